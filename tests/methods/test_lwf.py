"""LwF: the divergence by hand, and training against one that keeps the old model and runs it."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import models
import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.method import Method, View
from holdfast.errors import Refused, tell_once
from holdfast.methods import LwF
from holdfast.methods.common.answers import divergence
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, Encoder, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (LwF(), 0),
    (LwF(strength=0.3, temperature=1.0), 0),
    (LwF(rows="near"), 0),
]

Batch = dict[str, Tensor]


def second_task(method: LwF, **how: Any) -> tuple[ToyTraining, nn.Module]:
    """A toy in its second task, the encoder some steps on; the first model as it was before."""
    toy = ToyTraining(method, **how)
    toy.begin("one")
    toy.learn(0, 3)
    toy.end()
    toy.begin("two")
    teacher = copy.deepcopy(toy.models["one"]).eval()
    toy.learn(0, 3)
    return toy, teacher


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of Σ p log(p/q)."""
    return (p * (p.log() - q.log())).sum(-1).mean()


def gradients(toy: ToyTraining) -> dict[str, Tensor]:
    return {n: w.grad.clone() for n, w in toy.bound.weights.items() if w.grad is not None}


class Calls:
    """How often an encoder was run: its first layer, which nothing stands in for."""

    def __init__(self, encoder: nn.Module) -> None:
        self.count = 0
        first: Any = encoder.embeddings
        first.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


# --- the formula ----------------------------------------------------------------------------------


def test_divergence_of_classes_by_hand() -> None:
    before, now = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log(), torch.zeros(2, 2)
    one = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert divergence(before, now).item() == pytest.approx(one / 2)  # the second row has not moved
    other = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert divergence(before, now, reverse=True).item() == pytest.approx(other / 2)
    # T 2 takes the square roots of the odds, 4 to 2: (2/3, 1/3) beside (1/2, 1/2), times 4.
    warm = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert divergence(before, now, temperature=2.0).item() == pytest.approx(warm / 2)


def test_divergence_of_numbers_and_of_several_labels_by_hand() -> None:
    assert divergence(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]]), "numbers") == 2.25
    before = torch.tensor([[math.log(4.0), 0.0, 1.0]])  # the first label .8, the second .5
    now = torch.tensor([[0.0, math.log(4.0), 1.0]])
    one = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    other = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert divergence(before, now, "labels").item() == pytest.approx(one + other)


@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_is_that_of_a_reference_that_runs_the_old_model(dropout: bool) -> None:
    """With dropout the old head reads the training pass's own features: one draw."""
    toy, teacher = second_task(LwF(strength=30.0, temperature=3.0), dropout=dropout)
    old, model = toy.models["one"], toy.model
    old.classifier.zero_grad()
    with torch.no_grad():
        for w in model.encoder.parameters():
            w.add_(torch.randn_like(w) / 2)
    torch.manual_seed(5)
    toy.backward(3)
    ours = gradients(toy)
    assert not any(p.grad is not None for p in old.classifier.parameters())
    toy.optimizer.zero_grad()
    torch.manual_seed(5)
    batch = make_batch("two", 3)
    features = model.encoder(batch["tokens"])
    loss = nn.functional.cross_entropy(model.classifier(features), batch["labels"])
    p = (teacher(batch["tokens"]).logits / 3.0).softmax(-1).detach()
    q = (old.classifier(features) / 3.0).softmax(-1)
    (loss + 30.0 * 9.0 * kl(p, q)).backward()
    theirs = gradients(toy)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    assert 30.0 * 9.0 * kl(p, q) > 0.02 * loss


def test_a_step_runs_the_encoder_once() -> None:
    toy, _ = second_task(LwF())
    calls = Calls(toy.model.encoder)
    toy.learn(3, 5)
    assert calls.count == 2
    toy.backward(5, pieces=4)
    assert calls.count == 6


def test_the_first_task_is_learned_plainly() -> None:
    plain, ours = ToyTraining(None), ToyTraining(LwF(strength=100.0))
    for toy in (plain, ours):
        toy.begin("one")
        toy.learn()
    for name, w in plain.weights().items():
        assert torch.equal(ours.weights()[name], w)


# --- several old tasks, of several kinds ----------------------------------------------------------


class Chain:
    """Tasks of any number of outputs on one encoder, which wanders in place of learning."""

    def __init__(self, method: Method, *others: Method, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.encoder: nn.Module = Encoder().to(dtype).eval()
        self.bound = Recipe(methods=[*others, method]).unbound()
        self.dtype = dtype
        self.rows = [{"tokens": torch.randint(11, (5, 4))} for _ in range(4)]

    def begin(self, task: str, classes: int) -> Classifier:
        model = Classifier(classes, encoder=self.encoder).to(self.dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.bound.begin_task(task, optimizer, 10, model=model, data=self.rows)
        return model

    def wander(self) -> None:
        with torch.no_grad():
            for w in self.encoder.parameters():
                w.add_(torch.randn_like(w) / 4)

    def penalty(self, batch: Batch) -> Tensor:
        self.prepare()
        return self.bound.penalty(batch, self.bound.models[self.bound.task](**batch))

    def prepare(self) -> None:
        self.encoder.train()  # features are those of a training pass
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def test_old_heads_add_up_a_regression_among_them() -> None:
    """Three tasks before; one is called as a slot of the state might be."""
    chain = Chain(LwF(strength=2.0, temperature=1.0))
    for task, classes in (("one", 3), ("rows", 1), ("known", 4)):
        chain.begin(task, classes)
        chain.wander()
        chain.bound.end_task()
    chain.begin("now", 2)
    olds = {t: copy.deepcopy(chain.bound.models[t]) for t in chain.bound.finished}
    chain.wander()
    batch = chain.rows[2]
    expected = torch.zeros((), dtype=torch.float64)
    for task, old in olds.items():
        before, now = old(**batch).logits, chain.bound.models[task](**batch).logits
        if task == "rows":
            expected = expected + ((before - now) ** 2).sum() / 2 / 5
        else:
            expected = expected + kl(before.softmax(-1), now.softmax(-1))
    torch.testing.assert_close(chain.penalty(batch), 2.0 * expected, atol=1e-12, rtol=1e-12)
    assert expected > 0.01


def test_several_labels_a_row_are_each_held() -> None:
    chain = Chain(LwF(strength=1.0, temperature=1.0))
    old: Any = chain.begin("one", 3)
    old.config = type("Config", (), {"problem_type": "multi_label_classification"})
    chain.bound.end_task()
    chain.begin("two", 2)
    batch = chain.rows[0]
    p = old(**batch).logits.sigmoid().detach()
    chain.wander()
    q = old(**batch).logits.sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(chain.penalty(batch), expected.sum(-1).mean(), atol=1e-9, rtol=1e-9)


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Method):
    """Runs the model on other rows in its own penalty, as replay does."""

    name: ClassVar[str] = "elsewhere"

    def penalty(self, view: View) -> Tensor:
        logits: Tensor = view.forward({"tokens": torch.zeros(5, 4, dtype=torch.long)}).logits
        return 0 * logits.sum()


def test_the_forward_pass_of_another_method_is_not_taken_for_the_batch() -> None:
    found = []
    for others in ([], [Elsewhere()]):
        chain = Chain(LwF(), *others)
        chain.begin("one", 3)
        chain.bound.end_task()
        chain.begin("two", 3)
        chain.wander()
        found.append(chain.penalty(chain.rows[1]).item())
    assert found[0] == pytest.approx(found[1]) and found[0] > 1e-4


def test_a_pass_over_another_batch_is_not_taken_for_this_one() -> None:
    """A loop may run the model twice before it asks for the penalty, or a copy of it."""
    found = []
    for between in (0, 1, 2):
        chain = Chain(LwF())
        chain.begin("one", 3)
        chain.bound.end_task()
        chain.begin("two", 3)
        chain.wander()
        model = chain.bound.models["two"]
        chain.prepare()
        batch, other = chain.rows[1], chain.rows[0]
        outputs = model(**batch)
        if between == 1:
            model(**other)
        elif between == 2:
            copy.deepcopy(model)(**other)
        found.append(float(chain.bound.penalty(batch, outputs)))
    assert found[0] == pytest.approx(found[1]) == pytest.approx(found[2]) and found[0] > 1e-4


def test_a_model_in_training_can_be_saved_whole() -> None:
    """`torch.save(model)` and copies leave behind what the recipe sees of it."""
    chain = Chain(LwF())
    chain.begin("one", 3)
    chain.bound.end_task()
    chain.begin("two", 3)
    chain.wander()
    chain.prepare()
    model, file = chain.bound.models["two"], io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    batch = chain.rows[1]
    logits = model(**batch).logits
    features = chain.bound.features
    assert features is not None
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(**batch).logits, logits)
        assert chain.bound.features is features


@pytest.mark.parametrize("rows", ["all", "near"])
def test_a_language_model_has_no_old_head(rows: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and no step pays for it; a model of its own for each task is refused."""
    tell_once.cache_clear()
    model, batch = models.gpt2(), {"input_ids": torch.tensor([[3, 4, 5]])}
    bound = Recipe(methods=[LwF(rows=rows)]).unbound()
    for task in ("one", "two"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound.begin_task(task, optimizer, 3, model=model, shared=model, data=[batch])
        assert bound.penalty(batch, model(**batch)) == 0.0
        bound.end_task([batch])
    assert "no heads to hold the answers of" in caplog.text
    other = models.gpt2()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(Refused, match=r"head of 'one'.*kl_anchor"):
        bound.begin_task("three", optimizer, 3, model=other, shared=other, data=[batch])


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_found_in_any_order_and_division_and_others_refused() -> None:
    chain = Chain(LwF())
    chain.rows.append(chain.rows[0])  # read twice
    chain.begin("one", 3)
    chain.bound.end_task()
    chain.begin("two", 3)
    chain.wander()
    tokens = torch.cat([b["tokens"] for b in chain.rows])
    each = torch.stack([chain.penalty({"tokens": row[None]}).detach() for row in tokens])
    picked = torch.tensor([7, 3, 3, 19, 0])
    shuffled = chain.penalty({"tokens": tokens[picked]})
    torch.testing.assert_close(shuffled, each[picked].mean(), atol=1e-12, rtol=1e-12)
    assert each.unique().numel() > 10
    changed = tokens[picked].clone()
    changed[4, 2] = (changed[4, 2] + 1) % 11
    with pytest.raises(Refused, match=r"lwf: a row was not among those read.*changed at random"):
        chain.penalty({"tokens": changed})


def bert_pair(head: str = "SequenceClassification") -> tuple[Any, Any]:
    one, two = models.bert(head, seed=0), models.bert(head, seed=1, num_labels=3)
    two.bert = one.bert
    return one, two


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_padding_changes_neither_the_row_nor_its_answer(head: str) -> None:
    """Of tags, a row's divergence is the mean over its own tokens."""
    one, two = bert_pair(head)
    tokenizer = models.tokenizer()
    texts = ["a film", "a good book and a bad plot", "who was the man", "not very fine", "red"]
    rows = [tokenizer(text) for text in texts]
    bound = Recipe(methods=[LwF(strength=1.0)]).unbound()
    alone = [dict(tokenizer.pad([row], return_tensors="pt")) for row in rows]
    for task, model in (("one", one), ("two", two)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound.begin_task(task, optimizer, 3, model=model, data=alone)
        if task == "one":
            bound.end_task()
    before = copy.deepcopy(one)
    with torch.no_grad():
        for w in one.bert.parameters():
            w.add_(torch.randn_like(w) / 20)
    together = dict(tokenizer.pad(rows, return_tensors="pt"))
    assert not together["attention_mask"].all()
    two.train()
    whole = bound.penalty(together, two(**together))
    each = [bound.penalty(batch, two(**batch)) for batch in alone]
    torch.testing.assert_close(whole, torch.stack(each).mean(), atol=1e-6, rtol=1e-5)
    p, q = (m.eval()(**alone[1]).logits.div(2).softmax(-1) for m in (before, one))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(each[1], expected, atol=1e-6, rtol=1e-4)
    assert whole > 1e-3


# --- going on after a stop ------------------------------------------------------------------------


def test_answers_are_loaded_and_no_row_is_read_again() -> None:
    toy, _ = second_task(LwF())
    saved = toy.save()
    again = ToyTraining(LwF())
    for task in ("one", "two"):
        again.add_model(task, seed=50)
    for task, model in again.models.items():
        model.load_state_dict(saved["models"][task])
    calls = Calls(again.models["two"].encoder)
    optimizer = torch.optim.AdamW(again.models["two"].parameters(), lr=0.02, weight_decay=0.1)

    def rows() -> Iterator[Batch]:
        raise AssertionError("read again")
        yield {}

    again.bound.begin_task("two", optimizer, 9, model=again.models["two"], data=rows, resuming=True)
    state = toy.bound.state_dict()
    again.bound.load_state_dict({**state, "meta": json.loads(saved["meta"])})
    assert calls.count == 0
    again.bound.models |= again.models
    kept, loaded = (b.states["lwf"].tensors for b in (toy.bound, again.bound))
    assert torch.equal(kept["answers"]["one"], loaded["answers"]["one"])
    found = []
    for each in (toy, again):
        batch = make_batch("two", 4)
        torch.manual_seed(3)
        found.append(each.bound.penalty(batch, each.models["two"].train()(**batch)))
    assert torch.equal(found[0], found[1]) and found[0] > 0


def test_answers_go_when_the_task_ends_and_cost_what_is_said() -> None:
    toy, _ = second_task(LwF())
    state, rows = toy.bound.states["lwf"], 9 * 8
    assert state.bytes() == rows * (3 * 4 + 8)
    toy.end()
    assert state.bytes() == 0 and not state.cache


def test_strength_may_be_another_between_tasks_only() -> None:
    toy, _ = second_task(LwF())
    other = Recipe(methods=[LwF(strength=3.0)]).unbound()
    with pytest.raises(Refused, match="saved by"):
        other.load_state_dict(toy.bound.state_dict())
    toy.end()
    other.load_state_dict(toy.bound.state_dict())


# --- precision, compiled models -------------------------------------------------------------------


def test_bfloat16_models_are_compared_in_float32() -> None:
    """A change of 2^-9 of a probability is lost in bfloat16's logarithms."""
    chain = Chain(LwF(strength=1.0, temperature=1.0), dtype=torch.bfloat16)
    old = chain.begin("one", 3)
    chain.bound.end_task()
    chain.begin("two", 2)
    batch = chain.rows[0]
    before = old(**batch).logits.float().detach()
    with torch.no_grad():
        old.classifier.bias.add_(torch.tensor([0.06, 0.0, 0.0], dtype=torch.bfloat16))
    now = old(**batch).logits.float()
    found = chain.penalty(batch)
    assert found.dtype is torch.float32
    expected = kl(before.softmax(-1), now.softmax(-1))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None


class Traced(Classifier):
    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Output:  # type: ignore[override]
        out = super().forward(tokens, labels)
        return Output(out.logits, out.loss)


@pytest.mark.parametrize("when", ["before its features are asked for", "after"])
def test_a_compiled_model_is_held_as_well(when: str) -> None:
    """Code compiled before the hook was there hides the features: they are computed again."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        one, bound = Traced(), Recipe(methods=[LwF()]).unbound()
        two = Traced(encoder=one.encoder)
        for module in two.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        called: Any = torch.compile(two, backend="aot_eager") if compiled else two
        batch = make_batch("two", 0)
        if when != "after":
            called(**batch)
        for task, model in (("one", one), ("two", two)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            bound.begin_task(task, optimizer, 3, model=model, data=[batch])
            if task == "one":
                bound.end_task()
        for _ in range(3):
            optimizer.zero_grad()
            out = called(**batch)
            (out.loss + bound.penalty(batch, out)).backward()
            optimizer.step()
        found.append({n: w.detach().clone() for n, w in bound.weights.items()})
    for name, w in found[0].items():
        torch.testing.assert_close(found[1][name], w, atol=1e-6, rtol=1e-5, msg=name)
    torch._dynamo.reset()
