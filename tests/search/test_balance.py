"""Benefit, harm and the rates that balance them, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import Refused
from holdfast.methods.common.importance import diagonal_fisher
from holdfast.network.parts import parts
from holdfast.network.rates import Rates
from holdfast.search.balance import (
    Measured,
    base_rate,
    benefit_and_harm,
    harm_of,
    mean_gradient,
    moved,
    multipliers,
    places,
)


class Two(nn.Module):
    """y = a·x₁ + c·x₂, with the loss (y − t)²: two parts of one weight each."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names or ("a", "c"):
            setattr(self, name, nn.Linear(1, 1, bias=False))
            nn.init.constant_(getattr(self, name).weight, 1.0)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        y = self.a(x[:, :1]) + self.c(x[:, 1:])
        return SimpleNamespace(logits=y, loss=nn.functional.mse_loss(y[:, 0], labels))


NEW = {"x": torch.tensor([[1.0, 2.0], [2.0, 0.0], [0.0, 1.0]]), "labels": torch.tensor([1.0, 4, 2])}
OLD = {"x": torch.tensor([[1.0, 1.0], [3.0, 1.0]]), "labels": torch.tensor([1.0, 6.0])}
GROUPS = {"a.weight": 0, "c.weight": 1}


def batches(data: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for i in range(0, len(data["x"]), size):
        yield {k: v[i : i + size] for k, v in data.items()}


def measured(model: Two, size: int, lr: float = 0.1) -> list[Measured]:
    """What one step of plain descent at `lr` gains and harms."""
    weights = dict(model.named_parameters())

    def forward(batch: Any) -> Any:
        return model(**batch)

    gradient = mean_gradient(forward, batches(NEW, size), weights, model)
    fisher = diagonal_fisher(forward, batches(OLD, size), weights, labels="true")
    update = {name: -lr * g for name, g in gradient.items()}
    return benefit_and_harm(update, gradient, fisher, GROUPS, ["a", "c"])


def test_benefit_and_harm_of_two_weights_by_hand() -> None:
    """New residuals y − t = 2, −2, −1: g = 2/3 (2·1 − 2·2, 2·2 − 1) = (−4/3, 2). Old ones 1 and −2:
    F = mean of (2 r x)² = ((4 + 144)/2, (4 + 16)/2) = (74, 10). u = −g/10."""
    a, c = measured(Two(), 3)
    assert a.benefit == pytest.approx(0.1 * (4 / 3) ** 2)
    assert c.benefit == pytest.approx(0.1 * 2**2)
    assert a.harm == pytest.approx(0.5 * 74 * (0.4 / 3) ** 2)
    assert c.harm == pytest.approx(0.5 * 10 * 0.2**2)
    one, two = multipliers([a, c], weights={"a", "c"})
    assert two / one == pytest.approx(7.4)  # b/h = 2/(η F): the weight that old rows need is slower


@pytest.mark.parametrize("size", [1, 2])
def test_neither_batch_size_nor_the_order_of_parameters_counts(size: int) -> None:
    for model in (Two(), Two("c", "a")):
        for mine, theirs in zip(measured(model, size), measured(Two(), 3), strict=True):
            assert mine.benefit == pytest.approx(theirs.benefit, rel=1e-6)
            assert mine.harm == pytest.approx(theirs.harm, rel=1e-6)


def test_a_weight_without_gradient_or_importance_counts_for_the_other() -> None:
    one, two, three = (torch.tensor([value]) for value in (1.0, 2.0, 3.0))
    update, gradient = {"a.weight": two, "c.weight": three}, {"c.weight": -one}
    a, c = benefit_and_harm(update, gradient, {"a.weight": one}, GROUPS, ["a", "c"])
    assert (a.benefit, a.harm, c.benefit, c.harm) == (0.0, 2.0, 3.0, 0.0)


def test_labels_that_do_not_count_weigh_nothing_in_a_gradient() -> None:
    """A loss that is a mean over labels: batches of 3 and 1 rows with unequal numbers of labels."""
    model = models.bert("TokenClassification", num_labels=2)
    rows, weights = models.rows(4, labels="tags"), dict(model.named_parameters())
    found = [
        mean_gradient(
            lambda batch: model(**batch),
            [models.collate(few) for few in models.pieces(rows, size)], weights, model,
        )
        for size in (4, 3)
    ]  # fmt: skip
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6)


# --- multipliers and base rate --------------------------------------------------------------------


def some(*pairs: tuple[float | None, float | None]) -> list[Measured]:
    return [Measured(f"part{i}", b, h) for i, (b, h) in enumerate(pairs)]


def curve(*pairs: tuple[float | None, float | None]) -> list[float]:
    return multipliers(some(*pairs), weights={f"part{i}" for i in range(len(pairs))})


def test_multipliers_are_as_b_over_h_with_geometric_mean_1() -> None:
    m = curve((1.0, 2.0), (3.0, 2.0), (1.0, 4.0))
    assert [each / m[0] for each in m] == pytest.approx([1, 3, 0.5])
    assert math.prod(m) == pytest.approx(1)
    assert m == pytest.approx(curve((10.0, 2e3), (30.0, 2e3), (10.0, 4e3)))  # no scale of b or h


def test_multipliers_are_clipped_around_their_geometric_mean() -> None:
    m = curve((1.0, 1e-4), (1.0, 1.0), (1.0, 1e4))
    assert [each / m[1] for each in m] == pytest.approx([10, 1, 0.1])


def test_parts_without_gain_without_harm_and_frozen_ones() -> None:
    gains, harmless, loses, frozen, still = range(5)
    m = multipliers(
        some((1.0, 1.0), (5.0, 0.0), (-1.0, 1.0), (None, None), (0.0, 0.0), (None, None)),
        weights={f"part{i}" for i in (gains, harmless, loses, frozen, still)},
    )
    raw = [each / m[gains] for each in m]
    assert raw == pytest.approx([1, 1, 0.1, 0, 1, 1])
    assert curve((1.0, 1.0), (-1.0, 0.0), (2.0, 1.0))[1] == min(
        curve((1.0, 1.0), (-1.0, 0.0), (2.0, 1.0))
    )


@pytest.mark.parametrize("pairs", [[(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)], [(None, None)] * 3])
def test_a_probe_that_gained_nothing_where_there_is_harm_is_refused(pairs: Any) -> None:
    with pytest.raises(Refused, match="gained nothing in any part"):
        curve(*pairs)


def test_the_base_rate_does_the_harm_that_is_tolerated() -> None:
    """Harm grows with the steps and the square of the rate; ½ is in h and nowhere else.

    ½ · F u² = ½ · (4 · .1² + 1 · .2²) = .04 at multipliers 1; a rate of lr · √(.1 / (10 · .04))."""
    found = benefit_and_harm(
        {"a.weight": torch.tensor([0.1]), "c.weight": torch.tensor([0.2])},
        {"a.weight": torch.tensor([-1.0]), "c.weight": torch.tensor([-1.0])},
        {"a.weight": torch.tensor([4.0]), "c.weight": torch.tensor([1.0])},
        GROUPS, ["a", "c"],
    )  # fmt: skip
    assert harm_of(found, [1.0, 1.0]) == pytest.approx(0.04)
    assert harm_of(found, [2.0, 0.5]) == pytest.approx(4 * 0.02 + 0.25 * 0.02)
    rate = base_rate(found, [1.0, 1.0], lr=2e-4, times=10, tolerance=0.1)
    assert rate == pytest.approx(1e-4)
    scaled = base_rate(found, [1.0, 1.0], lr=2e-4, times=10, tolerance=0.1, scale=4.0)
    assert scaled == pytest.approx(5e-5)


# --- how far answers moved ------------------------------------------------------------------------


def test_how_far_answers_moved_in_closed_form() -> None:
    head = models.bert(num_labels=2)
    before, now = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    exact = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # KL(before ‖ now)
    assert moved(before, now, {}, head).tolist() == pytest.approx([exact])
    several = models.bert(num_labels=2, problem_type="multi_label_classification")
    both = moved(before, torch.full((1, 2), math.log(3.0)), {}, several)
    assert both.tolist() == pytest.approx([2 * exact])
    number = models.bert(num_labels=1)
    assert moved(torch.tensor([[1.0]]), torch.tensor([[3.0]]), {}, number).tolist() == [2.0]


def test_of_tokens_the_labels_that_count() -> None:
    tags, text = models.bert("TokenClassification", num_labels=2), models.gpt2()
    before = torch.zeros(1, 3, 2)
    now = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 9.0]]])
    for model, labels in ((tags, [[-100, 1, -100]]), (text, [[-100, -100, 1]])):
        found = moved(before, now, {"labels": torch.tensor(labels)}, model)
        assert found.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)])


# --- where multipliers stand ----------------------------------------------------------------------


@pytest.mark.parametrize("most", [3, 5, 10])
@pytest.mark.parametrize(
    "model",
    [
        models.bert(),
        models.bert(num_hidden_layers=12),
        models.gpt2(n_layer=5),
        models.t5(),
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)),
    ],
    ids=["bert2", "bert12", "gpt2", "t5", "no layers"],
)
def test_a_rates_file_gives_each_part_the_multiplier_it_was_measured_for(
    model: nn.Module, most: int
) -> None:
    found = parts(model)
    at, names, layers = places(found, most)
    values = [1.5**k for k in range(len(names))]
    assert 3 <= len(names) <= most
    made = Rates.from_list(values, layers=layers).of(found)
    assert made == {part: values[at[part]] for part in found.order}
