"""Tensors that come into training late: no state and no decay before, all of it from then on."""

from __future__ import annotations

import pytest
import torch
from tiny import METHODS, bind, net
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, L2SP
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import ToyTraining, make_batch

LATE = "encoder.layers.0.up.weight"


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("task", ["one", "two"])
def test_unfrozen_in_the_middle_of_a_task_it_begins_to_train(method: Method, task: str) -> None:
    toy = ToyTraining(method)
    if task == "two":
        toy.begin("one")
        toy.learn()
        toy.end()
    toy.begin(task)
    late = toy.bound.weights[LATE].requires_grad_(False)
    start = late.detach().clone()
    toy.learn(0, 5)
    assert torch.equal(late, start), "decay or a pull moved it"
    assert late not in toy.optimizer.state
    for slot in ("sum", "count"):
        assert LATE not in toy.bound.states[method.name].slot(slot)
    late.requires_grad_(True)
    toy.learn(5)
    assert (late != start).any() and late.isfinite().all()
    assert late in toy.optimizer.state
    toy.end()


def dense(unfreeze: int, drop: float, stage: int) -> nn.Sequential:
    """DPS Dense by the book: a tensor takes part from its first gradient on."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    matrices = [model[0].weight, model[2].weight]
    sums: dict[Tensor, Tensor] = {}
    held: dict[Tensor, Tensor] = {}
    for step in range(12):
        masking = step // stage % 2 == 1
        if step % stage == 0 and masking:
            held = {
                w: s < s.flatten().sort(descending=True).values[-(-s.numel() // 2) - 1]
                for w, s in sums.items()
            }
        elif step % stage == 0:
            sums = {}
        model[0].weight.requires_grad_(step >= unfreeze)
        optimizer.zero_grad()
        model(rows(step)).square().sum().backward()
        before = {w: w.detach().clone() for w in matrices}
        for w in matrices:
            if w.grad is not None and masking and w in held:
                w.grad[held[w]] = 0
            elif w.grad is not None and not masking:
                sums[w] = sums.get(w, 0) + w.grad**2
        optimizer.step()
        for w in matrices:
            if masking and w in held:
                w.data[held[w]] = before[w][held[w]]
    return model


def rows(step: int) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("unfreeze", [0, 2, 4, 7])
def test_dense_selects_from_its_first_gradients(unfreeze: int) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    bind(model, optimizer, DPS(stage=3, drop=0.5), total_steps=12)
    for step in range(12):
        model[0].weight.requires_grad_(step >= unfreeze)
        optimizer.zero_grad()
        model(rows(step)).square().sum().backward()
        optimizer.step()
    same(model.state_dict(), dense(unfreeze, 0.5, 3).state_dict())


@pytest.mark.parametrize("method", [L2SP(strength=0.5, head_strength=0.0), EWC(strength=20.0)])
def test_the_pull_waits_for_the_gradient(method: Method) -> None:
    """From then on λF (w − w*) is added, w* where the weight was all along."""
    toy = ToyTraining(method)
    toy.begin("one")
    toy.learn(0, 3)
    toy.end()
    toy.begin("two")
    late = toy.bound.weights[LATE].requires_grad_(False)
    toy.learn(0, 3)
    slots = toy.bound.states[method.name].weights
    anchor = slots["anchor" if isinstance(method, EWC) else "start"][LATE].clone()
    fisher = slots["fisher"][LATE] if isinstance(method, EWC) else torch.ones(())
    assert torch.equal(late, anchor) and fisher.any()
    late.requires_grad_(True)
    with torch.no_grad():
        late += 1e-1  # as if trained
    toy.bound.max_grad_norm = None
    toy.backward(3)
    assert late.grad is not None
    strength: float = method.strength  # type: ignore[attr-defined]
    expected = late.grad + strength * fisher * (late.detach() - anchor)
    toy.optimizer.step()
    torch.testing.assert_close(late.grad, expected)


def test_importance_of_what_was_frozen_is_not_made_up() -> None:
    """A tensor frozen in the first task is anchored after the second, where it was trained."""
    toy = ToyTraining(EWC(), frozen={LATE})
    toy.begin("one")
    toy.learn()
    toy.end()
    fisher = toy.bound.states["ewc"].weights["fisher"]
    assert fisher and LATE not in fisher
    toy.frozen = ()
    toy.begin("two")
    for p in toy.model.parameters():
        p.requires_grad_(True)
    toy.learn()
    toy.end()
    assert toy.bound.states["ewc"].weights["fisher"][LATE].any()


# --- groups that change under a bound optimizer ---------------------------------------------------


def half_bound() -> tuple[nn.Sequential, torch.optim.Optimizer, Bound]:
    model = net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, weight_decay=0.1)
    return model, optimizer, bind(model, optimizer, L2SP())


def test_an_added_group_is_noticed_before_it_is_trained() -> None:
    model, optimizer, bound = half_bound()
    optimizer.add_param_group({"params": list(model[0].parameters())})
    model(rows(0)).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(Refused, match=r"2 parameters were added.*0 removed.*before bind"):
        optimizer.step()
    same(model.state_dict(), before)
    bound.begin_task("task", optimizer, 5)  # one of the remedies
    optimizer.step()
    assert (model[0].weight != before["0.weight"]).any() and bound.step == 1


def test_parameters_exchanged_within_a_group_are_noticed() -> None:
    model, optimizer, _ = half_bound()
    optimizer.param_groups[0]["params"] += model[0].parameters()
    model(rows(0)).sum().backward()
    with pytest.raises(Refused, match="2 parameters were added"):
        optimizer.step()
    del optimizer.param_groups[0]["params"][1:]
    with pytest.raises(Refused, match="1 removed"):
        optimizer.step()


def test_the_other_remedy_serves_gradual_unfreezing() -> None:
    """All parameters in the optimizer, most of them frozen at first."""
    model, recipe = net(), Recipe(methods=[L2SP(), DPS(stage=2)])
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=0.1, weight_decay=0.1))
    bound = recipe.bind(model, optimizer, total_steps=6)
    model[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(6):
        if step == 3:
            same(model[0].state_dict(), {k: before[f"0.{k}"] for k in ("weight", "bias")})
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        model(rows(step)).square().sum().backward()
        optimizer.step()
    assert (model[0].weight != before["0.weight"]).any() and bound.step == 6


def test_the_rate_told_is_of_the_groups_that_were_loaded() -> None:
    """torch replaces its groups when it loads a state."""
    model, optimizer, bound = half_bound()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.7
    optimizer.load_state_dict(state)
    model(rows(0)).sum().backward()
    optimizer.step()
    assert bound.views["l2sp"].lr("2.weight") == 0.7


def test_a_model_without_a_gradient_makes_an_empty_step() -> None:
    toy = ToyTraining(DPS(stage=2))
    toy.begin("one")
    before = toy.weights()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    toy.model.requires_grad_(False)
    toy.model(**make_batch("one", 0))
    scaler.step(toy.optimizer)
    same(toy.weights(), before)
    assert (toy.bound.step, toy.bound.skipped) == (1, 0)
