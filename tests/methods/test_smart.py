"""SMART: the ascent by hand where its slope is known, passes on embeddings by hand, the mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from test_r3f import bind, divergences, same, spied, text
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import SMART
from holdfast.methods.common import noise
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (SMART(), 0),
    (SMART(delta="code", strength=0.3, dropout="same"), 0),
    (SMART(epsilon=0.1, start=0.1, rate=0.1, ascents=2, proximal=1.0), 4),
]
ACCUMULATES = False  # it draws other noise for each micro-batch


class Linear(nn.Module):
    """logits = W x, of floats."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.out = nn.Linear(4, outputs, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(x))


def uphill(w: Tensor, x: Tensor, delta: Tensor, code: bool) -> Tensor:
    """The slope in δ, by its formula: of KL(p ‖ q) q − p, and of KL(q ‖ p) q (l − Σ q l)."""
    p, q = (x @ w.T).softmax(-1), ((x + delta) @ w.T).softmax(-1)
    slope = q - p
    if not code:
        ratio = q.log() - p.log()
        slope = slope + q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return slope @ w / len(x)


@pytest.mark.parametrize("ascents", [1, 3])
@pytest.mark.parametrize("kind", ["paper", "code"])
def test_the_ascent_of_a_linear_model_by_hand(
    kind: Any, ascents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Linear().double(), torch.randn(5, 4, dtype=torch.float64)
    drawn = spied(monkeypatch, "normal")
    bound = bind(model, SMART(strength=2.0, delta=kind, epsilon=0.3, start=0.1, rate=0.25,
                              ascents=ascents))  # fmt: skip
    batch = {"x": x, "labels": torch.zeros(5, dtype=torch.long)}
    out = model(**batch)
    ours = bound.penalty(batch, out)
    w, delta = model.out.weight.detach(), 0.1 * drawn[0]
    for _ in range(ascents):
        g = uphill(w, x, delta, kind == "code")
        if kind == "paper":
            delta = (delta + 0.25 * g / g.abs().amax(1, keepdim=True)).clamp(-0.3, 0.3)
        else:
            delta = delta + 0.25 * g
            delta = delta / delta.abs().amax(1, keepdim=True)
            assert delta.abs().amax(1).tolist() == pytest.approx([1.0] * 5)
    p, q = out.logits, model(x + delta).logits
    if kind == "paper":
        expected = divergences(p, q)
    else:  # each KL moves its second argument alone
        first = p.detach().softmax(-1) * (p.detach().log_softmax(-1) - q.log_softmax(-1))
        second = q.detach().softmax(-1) * (q.detach().log_softmax(-1) - p.log_softmax(-1))
        expected = (first + second).sum(-1).mean()
    same(model, ours, 2.0 * expected)
    assert ours > 1e-3


def test_an_ascent_goes_uphill_and_from_zero_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Linear().double(), torch.randn(5, 4, dtype=torch.float64)
    batch, how = {"x": x, "labels": torch.zeros(5, dtype=torch.long)}, {"epsilon": 0.3, "rate": 0.3}
    found = []
    for steps in (1, 9):
        bound = bind(model, SMART(start=0.01, ascents=steps, **how))  # type: ignore[arg-type]
        found.append(bound.penalty(batch, model(**batch)).item())
    assert found[1] > found[0] > 0
    monkeypatch.setattr(noise, "normal", lambda x, seed: torch.zeros_like(x))
    still = bind(model, SMART(start=0.01, ascents=9, **how))  # type: ignore[arg-type]
    assert still.penalty(batch, model(**batch)) == 0


def test_numbers_are_held_by_their_squared_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression has the slope 2 w wᵀ δ / rows; a network of one's own says what it returns."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    for model, labels, how in (
        (Linear(1), torch.rand(5), {}),
        (Linear(4), x, {"outputs": "numbers"}),  # an autoencoder
    ):
        model, drawn = model.double(), spied(monkeypatch, "normal")
        bound = bind(model, SMART(epsilon=0.5, start=0.1, rate=0.2, **how))  # type: ignore[arg-type]
        batch = {"x": x, "labels": labels}
        out = model(**batch)
        ours = bound.penalty(batch, out)
        w, delta = model.out.weight.detach(), 0.1 * drawn[0]
        g = 2 * delta @ w.T @ w / 5
        delta = delta + 0.2 * g / g.abs().amax(1, keepdim=True)
        expected = (out.logits - model(x + delta).logits).square().sum(1).mean()
        same(model, ours, expected)
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["paper", "code"])
def test_of_text_it_is_a_pass_on_embeddings_with_delta(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """δ by autograd on embeddings, of each token its own size; the table learns from both sides."""
    model, batch = models.bert().double(), text("class")
    drawn = spied(monkeypatch, "normal")
    bound = bind(model, SMART(delta=kind, epsilon=0.2, start=0.1, rate=0.3), [batch])
    out = model(**batch)
    ours = bound.penalty(batch, out)
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    delta = (0.1 * drawn[0]).requires_grad_()
    moved = model(inputs_embeds=table(batch["input_ids"]) + delta, **rest).logits
    before = out.logits.detach()
    value = divergences(before, moved)
    if kind == "code":
        value = (before.softmax(-1) * (before.log_softmax(-1) - moved.log_softmax(-1))).sum(1)
        value = value.mean()
    (g,) = torch.autograd.grad(value, delta)
    with torch.no_grad():
        if kind == "paper":
            largest = g.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # 0 for padding
            delta = (delta + 0.3 * g / largest).clamp(-0.2, 0.2)
        else:
            delta = delta + 0.3 * g
            delta = delta / delta.abs().amax(-1, keepdim=True)
    moved = model(inputs_embeds=table(batch["input_ids"]) + delta, **rest).logits
    torch.testing.assert_close(ours, divergences(out.logits, moved), atol=1e-8, rtol=1e-6)
    if kind == "paper":
        same(model, ours, divergences(out.logits, moved), atol=1e-8, rtol=1e-6)


def test_the_slope_survives_float16() -> None:
    """Behind a head this small a slope that is not scaled is flushed to 0."""
    torch.manual_seed(0)
    model, batch = Linear(), {"x": torch.randn(5, 4), "labels": torch.zeros(5, dtype=torch.long)}
    model.out.weight.data.mul_(1e-3)
    steps = {}
    for dtype in (torch.float64, torch.float16):
        net = Linear().to(dtype)
        net.load_state_dict(model.state_dict())
        method = SMART(delta="paper", start=0.1, rate=1.0, epsilon=9.0)
        bound = bind(net, method)
        inputs = batch | {"x": batch["x"].to(dtype)}
        clean = net(**inputs).logits
        bound.inputs, view = inputs, bound.views["smart"]
        delta = method._worst(view, clean.detach().to(torch.float64), "classes").value
        start = 0.1 * noise.normal(inputs["x"], 0).mul(0)
        steps[dtype] = delta.detach().double() - start
    assert steps[torch.float16].abs().amax(1).min() > 0.8  # a step of η, not of 0


# --- the proximal part ----------------------------------------------------------------------------


def test_the_mean_follows_the_weights_and_holds_the_outputs() -> None:
    torch.manual_seed(0)
    model = Linear().double()
    bound = bind(model, SMART(strength=0.0, proximal=2.0))  # of 9 steps the first is early
    x = torch.randn(5, 4, dtype=torch.float64)
    batch = {"x": x, "labels": torch.zeros(5, dtype=torch.long)}
    mean = model.out.weight.detach().clone()
    for step in range(3):
        bound.optimizer.zero_grad()
        out = model(**batch)
        ours = bound.penalty(batch, out)
        same(model, ours, 2.0 * divergences(out.logits, x @ mean.T))
        assert (ours > 0) == (step > 0)
        (out.logits[:, 0].sum() + ours).backward()
        bound.optimizer.step()
        keep = 0.99 if step < 1 else 0.999
        mean = keep * mean + (1 - keep) * model.out.weight.detach()
    bound.end_task()
    assert not any(key.startswith("smart/weights") for key in bound.state_dict()["tensors"])


def test_the_mean_of_bfloat16_weights_is_kept_in_float32_and_starts_with_each_task() -> None:
    toy = ToyTraining(SMART(proximal=1.0), dtype=torch.bfloat16)
    for task in ("one", "two"):
        toy.begin(task)
        mean = toy.bound.states["smart"].weights["mean"]
        assert mean.keys() == toy.bound.weights.keys()
        for name, w in toy.bound.weights.items():
            assert mean[name].dtype is torch.float32 and torch.equal(mean[name], w.float())
        before = {n: m.clone() for n, m in mean.items()}
        toy.learn(0, 1)
        assert any(not torch.equal(mean[n], before[n]) for n in mean)
        toy.end()


def test_the_masks_of_the_training_pass_leave_delta_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "normal", lambda x, seed: torch.zeros_like(x))
    batch, found = make_batch("one", 0), {}
    for dropout in ("same", "own"):
        torch.manual_seed(0)
        model = Classifier()
        bound = bind(model, SMART(dropout=dropout))  # type: ignore[arg-type]
        found[dropout] = bound.penalty(batch, model(**batch)).item()
    assert found["same"] == 0.0 and found["own"] > 1e-3


def test_a_reentrant_activation_checkpoint_is_refused() -> None:
    model = models.bert().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    bound, batch = bind(model, SMART(epsilon=0.1)), text("class")
    with pytest.raises(Refused, match="smart: a reentrant activation checkpoint"):
        bound.penalty(batch, model(**batch))


def test_what_enters_no_table_is_refused_before_a_step() -> None:
    class Functional(Classifier):
        def forward(self, tokens: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
            x = nn.functional.embedding(tokens, self.encoder.embeddings.weight)  # type: ignore
            return SimpleNamespace(logits=self.classifier(x.mean(1)))

    with pytest.raises(Refused, match="did not come by tokens"):
        bind(Functional(), SMART(), [make_batch("one", 0)])
