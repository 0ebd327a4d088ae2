"""Which entries of a tensor are its largest: thresholds and masks by rank.

Floats of one sign sort as their bits do as integers. So the value at a rank is found digit by digit
(a radix select): count how often each leading digit occurs, keep the one in which the rank falls,
go on with the next digit. It is exact, never sorts, and needs a bounded amount of extra memory
(measured on one core: 4 to 6 times as fast as `kthvalue` for a million entries and more). Counts
add up over processes, so sharded tensors need one small all-reduce per digit, for all tensors at
once. Small scores are partitioned instead: those between two entries of a sample, whose ranks in it
enclose the one sought with near certainty (Floyd & Rivest, CACM 1975); where they do not, all of
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from holdfast.config import exactly
from holdfast.ops import distributed

CHUNK = 1 << 20  # entries read at a time: it bounds the extra memory
COPIED = 1 << 22  # up to this, numpy's partition is faster
SAMPLE = 1 << 13  # entries of a sample
SMALL = 1 << 15  # the same for `kthvalue` of a copy on an accelerator
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
Scope = Literal["tensor", "global"]


def select(
    scores: Mapping[str, Tensor], drop: float | Fraction, scope: Scope = "tensor"
) -> dict[str, Tensor]:
    """True where an entry's score is at least that of rank ⌈n (1 − drop)⌉, counted from the top.

    Entries that tie with the threshold are all kept, so equal scores keep everything. For sharded
    tensors (`DTensor`) n counts the whole tensor, and the mask is sharded alike; then every rank
    must call this, with the same names.
    """
    return {
        name: distributed.like(distributed.local(scores[name]) >= tau, scores[name])
        for names, tau in _groups(scores, drop, scope)
        for name in names
    }


def top(scores: Mapping[str, Tensor], share: float, scope: Scope = "tensor") -> dict[str, Tensor]:
    """True for exactly ⌈n · share⌉ entries, those of highest score; 0 < share ≤ 1.

    As `select`, but of the entries that tie with the threshold the last ones are left out, in the
    order of `scores` and of each tensor's rows, whole tensors and shards alike.
    """
    masks: dict[str, Tensor] = {}
    drop = 1 - Fraction(str(share))
    for names, tau in _groups(scores, drop, scope):
        found = {n: distributed.local(scores[n]) >= tau for n in names}
        kept = [distributed.sum_(found[n].sum(), distributed.placement(scores[n])) for n in names]
        whole = sum(scores[n].numel() for n in names)
        surplus = int(torch.stack(kept).sum()) - math.ceil(exactly(share, whole))
        for name in reversed(names):
            if surplus <= 0:
                break
            ties = (torch.atleast_1d(distributed.local(scores[name])) == tau).nonzero()
            over = distributed.placement(scores[name])
            first, total = distributed.before(torch.tensor(len(ties), device=ties.device), over)
            left_out = min(surplus, total)
            last = ties[max(0, min(len(ties), total - left_out - first)) :]
            torch.atleast_1d(found[name])[last.unbind(1)] = False
            surplus -= left_out
        masks |= {n: distributed.like(found[n], scores[n]) for n in names}
    return masks


def _groups(
    scores: Mapping[str, Tensor], drop: float | Fraction, scope: Scope
) -> list[tuple[list[str], Tensor]]:
    """The names that are ranked together, with their threshold."""
    groups = ([list(scores)] if scores else []) if scope == "global" else [[n] for n in scores]
    taus = thresholds([[scores[n] for n in names] for names in groups], drop)
    return list(zip(groups, taus, strict=True))


def threshold(scores: Tensor, drop: float | Fraction) -> Tensor:
    """The score of rank ⌈n (1 − drop)⌉ from the top, of n ≥ 1 scores; none may be NaN."""
    return thresholds([[scores]], drop)[0]


def thresholds(groups: Sequence[Sequence[Tensor]], drop: float | Fraction) -> list[Tensor]:
    """The `threshold` of each group of tensors, whose entries are ranked together."""
    wanted = []  # ranks from the bottom, 1 for the smallest
    for group in groups:
        n = sum(s.numel() for s in group)
        wanted.append(min(math.floor(exactly(drop, n)) + 1, n))
    if any(distributed.sharded(s) for group in groups for s in group):
        return _by_digits(groups, wanted, bits=8)
    found = []
    for group, rank in zip(groups, wanted, strict=True):
        if sum(s.numel() for s in group) <= (COPIED if group[0].is_cpu else SMALL):
            found.append(_of_copy(group, rank))
        else:  # one group at a time: its counts of wide digits are half a megabyte
            found += _by_digits([group], [rank], bits=16)
    return found


def _of_copy(group: Sequence[Tensor], rank: int) -> Tensor:
    """The value at a rank, 1 for the smallest, from a copy of all scores, or of those near it."""
    each = [s.detach().flatten() for s in group]
    flat = torch.cat(each) if len(each) > 1 else each[0]
    if not rank:  # of no scores, which no threshold divides
        return flat.new_zeros(())
    if not flat.is_cpu or flat.dtype not in INTEGERS:
        return flat.kthvalue(rank).values
    near, rank = _around(flat.numpy(), rank, row=group[0].shape[-1:].numel() or 1)
    near.partition(rank - 1)
    return torch.tensor(near[rank - 1])


def _around(scores: Any, rank: int, row: int) -> tuple[Any, int]:
    """A copy of the scores near a rank, and the rank among them.

    scores: numpy, (n,), flattened from rows of `row`.
    """
    step = len(scores) // SAMPLE
    if step < 4:
        return scores.copy(), rank
    while math.gcd(step, row) > 1:  # else it would come by some columns only
        step += 1
    sample = scores[::step].copy()
    size, share = len(sample), rank / len(scores)
    spread = 3 * math.sqrt(size * share * (1 - share)) + 1  # three standard deviations
    low, high = math.floor(size * share - spread), math.ceil(size * share + spread)
    low, high = max(low, 0), min(high, size - 1)
    sample.partition([low, high])
    below = scores < sample[low]
    near, place = scores[(scores <= sample[high]) ^ below], rank - int(np.count_nonzero(below))
    return (near, place) if 0 < place <= len(near) else (scores.copy(), rank)


def _by_digits(groups: Sequence[Sequence[Tensor]], ranks: list[int], *, bits: int) -> list[Tensor]:
    """The value at a rank, 1 for the smallest, in each group, found `bits` bits at a time."""
    dtype = torch.float32
    for group in groups:
        for s in group:
            dtype = torch.promote_types(dtype, s.dtype)
    width, size, device = torch.finfo(dtype).bits, 1 << bits, groups[0][0].device
    left = torch.tensor(ranks, device=device)[:, None]
    found = [0] * len(groups)  # the leading bits of each value, as a signed integer
    share = [1.0] * len(groups)  # of the entries that have these bits
    for shift in range(width - bits, -1, -bits):
        first = shift == width - bits
        counts: dict[distributed.Placement, Tensor] = {}
        for i, group in enumerate(groups):
            for s in group:
                where = distributed.placement(s)
                if where not in counts:
                    shape = len(groups), size
                    counts[where] = torch.zeros(shape, dtype=torch.int64, device=device)
                prefix = None if first else found[i]
                _count_(counts[where][i], s, dtype, shift, prefix, sparse=share[i] < 1 / 8)
        total = torch.stack([distributed.sum_(t, where) for where, t in counts.items()]).sum(0)
        # The sign bit comes first; for negative floats a larger digit means a smaller number.
        negative = [v < 0 for v in found]
        if first:
            total = torch.cat([total[:, size // 2 :].flip(1), total[:, : size // 2]], 1)
        else:
            total = torch.where(
                torch.tensor(negative, device=device)[:, None], total.flip(1), total
            )
        upto = total.cumsum(1)
        place = (upto < left).sum(1, keepdim=True)
        here = total.gather(1, place)
        left = left - (upto.gather(1, place) - here)
        shares = (here / upto[:, -1:]).flatten().tolist()
        for i, p in enumerate(place.flatten().tolist()):
            if first:
                found[i] = -1 - p if p < size // 2 else p - size // 2
            else:
                found[i] = (found[i] << bits) | (size - 1 - p if negative[i] else p)
            share[i] *= shares[i]
    integers = torch.tensor(found, dtype=INTEGERS[dtype], device=device)
    return list(integers.view(dtype).unbind())


def _count_(
    counts: Tensor, s: Tensor, dtype: torch.dtype, shift: int, prefix: int | None, *, sparse: bool
) -> None:
    """Add how often each digit at `shift` occurs among the entries whose bits above are `prefix`.

    counts: int64, one entry per digit; its length is a power of two.
    sparse: few entries have the prefix, so that selecting them first pays off.
    """
    size = len(counts)
    for piece in distributed.local(s).detach().flatten().split(CHUNK):
        number = piece.to(dtype).view(INTEGERS[dtype])
        above = number >> shift
        digit = above & (size - 1)
        if prefix is not None:
            mine = (above >> (size.bit_length() - 1)) == prefix
            digit = digit[mine] if sparse else torch.where(mine, digit, size)
        counts += torch.bincount(digit, minlength=size)[:size]
