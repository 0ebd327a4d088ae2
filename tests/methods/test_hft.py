"""HFT: half of each category trains, spread over layers, drawn anew for each task."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from subnetworks import both_tasks
from torch import nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods.ewc import EWC
from holdfast.methods.hft import HFT
from holdfast.recipe import Recipe
from holdfast.testing.toy import ToyTraining

CONTRACT: list[tuple[Method, float]] = [(HFT(), 0), (HFT(share=0.3, others="freeze"), 0)]


def bound_bert(method: HFT, layers: int = 3, seed: int = 0) -> Bound:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Recipe(methods=[method]).bind(model, optimizer, total_steps=9, seed=seed)


@pytest.mark.parametrize(
    ("share", "attention", "forward", "norms"),
    [(0.5, {2}, {1}, {1}), (0.25, {1}, {0, 1}, {0, 1}), (0.7, {3}, {1, 2}, {1, 2})],
)
def test_each_layer_trains_its_share_of_each_category(
    share: float, attention: set[int], forward: set[int], norms: set[int]
) -> None:
    """Of a BERT layer's 4 attention modules, 2 feed-forward and 2 norms; in all ⌈share · N⌉."""
    bound = bound_bert(HFT(share=share))
    out = set(bound.states["hft"].numbers["out"])
    trained: dict[str, Counter[str]] = {"attention": Counter(), "forward": Counter(),
                                        "norm": Counter()}  # fmt: skip
    for name in bound.shared:
        part, kind = bound.part_of[name], "forward"
        if not part.startswith("layer."):
            assert name not in out
            continue
        module = name.rpartition(".")[0]
        assert (f"{module}.bias" in out) == (f"{module}.weight" in out), "a bias goes along"
        if name.endswith("weight"):
            kind = "norm" if "LayerNorm" in name else "attention" if "attention" in name else kind
            trained[kind][part] += name not in out
    assert {k: set(c.values()) for k, c in trained.items()} == {
        "attention": attention, "forward": forward, "norm": norms}  # fmt: skip
    whole = {"attention": 12, "forward": 6, "norm": 6}
    for kind, counts in trained.items():
        assert counts.total() == -int(-whole[kind] * share // 1), kind


def test_the_frozen_half_stays_bit_for_bit() -> None:
    for toy, seen in both_tasks(HFT()):
        out = set(toy.bound.states["hft"].numbers["out"])
        assert out < {*toy.bound.shared}
        for name, w in seen[-1].items():
            if name in out:
                assert torch.equal(w, seen[0][name])
                assert toy.bound.weights[name] not in toy.optimizer.state
                assert toy.bound.weights[name].grad is None, "and was computed"
            else:
                assert (w != seen[0][name]).any()


@pytest.mark.parametrize("first", [True, False])
def test_what_it_left_out_is_measured_by_others(first: bool) -> None:
    """The next task may train it: EWC must know how much the old one needs it."""
    toy = ToyTraining(None)
    toy.recipe = Recipe(methods=[HFT(), EWC()] if first else [EWC(), HFT()])
    toy.bound = toy.recipe.unbound()
    toy.begin("one")
    toy.learn(0, 3)
    toy.end()
    assert toy.bound.states["ewc"].weights["fisher"].keys() == toy.bound.shared.keys()


def test_another_seed_or_task_draws_another_half() -> None:
    outs = [bound_bert(HFT(), seed=s).states["hft"].numbers["out"] for s in (0, 0, 1)]
    assert outs[0] == outs[1] != outs[2]
    bound = bound_bert(HFT())
    bound.begin_task("two", torch.optim.SGD(bound.models["task"].parameters(), lr=0.1), 9)
    assert bound.states["hft"].numbers["out"] != outs[0]


def test_others_can_rest_too() -> None:
    toy = ToyTraining(HFT(others="freeze"))
    toy.begin("one")
    out = toy.bound.states["hft"].numbers["out"]
    assert "encoder.embeddings.weight" in out and not any(n.startswith("one/") for n in out)


def test_a_network_without_layers_is_refused() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Refused, match="hft: no layer of the network trains"):
        Recipe(methods=[HFT()]).bind(model, optimizer, total_steps=3)
