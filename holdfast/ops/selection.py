"""Which entries of a tensor are its largest: thresholds and masks by rank.

Floats of one sign sort as their bits do as integers. So the value at a rank is found digit by digit
(a radix select): count how often each leading digit occurs, keep the one in which the rank falls,
go on with the next digit. It is exact, never sorts, and needs a bounded amount of extra memory
(measured on one core: 4 to 6 times as fast as `kthvalue` for a million entries and more). Counts
add up over processes, so sharded tensors need one small all-reduce per digit, for all tensors at
once. Small scores are copied and partitioned instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from holdfast.config import exactly
from holdfast.ops import distributed

CHUNK = 1 << 20  # entries read at a time: it bounds the extra memory
COPIED = 1 << 22  # up to this, numpy's vectorised partition of a copy is faster
SMALL = 1 << 15  # the same for `kthvalue` of a copy on an accelerator
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def select(
    scores: Mapping[str, Tensor], drop: float, scope: Literal["tensor", "global"] = "tensor"
) -> dict[str, Tensor]:
    """True where an entry's score is at least that of rank ⌈n (1 − drop)⌉, counted from the top.

    Entries that tie with the threshold are all kept, so equal scores keep everything. For sharded
    tensors (`DTensor`) n counts the whole tensor, and the mask is sharded alike; then every rank
    must call this, with the same names.
    """
    if not scores:
        return {}
    every = list(scores.values())
    if scope == "global":
        taus = thresholds([every], drop) * len(every)
    else:
        taus = thresholds([[s] for s in every], drop)
    return {
        n: distributed.like(distributed.local(s) >= tau, s)
        for (n, s), tau in zip(scores.items(), taus, strict=True)
    }


def threshold(scores: Tensor, drop: float) -> Tensor:
    """The score of rank ⌈n (1 − drop)⌉ from the top, of n ≥ 1 scores; none may be NaN."""
    return thresholds([[scores]], drop)[0]


def thresholds(groups: Sequence[Sequence[Tensor]], drop: float) -> list[Tensor]:
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
    """The value at a rank, 1 for the smallest, from a copy of all scores."""
    flat = torch.cat([s.detach().flatten() for s in group])
    if not flat.is_cpu or flat.dtype not in INTEGERS:
        return flat.kthvalue(rank).values
    flat.numpy().partition(rank - 1)
    return flat[rank - 1].clone()


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
