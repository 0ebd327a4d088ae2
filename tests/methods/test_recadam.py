"""RecAdam: one step by hand, both of its pulls, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.methods import DynamicSubset, RecAdam
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import Classifier, ToyTraining

CONTRACT: list[tuple[Method, float]] = [
    (RecAdam(), 4),
    (RecAdam(strength=3.0, slope=0.5, middle=3, pull="gradient"), 4),
]
LR = 0.01


def bind(method: RecAdam, kind: type[torch.optim.Optimizer], **settings: Any) -> Bound:
    torch.manual_seed(0)
    model = Classifier().double()
    optimizer = kind(model.parameters(), lr=LR, **settings)
    return Recipe(methods=[method]).bind(model, optimizer, total_steps=40, task="one")


def snapshot(bound: Bound) -> dict[str, Tensor]:
    return {n: w.detach().clone() for n, w in bound.weights.items()}


def step(bound: Bound, scale: float = 1.0) -> dict[str, Tensor]:
    """One step with drawn gradients, which it returns."""
    grads = {}
    for name, w in bound.weights.items():
        w.grad = scale * torch.randn_like(w)
        grads[name] = w.grad.clone()
    bound.optimizer.step()
    return grads


def share_at(t: int, k: float, t0: int) -> float:
    return 1 / (1 + math.exp(-k * (t - t0)))


@pytest.mark.parametrize("strength", [3.0, 1e6])
def test_steps_by_hand(strength: float) -> None:
    """With SGD, whose step is −lr g; a pull that would pass the start ends there."""
    bound = bind(RecAdam(strength=strength, slope=0.3, middle=0.1), torch.optim.SGD)
    start = snapshot(bound)
    for t in (1, 2, 3):
        before = snapshot(bound)
        grads = step(bound)
        share = share_at(t, 0.3, 4)  # a tenth of 40 steps
        for name, w in bound.weights.items():
            expected = before[name] - LR * grads[name]
            if name in bound.shared:
                expected = before[name] - share * LR * grads[name]
                expected -= min(1, LR * (1 - share) * strength) * (expected - start[name])
            torch.testing.assert_close(w.detach(), expected, msg=name)


def test_in_the_gradient_it_is_the_gradient_of_the_annealed_loss() -> None:
    bound = bind(RecAdam(strength=2.0, slope=0.3, middle=2, pull="gradient"), torch.optim.SGD)
    start = snapshot(bound)
    for t in (1, 2, 3):
        before = {n: w.detach().clone().requires_grad_() for n, w in bound.weights.items()}
        share = share_at(t, 0.3, 2)
        grads = step(bound)
        loss = torch.zeros(()).double()
        for name, w in before.items():
            task, square = (grads[name] * w).sum(), (w - start[name]).square().sum()
            held = name in bound.shared
            loss = loss + (share * task + (1 - share) * 2.0 / 2 * square if held else task)
        theirs = torch.autograd.grad(loss, list(before.values()))
        for (name, w), g in zip(before.items(), theirs, strict=True):
            torch.testing.assert_close(bound.weights[name].detach(), w.detach() - LR * g, msg=name)


class Annealed(RecAdam):
    """λ as it is long after t₀."""

    def share(self, view: View) -> float:
        return 1.0


@pytest.mark.parametrize("pull", ["decoupled", "gradient"])
def test_once_annealed_it_is_plain_bit_for_bit(pull: Any) -> None:
    same(ToyTraining(Annealed(pull=pull)).learn_all().weights(),
         ToyTraining(None).learn_all().weights())  # fmt: skip


def test_the_share_goes_from_0_over_a_half_to_1() -> None:
    """In float64 it is 1 from k (t − t₀) = 37 on, and overflows nowhere."""
    method = RecAdam(slope=2.0, middle=10)
    bound = bind(method, torch.optim.SGD)
    found = {}
    for step in (0, 9, 29, 100_000):
        bound.step = step
        found[step] = method.share(bound.views["recadam"])
    assert found == {0: pytest.approx(1 / (1 + math.exp(18))), 9: 0.5, 29: 1.0, 100_000: 1.0}
    bound.step = 0
    assert RecAdam(slope=1e4, middle=10).share(bound.views["recadam"]) == 0


def test_before_it_is_annealed_it_only_decays_to_the_start() -> None:
    """λ = 0: what the gradient says does not matter, even to AdamW."""
    bound = bind(RecAdam(strength=10.0, slope=1e4, middle=39), torch.optim.AdamW, weight_decay=0.1)
    start = snapshot(bound)
    with torch.no_grad():
        for w in bound.weights.values():
            w += 1
    for t in (1, 2, 3):
        step(bound, scale=100.0)
        for name, w in bound.shared.items():
            torch.testing.assert_close(w.detach() - start[name], torch.ones_like(w) * 0.9**t)


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    bound = bind(RecAdam(), torch.optim.AdamW)
    with torch.no_grad():
        for w in bound.weights.values():
            w += 1
    before, out = snapshot(bound), next(iter(bound.shared))
    for name, w in bound.weights.items():
        w.grad = None if name == out else torch.ones_like(w)
    bound.optimizer.step()
    for name, w in bound.weights.items():
        assert torch.equal(w.detach(), before[name]) == (name == out)


def test_what_others_hold_still_is_held_after_the_pull() -> None:
    """A pull after them would move all entries; before them it moves those of the subnetwork."""
    subset, toy = DynamicSubset(share=0.2), ToyTraining(None)
    toy.bound = Recipe(methods=[subset, RecAdam()]).unbound()
    with pytest.raises(Refused, match="recadam: it would move what dynamic_subset held still"):
        toy.begin("one")
    toy.bound = Recipe(methods=[RecAdam(strength=1.0, middle=2), subset]).unbound()
    toy.begin("two")
    start = snapshot(toy.bound)
    for step in range(5):
        toy.learn(step, step + 1)
        for name in toy.bound.shared:
            moved = int((toy.bound.weights[name] != start[name]).sum())
            assert moved == math.ceil(0.2 * start[name].numel()), name
