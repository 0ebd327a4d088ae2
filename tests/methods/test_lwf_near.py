"""LwF on near rows: shares by hand, and against a loop that inverts M and keeps the old model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import transformers
from test_lwf import Chain
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.head_first import HeadFirst
from holdfast.errors import Refused
from holdfast.methods import LwF, lwf
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

Batch = dict[str, Tensor]
NEAR = LwF(rows="near", strength=1.0, temperature=1.0)


def kept(bound: Bound, task: str = "one") -> Tensor:
    """The shares of rows by an old task, in the order of the rows' numbers."""
    return bound.states["lwf"].tensors["answers"][f"{task}/shares"]


@pytest.fixture(autouse=True)
def a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """ε is a tenth of M's mean diagonal here, M of 400 rows: round numbers by hand."""
    monkeypatch.setattr(lwf, "RIDGE", 0.1)
    monkeypatch.setattr(lwf, "MEASURED", 400)


def slow(old: Tensor, new: Tensor) -> Tensor:
    """The equation as it stands: M⁻¹ made, and each row by itself."""
    old, new = (torch.cat([x.double(), torch.ones(len(x), 1)], 1) for x in (old, new))
    m = sum((torch.outer(x, x) for x in old), torch.zeros(1)) / len(old)
    inverse = torch.linalg.inv(m + 0.1 * m.trace() / len(m) * torch.eye(len(m)))
    d = torch.stack([x @ inverse @ x for x in old]).mean()
    return torch.stack([torch.clamp(d / (x @ inverse @ x), max=1.0) for x in new])


class Scale(nn.Module):
    """Features that are the inputs, until the weight moves."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Bare(nn.Module):
    """A head on rows of numbers."""

    def __init__(self, inputs: int, encoder: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head or nn.Linear(inputs, 2)

    @property
    def base_model(self) -> nn.Module:
        return self.encoder

    def get_output_embeddings(self) -> None:
        pass

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.encoder(x)))


def told_apart(old: Tensor, new: Tensor, method: LwF = NEAR) -> tuple[Bound, Bare]:
    """A bound in its second task; rows (n, inputs) of both."""
    torch.manual_seed(0)
    bound, encoder = Recipe(methods=[method]).unbound(), Scale()
    for task, rows in (("one", old), ("two", new)):
        model = Bare(old.shape[1], encoder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound.begin_task(task, optimizer, 3, model=model, data=[{"x": rows}])
        if task == "one":
            bound.end_task([{"x": rows}])
    return bound, model


def shares(bound: Bound, rows: Tensor, task: str = "one") -> Tensor:
    """The shares of rows (n, inputs), in their own order."""
    bound.inputs = {"x": rows}
    return lwf.answers.recall(
        bound.states["lwf"], bound.views["lwf"].rows, where="", remedy=""
    )[f"{task}/shares"]  # fmt: skip


# --- the formula ----------------------------------------------------------------------------------


def test_shares_and_the_penalty_by_hand() -> None:
    """Old rows 1 and 3: M = (5 2; 2 1), ε = .3, h = (1.3 x² − 4 x + 5.3) / 2.89, d = 3.8 / 2.89."""
    new = torch.tensor([[10.0], [-1.0], [3.0], [1.0], [2.0]])
    bound, model = told_apart(torch.tensor([[1.0], [3.0]]), new)
    expected = torch.tensor([3.8 / 95.3, 3.8 / 10.6, 3.8 / 5.0, 1.0, 1.0])
    torch.testing.assert_close(shares(bound, new), expected, atol=1e-6, rtol=1e-5)
    old: Any = bound.models["one"]
    before = old.head(new).softmax(-1).detach()
    with torch.no_grad():
        model.encoder.by.fill_(0.7)  # type: ignore[union-attr]
    now = old.head(0.7 * new).softmax(-1)
    each = (before * (before / now).log()).sum(1)
    found = bound.penalty({"x": new}, model(new))
    torch.testing.assert_close(found, (expected * each).sum() / 5, atol=1e-6, rtol=1e-4)
    assert 0 < found < 0.7 * each.mean()


def test_rows_of_the_old_distribution_count_and_those_far_off_hardly() -> None:
    draw = torch.Generator().manual_seed(0)
    spread, middle = torch.tensor([2.0, 1.0, 1.5, 1.0]), torch.tensor([1.0, 0.0, -1.0, 0.5])
    old, same = (torch.randn(3000, 4, generator=draw) * spread + middle for _ in range(2))
    wide, thin = (middle + 4 * torch.eye(4)[i] for i in (0, 1))
    new = torch.cat([same, torch.stack([middle, wide, thin, middle + 8 * spread])])
    bound, _ = told_apart(old, new, LwF(rows="near"))
    found = shares(bound, new)
    assert found[:3000].mean() > 0.85 and found.max() == 1.0
    at_middle, at_wide, at_thin, far = found[3000:].tolist()
    assert at_middle == 1.0 and far < 0.04
    assert at_wide > 1.8 * at_thin  # as far off, but where the old rows are spread wider


def test_gradient_is_that_of_a_reference() -> None:
    toy = ToyTraining(LwF(rows="near", strength=30.0, temperature=3.0), dropout=False)
    toy.begin("one")
    toy.learn(0, 3)
    toy.end()
    toy.begin("two")
    teacher: Any = copy.deepcopy(toy.models["one"]).eval()
    toy.learn(0, 3)
    model, old = toy.model, toy.models["one"]
    with torch.no_grad():
        for w in model.encoder.parameters():
            w.add_(torch.randn_like(w) / 2)
    toy.backward(3)
    ours = {n: w.grad.clone() for n, w in toy.bound.weights.items() if w.grad is not None}
    toy.optimizer.zero_grad()
    batch = make_batch("two", 3)
    with torch.no_grad():
        rows = torch.cat([make_batch("one", step)["tokens"] for step in range(3)])
        share = slow(teacher.encoder(rows), teacher.encoder(batch["tokens"])).float()
        p = (teacher.classifier(teacher.encoder(batch["tokens"])) / 3.0).softmax(-1)
    features = model.encoder(batch["tokens"])
    loss = nn.functional.cross_entropy(model.classifier(features), batch["labels"])
    q = (old.classifier(features) / 3.0).softmax(-1)
    (loss + 30.0 * 9.0 * (share * (p * (p / q).log()).sum(1)).mean()).backward()
    for name, w in toy.bound.weights.items():
        torch.testing.assert_close(ours[name], w.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert share.min() < 0.8 and share.max() == 1.0


def test_order_and_division_of_rows_change_nothing() -> None:
    found = []
    for pieces in (1, 4, 20):
        chain = Chain(NEAR)
        tokens = torch.cat([b["tokens"] for b in chain.rows])
        old = torch.randint(11, (20, 4), generator=torch.Generator().manual_seed(5))
        order = torch.randperm(20, generator=torch.Generator().manual_seed(pieces))
        chain.begin("one", 3)
        chain.bound.end_task([{"tokens": t} for t in old[order].chunk(pieces)])
        chain.rows = [{"tokens": t} for t in tokens[order].chunk(pieces)]
        chain.begin("two", 3)
        torch.manual_seed(1)
        chain.wander()
        found.append((kept(chain.bound), chain.penalty({"tokens": tokens}).detach()))
    for ours, penalty in found[1:]:
        torch.testing.assert_close(ours, found[0][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(penalty, found[0][1], atol=1e-9, rtol=1e-5)
    assert kept(chain.bound).unique().numel() > 8


def test_the_first_rows_of_a_task_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lwf, "MEASURED", 7)
    chain = Chain(NEAR)
    chain.begin("one", 3)
    chain.bound.end_task(chain.rows)  # batches of five
    moment = chain.bound.states["lwf"].tensors["moments"]["one"]
    x = chain.encoder(torch.cat([b["tokens"] for b in chain.rows])[:7]).detach().float()
    x = torch.cat([x, torch.ones(7, 1)], 1)
    torch.testing.assert_close(moment, x.T @ x / 7)


# --- heads ----------------------------------------------------------------------------------------


def test_several_old_heads_of_several_kinds() -> None:
    """Each has its own shares: classes, a regression, and a head of two layers, which has none."""
    chain, spans = Chain(NEAR), {}
    draw = torch.Generator().manual_seed(3)
    for task, classes in (("one", 3), ("number", 1), ("deep", 2)):
        old: Any = chain.begin(task, classes)
        if task == "deep":
            old.classifier = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double()
            optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
            chain.bound.begin_task(task, optimizer, 10, model=old, data=chain.rows)
        chain.wander()
        rows = torch.randint(11, (12, 4), generator=draw)
        chain.bound.end_task([{"tokens": rows}])
        spans[task] = chain.encoder(rows).detach()
    chain.begin("now", 2)
    answers = chain.bound.states["lwf"].tensors["answers"]
    assert answers.keys() == {"one", "one/shares", "number", "number/shares", "deep"}
    olds = {t: copy.deepcopy(chain.bound.models[t]) for t in spans}
    batch = chain.rows[1]
    x = chain.encoder(**batch).detach()
    chain.wander()
    expected = torch.zeros(())
    for task, old in olds.items():
        before, now = old(**batch).logits, chain.bound.models[task](**batch).logits
        if task == "number":
            each = (before - now).square().sum(1) / 2
        else:
            p, q = before.softmax(-1), now.softmax(-1)
            each = (p * (p / q).log()).sum(1)
        share = torch.ones(5) if task == "deep" else slow(spans[task], x)
        expected = expected + (share * each).mean()
    torch.testing.assert_close(chain.penalty(batch), expected, atol=1e-6, rtol=1e-5)


def test_one_head_for_all_tasks() -> None:
    """The same layer is asked once for each old task; each has its own moment."""
    torch.manual_seed(0)
    bound, model = Recipe(methods=[NEAR]).unbound(), Bare(1, Scale())
    new = torch.tensor([[10.0], [3.0]])
    for task, old in (("one", [[1.0], [3.0]]), ("two", [[-2.0], [2.0]]), ("three", [])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound.begin_task(task, optimizer, 3, model=model, data=[{"x": new}])
        if old:
            bound.end_task([{"x": torch.tensor(old)}])
    by_one, by_two = shares(bound, new), shares(bound, new, "two")
    torch.testing.assert_close(by_one, torch.tensor([3.8 / 95.3, 3.8 / 5.0]))
    d, h = 4 / 4.25 + 1 / 1.25, [100 / 4.25 + 1 / 1.25, 9 / 4.25 + 1 / 1.25]
    torch.testing.assert_close(by_two, torch.tensor([d / h[0], d / h[1]]))


def decoder() -> Any:
    """Its head judges every token, and the last one's logits are taken."""
    return transformers.GPT2ForSequenceClassification(models.gpt2().config)


def choices() -> Any:
    """Its head judges every choice by itself."""
    return models.bert("MultipleChoice")


@pytest.mark.parametrize(("made", "shape"), [(decoder, (4, 6)), (choices, (4, 3, 6))])
def test_heads_that_are_not_given_one_input_a_row_hold_every_row(
    made: Any, shape: tuple[int, ...]
) -> None:
    batch = {"input_ids": torch.randint(5, 30, shape)}
    penalties = []
    for method in (NEAR, LwF(strength=1.0, temperature=1.0)):
        torch.manual_seed(0)
        bound, one, two = Recipe(methods=[method]).unbound(), made(), made()
        setattr(two, two.base_model_prefix, one.base_model)
        for task, model in (("one", one), ("two", two)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            bound.begin_task(task, optimizer, 3, model=model, data=[batch])
            if task == "one":
                bound.end_task([batch])
        torch.manual_seed(2)
        with torch.no_grad():
            for w in bound.shared.values():
                w.add_(torch.randn_like(w) / 20)
        penalties.append(bound.penalty(batch, model.train()(**batch)).detach())
    assert torch.equal(*penalties) and penalties[0] > 1e-4


def test_the_head_that_peft_trains_is_measured() -> None:
    """`modules_to_save` leaves the head it took the place of beside it: two layers, one of use."""
    peft = pytest.importorskip("peft")
    how = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2)
    model = peft.get_peft_model(models.bert(), how)
    bound = Recipe(methods=[NEAR]).unbound()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = {"input_ids": torch.randint(5, 30, (6, 4))}
    bound.begin_task("one", optimizer, 3, model=model, data=[batch])
    bound.end_task([batch])
    assert bound.states["lwf"].tensors["moments"]["one"].shape == (17, 17)


# --- rows -----------------------------------------------------------------------------------------


def test_rows_must_be_passed_at_the_end() -> None:
    chain = Chain(NEAR)
    chain.begin("one", 3)
    with pytest.raises(Refused, match=r"lwf reads the rows of a finished task.*data="):
        chain.bound.end_task()
    with pytest.raises(Refused, match=r"lwf: no rows.*data="):
        chain.bound.end_task([])
    plain = Chain(LwF())
    plain.begin("one", 3)
    plain.bound.end_task()


def test_inputs_that_are_not_finite_are_refused_when_they_are_measured() -> None:
    bound, _ = told_apart(torch.ones(2, 1), torch.ones(1, 1))
    with pytest.raises(Refused, match="lwf: the inputs of the head are not finite"):
        bound.end_task([{"x": torch.tensor([[1.0], [torch.inf]])}])


def test_rows_of_a_task_that_failed_to_begin_are_forgotten() -> None:
    """Heads are replaced before the second attempt: nothing of the first may be left."""
    old, new = torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [3.0]])
    bound, _ = told_apart(old, new)
    bound.end_task([{"x": new}])
    encoder = bound.core
    assert encoder is not None

    def failing() -> Iterator[Batch]:
        yield {"x": new}
        raise KeyboardInterrupt

    for data in (failing, lambda: [{"x": new[1:]}]):
        bound.models["one"] = copy.deepcopy(bound.models["one"])
        bound.models["one"].encoder = encoder
        model = Bare(1, encoder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if data is failing:
            with pytest.raises(KeyboardInterrupt):
                bound.begin_task("three", optimizer, 3, model=model, data=data)
        else:
            bound.begin_task("three", optimizer, 3, model=model, data=data)
    torch.testing.assert_close(kept(bound), torch.tensor([3.8 / 5.0]))


def test_what_is_kept_costs_what_is_said_and_draws_nothing() -> None:
    states = []
    for method in (LwF(), LwF(rows="near")):
        toy = ToyTraining(method)
        toy.begin("one")
        toy.end()
        states.append(toy.bound.randomness)
        toy.begin("two")
    assert torch.equal(*states)
    state, rows = toy.bound.states["lwf"], 9 * 8
    assert state.bytes() == rows * (3 * 4 + 8 + 4) + 4 * 7**2 and not state.cache
    toy.end()
    assert state.bytes() == 2 * 4 * 7**2 and state.tensors["moments"].keys() == {"one", "two"}


def test_bfloat16_features_are_measured_in_float32() -> None:
    chain = Chain(NEAR, dtype=torch.bfloat16)
    chain.begin("one", 3)
    old = torch.randint(11, (20, 4), generator=torch.Generator().manual_seed(5))
    chain.bound.end_task([{"tokens": old}])
    moment = chain.bound.states["lwf"].tensors["moments"]["one"]
    batch = chain.rows[0]
    chain.rows = [batch]
    chain.begin("two", 2)
    spans = [chain.encoder(t).detach().float() for t in (old, batch["tokens"])]
    expected = slow(*spans).float()
    assert moment.dtype is kept(chain.bound).dtype is torch.float32
    found = kept(chain.bound)
    torch.testing.assert_close(found.sort()[0], expected.sort()[0], atol=1e-5, rtol=1e-4)
    assert found.unique().numel() > 2


def test_head_first_and_near_rows_share_the_pass() -> None:
    """Both watch last layers in it, the fresh head's and the old one's."""
    torch.manual_seed(0)
    recipe = Recipe(head_first=HeadFirst(), methods=[LwF(rows="near")])
    bound, encoder = recipe.unbound(), Classifier().encoder
    for task in ("one", "two"):
        model = Classifier(encoder=encoder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = [make_batch(task, step) for step in range(4)]
        bound.begin_task(task, optimizer, 3, model=model, data=rows)
        assert bound.fitted is not None and bound.fitted["rows"] == 32
        if task == "one":
            bound.end_task(rows)
            old = torch.cat([b["tokens"] for b in rows])
    new = torch.cat([b["tokens"] for b in rows])
    encoder.eval()
    with torch.no_grad():
        expected = slow(encoder(old), encoder(new)).float()
    torch.testing.assert_close(kept(bound).sort()[0], expected.sort()[0], atol=1e-5, rtol=1e-4)
