"""The norm of a step's gradients: measured no more than needed, judged, clipped by; penalties."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny import adamw, bind, net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.engine.method import Method, View
from holdfast.methods import DPS, EWC, L2SP, Replay
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


class Passes(TorchDispatchMode):
    """How many entries of a model's weights or of their gradients each operator goes over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.entries: Counter[str] = Counter()
        self.ours = {t.data_ptr() for w in model.parameters() for t in (w, w.grad)}

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lists = [given if isinstance(given, list) else [given] for given in args]
        mine = ([t for t in each if isinstance(t, Tensor) and t.data_ptr() in self.ours]
                for each in lists)  # fmt: skip
        name = call.overloadpacket.__name__
        self.entries[name] += max((sum(t.numel() for t in each) for each in mine), default=0)
        return call(*args, **(kwargs or {}))

    @property
    def told(self) -> dict[str, int]:
        """Without views, and what any training does."""
        plain = {"detach", "view", "_fused_adamw_", "zeros_like"}
        return {name: n for name, n in self.entries.items() if n and name not in plain}


ALL, LINEAR = 26, 20  # weights of the network; those that DPS covers
NORM = {"_foreach_norm": ALL}
SUM = NORM | {"addcmul_": LINEAR}
MASK = {"threshold_backward": 2 * LINEAR, "bitwise_or_": LINEAR}  # of gradients, then of weights
BITS = {"mul_": LINEAR, "threshold_backward": LINEAR, "bitwise_xor_": 2 * LINEAR}
PULL = {"_foreach_norm": 2 * ALL, "sub": ALL, "add_": ALL}
# By recipe: what is gone over in its fifth step, and in its seventh, which masks.
PASSES: dict[str, tuple[tuple[Method, ...], float | None, dict[str, int], dict[str, int]]] = {
    "plain": ((), None, NORM, NORM),
    "below the limit": ((), 1e3, NORM, NORM),
    "above the limit": ((), 1e-3, NORM | {"_foreach_mul_": ALL}, NORM | {"_foreach_mul_": ALL}),
    "pulled": ((L2SP(),), 1e3, PULL, PULL),
    "dense": ((DPS(stage=2),), None, SUM, NORM | MASK),
    "dense below the limit": ((DPS(stage=2),), 1e3, SUM, {"_foreach_norm": ALL + LINEAR} | MASK),
    "mix": ((DPS(stage=2, mix=True),), None, SUM, NORM | BITS),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_step_goes_over_the_weights_no_more_often_than_it_says(name: str) -> None:
    methods, limit, *expected = PASSES[name]
    model, found = net(), []
    optimizer = adamw(model, fused=True)
    bound = Recipe(methods=methods, max_grad_norm=limit).bind(model, optimizer, total_steps=8)
    for step in range(7):
        model(data(step)).sum().backward()
        with Passes(model) as seen:
            bound.gradient_norm()  # as Trainer asks
            optimizer.step()
        optimizer.zero_grad()
        found.append(seen.told)
    assert [found[4], found[6]] == expected


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
