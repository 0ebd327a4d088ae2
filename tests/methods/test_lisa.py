"""LISA: its schedule by hand, and that a resting layer does not move by a bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from subnetworks import both_tasks
from torch import nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods.lisa import LISA
from holdfast.recipe import Recipe
from holdfast.testing.toy import ToyTraining

CONTRACT: list[tuple[Method, float]] = [(LISA(every=2), 0), (LISA(layers=2, every=0.3), 0)]


def test_layers_change_every_k_steps_as_the_generator_draws_them() -> None:
    method = LISA(every=2)
    draws = torch.Generator()
    draws.set_state(ToyTraining(method).bound.views["lisa"].generator.get_state())
    for toy, seen in both_tasks(method):
        # Drawn before steps 0, 2, 4, 6 and 8.
        drawn = [int(torch.randperm(2, generator=draws)[0]) for _ in range(5)]
        active = [drawn[step // 2] for step in range(toy.steps)]
        for step, (before, after) in enumerate(pairwise(seen)):
            for name, w in after.items():
                moved = (w != before[name]).any()
                if name.startswith("encoder.layers."):
                    assert moved == (name.split(".")[2] == str(active[step])), (step, name)
                else:
                    assert moved, "embeddings and head always train"
        for layer in (0, 1):
            w = toy.bound.weights[f"encoder.layers.{layer}.up.weight"]
            steps = toy.optimizer.state[w]["step"] if w in toy.optimizer.state else 0
            assert steps == active.count(layer), "moments wait while a layer rests"
        assert len({*active}) == 2, "a seed that draws both layers"


def test_a_skipped_step_draws_nothing() -> None:
    """Whatever the gradients of the step before a change were, the next layer is the same."""
    found = []
    for bad in (False, True):
        toy = ToyTraining(LISA(every=3))
        toy.begin("one")
        toy.learn(0, 2)
        if bad:
            toy.backward(2)
            toy.bound.weights["encoder.embeddings.weight"].grad.fill_(torch.nan)  # type: ignore[union-attr]
            toy.optimizer.step()
        resting = [toy.bound.states["lisa"].numbers["resting"]]
        for step in range(2, 9):
            toy.learn(step, step + 1)
            resting.append(toy.bound.states["lisa"].numbers["resting"])
        found.append(resting)
    assert found[0] == found[1]
    assert len({*map(tuple, found[0])}) == 2, "a seed that changes layers"


def test_gamma_layers_train_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(7)])  # the first and last are no layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[LISA(layers=2)]).bind(model, optimizer, total_steps=40)
    numbers = bound.states["lisa"].numbers
    assert len(numbers["parts"]) == 5 and len(numbers["resting"]) == 3
    assert {*numbers["resting"]} < {*numbers["parts"]}


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(Refused, match=r"lisa\.layers: 2 layers train, 3 are to be drawn"):
        ToyTraining(LISA(layers=3)).begin("one")
