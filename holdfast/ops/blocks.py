"""Elementwise work on many tensors: in blocks on the CPU, in bunches on accelerators.

On the CPU an operation on a whole tensor sends its temporaries through memory, whose bandwidth
bounds elementwise work on weights: blocks stay in the cache. On accelerators launches cost more
than that: a bunch of small tensors takes one launch. Of sharded tensors (`DTensor`) each rank works
on its own part.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from holdfast.ops.distributed import local

SIZE = 1 << 18  # entries of a block: 1 MiB of float32
BUNCH = 1 << 22  # entries of a bunch, at most, or one larger tensor: it bounds the extra memory
IN_BLOCKS = frozenset({"cpu"})  # device types whose tensors are worked on in blocks
_kept = threading.local()


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching rows of all `tensors` as views, about `SIZE` entries of the first at a time.

    Tensors agree in their first dimension. Rows longer than `SIZE` stay whole.
    """
    tensors = tuple(local(t) for t in tensors)
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= 2 * SIZE or first.ndim == 0:
        yield tensors
        return
    rows = max(1, SIZE * len(first) // first.numel())
    for start in range(0, len(first), rows):
        yield tuple(t[start : start + rows] for t in tensors)


def bunched(tensor: Tensor) -> bool:
    """Whether work on such tensors is done in bunches."""
    return local(tensor).device.type not in IN_BLOCKS


def bunches(
    *columns: Sequence[Tensor], most: float | None = None
) -> Iterator[tuple[list[Tensor], ...]]:
    """Yield matching stretches of the `columns`, for one `torch._foreach_` operation each.

    The tensors of a stretch have one device, one dtype per column, and at most `most` entries
    (default: `BUNCH`) in its first column, or else there is one tensor.
    """
    most = BUNCH if most is None else most
    rows: list[tuple[Tensor, ...]] = []
    size, kind = 0, None
    for row in zip(*([local(t) for t in column] for column in columns), strict=True):
        mine, count = (row[0].device, *(t.dtype for t in row)), row[0].numel()
        if rows and (mine != kind or size + count > most):
            yield tuple(map(list, zip(*rows, strict=True)))
            rows, size = [], 0
        rows.append(row)
        size, kind = size + count, mine
    if rows:
        yield tuple(map(list, zip(*rows, strict=True)))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of a bunch as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def copy_(tensors: list[Tensor], vector: Tensor) -> None:
    """The inverse of `joined`: write a vector's entries into the tensors of a bunch."""
    parts = vector.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def workspace(place: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor for a block's result, valid until the next call for its `place`.

    On the CPU the memory is kept, one buffer per `place`, dtype and thread: fresh memory costs a
    page fault every 4 KiB, which takes longer than the work (measured: 3 to 6 times).
    """
    count = math.prod(shape)
    if device.type != "cpu" or count > 4 * SIZE:
        return torch.empty(shape, dtype=dtype, device=device)
    workspaces: dict[tuple[int, torch.dtype], Tensor] = vars(_kept).setdefault("workspaces", {})
    found = workspaces.get((place, dtype))
    if found is None or found.numel() < count:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training
            found = workspaces[place, dtype] = torch.empty(count, dtype=dtype, device=device)
    return found[:count].view(shape)


def add_squares_(totals: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """total ← total + value², in the precision of the totals."""
    if totals and bunched(totals[0]):
        for sums, xs in bunches(totals, values, most=math.inf):  # copies only what it must widen
            wide = [x.to(s.dtype) for x, s in zip(xs, sums, strict=True)]
            torch._foreach_addcmul_(sums, wide, wide)
        return
    for total, value in zip(totals, values, strict=True):
        for s, x in blocks(total, value):
            x = x.to(s.dtype)
            s.addcmul_(x, x)
