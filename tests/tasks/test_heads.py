"""One head for all tasks: it grows, labels are told by name, prototypes are class means."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    RobertaConfig,
)

from holdfast import HeadFirst, LoRA, LwF, Recipe, Refused
from holdfast.engine.head_first import KNOWN
from holdfast.engine.peft import adapt
from holdfast.tasks import Row, Task
from holdfast.tasks.kinds import evaluate, generation, kind_named
from holdfast.tasks.kinds.classification import KIND
from holdfast.tasks.kinds.heads import OneHead, Prototypes, answering, headed, with_classes
from holdfast.tasks.scores import score

WORDS = ["the film was good", "a plot", "who is not cold ?", "red " * 8, "blue book", "dull cast"]


def task(name: str, labels: tuple[str, ...] | None, said: str = "", **more: Any) -> Task:
    """Rows of WORDS; said: the initial letter of each one's label."""
    initials = {label[0]: i for i, label in enumerate(labels or ())}
    rows = tuple(
        Row(w, None, initials[said[i]] if labels else i / 4)
        for i, w in enumerate(WORDS[: len(said) or None])
    )
    plain = {"metric": "accuracy" if labels else "spearman", "source": "here", "selection": ()}
    return Task(**plain | {"evaluation": rows} | more, name=name, labels=labels, train=rows)


TOKENS = models.tokenizer()
COLLATE = DataCollatorWithPadding(TOKENS)
ONE = task("one", ("no", "yes"), "nynyny")
SOME, REST = (replace(task(name, ("no", "yes"), "nynyny"), train=ONE.train[rows])
              for name, rows in (("some", slice(4)), ("rest", slice(4, 6))))  # fmt: skip
TWO = task("two", ("maybe", "yes", "often"), "myoymo")  # yes is known, and second here


def bert(**more: Any) -> Any:
    return models.bert(**{"num_labels": 2, "id2label": {0: "no", 1: "yes"}} | more)


def small(kind: str) -> Any:
    """A classifier with a head of two layers, or of one."""
    torch.manual_seed(3)
    sizes = {"vocab_size": models.SIZE, "num_labels": 2}
    if kind == "bert":
        return bert(seed=3)
    config: Any = (
        RobertaConfig(**sizes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16, max_position_embeddings=70)
        if kind == "roberta"
        else DistilBertConfig(**sizes, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


# --- growing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_what_a_head_has_is_kept_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, labels = small(kind), ("no", "yes", "maybe", "often")
    before = models.weights(model)
    KIND.grow(model, labels, seed=7)
    torch.manual_seed(7)
    drawn = models.weights(
        AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(**{**model.config.to_dict(), "num_labels": 4})
        )
    )
    grown = 0
    for name, w in model.named_parameters():
        old = before[name]
        assert torch.equal(w[: len(old)], old)
        assert torch.equal(w[len(old) :], drawn[name][len(old) :])
        grown += len(w) > len(old)
    assert grown == 2  # the last layer's weight and bias
    inputs = TOKENS(WORDS, padding=True, return_tensors="pt")
    if kind != "bert":
        inputs.pop("token_type_ids")
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == dict(enumerate(labels))
    wanted = model(**inputs, labels=torch.tensor([3] * len(WORDS)))
    assert wanted.logits.shape == (len(WORDS), 4)
    assert torch.equal(loaded(**inputs).logits, wanted.logits)


def test_a_head_grows_above_adapters() -> None:
    plain, adapted = bert(seed=3), adapt(bert(seed=3), LoRA(rank=2))
    before = {name: p for name, p in adapted.named_parameters() if name.startswith("bert.")}
    for model in (plain, adapted):
        KIND.grow(model, ("no", "yes", "maybe"), seed=7)
    assert torch.equal(adapted.classifier.weight, plain.classifier.weight)
    assert all(p is before[n] for n, p in adapted.named_parameters() if n.startswith("bert."))


@pytest.mark.parametrize("size", [2, 3])
def test_the_head_of_another_kind_is_no_head_of_tags(size: int, tmp_path: Path) -> None:
    """Both are called `classifier`: it is dropped, whether it would fit or not."""
    tags: Any = kind_named("tokens")
    saved = bert(num_labels=size, id2label={i: f"{i}" for i in range(size)}, seed=3)
    saved.save_pretrained(tmp_path)
    made = tags.load_model(str(tmp_path), task("tags", ("O", "X"), "OXOXOX"), seed=5)
    assert not torch.equal(made.classifier.weight[:2], saved.classifier.weight[:2])
    assert torch.equal(made.base_model.embeddings.word_embeddings.weight,
                       saved.base_model.embeddings.word_embeddings.weight)  # fmt: skip
    assert "dropped" in str(tags.dropped(str(tmp_path)))


def test_a_head_grows_only_by_new_labels() -> None:
    kind: Any = headed(KIND, "shared", [ONE, TWO, task("three", ("often", "no"), "onon")])
    model = bert()
    assert kind.labels == {
        "one": ("no", "yes"),
        "two": ("no", "yes", "maybe", "often"),
        "three": ("no", "yes", "maybe", "often"),
    }
    assert kind.add_head(model, TWO, seed=1) is model and model.num_labels == 4
    assert getattr(model, KNOWN) == 2
    before = models.weights(model)
    three = task("three", ("often", "no"), "onon")
    assert kind.add_head(model, three, seed=2) is model and models.same(
        models.weights(model), before
    )
    assert getattr(model, KNOWN) == 4  # nothing in it is fresh


# --- labels by name -------------------------------------------------------------------------------


class Says(nn.Module):
    """Gives the classes that it was told, row by row, in batches of one."""

    def __init__(self, classes: list[int], size: int) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.zeros(())), size
        self.by_row = {len(TOKENS(w)["input_ids"]): c for w, c in zip(WORDS, classes, strict=True)}

    def forward(self, attention_mask: Tensor, **_: Any) -> Any:
        said = torch.tensor([self.by_row[int(n)] for n in attention_mask.sum(1)])
        return type("Out", (), {"logits": nn.functional.one_hot(said, self.size).float()})


def test_labels_are_those_of_the_head_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of the head while learning, the task's own when scored: others are wrong."""
    monkeypatch.setattr(f"{__name__}.WORDS", ["a " * (i + 1) for i in range(6)])
    two = task("two", ("maybe", "yes", "often"), "myoymo")
    kind: Any = headed(KIND, "shared", [ONE, two])
    rows = kind.encode(two.train, two, TOKENS, max_length=16)
    # no 0, yes 1, maybe 2, often 3
    assert [r["labels"] for r in rows] == [2, 1, 3, 1, 2, 3]
    assert [r["labels"] for r in kind.encode(ONE.train, ONE, TOKENS, max_length=16)] == [0, 1] * 3
    model = Says([2, 0, 3, 1, 3, 0], 4)
    found = kind.measure(model, rows, two, COLLATE)
    # its own: maybe 0, yes 1, often 2; no, of another task, comes after them
    assert found.tolist() == [[0, 0], [1, 3], [2, 2], [1, 1], [0, 2], [2, 3]]
    assert evaluate(model, rows, two, COLLATE, kind) == pytest.approx(3 / 6)


def test_f1_counts_classes_of_other_tasks_as_wrong() -> None:
    truth, said = [1, 1, 0, 0, 1], [1, 2, 0, 1, 5]
    # of class 1: one hit, one false alarm, two misses
    assert score("f1", truth, said, classes=2) == pytest.approx(2 / (2 + 1 + 2))
    three = score("f1", [0, 1, 2, 2], [0, 3, 2, 1], classes=3)
    assert three == pytest.approx((1.0 + 0.0 + 2 / 3) / 3)  # no mean over a fourth class


# --- methods that know old heads ------------------------------------------------------------------


def batches(kind: Any, asked: Task, size: int = 2) -> list[dict[str, Tensor]]:
    rows = list(kind.encode(asked.train, asked, TOKENS, max_length=16))
    return [dict(COLLATE(part)) for part in models.pieces(rows, size)]


def second_task(**recipe: Any) -> tuple[Any, Any, Any, Any]:
    """Bound to TWO after SOME and REST, with one head; the model as it was before it grew."""
    kind: Any = headed(KIND, "shared", [SOME, REST, TWO])
    model, made = bert(seed=1), Recipe(**recipe)
    bound = made.unbound(seed=0)
    for old in (SOME, REST):
        bound.remember(old.name, model, batches(kind, old), shared=model.base_model)
    before = copy.deepcopy(model).eval()
    kind.add_head(model, TWO, seed=5)
    grown = models.weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound.begin_task("two", optimizer, 4, model=model, shared=model.base_model,
                     data=batches(kind, TWO))  # fmt: skip
    return bound, model, before, grown


def features(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the head reads: (rows, width)."""
    return model.base_model(**{k: v for k, v in batch.items() if k != "labels"})[1]  # type: ignore[no-any-return]


def nearness(model: Any, asked: Task, batch: dict[str, Tensor]) -> Tensor:
    """min(1, d/h) of each row of a batch, by the moment of a task's rows: (rows,)."""
    one = nn.functional.pad(features(model, batch), (0, 1), value=1.0)
    old = COLLATE(list(headed(KIND, "shared", [asked]).encode(asked.train, asked, TOKENS,
                                                              max_length=16)))  # fmt: skip
    x = nn.functional.pad(features(model, dict(old)), (0, 1), value=1.0)
    moment = x.T @ x / len(x)
    inverse = (moment + 0.3 * moment.diagonal().mean() * torch.eye(len(moment))).inverse()
    return ((moment @ inverse).trace() / (one @ inverse * one).sum(1)).clamp(max=1).detach()


@pytest.mark.parametrize("rows", ["all", "near"])
def test_lwf_holds_the_old_outputs_over_the_old_labels(rows: Any) -> None:
    """As a twin that keeps the old model: one term, whose new outputs do not count.

    A row is near if it is near one of the old tasks.
    """
    bound, model, before, _ = second_task(methods=[LwF(strength=3.0, temperature=2.0, rows=rows)])
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(w.numel())) / 4)
    model.train()
    batch = batches(headed(KIND, "shared", [ONE, TWO]), TWO, size=6)[0]
    penalty = bound.penalty(batch, model(**batch))
    p = (before.classifier(features(before, batch)) / 2).softmax(-1).detach()
    q = (model.classifier(features(model, batch))[:, :2] / 2).softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    if rows == "near":
        shares = [nearness(before, old, batch) for old in (SOME, REST)]
        assert bool((shares[0] > shares[1]).any()) and bool((shares[0] < shares[1]).any())
        each = each * torch.maximum(*shares)
    torch.testing.assert_close(penalty, 3.0 * 4.0 * each.mean(), rtol=1e-3, atol=1e-6)
    penalty.backward()
    grad = model.classifier.weight.grad
    assert bool(grad[:2].any()) and not bool(grad[2:].any())


def test_of_a_grown_head_only_what_is_new_is_fitted_first() -> None:
    from sklearn.linear_model import LogisticRegression

    bound, model, before, grown = second_task(head_first=HeadFirst())
    now = models.weights(model)
    assert bound.fitted["fit"] == "logistic"
    changed = {n for n in now if not torch.equal(now[n], grown[n])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert torch.equal(now["classifier.weight"][:2], before.classifier.weight)
    assert torch.equal(now["classifier.bias"][:2], before.classifier.bias)
    kind = headed(KIND, "shared", [ONE, TWO])
    every = COLLATE(list(kind.encode(TWO.train, TWO, TOKENS, max_length=16)))
    truth = every.pop("labels").numpy()
    with torch.no_grad():
        x = before.base_model(**every)[1].double().numpy()
    fitted = LogisticRegression(max_iter=1000).fit(x, truth)  # of yes, maybe, often
    assert fitted.classes_.tolist() == [1, 2, 3]
    np.testing.assert_allclose(now["classifier.weight"][2:], fitted.coef_[1:], atol=2e-3)
    np.testing.assert_allclose(now["classifier.bias"][2:], fitted.intercept_[1:], atol=2e-3)


# --- prototypes -----------------------------------------------------------------------------------


def fitted(kind: Any, model: Any, *asked: Task) -> Any:
    for i, each in enumerate(asked):
        if i:
            kind.add_head(model, each, seed=i)
        kind.fit(model, kind.encode(each.train, each, TOKENS, max_length=16), each, COLLATE)
    return model.eval()


def slowly(model: Any, by_class: dict[int, list[str]], texts: list[str], spread: bool) -> Tensor:
    """d of each text, from the features themselves: (texts, classes)."""

    def z(text: str) -> Tensor:
        with torch.no_grad():
            pooled: Tensor = model.base_model(**TOKENS(text, return_tensors="pt"))[1][0]
        return pooled.double()

    found = []
    for text in texts:
        d = []
        for c in sorted(by_class):
            members = torch.stack([z(t) for t in by_class[c]])
            mean = members.mean(0)
            variance = (members - mean).square().mean(0).sum() if spread else 0.0
            d.append((z(text) - mean).square().sum() + variance)
        found.append(torch.stack(d))
    return torch.stack(found)


@pytest.mark.parametrize("spread", [False, True])
def test_prototypes_are_class_means(spread: bool) -> None:
    """Over both tasks, of which yes has rows in each; the encoder does not move."""
    kind: Any = headed(KIND, "variance_prototype" if spread else "prototype", [ONE, TWO])
    assert isinstance(kind, Prototypes)
    model = bert(seed=2)
    encoder = models.weights(model.base_model)
    fitted(kind, model, ONE, TWO)
    assert models.same(models.weights(model.base_model), encoder)
    assert model.config.prototype_rows == [3, 5, 2, 2]
    of: dict[int, list[str]] = {c: [] for c in range(4)}
    for asked in (ONE, TWO):
        names = [("no", "yes", "maybe", "often").index(n) for n in asked.labels or ()]
        for row in asked.train:
            of[names[int(row.label)]].append(row.text)
    inputs = TOKENS(WORDS, padding=True, return_tensors="pt")
    with torch.no_grad():
        got = model(**inputs).logits.double().softmax(-1)
    d = slowly(model, of, WORDS, spread)
    torch.testing.assert_close(got, (-d).softmax(-1), rtol=1e-4, atol=1e-6)
    about = {"labels": ("no", "yes", "maybe", "often")}
    said = KIND.predict(model, about, WORDS, None, TOKENS, max_length=16, batch=4)
    assert list(said[0].probabilities.values()) == pytest.approx(got[0].tolist(), abs=1e-6)
    assert said[0].out_of_domain is None
    for _ in range(2):  # and the model is as it was
        with answering(KIND, model) as asked:
            told = asked.predict(model, about, WORDS, None, TOKENS, max_length=16, batch=4)
        least = d.min(-1).values.tolist()
        assert [each.out_of_domain for each in told] == pytest.approx(least, rel=1e-4, abs=1e-5)
        assert [each.label for each in told] == [about["labels"][int(i)] for i in d.argmin(-1)]
        assert list(told[0].probabilities.values()) == pytest.approx(got[0].tolist(), abs=1e-6)
    assert KIND.predict(model, about, WORDS, None, TOKENS, max_length=16, batch=4) == said


@pytest.mark.parametrize("head", ["prototype", "variance_prototype"])
def test_the_order_of_tasks_and_saving_change_no_prototype(head: str, tmp_path: Path) -> None:
    one, other = (headed(KIND, head, order) for order in ([ONE, TWO], [TWO, ONE]))
    first = fitted(one, bert(seed=2), ONE, TWO)
    back: Any = bert(seed=2, num_labels=3, id2label=dict(enumerate(TWO.labels or ())))
    second = fitted(other, back, TWO, ONE)
    order = [["maybe", "yes", "often", "no"].index(n) for n in ("no", "yes", "maybe", "often")]
    for name in ("weight", "bias"):
        a, b = getattr(first.classifier, name), getattr(second.classifier, name)[order]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    between = fitted(one, bert(seed=2), ONE)
    between.save_pretrained(tmp_path)
    again: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kind: Any = one
    kind.add_head(again, TWO, seed=9)
    kind.fit(again, kind.encode(TWO.train, TWO, TOKENS, max_length=16), TWO, COLLATE)
    assert torch.equal(again.classifier.weight, first.classifier.weight)
    assert torch.equal(again.classifier.bias, first.classifier.bias)


def test_a_class_without_rows_is_never_said() -> None:
    bare = task("bare", ("no", "yes", "often"), "nyny")
    kind: Any = headed(KIND, "prototype", [bare])
    model = fitted(kind, bert(num_labels=3), bare)
    with torch.no_grad():
        shares = model(**TOKENS(WORDS, padding=True, return_tensors="pt")).logits.softmax(-1)
    assert float(shares[:, 2].max()) == 0.0
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(WORDS)))


def test_the_distance_to_a_lone_row_is_0_and_never_below() -> None:
    kind: Any = headed(KIND, "prototype", [ONE])
    lone = replace(ONE, train=(replace(ONE.train[0], label=0), replace(ONE.train[1], label=1)))
    model = fitted(kind, bert(seed=2), lone)
    with answering(KIND, model) as asked:
        said = asked.predict(model, {"labels": ("no", "yes")}, WORDS, None, TOKENS, max_length=16,
                             batch=4)  # fmt: skip
    far: list[Any] = [each.out_of_domain for each in said]
    assert min(far) >= 0 and far[:2] == pytest.approx([0, 0], abs=1e-5) and min(far[2:]) > 1e-3
    assert [each.label for each in said[:2]] == ["no", "yes"]


@pytest.mark.parametrize("head", ["prototype", "variance_prototype"])
def test_further_classes_need_no_training_and_move_none(head: str) -> None:
    """As if their rows had come as a task; the model that there was is left alone."""
    more = task("more", ("maybe", "often"), "moommo")
    both = fitted(headed(KIND, head, [ONE, more]), bert(seed=2), ONE, more)
    model = fitted(headed(KIND, head, [ONE]), bert(seed=2), ONE)
    before, state = models.weights(model), torch.get_rng_state()
    rows = {name: [replace(r, label=None) for r in more.train if r.label == i]
            for i, name in enumerate(more.labels or ())}  # fmt: skip
    about = {"name": "one", "labels": ["no", "yes"], "metric": "accuracy", "pairs": False,
             "kind": "classification"}  # fmt: skip
    made, labels = with_classes(model, about, rows, TOKENS, max_length=16)
    assert labels == ["no", "yes", "maybe", "often"] == list(made.config.id2label.values())
    assert models.same(models.weights(model), before) and len(model.config.id2label) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert made.base_model is model.base_model
    for name in ("weight", "bias"):
        new = getattr(made.classifier, name)
        assert torch.equal(new[:2], before[f"classifier.{name}"])
        torch.testing.assert_close(new, getattr(both.classifier, name), rtol=1e-6, atol=1e-7)
    assert made.config.prototype_rows == [3, 3, 3, 3]
    for wrong, why in [
        ({"yes": rows["often"]}, "'yes' is a class already"),
        ({"x": []}, "no rows"),
    ]:
        with pytest.raises(Refused, match=why):
            with_classes(model, about, wrong, TOKENS, max_length=16)
    with pytest.raises(Refused, match="its head is not of prototypes: new classes need training"):
        with_classes(bert(), about, rows, TOKENS, max_length=16)


# --- what cannot be -------------------------------------------------------------------------------


def test_what_cannot_share_a_head_is_refused() -> None:
    numbers = task("n", None)
    assert headed(KIND, "task", [ONE, numbers]) is KIND
    assert isinstance(headed(KIND, "shared", [numbers, task("m", None)]), OneHead)
    with pytest.raises(Refused, match=r"--head shared: numbers have no classes \(n\); --head task"):
        headed(KIND, "shared", [ONE, numbers])
    with pytest.raises(Refused, match=r"--head prototype: numbers have no classes"):
        headed(KIND, "prototype", [numbers])
    text = task("t", None, kind="generation", metric="likelihood")
    with pytest.raises(Refused, match="kind generation have no heads: they share the whole model"):
        headed(generation.KIND, "shared", [text, text])
    theirs: Any = SimpleNamespace(HEADS=True)  # a kind of another package
    with pytest.raises(Refused, match="the heads of kind classification cannot grow"):
        headed(theirs, "shared", [ONE])
    wrapped: Any = nn.Sequential(bert())
    wrapped.config = wrapped[0].config
    with pytest.raises(Refused, match="of Sequential cannot grow by labels"):
        KIND.grow(wrapped, ("no", "yes", "maybe"), seed=0)
    several = Task(**{**vars(ONE), "train": (Row("a", None, "no yes"),)})
    with pytest.raises(Refused, match="the rows of one do not have one class each"):
        headed(KIND, "shared", [several])


def test_a_head_that_cannot_be_prototypes_is_refused() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("gpt2", vocab_size=models.SIZE, n_embd=16, n_layer=1, n_head=2,
                             n_positions=64, num_labels=2, pad_token_id=0)
    )  # fmt: skip
    with pytest.raises(Refused, match="does not end in a linear layer with a bias"):
        fitted(headed(KIND, "prototype", [ONE]), model, ONE)
