"""SWA: the mean of which steps' weights, what it leaves alone, and tasks that end early."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, HFT, SWA, DynamicSubset, MoFO
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [(SWA(), 4), (SWA(start=2, every=3), 4)]


def steps_of(method: Method | None) -> tuple[ToyTraining, list[dict[str, Tensor]]]:
    """A toy after a task, not ended yet, and its weights after each of its steps."""
    toy, seen = ToyTraining(method, steps=10), []
    toy.begin("one")
    for step in range(toy.steps):
        toy.learn(step, step + 1)
        seen.append(toy.weights())
    return toy, seen


@pytest.mark.parametrize(
    ("method", "taken"),
    [
        (SWA(start=1, every=1), range(1, 11)),
        (SWA(start=0.5, every=1), range(5, 11)),
        (SWA(start=0.5, every=2), (6, 8, 10)),
        (SWA(start=3, every=3), (4, 7, 10)),
        (SWA(start=3, every=100), (10,)),
        (SWA(start=50), (10,)),
    ],
)
def test_a_task_ends_at_the_mean_and_is_trained_plainly(method: SWA, taken: Any) -> None:
    _, plain = steps_of(None)
    toy, seen = steps_of(method)
    for ours, theirs in zip(seen[:-1], plain[:-1], strict=True):
        for name, w in theirs.items():
            assert torch.equal(ours[name], w), "a step is plain"
    for name, w in seen[-1].items():
        mean = torch.stack([plain[step - 1][name].double() for step in taken]).mean(0)
        torch.testing.assert_close(w.double(), mean, atol=1e-6, rtol=1e-6)
    assert not toy.bound.states["swa"].bytes()


def test_weights_of_half_precision_are_averaged_in_float32() -> None:
    """In bfloat16 a mean of many weights would stay where its first few put it."""
    w, model = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), torch.nn.Module()
    model.register_parameter("w", w)
    optimizer = torch.optim.SGD([w], lr=1.0)
    Recipe(methods=[SWA(start=1, every=1)]).bind(model, optimizer, total_steps=64)
    for _ in range(64):
        w.grad = torch.full_like(w, -1 / 64)
        optimizer.step()
    assert w.item() == pytest.approx(1 + sum(range(1, 65)) / 64**2, abs=2**-8)


def test_skipped_steps_count_as_steps_of_the_task() -> None:
    toy = ToyTraining(SWA(start=5, every=1))
    for task in ("one", "two"):
        toy.begin(task)
        seen = []
        for step in range(toy.steps):
            if step == 7:
                toy.backward(step)
                next(iter(toy.bound.weights.values())).grad.fill_(torch.nan)  # type: ignore[union-attr]
                toy.optimizer.step()
                toy.optimizer.zero_grad()
            else:
                toy.learn(step, step + 1)
            seen.append(toy.weights())
        assert not toy.bound.states["swa"].weights, "the mean was taken at the last step"
        toy.end()


def test_a_task_that_ends_early_keeps_its_last_weights_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy = ToyTraining(SWA(), steps=10)
    toy.begin("one")
    toy.learn(0, 8)
    before = toy.weights()
    toy.end()
    assert "one: swa: step 8 was the last, not 10" in caplog.text
    assert all(torch.equal(w, before[n]) for n, w in toy.weights().items())
    assert not toy.bound.states["swa"].bytes()
    toy.begin("two")
    toy.learn()
    toy.end()
    assert "two: swa" not in caplog.text


def test_training_that_goes_on_takes_a_mean_of_its_own_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a task of 4 steps that were saved, and then planned as 8."""
    swa = SWA(start=2, every=1)
    toy = ToyTraining(swa, steps=4)
    toy.begin("one")
    toy.learn()
    saved = toy.save()

    def going_on(total: int) -> list[dict[str, Tensor]]:
        again, seen = ToyTraining.load(copy.deepcopy(saved), swa, closed=False), []
        again.bound.total_steps = total
        for step in range(4, 8):
            again.learn(step, step + 1)
            seen.append(again.weights())
        return seen

    plain = going_on(1000)
    assert "one: swa: step 4 was not the last" in caplog.text
    for name, w in going_on(8)[-1].items():
        mean = torch.stack([weights[name].double() for weights in plain]).mean(0)
        torch.testing.assert_close(w.double(), mean, atol=1e-6, rtol=1e-6)


def test_a_last_step_that_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    toy = ToyTraining(SWA(start=5, every=1))
    toy.begin("one")
    toy.learn(0, 8)
    toy.backward(8)
    next(iter(toy.bound.weights.values())).grad.fill_(torch.nan)  # type: ignore[union-attr]
    toy.optimizer.step()
    toy.end()
    assert "one: swa: its last step was left out: the weights are not the mean" in caplog.text


def test_methods_that_take_back_steps_come_before_it() -> None:
    """After it they would restore weights that the mean has replaced."""

    def bind(*methods: Method) -> None:
        model = Classifier()
        Recipe(methods=methods).bind(model, torch.optim.AdamW(model.parameters()), total_steps=9)

    with pytest.raises(Refused, match=r"mofo changes weights after swa took them.*name swa after"):
        bind(SWA(), MoFO())
    with pytest.raises(Refused, match=r"dps changes weights after swa took them"):
        bind(SWA(), DPS(stage=2))
    bind(HFT(), DPS(stage=2), MoFO(), SWA())


def test_a_mean_of_subsets_is_refused() -> None:
    """Each has the entries that may differ from the start, and their mean those of all."""
    with pytest.raises(Refused, match="more entries differ in a mean"):
        Recipe(methods=[DynamicSubset(), SWA()])
