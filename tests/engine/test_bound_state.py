"""What a `Bound` saves, and which states it refuses to take up."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import adamw, bind, net
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, L2SP, RecAdam
from holdfast.ops import distributed
from holdfast.recipe import Recipe


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = net()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), r"0\.weight was"),
        (lambda: net().bfloat16(), "bfloat16"),
        (Renamed, r"is new.*is gone|and \d more"),
        (lambda: net()[:1], r"2\.weight is gone"),
    ],
)
def test_states_of_other_parameters_are_refused(
    change: Callable[[], nn.Module], complaint: str
) -> None:
    model = net()
    bound = bind(model, adamw(model), L2SP())
    state = bound.state_dict()
    other = change()
    target = bind(other, adamw(other), L2SP())
    start = {k: v.clone() for k, v in target.state_dict()["tensors"].items()}
    with pytest.raises(Refused, match=complaint):
        target.load_state_dict(state)
    now = target.state_dict()["tensors"]
    assert all(torch.equal(now[k], v) for k, v in start.items())


def test_states_loaded_before_a_task_bind_its_parameters_too() -> None:
    model = net()
    state = bind(model, adamw(model), L2SP()).state_dict()
    for other, complaint in ((Renamed(), "is gone"), (net().double(), "float64")):
        bound = Recipe(methods=[L2SP()]).unbound()
        bound.load_state_dict(state)
        with pytest.raises(Refused, match=complaint):
            bound.begin_task("two", adamw(other), 5, model=other)


def test_states_of_other_methods_and_tasks_are_refused() -> None:
    model = net()
    state = bind(model, adamw(model), L2SP(strength=0.5)).state_dict()
    for methods in ([L2SP()], [], [L2SP(strength=0.5), EWC()]):
        with pytest.raises(Refused, match="was saved by"):
            bind(model, adamw(model), *methods).load_state_dict(state)
    with pytest.raises(Refused, match="of task 'task', not of 'two'"):
        bind(model, adamw(model), L2SP(strength=0.5), task="two").load_state_dict(state)


def test_a_smaller_optimizer_in_a_later_task_can_be_resumed() -> None:
    """What a task does not train is not missing from its state."""
    model, bound = net(), Recipe(methods=[L2SP()]).unbound()
    bound.begin_task("one", adamw(model), 5, model=model)
    bound.begin_task("two", adamw(model[2]), 5, model=model)
    state = json.loads(json.dumps(bound.state_dict()["meta"]))
    again = Recipe(methods=[L2SP()]).unbound()
    again.begin_task("two", adamw(model[2]), 5, model=model)
    again.load_state_dict({"meta": state, "tensors": bound.state_dict()["tensors"]})


def test_types_survive_loading() -> None:
    """torch's own optimizer state would cast all of these to the parameter's bfloat16."""
    model = net().bfloat16()
    bound = bind(model, adamw(model), DPS())
    state = bound.states["dps"]
    state.weights["sum"] = {"0.weight": torch.full((4, 3), 1 / 3)}
    state.weights["mask"] = {"0.weight": torch.ones(4, 3, dtype=torch.bool)}
    state.tensors["index"] = {"0.weight": torch.tensor([300_000_001])}
    saved = copy.deepcopy(bound.state_dict())
    fresh = net().bfloat16()
    target = bind(fresh, adamw(fresh), DPS())
    target.load_state_dict(saved)
    for key, tensor in saved["tensors"].items():
        assert torch.equal(target.state_dict()["tensors"][key], tensor), key
        assert target.state_dict()["tensors"][key].dtype is tensor.dtype
    ours = target.states["dps"].weights["sum"]["0.weight"]
    assert ours.data_ptr() != saved["tensors"]["dps/weights/sum/0.weight"].data_ptr()


def test_a_task_of_more_steps_than_its_state_was_saved_in_has_all_of_them() -> None:
    recall, model, fresh = RecAdam(middle=0.5), net(), net()
    state = bind(model, adamw(model), recall, total_steps=10).state_dict()
    bound = bind(fresh, adamw(fresh), recall, total_steps=20)
    bound.load_state_dict(state)
    assert bound.total_steps == 20
    bound.step = 9
    assert recall.share(bound.views["recadam"]) == 0.5


def test_what_was_loaded_before_a_task_moves_to_its_device() -> None:
    """Indices too, which no accelerator takes from the processor."""
    bound = Recipe(methods=[EWC()]).unbound()
    bound.states["ewc"].slot("fisher")["0.weight"] = torch.ones(4, 3)
    bound.states["ewc"].tensors["rows"] = {"0.weight": torch.tensor([1])}
    model = net().to("meta")
    bound.begin_task("two", adamw(model), 5, model=model)
    tensors = bound.state_dict()["tensors"]
    assert tensors.pop("generator").is_cpu
    assert len(tensors) == 2 and all(t.is_meta for t in tensors.values())


@dataclass(frozen=True, kw_only=True)
class Drawing(Method):
    """Draws whenever it is called, and runs the model with dropout."""

    name: ClassVar[str] = "drawing"

    def penalty(self, view: View) -> Tensor:
        torch.rand((), generator=view.generator)
        return 0.0 * view.forward().square().mean()

    def end_task(self, view: View) -> None:
        torch.rand(()), torch.rand((), generator=view.generator)


class Noting(DPS):
    """Mix, whose noise is noted."""

    def draw(self, view: View, name: str) -> Tensor:
        noise = super().draw(view, name)
        NOTED.append(noise.clone())
        return noise


NOTED: list[Tensor] = []


def learned(methods: Sequence[Method]) -> tuple[Bound, list[Tensor]]:
    """Two tasks of four steps, and the noise of Mix in them."""
    NOTED.clear()
    model, bound = nn.Sequential(net(), nn.Dropout(0.5)), Recipe(methods=methods).unbound(seed=3)
    for task in ("one", "two"):
        optimizer = adamw(model)
        bound.begin_task(task, optimizer, 4, model=model)
        for _ in range(4):
            out = model(torch.ones(2, 3))
            loss = out.square().sum()
            if bound.has_penalty:
                loss = loss + bound.penalty({"input": torch.ones(2, 3)}, out)
            loss.backward()
            optimizer.step()
        bound.end_task([])
    return bound, list(NOTED)


@pytest.mark.parametrize("first", [True, False])
def test_a_method_more_changes_no_draw_of_another(first: bool) -> None:
    mix, more = Noting(mix=True, stage=1), Drawing()
    _, alone = learned([mix])
    bound, beside = learned([more, mix] if first else [mix, more])
    assert len(alone) == len(beside) > 4
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(alone, alone[2:], strict=False))
    # Each is saved, whatever the order of methods in the recipe.
    again = Recipe(methods=[mix, more] if first else [more, mix]).unbound(seed=9)
    again.load_state_dict(bound.state_dict())
    assert torch.equal(again.randomness, bound.randomness)
    assert torch.equal(*(torch.rand(3, generator=b.views["drawing"].generator)
                         for b in (again, bound)))  # fmt: skip


def test_states_with_one_random_state_for_all_methods_go_on_from_new_ones() -> None:
    """As earlier versions saved them: never the same draws for two methods."""
    bound = Recipe(methods=[EWC(), L2SP()]).unbound()
    state = bound.state_dict()
    state["tensors"]["generator"] = torch.Generator().manual_seed(5).get_state()
    found = []
    for seed in (0, 1):
        again = Recipe(methods=[EWC(), L2SP()]).unbound(seed=seed)
        again.load_state_dict(state)
        found.append(again.randomness)
    assert torch.equal(*found) and len({each.numpy().tobytes() for each in found[0]}) == 3


def test_a_state_can_be_asked_for_before_any_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        state = Recipe(methods=[EWC()]).unbound().state_dict()
        assert list(state["tensors"]) == ["generator"] and state["meta"]["parameters"] == {}
