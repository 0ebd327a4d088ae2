"""Recipes in which one method puts entries back that another has moved: refused, or right."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, SIFT, ChildTuning, DynamicSubset, MoFO, RecAdam
from holdfast.recipe import Recipe
from holdfast.testing.toy import ToyTraining

SUBSET, DENSE, CHILD = DynamicSubset(share=0.1), DPS(stage=2), ChildTuning(score="random")
MOMENTUM = MoFO(share=0.3)


def toy_of(*methods: Method) -> ToyTraining:
    toy = ToyTraining(None, steps=20)
    toy.recipe = Recipe(methods=methods)
    toy.bound = toy.recipe.unbound(seed=7)
    return toy


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (DENSE, MoFO(decay="all"), "it would move what dps held still; list mofo before it"),
        (MOMENTUM, SIFT(decay="none"), "it would move what mofo held still; list sift before it"),
        (CHILD, RecAdam(), "it would move what child_tuning held still; list recadam before it"),
        (SUBSET, MOMENTUM, "mofo would hold entries that have to go back; list it after them"),
        (SUBSET, CHILD, "child_tuning would hold entries that have to go back"),
        (SUBSET, DENSE, "dps would hold entries that have to go back"),
    ],
    ids=lambda x: x.name if isinstance(x, Method) else "",
)
def test_a_method_that_undoes_another_is_refused_after_it(
    first: Method, second: Method, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        toy_of(first, second).begin("one")
    toy_of(second, first).begin("one")


@pytest.mark.parametrize("other", [MOMENTUM, CHILD, DENSE], ids=lambda m: m.name)
def test_beside_others_a_subset_is_as_small_as_it_should(other: Method) -> None:
    toy = toy_of(other, SUBSET)
    toy.begin("one")
    start = {name: w.detach().clone() for name, w in toy.bound.shared.items()}
    for step in range(toy.steps):
        toy.learn(step, step + 1)
        for name, w in toy.bound.shared.items():
            assert int((w != start[name]).sum()) <= math.ceil(0.1 * w.numel()), (step, name)


def test_what_is_held_is_not_decayed_either() -> None:
    toy = toy_of(MoFO(share=0.3, decay="all"), DENSE)
    toy.begin("one")
    toy.learn(0, 3)
    held = toy.bound.states["dps"].weights["held"]
    assert DENSE.masking(toy.bound.views["dps"])
    for name, values in held.items():
        still = ~values.isnan()
        assert torch.equal(toy.bound.weights[name][still], values[still]), name
