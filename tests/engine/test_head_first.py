"""The head first: what is fitted, by which equation, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import SIZE, arguments, bert, collate, gpt2, rows, same, weights
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import holdfast
from holdfast.engine import head_first
from holdfast.engine.bound import Bound
from holdfast.engine.head_first import HeadFirst
from holdfast.errors import Refused
from holdfast.methods import LwF
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe

Batch = dict[str, Tensor]
LOGISTIC = HeadFirst()


def batches(made: list[dict[str, Any]], size: int = 7) -> list[Batch]:
    return [collate(made[i : i + size]) for i in range(0, len(made), size)]


def fit(
    model: nn.Module, data: Any, how: HeadFirst = LOGISTIC, *, total_steps: int = 100, **more: Any
) -> Bound:
    """Begin a task with the head first."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    recipe = Recipe(head_first=how)
    return recipe.bind(model, optimizer, total_steps=total_steps, data=data, **more)


def pooled(model: Any, data: list[Batch]) -> Tensor:
    """What the classifier is given: (rows, width), without dropout."""
    model = model.eval()
    with torch.no_grad():
        return torch.cat([model.bert(input_ids=b["input_ids"]).pooler_output for b in data])


def labelled(made: list[dict[str, Any]], labels: list[Any]) -> list[dict[str, Any]]:
    return [{**row, "labels": label} for row, label in zip(made, labels, strict=True)]


def close(ours: Tensor, theirs: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.detach().double(), torch.as_tensor(theirs).double(),
                               atol=atol, rtol=1e-4)  # fmt: skip


# --- the equation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.3, 1.0])
def test_several_classes_are_scikit_learns(c: float) -> None:
    model = bert(num_labels=4, hidden_dropout_prob=0.5)  # features are those of evaluation mode
    data = batches(labelled(rows(60), [i % 4 for i in range(60)]))
    x, y = pooled(model, data), torch.cat([b["labels"] for b in data])
    theirs = LogisticRegression(C=c, max_iter=1000).fit(x.double().numpy(), y.numpy())
    model.train()
    bound = fit(model, data, HeadFirst(inverse_decay=c))
    close(model.classifier.weight, theirs.coef_)
    close(model.classifier.bias, theirs.intercept_)
    assert bound.fitted is not None and bound.fitted.pop("seconds") > 0
    assert bound.fitted == {"fit": "logistic", "steps": 0, "rows": 60}


def test_the_logistic_fit_is_where_the_gradient_of_its_equation_vanishes() -> None:
    """Σ −log softmax(W x + b)_y + ‖W‖² / (2 C), written down and differentiated by torch."""
    model, c = bert(num_labels=3), 0.7
    data = batches(labelled(rows(45), [i % 3 for i in range(45)]))
    fit(model, data, HeadFirst(inverse_decay=c))
    x, y = pooled(model, data).double(), torch.cat([b["labels"] for b in data])
    w = model.classifier.weight.detach().double().requires_grad_()
    b = model.classifier.bias.detach().double().requires_grad_()

    def steepest(c: float) -> float:
        loss = nn.functional.cross_entropy(x @ w.T + b, y, reduction="sum")
        found = torch.autograd.grad(loss + (w**2).sum() / (2 * c), [w, b])
        return max(float(g.abs().max()) for g in found)

    assert steepest(c) < 0.02
    assert min(steepest(2 * c), steepest(c / 2)) > 0.2  # not because all gradients are small


def test_of_two_classes_the_logits_differ_by_scikit_learns_one() -> None:
    model = bert(num_labels=2)
    data = batches(rows(40))
    x, y = pooled(model, data), torch.cat([b["labels"] for b in data])
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(x.double().numpy(), y.numpy())
    fit(model, data)
    with torch.no_grad():
        logits = model(**data[0]).logits
    close(logits[:, 1] - logits[:, 0], theirs.decision_function(x[:7].double().numpy()))
    close(logits.sum(1), torch.zeros(7))  # split evenly: neither class has larger weights


def test_a_class_without_rows_is_never_the_answer() -> None:
    model = bert(num_labels=5)
    data = batches(labelled(rows(45), [(0, 1, 3)[i % 3] for i in range(45)]))
    x, y = pooled(model, data), torch.cat([b["labels"] for b in data])
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(x.double().numpy(), y.numpy())
    fit(model, data)
    weight, bias = model.classifier.weight, model.classifier.bias
    close(weight[[0, 1, 3]], theirs.coef_)  # each in its own row, whatever is absent before it
    close(bias[[0, 1, 3]], theirs.intercept_)
    assert not weight[[2, 4]].any()
    close(bias[[2, 4]], torch.full((2,), theirs.intercept_.min() - 2))


def test_several_labels_a_row_are_a_classifier_each() -> None:
    model = bert(num_labels=3, problem_type="multi_label_classification")
    made = rows(50, labels="several")
    for row in made:
        row["labels"][2] = 0.0  # never given
    data = batches(made)
    x, y = pooled(model, data).double().numpy(), torch.cat([b["labels"] for b in data]).numpy()
    assert fit(model, data).fitted["fit"] == "logistic"  # type: ignore[index]
    for label in (0, 1):
        theirs = LogisticRegression(C=1.0, max_iter=1000).fit(x, y[:, label])
        close(model.classifier.weight[label], theirs.coef_[0])
        close(model.classifier.bias[label], theirs.intercept_[0])
    assert not model.classifier.weight[2].any() and model.classifier.bias[2] < 0


@pytest.mark.parametrize("c", [0.5, 4.0])
@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_ridge_in_closed_form(outputs: int, c: float) -> None:
    """w = (Xᵀ X + I/C)⁻¹ Xᵀ y of centred x and y, the bias not shrunk."""
    model = bert(num_labels=outputs, problem_type="regression")
    draw = np.random.default_rng(0)
    numbers = draw.normal(3.0, 2.0, size=(40, outputs))
    given = [list(map(float, n)) if outputs > 1 else float(n[0]) for n in numbers]
    data = batches(labelled(rows(40), given))
    x, y = pooled(model, data).double(), torch.as_tensor(numbers)
    assert fit(model, data, HeadFirst(inverse_decay=c)).fitted["fit"] == "ridge"  # type: ignore[index]
    centred = x - x.mean(0)
    inverse = torch.linalg.inv(centred.T @ centred + torch.eye(x.shape[1]) / c)
    w = (inverse @ centred.T @ (y - y.mean(0))).T
    close(model.classifier.weight, w)
    close(model.classifier.bias, y.mean(0) - w @ x.mean(0))


def test_tokens_without_a_label_do_not_count() -> None:
    model = bert("TokenClassification", num_labels=2)
    data = batches(rows(30, labels="tags"))
    with torch.no_grad():
        x = torch.cat([model.eval().bert(b["input_ids"]).last_hidden_state for b in data])
    y = torch.cat([b["labels"] for b in data])
    known = y != -100
    assert 0 < known.sum() < known.numel()
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(x[known].double(), y[known])
    found = fit(model, data).fitted
    close(model.classifier.weight[1] - model.classifier.weight[0], theirs.coef_[0])
    assert found is not None and found["fit"] == "logistic" and found["rows"] == known.sum()


def test_one_class_alone_leaves_the_head() -> None:
    model = bert(num_labels=3)
    before = weights(model)
    assert fit(model, batches(labelled(rows(20), [1] * 20))).fitted["fit"] == "none"  # type: ignore[index]
    assert same(weights(model), before)


def test_soft_labels_are_fitted_by_steps() -> None:
    """No classifier of scikit-learn's takes them, and ridge is not the model's loss."""
    model = bert(num_labels=3, problem_type="multi_label_classification")
    soft = [[0.2, 0.9, 0.0] for _ in range(20)]
    assert fit(model, batches(labelled(rows(20), soft))).fitted["fit"] == "steps"  # type: ignore[index]


# --- what does not matter, and what is not touched ------------------------------------------------


def test_neither_the_size_of_batches_nor_the_order_of_rows_matters() -> None:
    made = labelled(rows(50), [i % 3 for i in range(50)])
    heads = []
    for data in (batches(made), batches(made, 50), batches(made[::-1], 16)):
        model = bert(num_labels=3)
        fit(model, data)
        heads.append(model.classifier.weight.detach().clone())
    close(heads[1], heads[0], atol=1e-4)
    close(heads[2], heads[0], atol=1e-4)
    assert float((heads[0] - weights(bert(num_labels=3))["classifier.weight"]).abs().max()) > 0.1


def test_a_limit_of_rows_is_exact_whatever_the_size_of_batches() -> None:
    made = labelled(rows(50), [i % 3 for i in range(50)])
    heads = []
    for data, limit in ((batches(made, 7), 20), (batches(made, 16), 20), (batches(made[:20]), 99)):
        model = bert(num_labels=3)
        assert fit(model, data, HeadFirst(rows=limit)).fitted["rows"] == 20  # type: ignore[index]
        heads.append(model.classifier.weight.detach().clone())
    close(heads[1], heads[0], atol=1e-4)
    close(heads[2], heads[0], atol=1e-4)


class Counted:
    """Rows that count how often they are read, and an encoder its passes."""

    def __init__(self, model: Any, data: list[Batch]) -> None:
        self.data, self.read, self.passes = data, 0, 0
        embeddings: nn.Module = model.base_model.embeddings
        embeddings.register_forward_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.passes += 1

    def __call__(self) -> Iterator[Batch]:
        for batch in self.data:
            self.read += 1
            yield batch


@pytest.mark.parametrize(
    ("how", "passes"), [(LOGISTIC, 8), (HeadFirst(rows=14), 2), (HeadFirst(steps=3), 3)]
)
def test_rows_are_passed_through_the_encoder_once(how: HeadFirst, passes: int) -> None:
    """And no further than the fit needs."""
    model = bert()
    counted = Counted(model, batches(rows(56)))
    fit(model, counted, how)
    assert counted.passes == passes and counted.read <= passes + 2


@pytest.mark.parametrize("how", [LOGISTIC, HeadFirst(steps=5)], ids=["logistic", "steps"])
def test_all_but_the_head_is_as_it_was(how: HeadFirst) -> None:
    """Weights, buffers, gradients, modes, hooks and the global random state."""
    model = bert(num_labels=2, hidden_dropout_prob=0.3)
    model.train()
    model.bert.encoder.layer[0].eval()  # a module of its own mode
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    bound = fit(model, batches(rows(40)), how)
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())
    assert not bound.optimizer.state and bound.step == 0


@pytest.mark.parametrize("how", [LOGISTIC, HeadFirst(steps=5)], ids=["logistic", "steps"])
def test_it_is_the_same_again(how: HeadFirst) -> None:
    found = []
    for seed in (1, 2):
        model = bert(hidden_dropout_prob=0.3)
        torch.manual_seed(seed)  # nothing hangs on it
        fit(model, batches(rows(30)), how)
        found.append(weights(model))
    assert same(*found)


# --- steps ----------------------------------------------------------------------------------------


def roberta(**more: Any) -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=SIZE, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
        **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config)  # type: ignore[no-any-return]


def distilbert(**more: Any) -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=SIZE, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64,
        initializer_range=0.2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.DistilBertForSequenceClassification(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [roberta, distilbert])
def test_a_head_of_several_layers_takes_steps_and_moves_alone(
    make: Callable[..., nn.Module],
) -> None:
    model, data = make(), batches(rows(40))
    before = weights(model)
    model.eval()

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(**b).loss) * len(b["labels"]) for b in data) / 40

    at_first = loss()
    found = fit(model, data, HeadFirst(fit="logistic", lr=0.02), total_steps=300).fitted
    assert found is not None and (found["fit"], found["steps"]) == ("steps", 30)
    after = weights(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if not n.startswith(("roberta.", "distilbert."))}
    assert len(changed) == 4 and loss() < at_first - 0.01


def test_steps_are_those_of_adamw_on_the_head_by_itself() -> None:
    """Against features by hand, torch's AdamW on the linear layer, rows round and round."""
    model, data = bert(num_labels=3), batches(labelled(rows(21), [i % 3 for i in range(21)]))
    reference = nn.Linear(16, 3)
    reference.load_state_dict(model.classifier.state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for step in range(5):
        batch = data[step % 3]
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(pooled(model, [batch])), batch["labels"]).backward()
        optimizer.step()
    found = fit(model, data, HeadFirst(steps=5, lr=0.01)).fitted
    close(model.classifier.weight, reference.weight, atol=1e-6)
    close(model.classifier.bias, reference.bias, atol=1e-6)
    assert found is not None and (found["steps"], found["rows"]) == (5, 35)


@pytest.mark.parametrize(
    ("how", "total", "steps"),
    [
        (HeadFirst(steps=0.25), 40, 10),
        (HeadFirst(steps=7), 40, 7),
        (HeadFirst(fit="steps"), 40, 4),
        (HeadFirst(steps=0.1), 3, 1),
    ],
)
def test_steps_are_a_share_of_the_tasks_own_or_a_number(
    how: HeadFirst, total: int, steps: int
) -> None:
    assert fit(bert(), batches(rows(14)), how, total_steps=total).fitted["steps"] == steps  # type: ignore[index]


class Projected(nn.Module):
    """Its one layer above the encoder gives no logits yet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.own = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = torch.tanh(self.own(self.encoder(x)))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def test_a_layer_whose_output_is_not_the_logits_takes_steps() -> None:
    model = Projected()
    data = [{"x": torch.randn(12, 4), "labels": torch.arange(12) % 3}]
    assert fit(model, data, shared=model.encoder).fitted["fit"] == "steps"  # type: ignore[index]


def test_a_frozen_bias_stays() -> None:
    model = bert()
    model.classifier.bias.requires_grad_(False)
    before = model.classifier.bias.detach().clone()
    assert fit(model, batches(rows(20))).fitted["fit"] == "steps"  # type: ignore[index]
    assert torch.equal(model.classifier.bias, before)


# --- where there is nothing to fit ----------------------------------------------------------------


def test_a_language_model_has_no_fresh_head_which_is_said_once(
    said: Callable[[], list[str]],
) -> None:
    for _ in range(2):
        model = gpt2()
        before = weights(model)
        assert fit(model, None).fitted is None  # and no rows are asked for
        assert same(weights(model), before)
    assert said() == [
        "head_first: GPT2LMHeadModel has no fresh head to train, so none is fitted first"
    ]


def test_a_head_that_a_finished_task_uses_is_not_fitted_again(
    said: Callable[[], list[str]],
) -> None:
    """One head for all tasks: a second fit would forget the first task."""
    model, data = bert(), batches(rows(30))
    bound = fit(model, data, task="one", shared=model.bert)
    bound.end_task()
    head = model.classifier.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    bound.begin_task("two", optimizer, 10, model=model, data=data, shared=model.bert)
    assert bound.fitted is None and torch.equal(model.classifier.weight, head)
    assert len(said()) == 1
    bound.end_task()
    other = bert(seed=1)
    other.bert = model.bert
    optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(Refused, match="'one' is learned already, by another model"):
        bound.begin_task("one", optimizer, 10, model=other, data=data)
    bound.begin_task("three", optimizer, 10, model=other, data=data)
    assert bound.fitted is not None


def test_missing_rows_are_asked_for_and_empty_ones_refused() -> None:
    with pytest.raises(Refused, match=r"head_first reads the rows.*pass data="):
        fit(bert(), None)
    for how in (LOGISTIC, HeadFirst(steps=3)):
        with pytest.raises(Refused, match="no rows to fit the head to"):
            fit(bert(), [], how)


def test_batches_without_labels_are_refused() -> None:
    unlabelled = [{"input_ids": b["input_ids"]} for b in batches(rows(14))]
    with pytest.raises(Refused, match=r"no loss.*labels"):
        fit(bert(), unlabelled)


# --- PEFT -----------------------------------------------------------------------------------------


def lora(head: str = "SEQ_CLS", **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = bert(num_labels=3) if head == "SEQ_CLS" else gpt2()
    target = ["query"] if head == "SEQ_CLS" else ["c_attn"]
    config = peft.LoraConfig(task_type=head, r=2, target_modules=target, **more)
    return peft.get_peft_model(model, config)


def test_a_head_beside_adapters_is_the_tasks_own_and_is_fitted() -> None:
    """PEFT's `base_model` is the whole model: taken for the encoder, its head would be shared."""
    model = lora()
    data = batches(labelled(rows(40), [i % 3 for i in range(40)]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inner = model.get_base_model()
    x, y = pooled(inner, data), torch.cat([b["labels"] for b in data])
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(x.double().numpy(), y.numpy())
    bound = fit(model, data)
    assert bound.fitted is not None and bound.fitted["fit"] == "logistic"
    close(inner.classifier.modules_to_save.default.weight, theirs.coef_)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")
    }
    own = {n for n in bound.weights if n not in bound.shared}
    assert own == {f"task/classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}
    assert bound.shared and all(".lora_" in n for n in bound.shared)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_a_language_model_with_adapters_has_no_fresh_head(said: Callable[[], list[str]]) -> None:
    assert fit(lora("CAUSAL_LM"), None).fitted is None
    assert len(said()) == 1


@pytest.mark.parametrize("how", [LOGISTIC, HeadFirst(steps=3)], ids=["logistic", "steps"])
def test_a_head_that_rates_freeze_is_fitted_and_then_stays(how: HeadFirst) -> None:
    model, rates = bert(num_labels=3), replace(Rates.flat(), head=0.0)
    data = batches(labelled(rows(12), [i % 3 for i in range(12)]))
    recipe = Recipe(rates=rates, head_first=how, parts={"*.pooler.*": "layer.1"})
    optimizer = torch.optim.SGD(recipe.param_groups(model, lr=0.1))
    before = model.classifier.weight.detach().clone()
    bound = recipe.bind(model, optimizer, total_steps=9, data=data)
    fitted = model.classifier.weight.detach().clone()
    assert bound.fitted is not None and not torch.equal(fitted, before)
    model(**data[0]).loss.backward()
    optimizer.step()
    assert torch.equal(model.classifier.weight, fitted) and model.classifier.weight.grad is None


# --- resuming -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def trained(out: Path, how: HeadFirst, *, kill: int | None = None, resume: bool = False) -> Any:
    """A task of nine steps with dropout; `kill` ends it in the middle of an epoch."""

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == kill:
                raise Killed

    model = bert(hidden_dropout_prob=0.2, seed=3 if resume else 0)
    trainer = holdfast.Trainer(
        model=model, train_dataset=rows(22), data_collator=collate, shared=model.bert,
        args=arguments(out, num_train_epochs=3, gradient_accumulation_steps=2,
                       save_strategy="steps", save_steps=2),
        recipe=Recipe(head_first=how, methods=[LwF()]), callbacks=[Kill()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except Killed:
        assert kill is not None
    return trainer


@pytest.mark.parametrize("how", [LOGISTIC, HeadFirst(steps=0.5)], ids=["logistic", "steps"])
def test_a_trainer_that_goes_on_does_not_fit_again(
    how: HeadFirst, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", how)
    assert whole.bound.fitted is not None and whole.bound.step == 9
    trained(tmp_path / "cut", how, kill=5)
    monkeypatch.setattr(head_first.Head, "fit", None)
    again = trained(tmp_path / "cut", how, resume=True)
    assert again.bound.fitted is None
    assert same(weights(again.model), weights(whole.model))
    ours, theirs = (t.bound.state_dict() for t in (again, whole))
    assert same(ours["tensors"], theirs["tensors"]) and ours["meta"] == theirs["meta"]


def test_a_loop_that_goes_on_does_not_fit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training.loop import load_checkpoint, save_checkpoint

    data = batches(rows(36), 4)

    def steps(bound: Bound, model: nn.Module, start: int, stop: int) -> None:
        model.train()
        for batch in data[start:stop]:
            bound.optimizer.zero_grad()
            model(**batch).loss.backward()
            bound.optimizer.step()

    torch.manual_seed(0)
    whole = bert(hidden_dropout_prob=0.2)
    bound = fit(whole, data)
    steps(bound, whole, 0, 4)
    save_checkpoint(tmp_path / "checkpoint-4", bound, position={"batch": 4})
    steps(bound, whole, 4, 9)

    monkeypatch.setattr(head_first.Head, "fit", None)
    model = bert(hidden_dropout_prob=0.2, seed=9)
    again = fit(model, None, resuming=True)  # without rows, for none is read
    start = load_checkpoint(tmp_path / "checkpoint-4", again)["batch"]
    steps(again, model, start, 9)
    assert same(weights(model), weights(whole))
    assert same(again.state_dict()["tensors"], bound.state_dict()["tensors"])


def test_a_sequence_tells_what_each_head_took(tmp_path: Path) -> None:
    import models

    place = models.save_bert(tmp_path / "bert")
    tasks = [models.write_task(tmp_path, topic) for topic in ("mood", "question")]
    record = holdfast.run_sequence(
        str(place), tasks, Recipe(head_first=LOGISTIC), out=tmp_path / "run", epochs=0.5,
        max_length=16, progress=False,
    )  # fmt: skip
    assert list(record.head_first) == ["mood", "question"]
    for told in record.head_first.values():
        assert told["fit"] == "logistic" and told["rows"] > 20 and told["seconds"] > 0


# --- in files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{steps: 0.1}", HeadFirst(steps=0.1)),
        ("{fit: logistic}", HeadFirst(fit="logistic")),
        ("{steps: 40, lr: 0.01}", HeadFirst(steps=40, lr=0.01)),
        ("{}", HeadFirst()),
        ("true", HeadFirst()),
        ("false", None),
        ("null", None),
    ],
)
def test_a_recipe_file_says_it(text: str, expected: HeadFirst | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"head_first: {text}\n")
    recipe = Recipe.load(path)
    assert recipe.head_first == expected
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert ("head_first" in recipe.to_dict()) == (expected is not None)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"stesp": 3}, r"^r\.yaml: unknown key 'head_first\.stesp'; did you mean 'steps'\?"),
        ({"steps": 1.0}, r"^r\.yaml: head_first\.steps: 1\.0 is neither"),
        ({"steps": 0}, r"head_first\.steps"),
        ({"inverse_decay": 0}, r"head_first\.inverse_decay"),
        ({"lr": -1.0}, r"head_first\.lr"),
        ({"rows": 2.5}, r"head_first\.rows"),
        ({"fit": "ridge"}, r"head_first\.fit"),
        ({"fit": "logistic", "steps": 3}, r"head_first\.steps: a logistic fit takes no steps"),
        ("logistic", r"head_first must be true or a mapping.*\{rows: 1000\}"),
    ],
)
def test_mistakes_are_refused_by_name(value: Any, complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        Recipe.from_dict({"head_first": value}, where="r.yaml")


def test_python_takes_the_class_only() -> None:
    with pytest.raises(Refused, match=r"recipe\.head_first: must be a HeadFirst, not True"):
        Recipe(head_first=True)  # type: ignore[arg-type]


def test_the_page_names_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "head_first.md").read_text(encoding="utf-8")
    assert not [f.name for f in fields(HeadFirst) if f"`{f.name}`" not in page]


def test_recipes_without_it_keep_their_hash() -> None:
    """Runs are folders named by it: the keys of a recipe as they were before."""
    assert list(Recipe(name="plain").to_dict()) == [
        "kind", "schema", "name", "rates", "methods", "max_grad_norm",
    ]  # fmt: skip
