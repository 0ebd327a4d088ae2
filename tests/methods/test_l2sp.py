"""L2-SP against autograd of its equation."""

from __future__ import annotations

import torch
from pulls import bind, pulled, wander
from torch import nn

from holdfast.engine.method import Method
from holdfast.methods import L2SP

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [(L2SP(), 4), (L2SP(strength=1.0, head_strength=0.0), 4)]


def test_l2sp_equals_autograd_of_its_equation() -> None:
    bound = bind(L2SP(strength=0.3, head_strength=0.07))
    start = {n: w.detach().clone() for n, w in bound.weights.items()}
    wander(bound)
    total = torch.zeros((), dtype=torch.float64)
    for n, w in bound.weights.items():
        square = (w - start[n]) if n in bound.shared else w
        total = total + (0.3 if n in bound.shared else 0.07) / 2 * (square**2).sum()
    theirs = torch.autograd.grad(total, list(bound.weights.values()))
    ours = pulled(bound)
    for n, expected in zip(bound.weights, theirs, strict=True):
        torch.testing.assert_close(ours[n], expected)


def test_l2sp_starts_anew_with_each_task() -> None:
    bound = bind(L2SP())
    wander(bound)
    model, optimizer = bound.models["one"], bound.optimizer
    bound.begin_task("one", optimizer, 10, model=model)
    grads = pulled(bound)
    assert not any(grads[n].any() for n in bound.shared)


def test_no_penalty_in_a_step_touches_tensors_without_gradient() -> None:
    bound = bind(L2SP(strength=1.0))
    wander(bound)
    left_out: nn.Parameter = bound.weights["encoder.layers.0.up.weight"]
    before = left_out.detach().clone()
    for w in bound.weights.values():
        w.grad = None if w is left_out else torch.zeros_like(w)
    bound.optimizer.step()
    assert torch.equal(left_out, before)


def test_what_is_of_one_task_is_not_saved_after_it() -> None:
    bound = bind(L2SP())
    assert any(key.startswith("l2sp/") for key in bound.state_dict()["tensors"])
    bound.end_task()
    assert not any(key.startswith("l2sp/") for key in bound.state_dict()["tensors"])
