"""What tests of methods that pull weights share."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier


def bind(method: Method, *, dtype: torch.dtype = torch.float64) -> Bound:
    """A classifier of one encoder and head, bound to an optimizer that never steps far."""
    torch.manual_seed(0)
    model = Classifier().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=10, task="one")
    return bound


def wander(bound: Bound) -> None:
    """Other weights, as training would leave them."""
    with torch.no_grad():
        for w in bound.weights.values():
            w.add_(torch.randn_like(w))


def pulled(bound: Bound) -> dict[str, Tensor]:
    """What the method adds to gradients of zero."""
    for w in bound.weights.values():
        w.grad = torch.zeros_like(w)
    for method in bound.methods:
        with torch.no_grad():
            method.penalty_grad_(bound.views[method.name])
    return {n: w.grad for n, w in bound.weights.items() if w.grad is not None}
