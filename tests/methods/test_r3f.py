"""R3F against hand values and passes on embeddings made by hand; R4F's singular value."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import R3F
from holdfast.methods.common import noise
from holdfast.methods.common.answers import symmetric
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (R3F(), 0),
    (R3F(strength=0.5, epsilon=0.1, noise="normal", dropout="same", head="spectral"), 0),
]
ACCUMULATES = False  # it draws other noise for each micro-batch

Batch = dict[str, Tensor]


def bind(model: nn.Module, method: Method, data: Any = None) -> Bound:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    return Recipe(methods=[method]).bind(model, optimizer, total_steps=9, task="one", data=data)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def same(model: nn.Module, ours: Tensor, theirs: Tensor, **how: float) -> None:
    """Equal values, and equal gradients."""
    how = {"atol": 1e-9, "rtol": 1e-7} | how
    torch.testing.assert_close(ours, theirs, **how)
    one, two = gradients(model, ours), gradients(model, theirs)
    assert one.keys() == two.keys()
    for name, grad in two.items():
        torch.testing.assert_close(one[name], grad, **how, msg=name)


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Tensor]:
    """What a function of `noise` draws."""
    drawn: list[Tensor] = []
    draw: Callable[..., Tensor] = getattr(noise, name)

    def spy(*args: Any) -> Tensor:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(noise, name, spy)
    return drawn


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of Σ (p − q)(log p − log q), from logits."""
    difference = p.softmax(-1) - q.softmax(-1)
    return (difference * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()


# --- the divergence -------------------------------------------------------------------------------


def test_both_directions_of_three_quarters_and_a_half() -> None:
    """(¾, ¼) and (½, ½): ¼ ln 3, of which the logits learn as the choice says."""
    p = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64, requires_grad=True)
    q = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    third = torch.tensor([[0.25, -0.25]], dtype=torch.float64)  # p − q
    # ∂KL(p ‖ q)/∂p = p (log p/q − KL) is ± p₀ p₁ ln 3 for two classes.
    own_p, own_q = 3 / 16 * math.log(3), 1 / 4 * math.log(3)
    side = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    expected = {
        "none": (own_p * side + third, -own_q * side - third),
        "before": (None, -own_q * side - third),
        "targets": (third, -third),
    }
    for stop, (for_p, for_q) in expected.items():
        value = symmetric(p, q, stop=stop)  # type: ignore[arg-type]
        assert value.item() == pytest.approx(math.log(3) / 4, rel=1e-12)
        found = torch.autograd.grad(value, (p, q), allow_unused=True)
        for ours, theirs in zip(found, (for_p, for_q), strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_of_numbers_it_is_the_squared_distance_and_of_labels_their_sum() -> None:
    before, now = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]])
    assert symmetric(before, now, "numbers").item() == 4.5  # (9 + 0) / 2
    logits = torch.tensor([[math.log(3.0), math.log(3.0)]])
    each = symmetric(logits, torch.zeros(1, 2), "labels").item()
    assert each == pytest.approx(2 * math.log(3) / 4, rel=1e-6)


# --- R3F ------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """logits = W · mean of embeddings, without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 3), nn.Linear(3, 2, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(self.embed(tokens).mean(1)))


@pytest.mark.parametrize(("kind", "name"), [("uniform", "uniform"), ("normal", "normal")])
def test_a_linear_model_by_hand(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits move by ε W z̄, and the table learns from the clean side alone."""
    torch.manual_seed(0)
    model, batch = Bag().double(), make_batch("one", 0)
    drawn = spied(monkeypatch, name)
    bound = bind(model, R3F(strength=3.0, epsilon=0.2, noise=kind))
    out = model(**batch)
    ours = bound.penalty(batch, out)
    (z,) = drawn
    assert z.shape == (8, 5, 3) and (kind == "normal" or (z.abs() <= 1).all())
    held = model.embed(batch["tokens"]).detach().mean(1)
    q = (held + 0.2 * z.mean(1)) @ model.out.weight.T
    same(model, ours, 3.0 * divergences(out.logits, q))
    assert ours > 1e-4


def noised(model: Any, batch: Batch, z: Tensor, size: float) -> Tensor:
    """Logits of a model that is given embeddings made by hand."""
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
    batch = {k: v for k, v in batch.items() if k != "input_ids"}
    found: Tensor = model(inputs_embeds=embedded + size * z, **batch).logits
    return found


def text(kind: str) -> Batch:
    """Three rows of which one is padded."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, models.SIZE, (3, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = {"class": ids[:, 0] % 2, "tags": ids % 2, "tokens": ids.clone()}[kind]
    if kind != "class":
        labels[0, :3], labels[1, 5:] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


CASES = {
    "classifier": (lambda: models.bert(), "class", None),
    "tagger": (lambda: models.bert("TokenClassification"), "tags", 0),
    "gpt2": (lambda: models.gpt2(), "tokens", 1),
    "llama": (lambda: models.llama(), "tokens", 1),
    "t5": (lambda: models.t5(), "tokens", 0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_a_pass_on_noised_embeddings(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs that count: rows, or tokens with a label where each is predicted."""
    made, kind, shift = case
    model, batch = made().double(), text(kind)
    drawn = spied(monkeypatch, "uniform")
    bound = bind(model, R3F(epsilon=0.3), [batch])
    assert not drawn  # trying the first rows draws nothing
    out = model(**batch)
    ours = bound.penalty(batch, out)
    p, q = out.logits, noised(model, batch, drawn[0], 0.3)
    if shift is not None:
        length = batch["labels"].shape[1]
        where = batch["labels"][:, shift:] != -100
        p, q = (z[:, : length - shift][where] for z in (p, q))
    same(model, ours, divergences(p, q), atol=1e-8)
    assert ours > 1e-5


def test_the_masks_of_the_training_pass_leave_the_noise_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without noise exactly nothing under the same dropout, and much under its own."""
    monkeypatch.setattr(noise, "uniform", lambda x, seed: torch.zeros_like(x))
    batch, found = make_batch("one", 0), {}
    for dropout in ("same", "own"):
        torch.manual_seed(0)
        model = Classifier()
        bound = bind(model, R3F(dropout=dropout))  # type: ignore[arg-type]
        found[dropout] = bound.penalty(batch, model(**batch)).item()
    assert found["same"] == 0.0 and found["own"] > 1e-3


def test_without_labels_that_count_there_is_nothing_to_hold() -> None:
    model, batch = models.gpt2(), text("tokens")
    bound = bind(model, R3F(epsilon=0.1))
    drawn = bound.states["r3f"].generator.get_state()
    batch["labels"][:] = -100
    found = bound.penalty(batch, model(**batch))
    assert found == 0 and found.requires_grad
    assert not torch.equal(bound.states["r3f"].generator.get_state(), drawn)  # as other ranks draw


def test_a_pass_that_returns_no_logits_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.gpt2().double(), text("tokens")
    drawn, bound = spied(monkeypatch, "uniform"), bind(model, R3F(epsilon=0.3))
    ours = bound.penalty(batch, SimpleNamespace(logits=None, loss=None))
    where = batch["labels"][:, 1:] != -100
    p, q = model(**batch).logits, noised(model, batch, drawn[0], 0.3)
    same(model, ours, divergences(p[:, :-1][where], q[:, :-1][where]), atol=1e-8)


def test_frozen_embeddings_and_biases_alone_learn() -> None:
    model, batch = models.bert().double(), text("class")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    bound = bind(model, R3F(epsilon=0.3))
    bound.penalty(batch, model(**batch)).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("offered", [True, False])
def test_a_regression_is_refused(offered: bool) -> None:
    model = models.bert(num_labels=1)
    batch = text("class") | {"labels": torch.rand(3)}
    with pytest.raises(Refused, match=r"^r3f: a regression has no distribution.*use smart"):
        bound = bind(model, R3F(), [batch] if offered else None)
        assert not offered
        bound.penalty(batch, model(**batch))


def test_numbers_that_may_be_either_are_refused() -> None:
    batch = make_batch("one", 0) | {"labels": torch.rand(8, 3)}
    with pytest.raises(Refused, match="numbers for labels"):
        bind(Classifier(), R3F(), [{"tokens": batch["tokens"], "labels": batch["labels"]}])


# --- R4F ------------------------------------------------------------------------------------------


def test_the_heads_largest_singular_value_is_one_throughout() -> None:
    toy = ToyTraining(R3F(head="spectral"))
    toy.begin("one")
    fresh = copy.deepcopy(toy.model.classifier)
    for step in range(4):
        largest = torch.linalg.svdvals(toy.model.classifier.weight.detach())[0].item()
        assert largest == pytest.approx(1.0, abs=1e-6)
        toy.learn(step, step + 1)
    assert not torch.equal(fresh.weight, toy.model.classifier.weight)
    frozen = ToyTraining(R3F(head="spectral"), frozen={"classifier.weight"})
    frozen.begin("one")
    before = frozen.model.classifier.weight.detach().clone()
    frozen.learn()
    assert torch.equal(frozen.model.classifier.weight, before)


def test_a_run_that_goes_on_has_the_saved_weights_bit_for_bit() -> None:
    """σ of what was divided by σ is 1 but for rounding."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = Classifier()
        bound = bind(model, R3F(head="spectral"))
        saved = model.classifier.weight.detach().clone()
        bound.begin_task("task", bound.optimizer, 9, resuming=True)
        assert torch.equal(model.classifier.weight, saved)


def test_only_the_last_layer_of_a_head_and_no_language_models() -> None:
    torch.manual_seed(0)
    model = Classifier()
    model.classifier = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))  # type: ignore
    before = model.classifier[0].weight.detach().clone()  # type: ignore[index]
    bind(model, R3F(head="spectral"))
    assert torch.equal(model.classifier[0].weight, before)  # type: ignore[index]
    largest = torch.linalg.matrix_norm(model.classifier[2].weight.detach(), 2)  # type: ignore[index]
    assert largest.item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(Refused, match=r"r3f\.head: the task has no linear layer.*use free"):
        bind(models.gpt2(), R3F(head="spectral"))
