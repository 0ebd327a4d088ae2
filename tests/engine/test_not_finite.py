"""Numbers that are not finite: steps are left out, told, and in the end stopped; what would be
remembered of them is refused, and leaves all as it was."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from models import Plain, collate, rows, same
from tiny import adamw, bind, net
from torch import Tensor, nn

from holdfast import DPS, EWC, Merge, Recipe, Refused
from holdfast.engine.method import Method, View
from holdfast.engine.state import refuse_not_finite
from holdfast.errors import NotFinite, TrainingDiverged
from holdfast.methods import GPM, ChildTuning, KfacEWC


def step(model: nn.Module, optimizer: Any, *, bad: bool = False) -> None:
    x = torch.full((2, 3), math.nan if bad else 1.0)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_first_skipped_step_is_told_and_too_many_in_a_row_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer, DPS(stage=2), total_steps=99)
    for i in range(40):  # never 20 in a row
        step(model, optimizer, bad=i % 20 != 0)
    told = [r.message for r in caplog.records if "not finite" in r.message]
    assert told == ["task: after 1 steps gradients are not finite: such steps are left out and "
                    "counted"]  # fmt: skip
    assert (bound.step, bound.skipped, bound.in_a_row) == (2, 38, 19)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingDiverged, match="the gradients of 20 steps in a row were not"):
        step(model, optimizer, bad=True)
    assert same(before, model.state_dict()) and bound.skipped == 39
    step(model, optimizer)  # a hook that raised is in no one's way
    assert (bound.step, bound.in_a_row) == (3, 0)


@pytest.mark.parametrize(("most", "stops"), [(3, True), (None, False)])
def test_how_many_is_chosen(most: int | None, stops: bool) -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer)
    bound.max_skipped = most
    for _ in range(2):
        step(model, optimizer, bad=True)
    if stops:
        with pytest.raises(TrainingDiverged, match="3 steps"):
            step(model, optimizer, bad=True)
    else:
        for _ in range(70):
            step(model, optimizer, bad=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_may_look_for_its_scale(fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    """From 2^100 the scaled gradients, of about 2^60, overflow until it is halved 30 times."""
    model = net()
    optimizer = adamw(model, fused=fused)
    bound = bind(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    while not bound.step:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 3)).sum() * 2.0**60).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 25 < bound.skipped < 60
    assert caplog.text.count("not finite") == 1  # after the twentieth


def test_a_scaler_that_finds_none_is_stopped_too() -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(TrainingDiverged, match="60 steps in a row"):
        for _ in range(99):
            scaler.scale(model(torch.full((1, 3), math.nan)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert bound.skipped == 60


@pytest.mark.parametrize("most", [20, None])
def test_a_task_of_which_no_step_was_made_does_not_end(most: int | None) -> None:
    """Three steps are too few to be stopped at the twentieth (faults N3)."""
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer)
    bound.max_skipped = most
    for _ in range(3):
        step(model, optimizer, bad=True)
    if most is None:
        bound.end_task()
        return
    with pytest.raises(TrainingDiverged, match="task: diverged: no gradient of 3 steps was finite"):
        bound.end_task()
    assert bound.finished == []
    step(model, optimizer)
    bound.end_task()
    assert bound.finished == ["task"]


# --- what is remembered of rows -------------------------------------------------------------------


class Noisy(Plain):
    """Takes what is added to each row's embedding: numbers, one of which may be NaN."""

    def forward(self, input_ids: Tensor, labels: Tensor, more: Tensor) -> Any:  # type: ignore[override]
        hidden = torch.tanh(self.layer(self.embed(input_ids).mean(1) + more[:, None]))
        logits = self.out(hidden)
        return Out(nn.functional.cross_entropy(logits, labels), logits)


class Out:
    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


def batches(bad: bool = False) -> list[dict[str, Tensor]]:
    made = [collate(rows(4, seed=i)) | {"more": torch.zeros(4)} for i in range(3)]
    if bad:
        made[1]["more"][2] = math.nan
    return made


class Changing(Method):
    """Comes first and changes all there is before the next one fails."""

    name: ClassVar[str] = "changing"
    changes_weights: ClassVar[bool] = True

    def end_task(self, view: View) -> None:
        view.state.slot("seen")["x"] = torch.ones(1)
        view.state.numbers["ended"] = True
        for w in view.shared.values():
            w.detach().add_(1.0)


def everything(bound: Any) -> dict[str, Tensor]:
    found = dict(bound.state_dict()["tensors"]) | bound.models["one"].state_dict()
    return {k: v.clone() for k, v in found.items()}


MEASURING = {
    "ewc": EWC(rows=12),
    "ewc, own labels": EWC(rows=12, labels="true"),
    "retention": DPS(score="retention", stage=2),
    "merge": Merge(rows=12),
    "gpm": GPM(),
    "kfac": KfacEWC(rows=12),
}


@pytest.mark.parametrize("name", MEASURING)
def test_a_row_that_is_not_finite_is_named_and_nothing_changes(name: str) -> None:
    """EWC left out every later step, and retention froze all, without a word (faults N1)."""
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[Changing(), MEASURING[name]]).unbound()
    bound.begin_task("one", optimizer, 3, model=model, data=batches())
    for batch in batches():
        out = model(**batch)
        (out.loss + (bound.penalty(batch, out) if bound.has_penalty else 0.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before, meta = everything(bound), bound.state_dict()["meta"]
    with pytest.raises(Refused, match=r"batch 1, row 2 of the data \(from 0\).*not finite"):
        bound.end_task(batches(bad=True))
    assert same(everything(bound), before) and bound.state_dict()["meta"] == meta
    bound.end_task(batches())  # with the row mended it ends as it would have
    assert bound.finished == ["one"]
    assert all(v.isfinite().all() for v in bound.state_dict()["tensors"].values())


def test_a_second_task_that_fails_to_end_adds_nothing_to_the_first() -> None:
    """Sums over tasks are not written in place."""
    model = Noisy()
    bound = Recipe(methods=[EWC(rows=12), KfacEWC(rows=12), Merge(rows=12)]).unbound()
    for task in ("one", "two"):
        bound.begin_task(task, torch.optim.SGD(model.parameters(), lr=0.1), 1, model=model)
        with torch.no_grad():
            model.layer.weight += 0.1
        if task == "two":
            before = everything(bound)
            with pytest.raises(Refused, match="batch 1, row 2"):
                bound.end_task(batches(bad=True))
            assert same(everything(bound), before)
        bound.step = 1
        bound.end_task(batches())


def test_weights_that_are_not_finite_are_named() -> None:
    model = Noisy()
    bound = Recipe(methods=[EWC(rows=12)]).unbound()
    bound.begin_task("one", torch.optim.SGD(model.parameters(), lr=0.1), 1, model=model)
    with torch.no_grad():
        model.layer.weight[0, 0] = math.inf
    with pytest.raises(Refused, match=r"layer\.weight: this weight is not finite"):
        bound.end_task(batches())


def test_weights_that_would_become_so_are_not_written() -> None:
    class Overflowing(Changing):
        def end_task(self, view: View) -> None:
            for w in view.shared.values():
                w.detach().mul_(math.inf)

    model = Noisy()
    bound = Recipe(methods=[Overflowing()]).unbound()
    bound.begin_task("one", torch.optim.SGD(model.parameters(), lr=0.1), 1, model=model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Refused, match="would become one that is not finite"):
        bound.end_task(batches())
    assert same(before, model.state_dict()) and not bound.finished


def test_large_weights_are_finite_though_their_sum_is_not() -> None:
    large = torch.full((4,), 3e38)
    refuse_not_finite({"large": large}, "not finite")
    for bad in (float("inf"), float("nan")):
        with pytest.raises(NotFinite, match="two"):
            refuse_not_finite({"one": large, "two": torch.tensor([0.0, bad])}, "not finite")


def test_what_is_read_before_a_task_is_refused_too() -> None:
    model = Noisy()
    recipe = Recipe(methods=[ChildTuning(score="fisher", share=0.5)])
    with pytest.raises(Refused, match=r"batch 1, row 2 .*not finite"):
        recipe.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=3,
                    data=batches(bad=True))  # fmt: skip


# --- weights that are switched on -----------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_mixed_weight_is_switched_on_through_its_module(at: int) -> None:
    """In an updating stage it was a passing tensor that was switched on (faults N6)."""
    model = net()
    held = model[2]._parameters["weight"]
    model[2].weight.requires_grad_(False)
    optimizer = adamw(model)
    bound = bind(model, optimizer, DPS(stage=2, drop=0.4, mix=True), total_steps=20)
    for _ in range(at):
        step(model, optimizer)
    before = held.detach().clone()
    assert bound.step == at
    if at == 2:
        model[2].weight.requires_grad = True
    else:
        model[2].weight.requires_grad_(True)
    assert held.requires_grad
    step(model, optimizer)
    step(model, optimizer)
    step(model, optimizer)
    assert not torch.equal(before, held)
