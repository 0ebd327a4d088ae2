"""The norm of a step's gradients: measured no more than needed, judged, clipped by; penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import adamw, bind, net
from torch import Tensor

from holdfast.engine import stepping
from holdfast.engine.method import Method, View
from holdfast.methods import DPS, EWC, L2SP, Replay
from holdfast.ops.gradients import total_norm
from holdfast.recipe import Recipe


def data(step: int) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("again", [True, False])
def test_a_norm_asked_for_before_a_left_out_step_is_forgotten(again: bool) -> None:
    """A loop may ask, and then leave the step out by itself; it need not ask for the next one."""
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    assert not bound.gradient_norm().isfinite()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if again:
        assert bound.gradient_norm() == pytest.approx(26**0.5)
    optimizer.step()
    assert (bound.step, bound.skipped) == (1, 0)
    assert bound.norm == pytest.approx(26**0.5)


def test_what_is_written_after_a_norm_was_asked_for_counts() -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert bound.gradient_norm().isfinite()
    model[0].weight.grad.fill_(float("nan"))
    optimizer.step()
    assert (bound.step, bound.skipped) == (0, 1) and model[0].weight.isfinite().all()


@pytest.mark.parametrize(("methods", "passes"), [((), 1), ((L2SP(),), 2), ((DPS(stage=1),), 2)])
def test_the_norm_is_measured_once_for_each_time_gradients_are_written(
    methods: tuple[Method, ...], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, judged and clipped by: a pull makes it another, and so does a mask."""
    model, count = net(), 0

    def counted(grads: list[Tensor]) -> Tensor:
        nonlocal count
        count += 1
        return total_norm(grads)

    monkeypatch.setattr(stepping, "total_norm", counted)
    optimizer = adamw(model)
    recipe = Recipe(methods=methods, max_grad_norm=1.0)
    bound = recipe.bind(model, optimizer, total_steps=4)
    for step in range(2):  # the second one masks
        count = 0
        model(data(step)).sum().backward()
        bound.gradient_norm()
        bound.gradient_norm()
        optimizer.step()
    assert count == passes


@dataclass(frozen=True, kw_only=True)
class DrawsAtFirst(Method):
    """Draws when a task begins."""

    name: ClassVar[str] = "draws_at_first"

    def begin_task(self, view: View) -> None:
        torch.rand((), generator=view.generator)


def test_a_first_step_left_out_does_not_undo_the_draws_before_it() -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer, DrawsAtFirst())
    before = bound.randomness
    model[0].weight.grad = torch.full((4, 3), float("nan"))
    optimizer.step()
    assert bound.skipped == 1 and torch.equal(bound.randomness, before)


# --- clipping and penalties -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HalfOut(Method):
    """Masks all but the last layer."""

    name: ClassVar[str] = "half_out"

    def before_step(self, view: View) -> None:
        for name in ("0.weight", "0.bias"):
            view.grads[name] = None


@pytest.mark.parametrize(("methods", "count"), [((), 26), ((HalfOut(),), 10)])
def test_clipping_follows_the_masks(methods: tuple[Method, ...], count: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bound = Recipe(methods=methods, max_grad_norm=2.0).bind(model, optimizer, total_steps=3)
    for value, expected in ((5.0, 2 / count**0.5), (0.1, 0.1)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        before = model[2].weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - model[2].weight, torch.full((2, 4), expected))
        assert bound.norm == pytest.approx(value * 26**0.5)  # the norm told is of all, unclipped


def test_a_penalty_that_was_not_asked_for_stops_the_step() -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer, Replay(), L2SP(strength=1.0))
    for asked in (True, False):
        loss = model(data(0)).sum()
        if asked:
            loss = loss + bound.penalty({"x": data(0)})
        loss.backward()
        if asked:
            optimizer.step()
        else:
            before = model[0].weight.grad.clone()
            with pytest.raises(RuntimeError, match=r"bound\.penalty"):
                optimizer.step()
            assert torch.equal(model[0].weight.grad, before)  # asked for now, it can be made
    assert bound.has_penalty
    plain = net()
    assert not bind(plain, adamw(plain), EWC()).has_penalty  # its penalty is a gradient
