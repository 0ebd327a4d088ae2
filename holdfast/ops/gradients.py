"""The gradients of a step as a whole: unscaled, measured, clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from holdfast.ops import distributed
from holdfast.ops.blocks import bunched


def unscale_(optimizer: Any, grads: list[Tensor]) -> None:
    """Undo the GradScaler scale that a fused optimizer would otherwise undo in its kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        if grads:
            here = [distributed.local(g) for g in grads]
            torch._foreach_mul_(here, scale.double().reciprocal().float())
        optimizer.grad_scale = None


def total_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm over all gradients, at least float32.

    For sharded gradients it is the norm of the whole, equal on all ranks; all must call this.
    """
    return Norms().total(grads)


class Norms:
    """The norms of a step's gradients, each measured once for every time that it was written."""

    def __init__(self) -> None:
        # By id, unique while the gradient is kept; `_version` counts in-place writes.
        self._known: dict[int, tuple[Tensor, int, Tensor]] = {}

    def total(self, grads: list[Tensor]) -> Tensor:
        """`total_norm`, bit for bit torch's of gradients that are alike; shards are read anew."""
        if any(distributed.sharded(g) for g in grads):
            return _norm_of_shards(grads)
        known = {id(g): self._known.get(id(g), (g, -1, g)) for g in grads}
        alike: dict[Any, list[Tensor]] = {}
        for g, version, _ in known.values():
            if g._version != version:
                alike.setdefault((g.device, g.dtype), []).append(g)
        for (_, dtype), same in alike.items():
            # In their own dtype, float16 norms overflow above 65,504, bfloat16 has three digits.
            wide = torch.promote_types(dtype, torch.float32)
            for g, norm in zip(same, torch._foreach_norm(same, 2.0, wide), strict=True):
                known[id(g)] = g, g._version, norm
        self._known = known
        norms = [norm for _, _, norm in known.values()]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _norm_of_shards(grads: list[Tensor]) -> Tensor:
    """√Σ ‖shard‖²: shards summed over the ranks that hold them, others counted once.

    In float64, so that squares of finite norms do not overflow; one number is reduced per mesh.
    """
    alike: dict[distributed.Placement, list[Tensor]] = {}
    for g in grads:
        alike.setdefault(distributed.placement(g), []).append(distributed.local(g))
    square = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for spread, same in alike.items():
        norm = total_norm([g for g in same if g.numel()])  # an empty shard has none
        square += distributed.sum_(norm.to(square).square(), spread)
    return square.sqrt().float()


def clip_(grads: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of total norm `norm` down to `limit` where they are above it."""
    here = [distributed.local(g) for g in grads]
    if here and bunched(here[0]):  # without waiting for the norm
        torch._foreach_mul_(here, (limit / (norm + 1e-6)).clamp(max=1.0))
    elif norm > limit:
        torch._foreach_mul_(here, limit / (norm + 1e-6))


def switch_on_(weights: list[nn.Parameter]) -> None:
    """Let weights train again whose gradients were switched off; empties the list."""
    while weights:
        weights.pop().requires_grad_()
