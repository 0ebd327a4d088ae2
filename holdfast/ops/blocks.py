"""Elementwise work on large tensors, in blocks that stay in the CPU's cache.

An operation on a whole tensor sends its temporaries through memory, whose bandwidth bounds
elementwise work on weights. On accelerators, where launches cost more than that, a tensor is one
block. Of sharded tensors (`DTensor`) each rank works on its own part.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from holdfast.ops.distributed import local

SIZE = 1 << 18  # entries of a block: 1 MiB of float32
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
