"""Remembered weights, by name, and the quadratic pull towards them.

The pull is shared by every method that anchors: with strength λ, importance F (1 where none is
given), weights w and anchor w*,

    P(w)  = λ/2 · Σ F (w − w*)²          ∂P/∂w = λ F (w − w*)
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@torch.no_grad()
def remember(weights: Weights) -> dict[str, Tensor]:
    """A copy of each weight in its own dtype and layout."""
    return {name: w.detach().clone() for name, w in weights.items()}


@torch.no_grad()
def pull_(
    grads: MutableMapping[str, Tensor | None],
    weights: Weights,
    anchor: Weights,
    strength: float,
    importance: Weights | None = None,
) -> None:
    """Add λ F (w − w*) to the gradients in place; tensors without a gradient are left out."""
    for name, target in anchor.items():
        grad = grads.get(name)
        if grad is None:
            continue
        offset = torch.sub(weights[name], target)
        if importance is None:
            grad.add_(offset, alpha=strength)
        else:
            grad.addcmul_(importance[name], offset, value=strength)


def potential(
    weights: Weights, anchor: Weights, strength: float, importance: Weights | None = None
) -> Tensor:
    """λ/2 Σ F (w − w*)², differentiable; the slow twin of `pull_` and the value reported."""
    total = torch.zeros(())
    for name, target in anchor.items():
        square = (weights[name] - target).square()
        total = total + (square if importance is None else importance[name] * square).sum()
    return 0.5 * strength * total
