"""A curve found on one network goes to another by relative depth: real layers, many kinds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from holdfast.network.groups import param_groups
from holdfast.network.parts import EMBEDDINGS, HEAD, Parts, named_parameters, parts
from holdfast.network.rates import PRESETS, Rates

TEXT = {
    "vocab_size": 12, "hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 4,
    "max_position_embeddings": 8,
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)


class Convolutions(nn.Module):
    """A plain network that Transformers has never heard of."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.out = nn.Linear(4, 2)


def hugging(model: str, config: str, depth: str, **sizes: Any) -> Callable[[int], nn.Module]:
    kind, settings = getattr(transformers, model), getattr(transformers, config)
    return lambda layers: kind(settings(**sizes | {depth: layers}))


def t5(layers: int) -> nn.Module:
    """Half of the layers encode, half decode."""
    sizes = {"vocab_size": 12, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_layers=layers // 2)
    return transformers.T5ForConditionalGeneration(config)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "bert": hugging("BertForSequenceClassification", "BertConfig", "num_hidden_layers", **TEXT),
    "gpt2": hugging("GPT2LMHeadModel", "GPT2Config", "n_layer", vocab_size=12, n_embd=4, n_head=2,
                    n_positions=8),
    "t5": t5,
    "vit": hugging("ViTForImageClassification", "ViTConfig", "num_hidden_layers", image_size=4,
                   patch_size=2, hidden_size=4, num_attention_heads=2, intermediate_size=4),
    "cnn": Convolutions,
}  # fmt: skip
DEPTHS = (6, 12, 24)


@functools.cache
def network(kind: str, layers: int) -> tuple[nn.Module, Parts]:
    torch.manual_seed(0)
    model = NETWORKS[kind](layers)
    return model, parts(model)


def curve(rates: Rates, kind: str, layers: int) -> list[float]:
    """The multipliers of a network's layers, from input to output."""
    found = network(kind, layers)[1]
    of = rates.of(found)
    return [of[part] for part in sorted(found.order, key=found.depth.__getitem__)
            if part not in (EMBEDDINGS, HEAD)]  # fmt: skip


every = pytest.mark.parametrize("kind", NETWORKS)
each_depth = pytest.mark.parametrize("layers", DEPTHS)
RISING = Rates.from_list([0.1, 0.2, 0.2, 0.5, 0.9, 1.4, 2, 2, 7, 9], layers=12)


@every
@each_depth
def test_as_many_layers_as_the_network_has(kind: str, layers: int) -> None:
    found = network(kind, layers)[1]
    assert len(curve(Rates.flat(), kind, layers)) == layers
    depths = [found.depth[part] for part in found.order if part not in (EMBEDDINGS, HEAD)]
    assert depths == pytest.approx([(i + 0.5) / layers for i in range(layers)])


@every
@each_depth
def test_a_monotone_curve_stays_monotone_and_keeps_its_range(kind: str, layers: int) -> None:
    for rates in (RISING, Rates.layer_decay(0.8), Rates.from_list([1, 2, 3, 4])):
        found = curve(rates, kind, layers)
        assert all(a <= b for a, b in pairwise(found)) and found[0] < found[-1]
        assert min(rates.points) <= found[0] and found[-1] <= max(rates.points)
        back = Rates.from_list([1, *reversed(rates.points), 1], layers=rates.layers)
        assert all(a >= b for a, b in pairwise(curve(back, kind, layers)))


@every
@each_depth
def test_the_ends_agree(kind: str, layers: int) -> None:
    of = RISING.of(network(kind, layers)[1])
    assert of[EMBEDDINGS] == 0.1 and of[HEAD] == 9
    found = curve(RISING, kind, layers)
    assert found[0] == 0.2  # layers 0 and 1 of 12 share the first point
    # Layer 5 of 6 lies midway between layers 10 and 11 of 12, which have points of their own.
    assert found[-1] == (7 if layers >= 12 else pytest.approx(math.sqrt(2 * 7)))


@every
@each_depth
@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_learns_at_its_parts_rate(kind: str, layers: int, name: str) -> None:
    model, found = network(kind, layers)
    rates = Rates.preset(name)
    of = rates.of(found)
    groups = param_groups(model, rates, lr=1e-3, weight_decay=0.1, parts=found)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(named_parameters(model))  # each in one group, none left out
    for group in groups:
        for parameter in group["param_names"]:
            assert group["lr"] == pytest.approx(1e-3 * of[found.names[parameter]])
        assert len(group["params"]) == len(group["param_names"])


@every
def test_the_published_curve_on_twelve_layers_is_its_definition(kind: str) -> None:
    # Parts 1..8 are layers 0–1, 2, 3–4, 5, 6–7, 8, 9–10, 11 (BERTcL).
    owners = [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9, 10], [11]]
    for rates in (Rates.bertcl(), Rates.bertcl_averaged()):
        expected = {layer: m for m, own in zip(rates.points, owners, strict=True) for layer in own}
        assert curve(rates, kind, 12) == [expected[layer] for layer in range(12)]


@every
@pytest.mark.parametrize("layers", [6, 12])
def test_twice_as_deep_and_back_smooths_by_an_eighth(kind: str, layers: int) -> None:
    """ln m back = ln m + (left − 2·ln m + right)/8; beyond an end its own value stands."""
    points = [math.exp(math.sin(3 * i)) for i in range(layers)]
    there = curve(Rates.from_list([1, *points, 1], layers=layers), kind, 2 * layers)
    back = curve(Rates.from_list([1, *there, 1], layers=2 * layers), kind, layers)
    logs = [math.log(p) for p in points]
    padded = [logs[0], *logs, logs[-1]]
    expected = [padded[i + 1] + (padded[i] - 2 * padded[i + 1] + padded[i + 2]) / 8
                for i in range(layers)]  # fmt: skip
    assert [math.log(m) for m in back] == pytest.approx(expected, abs=1e-12)


steps = st.lists(st.floats(-2, 2), min_size=6, max_size=6)


@given(steps)
def test_the_round_trip_is_off_by_a_quarter_of_a_step_at_most(logs: list[float]) -> None:
    points = [math.exp(v) for v in logs]
    there = curve(Rates.from_list([1, *points, 1], layers=6), "cnn", 12)
    back = curve(Rates.from_list([1, *there, 1], layers=12), "cnn", 6)
    largest = max(abs(a - b) for a, b in pairwise(logs))
    for before, after in zip(logs, back, strict=True):
        assert abs(math.log(after) - before) <= largest / 4 + 1e-9


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_straight_line_comes_back_but_for_its_ends(offset: float, slope: float) -> None:
    points = [math.exp(offset + slope * i) for i in range(6)]
    there = curve(Rates.from_list([1, *points, 1], layers=6), "cnn", 12)
    back = curve(Rates.from_list([1, *there, 1], layers=12), "cnn", 6)
    assert back[1:-1] == pytest.approx(points[1:-1], rel=1e-9)
    ends = [offset + slope / 8, offset + 5 * slope - slope / 8]
    assert [math.log(back[0]), math.log(back[-1])] == pytest.approx(ends, abs=1e-9)
