"""LNSR: a stack of linear layers by hand, a twin that runs everything twice, the noise's length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from test_r3f import bind, gradients, text
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import LNSR
from holdfast.testing.toy import Classifier, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (LNSR(), 0),
    (LNSR(strength=3.0, layer=0, epsilon=0.2), 0),
    (LNSR(layer=1, noise="manifold"), 0),
]
ACCUMULATES = False  # it draws other noise for each micro-batch


class Turn(nn.Module):
    """A layer x ↦ A x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


class Stack(nn.Module):
    """Linear layers on embeddings or floats."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(Turn() for _ in range(layers))
        self.out = nn.Linear(4, 1)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, labels: Any = None
    ) -> SimpleNamespace:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.out(x.mean(1)))


def kept(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noises that are put on."""
    made: list[Tensor] = []
    draw = LNSR._noise

    def spy(self: LNSR, *args: Any) -> Tensor:
        made.append(draw(self, *args))
        return made[-1]

    monkeypatch.setattr(LNSR, "_noise", spy)
    return made


@pytest.mark.parametrize("kind", ["gaussian", "manifold"])
@pytest.mark.parametrize(("layer", "b"), [(0, 0), (1, 1), (3, 3), (0.5, 2), (0.74, 2), (0.75, 3)])
def test_a_stack_of_linear_layers_by_hand(
    layer: Any, b: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer r moves by A_r … A_{b+1} ε, whatever x is; padding does not count."""
    torch.manual_seed(0)
    model, made = Stack().double(), kept(monkeypatch)
    batch = {"tokens": make_batch("one", 0)["tokens"], "attention_mask": torch.ones(8, 5).long()}
    batch["attention_mask"][2, 3:] = 0
    bound = bind(model, LNSR(strength=3.0, layer=layer, noise=kind))
    ours = bound.penalty(batch, model(**batch))
    (epsilon,) = made
    shift, expected = epsilon, torch.zeros((), dtype=torch.float64)
    for r in range(b, 4):
        shift = shift @ model.layers[r].a.weight.T  # type: ignore[union-attr]
        each = [
            shift[row, token].square().sum() / 4
            for row in range(8) for token in range(5) if batch["attention_mask"][row, token]
        ]  # fmt: skip
        expected = expected + 3.0 * torch.stack(each).mean()
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)
    mine, theirs = gradients(model, ours), gradients(model, expected)
    for name, grad in mine.items():  # of what lies below x it is 0: A (x + ε) − A x
        torch.testing.assert_close(grad, theirs.get(name, torch.zeros_like(grad)), msg=name)
    assert ours > 1e-6 and theirs.keys() <= mine.keys()


def test_noise_is_of_the_declared_length_and_direction() -> None:
    torch.manual_seed(0)
    x, places = torch.randn(4, 6, 9), torch.ones(4, 6, dtype=torch.bool)
    places[1, 4:] = False
    for kind in ("gaussian", "manifold"):
        found = LNSR(epsilon=0.2, noise=kind)._noise(x, 5, places)  # type: ignore[arg-type]
        share = found.norm(dim=-1) / x.norm(dim=-1)
        k = 1 + 5 % 3  # row i towards row i + k
        there = places & places.roll(-k, 0) if kind == "manifold" else torch.ones_like(places)
        torch.testing.assert_close(share, 0.2 * there.float())
        if kind == "manifold":
            way = x.roll(-k, 0) - x
            alike = nn.functional.cosine_similarity(found, way, dim=-1)
            torch.testing.assert_close(alike[there], torch.ones(int(there.sum())))
    alone = LNSR(noise="manifold")._noise(x[:1], 5, None)
    assert not alone.any()
    maps = LNSR(epsilon=0.2)._noise(torch.randn(4, 3, 5, 5), 5, None)  # a row is one place
    assert maps.shape == (4, 3, 5, 5)


def twin(bound: Bound, model: nn.Module, batch: Any, b: int, epsilon: Tensor, seed: int) -> Tensor:
    """Two whole passes from one random state, the second with ε on layer b's output."""
    found: list[list[Tensor]] = []
    blocks = list(bound.blocks)
    for noisy in (False, True):
        outputs: list[Tensor] = []
        handles = []
        for i, block in enumerate(blocks):

            def see(
                _: Any, __: Any, out: Any, i: int = i, noisy: bool = noisy, to: Any = outputs
            ) -> Any:
                first = out if isinstance(out, Tensor) else out[0]
                if noisy and i == b - 1:
                    first = first + epsilon
                to.append(first)
                return first if isinstance(out, Tensor) else (first, *out[1:])

            handles.append(block.register_forward_hook(see))
        torch.manual_seed(seed)
        model(**batch)
        found.append(outputs)
        for handle in handles:
            handle.remove()
    clean, moved = found
    total = torch.zeros((), dtype=clean[0].dtype)
    for block, one, two in list(zip(blocks, clean, moved, strict=True))[b:]:
        mask = batch.get("attention_mask", torch.ones(one.shape[:2]))
        if bound.blocks[block] == "decoder" and "t5" in type(model).__name__.lower():
            mask = batch["labels"] != -100
        each = (two - one).square().mean(-1)
        total = total + (each * mask).sum() / mask.sum()
    return total


MODELS: dict[str, Any] = {
    "toy": (Classifier, lambda: make_batch("one", 0), 1),
    "bert": (lambda: models.bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2),
             lambda: text("class"), 1),
    "gpt2": (lambda: models.gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2),
             lambda: text("tokens"), 1),
    "t5 encoder": (models.t5, lambda: text("tokens"), 1),
    "t5 decoder": (models.t5, lambda: text("tokens"), 3),
}  # fmt: skip


@pytest.mark.parametrize("again", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_it_is_two_passes_under_one_dropout(
    case: Any, again: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two whole passes from one random state, though what is below is not run again; and in a
    model whose activations are computed again."""
    made, rows, b = case
    torch.manual_seed(0)
    model, batch, noises = made().double().train(), rows(), kept(monkeypatch)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    if again is not None and hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": again})
    bound = bind(model, LNSR(layer=b, epsilon=0.3))
    torch.manual_seed(5)
    out = model(**batch)
    state = torch.get_rng_state()
    runs: list[int] = []
    for i, block in enumerate(bound.blocks):
        inner = next(m for m in block.modules() if not [*m.children()])
        inner.register_forward_pre_hook(lambda *_, i=i: runs.append(i))  # type: ignore[misc]
    ours = bound.penalty(batch, out)
    assert set(runs) == set(range(b, len(bound.blocks)))
    assert torch.equal(torch.get_rng_state(), state)
    expected = twin(bound, model, batch, b, noises[0].detach(), 5)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)
    found = []
    for value in (ours, expected):
        model.zero_grad()
        value.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[1].items():  # T5's norms are in float32
        torch.testing.assert_close(found[0][name], grad, atol=1e-7, rtol=1e-6, msg=name)
    assert not any(found[0][name].any() for name in found[0].keys() - found[1].keys())


def test_without_noise_nothing_moves_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LNSR, "_noise", lambda self, x, *_: torch.zeros_like(x))
    for layer in (0, 1):
        for model, batch in ((Classifier(), make_batch("one", 0)),
                             (models.bert(hidden_dropout_prob=0.3), text("class"))):  # fmt: skip
            bound = bind(model.train(), LNSR(layer=layer))
            assert bound.penalty(batch, model(**batch)) == 0.0


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(Refused, match=r"^lnsr: the network has no repeated blocks"):
        bind(models.Plain(), LNSR())
    with pytest.raises(Refused, match=r"^lnsr\.layer: layer 2 of 2 has none above.*at most 1"):
        bind(Classifier(), LNSR(layer=2))
    model, batch = Classifier(), make_batch("one", 0)
    bound = bind(model, LNSR())
    with pytest.raises(Refused, match=r"^lnsr: the training pass was not seen"):
        bound.penalty(batch, model.eval()(**batch))

    class Traced(Stack):  # the tracer knows no namespaces
        def forward(self, tokens: Tensor, *_: Any, **__: Any) -> Any:
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return x

    traced = Traced()
    bound, compiled = bind(traced, LNSR()), torch.compile(traced, backend="eager", fullgraph=True)
    with pytest.raises(Refused, match=r"do not compile the model"):
        bound.penalty(batch, compiled(batch["tokens"]))
    assert bound.penalty(batch, traced(batch["tokens"])) > 0
