"""Mixout: its expectation, its limit, its two gradients, and dropout that comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.methods import DPS, Dropout, Extrapolation, Mixout
from holdfast.methods.common.mixing import mixed
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import ToyTraining

# Without dropout="off", after which the training passes themselves draw less.
CONTRACT: list[tuple[Method, float]] = [
    (Mixout(), 4),
    (Mixout(drop=0.8, noise="column", gradient="published"), 4),
]


class Scripted(Mixout):
    """Swaps what the test says."""

    def draw(self, view: View, name: str) -> Tensor:
        return KEEP


KEEP = torch.tensor([[True, False, True]])


def bind(method: Mixout, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Recipe(methods=[method]).bind(model, optimizer, total_steps=10)
    return optimizer


@pytest.mark.parametrize("gradient", ["exact", "published"])
def test_one_step_by_hand(gradient: Any) -> None:
    """W moves from W⁰ first, so that W̃ differs from both; N g with and without 1 / (1 − p)."""
    model = nn.Linear(3, 2).double()
    w, b = model.weight, model.bias  # once it is bound, the attribute is what the pass sees
    optimizer = bind(Scripted(drop=0.2, gradient=gradient), model)
    start, bias = w.detach().clone(), b.detach().clone()
    with torch.no_grad():
        w += torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        b += 1
    now, x = w.detach().clone(), torch.tensor([[1.0, 10.0, 100.0]]).double()
    seen = torch.where(KEEP, (now - 0.2 * start) / 0.8, start)  # the paper's fraction
    y = model(x)
    torch.testing.assert_close(y, x @ seen.T + bias + 1)
    y.sum().backward()
    optimizer.step()
    scale = 1 / 0.8 if gradient == "exact" else 1.0
    expected = now - KEEP * scale * x.expand(2, 3)
    torch.testing.assert_close(w.detach(), expected)
    torch.testing.assert_close(b.detach(), bias)  # 1 − g, never swapped


def test_the_exact_gradient_is_that_of_the_forward_pass() -> None:
    w, base = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3).double()
    keep = torch.rand(4, 3) < 0.5
    assert torch.autograd.gradcheck(lambda w: mixed(w, base, keep, 0.3, gain=1 / 0.7), w)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_the_expectation_is_the_trained_weight(drop: float) -> None:
    w, base = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    kept, swapped = (
        mixed(w, base, torch.full((5, 4), on), drop) for on in (True, False)
    )  # fmt: skip
    assert torch.equal(swapped, base)
    torch.testing.assert_close((1 - drop) * kept + drop * swapped, w)


@pytest.mark.parametrize("noise", ["column", "weight"])
def test_noise_is_as_often_as_it_should_and_of_its_shape(noise: Any) -> None:
    """Per column, an input is swapped for all outputs at once."""
    model = nn.Linear(2000, 3, bias=False)
    w, start = model.weight, model.weight.detach().clone()
    optimizer = bind(Mixout(drop=0.3, noise=noise), model)
    with torch.no_grad():
        w += 1
    shares = []
    for _ in range(3):
        swapped = model.weight == start  # what the forward pass reads
        assert torch.equal(model.weight == start, swapped), "one draw a step"
        assert bool((swapped == swapped[:1]).all()) == (noise == "column")
        shares.append(swapped.float().mean().item())
        model(torch.ones(1, 2000)).sum().mul(0).backward()
        optimizer.step()
    assert len(set(shares)) == 3
    assert sum(shares) / 3 == pytest.approx(0.3, abs=0.03)


def test_at_chance_zero_it_is_plain_bit_for_bit() -> None:
    plain, ours = ToyTraining(None).learn_all(), ToyTraining(Mixout(drop=0.0)).learn_all()
    same(ours.weights(), plain.weights())


def test_each_task_mixes_with_its_own_start() -> None:
    toy = ToyTraining(Mixout())
    toy.begin("one")
    first = {n: t.clone() for n, t in toy.bound.states["mixout"].weights["start"].items()}
    assert all(w.ndim == 2 for w in first.values()) and len(first) == 5
    toy.learn()
    toy.end()
    toy.begin("two")
    for name, start in toy.bound.states["mixout"].weights["start"].items():
        assert torch.equal(start, toy.bound.weights[name])
        assert name not in first or not torch.equal(start, first[name])


def test_dropout_is_off_only_while_it_is_bound() -> None:
    def shares(toy: ToyTraining) -> set[float]:
        return {m.p for m in toy.model.modules() if isinstance(m, nn.Dropout)}

    toy = ToyTraining(Mixout(dropout="off"))
    toy.begin("one")
    toy.learn(0, 4)
    assert shares(toy) == {0.0}
    again = ToyTraining.load(toy.save(), Mixout(dropout="off"), closed=False)
    for one in (toy, again):
        one.learn(4)
        one.end()
        one.begin("two")  # on the same encoder
        assert shares(one) == {0.0}
        one.bound.unbind()
        assert shares(one) == {0.2}
    same(again.weights(), toy.weights())
    keeping = ToyTraining(Mixout())
    keeping.begin("one")
    assert shares(keeping) == {0.2}


def test_a_model_in_evaluation_mode_and_one_without_layers_are_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = bind(Mixout(), model)
    model.eval()
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(Refused, match=r"mixout: nothing is swapped.*evaluation mode"):
        optimizer.step()
    with pytest.raises(Refused, match="no linear layer"):
        bind(Mixout(), nn.LayerNorm(3))


@pytest.mark.parametrize("other", [Mixout(drop=0.2), Extrapolation(rate=0.5)], ids=repr)
def test_dps_mix_shows_its_anchor_whatever_was_mixed_before(other: Method) -> None:
    """A masked entry is W* in the forward pass, not what another method put in its place."""
    toy, dps = ToyTraining(None), DPS(mix=True, stage=3)
    toy.recipe = Recipe(methods=[other, dps])
    toy.bound = toy.recipe.unbound(seed=7)
    toy.begin("one")
    toy.learn(0, 3)
    view = toy.bound.views["dps"]
    assert dps.masking(view) and toy.model.training
    masked = dps.frozen(view)
    assert any(bool(m.any()) for m in masked.values())
    for name, mask in masked.items():
        seen = toy.bound.owners[name][0].weight
        assert isinstance(seen, Tensor) and seen is not toy.bound.weights[name]
        assert torch.equal(seen[mask], view.state.weights["held"][name][mask]), name


@pytest.mark.parametrize("turned", [False, True])
def test_another_rate_of_dropout_beside_none_is_refused(turned: bool) -> None:
    """The later of the two would win, unsaid."""

    def begin(*methods: Method) -> list[float]:
        toy = ToyTraining(None)
        toy.recipe = Recipe(methods=methods[::-1] if turned else methods)
        toy.bound = toy.recipe.unbound()
        toy.begin("one")
        return [m.p for m in toy.model.modules() if isinstance(m, nn.Dropout)]

    with pytest.raises(Refused, match=r"dropout is off here and 0\.3 beside it; use keep"):
        begin(Dropout(p=0.3), Mixout(dropout="off"))
    assert set(begin(Dropout(p=0.3), Mixout())) == {0.3}
    assert set(begin(Dropout(), Mixout(dropout="off"))) == {0.0}
