"""The head last: its equation, and when it is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import arguments, bert, collate, gpt2, rows, same
from test_head_first import batches, labelled, pooled, roberta
from torch import Tensor, nn

import holdfast
from holdfast.engine.bound import Bound
from holdfast.engine.head_last import HeadLast, near
from holdfast.errors import Refused
from holdfast.methods import EWC, Merge
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe

Batch = dict[str, Tensor]


def learn(
    model: nn.Module, data: Any, how: HeadLast | None = None, *, steps: int = 1, **more: Any
) -> Bound:
    """A task of some steps, before its end."""
    recipe = Recipe(head_last=how or HeadLast(), **more)
    optimizer = torch.optim.SGD(recipe.param_groups(model, lr=0.1))
    bound = recipe.bind(model, optimizer, total_steps=9, data=data)
    for batch in data[:steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return bound


def head(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.classifier.named_parameters()}


def gradient(loss: Callable[[Tensor, Tensor], Tensor], w: Tensor, b: Tensor) -> float:
    """The steepest slope of a loss of weight and bias."""
    w, b = w.double().requires_grad_(), b.double().requires_grad_()
    return max(float(g.abs().max()) for g in torch.autograd.grad(loss(w, b), [w, b]))


# --- the equation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.05, 2.0])
def test_the_gradient_of_its_equation_vanishes(c: float) -> None:
    """Σ −log softmax(W x + b)_y + (‖W − W₁‖² + ‖b − b₁‖²) / (2 C), written down for torch."""
    model = bert(num_labels=3, hidden_dropout_prob=0.5)  # features are those of evaluation mode
    data = batches(labelled(rows(45), [i % 3 for i in range(45)]))
    bound = learn(model, data, HeadLast(inverse_decay=c))
    w1, b1 = head(model).values()
    bound.end_task(data)
    w, b = head(model).values()
    x, y = pooled(model, data).double(), torch.cat([b["labels"] for b in data])

    def loss(c: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda w, b: (
            nn.functional.cross_entropy(x @ w.T + b, y, reduction="sum")
            + (((w - w1.double()) ** 2).sum() + ((b - b1.double()) ** 2).sum()) / (2 * c)
        )

    assert gradient(loss(c), w, b) < 1e-3
    assert min(gradient(loss(2 * c), w, b), gradient(loss(c / 2), w, b)) > 0.02
    assert bound.fitted_last is not None and bound.fitted_last["rows"] == 45


def test_several_labels_a_row_are_a_classifier_each() -> None:
    model = bert(num_labels=2, problem_type="multi_label_classification")
    marks = [[float(i % 2), float(i % 3 == 0)] for i in range(30)]
    data = batches(labelled(rows(30), marks))
    bound = learn(model, data)
    w1, b1 = (t.double() for t in head(model).values())
    bound.end_task(data)
    x, y = pooled(model, data).double(), torch.cat([b["labels"] for b in data]).double()
    found = gradient(
        lambda w, b: nn.functional.binary_cross_entropy_with_logits(
            x @ w.T + b, y, reduction="sum"
        ) + (((w - w1) ** 2).sum() + ((b - b1) ** 2).sum()) / 0.6,
        *head(model).values(),
    )  # fmt: skip
    assert found < 1e-3


def test_regression_is_ridge_around_the_head_as_it_was() -> None:
    """w = w₁ + (XᵀX + I/C)⁻¹ Xᵀ (y − X w₁)."""
    model = bert(num_labels=1)
    data = batches(labelled(rows(30), [0.1 * i for i in range(30)]))
    bound = learn(model, data, HeadLast(inverse_decay=0.5))
    w1 = torch.cat([t.reshape(1, -1) for t in head(model).values()], 1).double()[0]
    bound.end_task(data)
    x = torch.cat([pooled(model, data), torch.ones(30, 1)], 1).double()
    y = torch.cat([b["labels"] for b in data]).double()
    wanted = w1 + torch.linalg.solve(x.T @ x + 2 * torch.eye(17).double(), x.T @ (y - x @ w1))
    found = torch.cat([t.reshape(1, -1) for t in head(model).values()], 1)[0]
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


@given(st.integers(0, 2**16))
def test_a_small_c_leaves_the_head_and_it_never_fits_worse(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(12, 4)), draw.integers(0, 3, size=(12, 1))
    start = draw.normal(size=(3, 4))

    def wrong(w: Any) -> float:
        logits = torch.from_numpy(x @ w.T)
        return float(nn.functional.cross_entropy(logits, torch.from_numpy(y[:, 0])))

    assert np.abs(near("single_label_classification", start, x, y, 1e-9) - start).max() < 1e-6
    found = [near("single_label_classification", start, x, y, c) for c in (0.1, 1.0, 10.0)]
    assert [*map(wrong, found)] == sorted(map(wrong, found), reverse=True)
    assert wrong(found[0]) <= wrong(start)


def test_classes_without_rows_stay_as_they_were() -> None:
    """Rows sorted by class would else teach the head that there is no other."""
    model = bert(num_labels=3)
    data = batches(labelled(rows(30), [0, 2] * 15))
    bound = learn(model, data)
    before = head(model)
    bound.end_task(data)
    after = head(model)
    for name, value in before.items():
        assert torch.equal(after[name][1], value[1]) and not torch.equal(after[name][0], value[0])
    x, y = pooled(model, data).double(), torch.cat([b["labels"] for b in data]) // 2
    w1, b1 = (t.double()[[0, 2]] for t in before.values())
    found = gradient(
        lambda w, b: nn.functional.cross_entropy(x @ w.T + b, y, reduction="sum")
        + (((w - w1) ** 2).sum() + ((b - b1) ** 2).sum()) / 0.6,
        *(t[[0, 2]] for t in after.values()),
    )  # fmt: skip
    assert found < 1e-3


def test_one_class_alone_leaves_the_head(said: Callable[[], list[str]]) -> None:
    model = bert(num_labels=3)
    data = batches(labelled(rows(20), [1] * 20))
    bound = learn(model, data)
    before = head(model)
    bound.end_task(data)
    assert same(head(model), before) and bound.fitted_last is not None
    assert bound.fitted_last["rows"] == 0 and len(said()) == 1


# --- which rows, which heads ----------------------------------------------------------------------


def test_neither_the_size_of_batches_nor_more_rows_than_asked_for_matter() -> None:
    made, found = labelled(rows(60), [i % 2 for i in range(60)]), []
    for data in (batches(made, 7), batches(made, 60), batches(made[:20], 20)):
        model = bert()
        bound = learn(model, batches(made, 7), HeadLast(rows=20))
        bound.end_task(data)
        assert bound.fitted_last is not None and bound.fitted_last["rows"] == 20
        found.append(head(model)["weight"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


def test_it_reads_what_merging_has_left() -> None:
    """Features are those of the merged encoder, and the encoder is as merging alone leaves it."""

    def run(last: HeadLast | None) -> Any:
        model = bert(num_labels=3)
        recipe = Recipe(methods=[Merge()], head_last=last)
        bound = recipe.unbound()
        for task in ("one", "two"):
            data = batches(labelled(rows(40, seed=len(task)), [i % 3 for i in range(40)]))
            other = bert(num_labels=3, seed=1)
            other.bert = model.bert
            model = other
            optimizer = torch.optim.SGD(recipe.param_groups(model, lr=0.1))
            bound.begin_task(task, optimizer, 9, model=model, shared=model.bert, data=data)
            for batch in data:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            trained = head(model).values()
            bound.end_task(data)
        return model, data, trained

    model, data, (w1, b1) = run(HeadLast())
    plain = run(None)[0]
    assert same(model.bert.state_dict(), plain.bert.state_dict())
    assert torch.equal(plain.classifier.weight, w1)
    x, y = pooled(model, data).double(), torch.cat([b["labels"] for b in data])
    found = gradient(
        lambda w, b: nn.functional.cross_entropy(x @ w.T + b, y, reduction="sum")
        + (((w - w1) ** 2).sum() + ((b - b1) ** 2).sum()) / 0.6,
        *head(model).values(),
    )  # fmt: skip
    assert found < 1e-3


def test_methods_measure_the_network_with_the_head_that_stays() -> None:
    """EWC would protect what the head needed that was there before."""
    model, data = bert(num_labels=3), batches(labelled(rows(24), [i % 3 for i in range(24)]))
    ewc = EWC(labels="true")
    bound = learn(model, data, steps=2, methods=[ewc])
    bound.end_task(data)
    assert bound.fitted_last is not None and bound.fitted_last["rows"]
    later = Recipe(methods=[ewc]).unbound()
    later.remember("as it is", model, data)
    for name, f in later.states["ewc"].weights["fisher"].items():
        torch.testing.assert_close(bound.states["ewc"].weights["fisher"][name], f)


def test_of_a_head_of_several_layers_the_last_is_fitted() -> None:
    model: Any = roberta(num_labels=3)
    data = batches(labelled(rows(30), [i % 3 for i in range(30)]))
    bound = learn(model, data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bound.end_task(data)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"classifier.out_proj.weight", "classifier.out_proj.bias"}


@pytest.mark.parametrize("frozen", [["weight", "bias"], ["bias"]])
def test_a_head_that_does_not_train_stays(frozen: list[str]) -> None:
    model, data = bert(), batches(rows(20))
    for name in frozen:
        getattr(model.classifier, name).requires_grad_(False)
    bound = learn(model, data)
    before = head(model)
    bound.end_task(data)
    assert same(head(model), before) and bound.fitted_last is None


def test_a_head_that_rates_freeze_stays() -> None:
    model, data = bert(), batches(rows(20))
    bound = learn(
        model, data, rates=replace(Rates.flat(), head=0.0), parts={"*.pooler.*": "layer.1"}
    )
    before = head(model)
    bound.end_task(data)
    assert same(head(model), before)


class Weighted(nn.Module):
    """A model whose own loss weighs its classes."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.classifier = (inner := bert()).bert, inner.classifier
        self.base_model, self.config = self.bert, inner.config

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        logits = self.classifier(self.bert(input_ids=input_ids).pooler_output)
        weight = torch.tensor([1.0, 19.0])
        return {"loss": nn.functional.cross_entropy(logits, labels, weight), "logits": logits}


def test_a_model_of_another_loss_keeps_its_head(said: Callable[[], list[str]]) -> None:
    model, data = Weighted(), batches(rows(40))
    for batch in data:
        batch.pop("attention_mask", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(head_last=HeadLast())
    bound = recipe.bind(model, optimizer, total_steps=9, data=data, shared=model.bert)
    model(**data[0])["loss"].backward()
    optimizer.step()
    before = head(model)
    bound.end_task(data)
    assert same(head(model), before) and "its loss is another" in said()[0]


@pytest.mark.parametrize(
    "own",
    [{"compute_loss_func": lambda out, labels, **_: 2 * nn.functional.cross_entropy(
        out.logits, labels)}, {"label_smoothing_factor": 0.1}, {}],
    ids=["function", "smoothing", "none"],
)  # fmt: skip
def test_a_trainer_of_another_loss_leaves_the_head(own: dict[str, Any], tmp_path: Path) -> None:
    model, smooth = bert(), own.pop("label_smoothing_factor", 0.0)
    args = arguments(tmp_path, max_steps=2, label_smoothing_factor=smooth)
    trainer = holdfast.Trainer(model=model, args=args, train_dataset=rows(), data_collator=collate,
                               recipe=Recipe(head_last=HeadLast()), **own)  # fmt: skip
    trainer.train()
    before = head(model)
    trainer.end_task()
    assert same(head(model), before) is bool(own or smooth)
    assert trainer.bound.head_last == HeadLast()


def test_a_head_made_of_other_weights_stays() -> None:
    model = bert()
    nn.utils.parametrizations.weight_norm(model.classifier)
    data = batches(rows(20))
    bound = learn(model, data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bound.end_task(data)
    assert same(model.state_dict(), before)


def test_a_resumed_loop_says_which_models_share_the_head() -> None:
    """Else the head of both tasks would be fitted to the second alone."""
    model, data = bert(), batches(rows(20))
    first = learn(model, data)
    first.end_task(data)
    state = first.state_dict()
    again = Recipe(head_last=HeadLast()).unbound()
    again.load_state_dict(state)
    again.begin_task("two", torch.optim.SGD(model.parameters(), lr=0.1), 9, model=model, data=data)
    again.step = 1
    before = head(model)
    with pytest.raises(Refused, match=r"head_last: .*'task'.*set bound\.models\['task'\]"):
        again.end_task(data)
    again.models["task"] = model
    again.end_task(data)
    assert same(head(model), before)


def test_a_language_model_has_no_head_of_its_own() -> None:
    model = gpt2()
    ids = torch.arange(24).reshape(4, 6)
    data = [{"input_ids": ids, "labels": ids}]
    bound = learn(model, data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bound.end_task(data)
    assert same(model.state_dict(), before) and bound.fitted_last is None


def test_a_head_learned_elsewhere_is_not_touched() -> None:
    model, data = bert(), batches(rows(20))
    before, bound = head(model), Recipe(head_last=HeadLast()).unbound()
    bound.remember("old", model, data, shared=model.bert)
    assert same(head(model), before) and bound.finished == ["old"]


def test_a_task_without_rows_is_refused_before_anything_changed() -> None:
    model, data = bert(), batches(rows(20))
    bound = learn(model, data, methods=[Merge()])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for given_ in (None, []):
        with pytest.raises(Refused, match=r"pass .*rows|pass data="):
            bound.end_task(given_)
        assert same(model.state_dict(), before) and bound.finished == []
    bound = learn(bert(), data)
    with pytest.raises(Refused, match=r"no rows to fit the head to; pass the task's rows as data="):
        bound.end_task()


def test_nothing_is_drawn_and_nothing_left_behind() -> None:
    model, data = bert(hidden_dropout_prob=0.5), batches(rows(20))
    bound = learn(model, data)
    drawn, mode, ours = torch.get_rng_state(), model.training, bound.generator.get_state()
    bound.end_task(data)
    assert torch.equal(torch.get_rng_state(), drawn) and model.training is mode
    assert torch.equal(bound.generator.get_state(), ours)  # whatever the size of batches
    assert not model.classifier._forward_hooks
    assert model.classifier.weight.grad is None and model.classifier.weight.requires_grad


# --- in recipes -----------------------------------------------------------------------------------


def test_a_sequence_fits_the_head_of_every_task(tmp_path: Path) -> None:
    import models

    place = models.save_bert(tmp_path / "bert")
    tasks = [models.write_task(tmp_path, topic) for topic in ("mood", "question")]
    how = {"epochs": 0.5, "max_length": 16, "progress": False}
    for name, recipe in (("with", Recipe(head_last=HeadLast())), ("without", Recipe())):
        holdfast.run_sequence(str(place), tasks, recipe, out=tmp_path / name, **how)
    found = {n: holdfast.load(tmp_path / n).models for n in ("with", "without")}
    for task in ("mood", "question"):
        ours, plain = (found[n][task].classifier.weight for n in ("with", "without"))
        assert not torch.equal(ours, plain)


def test_a_recipe_file_says_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("head_last: {inverse_decay: 1.0, rows: 50}\n")
    recipe = Recipe.load(path)
    assert recipe.head_last == HeadLast(inverse_decay=1.0, rows=50)
    recipe.save(path)
    assert Recipe.load(path) == recipe and recipe.idle_alone() is None
    with pytest.raises(Refused, match=r"head_last\.rows"):
        Recipe.from_dict({"head_last": {"rows": 0}})
    with pytest.raises(Refused, match=r"recipe\.head_last: must be a HeadLast, not True"):
        Recipe(head_last=True)  # type: ignore[arg-type]


def test_the_page_names_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "head_last.md").read_text(encoding="utf-8")
    assert not [f.name for f in fields(HeadLast) if f"`{f.name}`" not in page]
