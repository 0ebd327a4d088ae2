"""Gram matrices of layer inputs against slow loops, and the sums they are kept in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layered import Net, batches, begin, design, gram, whole
from models import bert, collate, gpt2, rows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.engine.bound import Bound
from holdfast.engine.grams import Grams, measure
from holdfast.errors import Refused
from holdfast.network.layers import layers_of
from holdfast.ops.moments import Blocks
from holdfast.recipe import Recipe


def bound_to(model: nn.Module, data: Any) -> Bound:
    bound = Recipe().unbound(seed=0)
    begin(bound, "one", model)
    bound.data = lambda: data
    return bound


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (9, 5, 4)),
    "linear of rows": (lambda: nn.Linear(4, 3), (9, 4)),
    "without bias": (lambda: nn.Linear(4, 3, bias=False), (9, 5, 4)),
    "transformers Conv1D": (lambda: Conv1D(3, 4), (9, 5, 4)),
    "1d": (lambda: nn.Conv1d(2, 3, 3), (9, 2, 8)),
    "1d stride": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (9, 2, 8)),
    "1d same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (9, 2, 8)),
    "1d reflect": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (9, 2, 8)),
    "2d": (lambda: nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0)), (9, 2, 5, 6)),
    "2d valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid", bias=False), (9, 2, 4, 4)),
    "2d same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2), (9, 2, 5, 6)),
    "2d circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        (9, 2, 4, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_measured_as_their_own_outputs_say(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    found = measure(bound_to(Net(layer), batches(4, x=x)))
    expected = gram(design(layer, x))
    ours = whole(found.moments["encoder.weight"])
    d = len(expected)
    torch.testing.assert_close(ours[:d, :d], expected, rtol=1e-5, atol=1e-5)
    assert found.readers == {"encoder.weight": "encoder.weight"}


@pytest.mark.parametrize("name", ["linear", "1d stride", "2d"])
def test_neither_batches_nor_order_matter(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    model = Net(layer)
    first = whole(measure(bound_to(model, batches(9, x=x))).moments["encoder.weight"])
    for size, order in ((1, range(9)), (4, range(9)), (2, range(8, -1, -1))):
        data = batches(size, x=x[list(order)])
        again = whole(measure(bound_to(model, data)).moments["encoder.weight"])
        torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-6)


def test_no_more_rows_than_asked_for() -> None:
    x, layer = torch.randn(9, 5, 4), nn.Linear(4, 3)
    found = measure(bound_to(Net(layer), batches(4, x=x)), rows=6)
    expected = gram(design(layer, x[:6]))
    torch.testing.assert_close(whole(found.moments["encoder.weight"]), expected, rtol=1e-5,
                               atol=1e-5)  # fmt: skip


class Turned(nn.Module):
    """A convolution over positions (rows, positions, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["linear", "flat", "convolution", "embedding"])
def test_padding_does_not_count(kind: str, side: str) -> None:
    torch.manual_seed(0)
    lengths = [3, 5, 1, 4]
    mask = torch.tensor([[i < n for i in range(5)] for n in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    x = torch.randn(4, 5, 4) if kind != "embedding" else torch.randint(7, (4, 5))
    encoder: nn.Module = {
        "linear": nn.Linear(4, 3), "convolution": Turned(), "embedding": nn.Embedding(7, 3),
        "flat": nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.Unflatten(0, (-1, 5))),
    }[kind]  # fmt: skip
    found = measure(bound_to(Net(encoder), batches(2, x=x, attention_mask=mask)))
    if kind == "embedding":
        expected = torch.zeros(7)
        for row, kept in zip(x.tolist(), mask.tolist(), strict=True):
            for token, there in zip(row, kept, strict=True):
                expected[token] += there / 4
        assert torch.equal(found.counts["encoder.weight"], expected)
        return
    layer = encoder.inner if isinstance(encoder, Turned) else nn.Linear(4, 3)
    full = design(layer, x.transpose(1, 2) if isinstance(encoder, Turned) else x)
    ours = whole(next(iter(found.moments.values())))
    torch.testing.assert_close(ours, gram(full * mask[..., None]), rtol=1e-5, atol=1e-5)


class Positions(nn.Module):
    """Positions of shape (1, tokens), the same for every row of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.inner = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.place(torch.arange(x.shape[1])[None]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_given_once_for_all_rows_counts_once_a_row(masked: bool, size: int) -> None:
    torch.manual_seed(0)
    model, x = Net(Positions()), torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    data = {"x": x} | ({"attention_mask": mask} if masked else {})
    found = measure(bound_to(model, batches(size, **data)))
    expected = mask.sum(0) / 3 if masked else torch.ones(5)
    torch.testing.assert_close(found.counts["encoder.place.weight"][:5], expected)
    inner = model.encoder.inner
    rows_ = design(inner, model.encoder.place.weight[:5].detach().expand(3, 5, 4))
    rows_ = rows_ * (mask[..., None] if masked else 1)
    ours = whole(found.moments["encoder.inner.weight"])
    torch.testing.assert_close(ours, gram(rows_), rtol=1e-5, atol=1e-5)


# --- who reads what -------------------------------------------------------------------------------


def test_layers_of_one_input_share_one_matrix() -> None:
    data = [collate(rows(6, seed=1))]
    found = measure(bound_to(bert(), data))
    layer = "bert.encoder.layer.1"
    query = f"{layer}.attention.self.query.weight"
    for name in ("query", "key", "value"):
        assert found.readers[f"{layer}.attention.self.{name}.weight"] == query
    # A layer: attention's three, its output, up, down. And the pooler; the head is the task's own.
    assert len(found.moments) == 2 * 4 + 1
    assert len(found.readers) == 2 * 6 + 1


class Odd(nn.Module):
    """`a` and `b` read one tensor first and different ones then; `c` is given it by its name; `d`
    reads it after it was written to, `f` before; `e` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.a(x) + self.b(x) + self.c(input=x)
        y = y + self.a(2 * x) + self.b(3 * x) + self.c(x)
        y = y + self.f(x)
        x.mul_(5)
        return y + self.d(x)


def test_layers_share_only_what_all_their_calls_share() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    found = measure(bound_to(Net(Odd()), batches(2, x=x)))
    assert set(found.readers) == {f"encoder.{n}.weight" for n in "abcdf"}
    one = torch.ones(3, 5, 1)
    for name, scales in {"a": (1, 2), "b": (1, 3), "c": (1, 1), "d": (5,), "f": (1,)}.items():
        expected = sum(gram(torch.cat([s * x, one], -1)) for s in scales)
        ours = whole(found.moments[found.readers[f"encoder.{name}.weight"]])
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_a_layer_first_called_in_a_later_batch_is_measured() -> None:
    inner = nn.Linear(4, 3)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.shape[1] == 5 else x

    short, long = torch.randn(2, 3, 4), torch.randn(4, 5, 4)
    found = measure(bound_to(Net(Routed()), [{"x": short}, {"x": long}]))
    expected = gram(design(inner, long)) * 4 / 6
    torch.testing.assert_close(whole(found.moments["encoder.inner.weight"]), expected, rtol=1e-5,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("output_first", [False, True])
def test_a_tied_weight_is_the_embeddings(output_first: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if output_first:
                self.out = nn.Linear(4, 7, bias=False)
            self.words = nn.Embedding(7, 4)
            if not output_first:
                self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x))

    bound = bound_to(Net(Tied()), batches(2, x=torch.tensor([[0, 1], [1, 1]])))
    linear, embeddings = layers_of(bound.shared, bound.owners)
    assert not linear and len(embeddings) == 1
    assert next(iter(measure(bound).counts.values())).tolist() == [0.5, 1.5, 0, 0, 0, 0, 0]


def test_gpt2_is_measured_once_a_weight() -> None:
    batch = collate(rows(4, labels="tokens"))
    found = measure(bound_to(gpt2(), [batch]))
    assert set(found.counts) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert torch.equal(found.counts["transformer.wpe.weight"][:8], torch.ones(8))
    counts = torch.bincount(batch["input_ids"].flatten(), minlength=38) / 4
    assert torch.equal(found.counts["transformer.wte.weight"], counts)
    assert len(found.moments) == len(found.readers) == 2 * 4


# --- what is refused, and what is left as it was --------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "low_rank"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inputs_that_are_not_finite_are_refused(structure: Any, value: float) -> None:
    x = torch.randn(5, 3, 4)
    x[4, 1, 2] = value
    bound = bound_to(Net(nn.Sequential(nn.Linear(4, 3))), batches(2, x=x))
    with pytest.raises(Refused, match=r"encoder\.0\.weight: the inputs of this layer are not fin"):
        measure(bound, structure=structure, width=1, rank=2)
    # Hooks are off, whatever happened.
    encoder: Any = bound.models["one"].encoder
    assert not encoder[0]._forward_pre_hooks


def test_no_rows_are_refused() -> None:
    with pytest.raises(Refused, match=r"no rows to measure.*data="):
        measure(bound_to(Net(nn.Linear(4, 3)), []))


def test_measuring_draws_nothing() -> None:
    bound = bound_to(Net(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))),
                     batches(2, x=torch.randn(5, 3, 4)))  # fmt: skip
    bound.models["one"].train()
    before = bound.randomness, torch.get_rng_state()
    found = measure(bound)
    assert torch.equal(bound.randomness, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    x = torch.cat([b["x"] for b in bound.data()])
    ours = whole(found.moments["encoder.1.weight"])[:4, :4]  # without dropout
    torch.testing.assert_close(ours, gram(x), rtol=1e-5, atol=1e-5)
    assert bound.models["one"].training


# --- adding up ------------------------------------------------------------------------------------


def test_adding_up_leaves_what_other_methods_hold() -> None:
    """Two methods may hold the same matrices: neither's sum may reach the other's."""
    x, model = torch.randn(6, 3, 4), Net(nn.Linear(4, 3))
    first = measure(bound_to(model, batches(2, x=x)))
    second = measure(bound_to(model, batches(2, x=2 * x)))
    states: list[Any] = [SimpleNamespace(tensors={}, numbers={}) for _ in range(2)]
    for state in states:
        first.save(state.tensors, state.numbers)
    held = states[1].tensors["gram"]["encoder.weight"].clone()
    for state in states:
        mine = Grams.load(state.tensors, state.numbers, 256)
        assert mine is not None
        mine.add_(second)
        mine.save(state.tensors, state.numbers)
        if state is states[0]:
            assert torch.equal(states[1].tensors["gram"]["encoder.weight"], held)
    one, two = (s.tensors["gram"]["encoder.weight"] for s in states)
    assert torch.equal(one, two)
    added = second.moments["encoder.weight"]
    assert isinstance(added, Blocks)
    torch.testing.assert_close(one, held + added.matrix)


def test_another_structure_is_refused() -> None:
    x = torch.randn(4, 3, 4)
    one, two = (measure(bound_to(Net(Odd()), batches(2, x=x))) for _ in range(2))
    two.readers["encoder.b.weight"] = "encoder.a.weight"
    with pytest.raises(Refused, match="layers read other inputs than in the task before"):
        one.add_(two)
