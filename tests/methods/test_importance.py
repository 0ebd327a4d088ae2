"""The diagonal Fisher against closed forms; batch size, labels, frozen weights, types."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import bert, collate, rows
from torch import Tensor, nn

from holdfast.engine.batches import rows_of
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC
from holdfast.methods.common.importance import diagonal_fisher
from holdfast.recipe import Recipe

ROWS, FEATURES, CLASSES = 16, 3, 4


class Linear(nn.Module):
    """Softmax regression: log p(y|x) has the gradient (1[k = y] − p_k) x_j."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


DRAW = torch.Generator().manual_seed(1)
DATA = {
    "x": torch.randn(ROWS, FEATURES, generator=DRAW),
    "labels": torch.randint(CLASSES, (ROWS,), generator=DRAW),
}


def batches(size: int) -> Iterator[dict[str, Any]]:
    for i in range(0, ROWS, size):
        yield {k: v[i : i + size] for k, v in DATA.items()} | {"note": "not a tensor"}


def estimate(model: Linear, *, size: int = 4, **how: Any) -> dict[str, Tensor]:
    def forward(batch: Any) -> Any:
        return model(batch["x"], batch["labels"])

    return diagonal_fisher(forward, batches(size), dict(model.named_parameters()), **how)


def closed(model: Linear, labels: str) -> tuple[Tensor, Tensor]:
    """Fisher of weight and bias: mean over rows of E_y (1[k = y] − p_k)² x_j²."""
    p = model(DATA["x"]).logits.softmax(-1).detach()
    if labels == "true":
        errors = (nn.functional.one_hot(DATA["labels"], CLASSES) - p) ** 2
    else:  # E_y (1[k = y] − p_k)² = p_k (1 − p_k)² + (1 − p_k) p_k² = p_k (1 − p_k)
        errors = p * (1 - p)
    return errors.T @ DATA["x"] ** 2 / ROWS, errors.mean(0)


@pytest.mark.parametrize("labels", ["true", "expected"])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_closed_form_whatever_the_batch_size(labels: Any, size: int) -> None:
    model = Linear()
    found = estimate(model, labels=labels, size=size)
    weight, bias = closed(model, labels)
    torch.testing.assert_close(found["layer.weight"], weight)
    torch.testing.assert_close(found["layer.bias"], bias)


def test_sampled_labels_are_unbiased_and_drawn_from_the_generator() -> None:
    model = Linear()
    draw = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    found = [estimate(model, labels="sampled", generator=draw)["layer.weight"] for _ in range(300)]
    assert torch.equal(torch.get_rng_state(), state)
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0) / 300**0.5
    assert ((mean - closed(model, "expected")[0]).abs() < 4 * spread).all()
    assert not torch.equal(found[0], found[1])
    again = estimate(model, labels="sampled", generator=torch.Generator().manual_seed(0))
    assert torch.equal(again["layer.weight"], found[0])


def test_only_the_first_rows_count() -> None:
    model = Linear()
    few = estimate(model, labels="true", rows=5, size=4)["layer.bias"]
    p = model(DATA["x"][:5]).logits.softmax(-1).detach()
    by_hand = ((nn.functional.one_hot(DATA["labels"][:5], CLASSES) - p) ** 2).mean(0)
    torch.testing.assert_close(few, by_hand)


def test_frozen_weights_are_left_out_and_unused_ones_are_zero() -> None:
    model = Linear()
    model.layer.bias.requires_grad_(False)
    model.spare = nn.Linear(2, 2)
    found = estimate(model, labels="expected")
    assert "layer.bias" not in found
    assert torch.equal(found["spare.weight"], torch.zeros(2, 2))
    torch.testing.assert_close(found["layer.weight"], closed(model, "expected")[0])


def test_sums_of_narrow_weights_are_float32() -> None:
    """1,000 rows whose squares are 1 each would stop at 256 in bfloat16: mean 0.256, not 1."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    def forward(batch: Any) -> Any:
        return SimpleNamespace(loss=(w * batch["x"].bfloat16()).sum())

    found = diagonal_fisher(forward, [{"x": torch.ones(1000)}], {"w": w}, labels="true")
    assert found["w"].dtype is torch.float32
    assert found["w"].item() == 1.0


def test_rows_of_splits_tensors_only() -> None:
    each = list(rows_of([{"x": torch.arange(6).view(3, 2), "name": "n"}]))
    assert [r["x"].tolist() for r in each] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(r["name"] == "n" for r in each)


def test_what_cannot_be_estimated_is_refused() -> None:
    model = Linear()
    weights = dict(model.named_parameters())
    with pytest.raises(Refused, match="no rows"):
        diagonal_fisher(lambda b: model(b["x"]), [], weights)
    for logits in (torch.zeros(1, 5, 7), torch.zeros(1, 1)):
        with pytest.raises(Refused, match="labels='true'"):
            diagonal_fisher(
                lambda b, z=logits: SimpleNamespace(logits=z), batches(4), weights, labels="sampled"
            )
    with pytest.raises(Refused, match="returned no loss"):
        diagonal_fisher(lambda b: SimpleNamespace(), batches(4), weights)


# --- several labels, several numbers --------------------------------------------------------------


class Several(Linear):
    """A label of each output by itself: log p(y|x) has the gradient (y_k − p_k) x_j."""

    def __init__(self, problem: str | None = "multi_label_classification") -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem)


def of_several(model: Several, *, size: int = 4, **how: Any) -> dict[str, Tensor]:
    """The Fisher information; labels are numbers, and the loss is half their squared distance."""
    y = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(2))

    def forward(batch: Any) -> Any:
        logits = model(batch["x"]).logits
        return SimpleNamespace(logits=logits, loss=(logits - batch["labels"]).square().sum() / 2)

    data = [{"x": DATA["x"][i : i + size], "labels": y[i : i + size]}
            for i in range(0, ROWS, size)]  # fmt: skip
    weights = dict(model.named_parameters())
    modules = {n: (model.layer,) for n in weights}
    return diagonal_fisher(forward, data, weights, model=model, modules=modules, **how)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_several_labels_a_row_count_each_by_itself(size: int) -> None:
    """E_y (y_k − p_k)² = p_k (1 − p_k), p the sigmoid of each logit."""
    model = Several()
    p = model(DATA["x"]).logits.sigmoid().detach()
    found = of_several(model, size=size, labels="expected")
    closed = p * (1 - p)
    torch.testing.assert_close(found["layer.weight"], closed.T @ DATA["x"] ** 2 / ROWS)
    torch.testing.assert_close(found["layer.bias"], closed.mean(0))
    draw = torch.Generator().manual_seed(0)
    drawn = [of_several(model, size=size, generator=draw)["layer.bias"] for _ in range(200)]
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 200**0.5
    assert ((mean - closed.mean(0)).abs() < 4 * spread).all()
    one, other = (of_several(model, size=n, generator=torch.Generator().manual_seed(3))
                  for n in (size, ROWS))  # fmt: skip
    torch.testing.assert_close(one["layer.weight"], other["layer.weight"])


def test_several_numbers_a_row_are_a_regression_by_its_own_loss() -> None:
    model = Several("regression")
    found = of_several(model)
    torch.testing.assert_close(found, of_several(model, labels="true"))
    assert found["layer.bias"].sum() > 0
    for labels in ("sampled", "expected"):
        with pytest.raises(Refused, match="or a regression; use labels='true'"):
            of_several(model, labels=labels)


def test_labels_that_may_mean_two_things_are_refused() -> None:
    with pytest.raises(Refused, match=r"config\.problem_type: .*say \"regression\" or"):
        of_several(Several(None))
    of_several(Several(None), labels="true")


@pytest.mark.parametrize(
    "method", [EWC(labels="expected"), DPS(score="retention", fisher_labels="expected")]
)
def test_methods_ask_the_model_what_its_logits_are_of(method: Method) -> None:
    model = bert(num_labels=3, problem_type="multi_label_classification")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=9)
    data = [collate(rows(8, labels="several"))]
    bound.end_task(data)
    name = "bert.pooler.dense.weight"
    found = bound.states[method.name].weights["fisher"][name]
    own = diagonal_fisher(lambda b: model.eval()(**b), data, {name: bound.weights[name]},
                          model=model, labels="expected")  # fmt: skip
    torch.testing.assert_close(found, own[name])
