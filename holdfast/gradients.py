"""The gradients of a step as a whole: unscaled, measured, clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holdfast.errors import Refused


def unscale_(optimizer: Any, grads: list[Tensor]) -> None:
    """Undo the scale of a GradScaler that a fused optimizer would undo inside its kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        torch._foreach_mul_(grads, scale.double().reciprocal().float())
        optimizer.grad_scale = None


def total_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm over all gradients; `Refused` where one is sparse."""
    if any(g.is_sparse for g in grads):
        raise Refused("a gradient is sparse", remedy="build the embedding with sparse=False")
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())


def clip_(grads: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of total norm `norm` down to `limit` where they are above it."""
    if norm > limit:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
