"""Remembered weights, by name, and the quadratic pull towards them.

The pull is shared by every method that anchors: with strength λ, importance F (1 where none is
given), weights w and anchor w*,

    P(w)  = λ/2 · Σ F (w − w*)²          ∂P/∂w = λ F (w − w*)
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from holdfast.ops.blocks import blocks, bunched, bunches, workspace
from holdfast.ops.distributed import sharded

if TYPE_CHECKING:
    from holdfast.engine.method import View

Weights = Mapping[str, Tensor]
NO_ROWS: Weights = MappingProxyType({})


@torch.no_grad()
def remember(weights: Weights) -> dict[str, Tensor]:
    """A copy of each weight in its own dtype and layout."""
    return {name: w.detach().clone() for name, w in weights.items()}


def keep_start(view: View) -> None:
    """In `begin_task`: remember the shared weights, unless the caller keeps them (a checkpoint)."""
    view.state.weights.pop("start", None)
    if view.bound.start is None and not view.resuming:
        view.state.weights["start"] = remember(view.shared)


def start_of(view: View) -> Weights | None:
    """In `end_task`: take out the shared weights as the task began; None if nobody kept
    them."""
    return view.state.weights.pop("start", None) or view.start()


@torch.no_grad()
def pull_(
    grads: MutableMapping[str, Tensor | None],
    weights: Weights,
    anchor: Weights,
    strength: float,
    importance: Weights | None = None,
    rows: Weights = NO_ROWS,
) -> None:
    """Add λ F (w − w*) to the gradients in place; tensors without a gradient are left out.

    rows: for some names the rows with F > 0, as `important_rows` finds them; F is 0 elsewhere.
    """
    names = [name for name in anchor if grads.get(name) is not None]
    if names and bunched(anchor[names[0]]):
        given = (grads, weights, anchor, *([] if importance is None else [importance]))
        for gs, ws, aims, *fs in bunches(*([cast(Tensor, x[n]) for n in names] for x in given)):
            offsets = torch._foreach_sub(ws, aims)
            if fs:
                torch._foreach_addcmul_(gs, fs[0], offsets, value=strength)
            else:
                torch._foreach_add_(gs, offsets, alpha=strength)
        return
    for name in names:
        grad, target = cast(Tensor, grads[name]), anchor[name]
        if importance is not None and name in rows and not sharded(grad):
            here = rows[name]
            offset = torch.sub(weights[name][here], target[here])
            pull = (offset * importance[name][here]).mul_(strength)
            grad.index_copy_(0, here, pull.add_(grad[here]).to(grad.dtype))
        elif importance is None:
            for g, w, aim in blocks(grad, weights[name], target):
                g.add_(_offset(w, aim), alpha=strength)
        else:
            for g, w, aim, f in blocks(grad, weights[name], target, importance[name]):
                g.addcmul_(f, _offset(w, aim), value=strength)


def important_rows(importance: Weights) -> dict[str, Tensor]:
    """The rows of each tensor with an importance above 0, where that is at most half of them.

    This is the case for embeddings: an old task's rows use a small part of the vocabulary.
    """
    found = {
        name: f.flatten(1).any(1).nonzero()[:, 0]
        for name, f in importance.items()
        if f.ndim > 1 and not sharded(f)
    }
    return {name: rows for name, rows in found.items() if 2 * len(rows) <= len(importance[name])}


def _offset(w: Tensor, aim: Tensor) -> Tensor:
    dtype = torch.promote_types(w.dtype, aim.dtype)
    return torch.sub(w, aim, out=workspace(0, w.shape, dtype, w.device))


def potential(
    weights: Weights, anchor: Weights, strength: float, importance: Weights | None = None
) -> Tensor:
    """λ/2 Σ F (w − w*)², differentiable; the slow reference of `pull_` and the value reported."""
    total = torch.zeros(())
    for name, target in anchor.items():
        square = (weights[name] - target).square()
        total = total + (square if importance is None else importance[name] * square).sum()
    return 0.5 * strength * total
