"""What a Bound attaches to, and rates that change while it is attached."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast import Rates, Recipe
from holdfast.errors import Refused


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object = None) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:optimizer contains")
def test_a_parameter_twice_in_one_group_is_refused() -> None:
    model = network()
    twice = [*model.parameters(), model[0].weight]
    with pytest.raises(Refused, match="holds 1 parameters twice"):
        Recipe().bind(model, torch.optim.SGD(twice, lr=0.1), total_steps=1)


def test_other_rates_take_over_with_the_state_and_the_schedule() -> None:
    """As if the optimizer had been made with the new rates, but for the moments it already has."""
    model = network()
    first = Recipe(rates=Rates.flat())
    optimizer = torch.optim.AdamW(first.param_groups(model, lr=0.1, weight_decay=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    bound = first.bind(model, optimizer, total_steps=9)
    step(model, optimizer, scheduler)
    moments = {n: optimizer.state[w]["exp_avg"].clone() for n, w in bound.weights.items()}
    rates = Rates.from_list([1.0, *[0.5] * 8, 3.0])
    bound.set_rates(rates, scheduler)
    wanted = {"0": 1.0, "1": 0.5, "2": 0.5, "3": 3.0}
    for name, w in bound.weights.items():
        assert bound.group_of[name]["lr"] == pytest.approx(0.1 * wanted[name[0]] / 2)
        assert torch.equal(optimizer.state[w]["exp_avg"], moments[name])
        decay = 0.0 if name.endswith("bias") else 0.01
        assert bound.group_of[name]["weight_decay"] == decay
    step(model, optimizer, scheduler)
    for name in bound.weights:
        assert bound.group_of[name]["lr"] == pytest.approx(0.1 * wanted[name[0]] / 3)
    assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]


def test_other_rates_may_not_freeze_and_need_a_base_rate() -> None:
    model = network()
    recipe = Recipe()
    bound = recipe.bind(
        model, torch.optim.SGD(recipe.param_groups(model, lr=0.1)), total_steps=1
    )  # fmt: skip
    with pytest.raises(Refused, match="freeze"):
        bound.set_rates(Rates.from_list([0.0, *[1.0] * 8, 1.0]))
    bound.unbind()
    plain = recipe.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1)
    with pytest.raises(Refused, match="no base rate"):
        plain.set_rates(Rates.bertcl())
