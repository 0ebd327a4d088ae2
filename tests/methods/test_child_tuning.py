"""Child-Tuning: F against its equation, D against a slow estimate, and what may not move."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from subnetworks import both_tasks, gradient, scripted
from torch import Tensor

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods.child_tuning import ChildTuning
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

CONTRACT: list[tuple[Method, float]] = [
    (ChildTuning(rows=6), 4),
    (ChildTuning(score="random", modules="all", head=False), 0),
    (ChildTuning(score="random", freeze="gradient", share=0.6), 0),
    (ChildTuning(estimate="batches", freeze="gradient", modules="linear"), 4),
]
RANDOM = {"score": "random", "modules": "all"}


# --- F --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["exact", "gradient"])
def test_random_child_under_sgd_is_its_equation(freeze: str) -> None:
    """w ← w − η g M / p, M of the method's own draws: by hand from a generator of equal state."""
    method = ChildTuning.from_dict({"share": 0.3, "freeze": freeze, **RANDOM})
    unused = Recipe(methods=[method]).unbound().views["child_tuning"].generator
    draws = torch.Generator()
    draws.set_state(unused.get_state())
    _, seen = scripted(method, 5, optimizer=torch.optim.SGD, lr=0.1)
    w = dict(seen[0])
    for step in range(5):
        for name in ("weight", "bias"):
            mask = torch.rand(w[name].shape, generator=draws) < 0.3
            w[name] = w[name] - 0.1 * gradient(step, name, w[name].shape) * mask / 0.3
            torch.testing.assert_close(seen[step + 1][name], w[name], rtol=1e-12, atol=0)


def test_random_child_moves_nothing_else_in_a_step() -> None:
    """Under momentum and decay; with the gradient alone masked, all of it moves."""
    for freeze in ("exact", "gradient"):
        method = ChildTuning.from_dict({"share": 0.3, "freeze": freeze, **RANDOM})
        moved = []
        for _, seen in both_tasks(method):
            for before, after in pairwise(seen[1:]):
                moved += [(after[n] != before[n]).float().mean() for n in before if "up" in n]
        share = torch.stack(moved).mean().item()
        assert share == (pytest.approx(0.3, abs=0.03) if freeze == "exact" else 1.0)


# --- D --------------------------------------------------------------------------------------------


def bind(method: Method, rows: list[dict[str, Tensor]]) -> tuple[Classifier, Any]:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Recipe(methods=[method]).bind(model, optimizer, total_steps=9, data=rows)


def slow(model: Classifier, rows: list[dict[str, Tensor]], clip: float | None) -> dict[str, Tensor]:
    """Σ g² of the batches of `rows`, each tensor's gradient clipped first."""
    total: dict[str, Tensor] = {}
    model.eval()
    for batch in rows:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in model.encoder.layers.named_parameters(prefix="encoder.layers"):
            g = p.grad
            assert g is not None
            scale = 1.0 if clip is None else min(1.0, clip / (g.norm().item() + 1e-6))
            total[name] = total.get(name, torch.zeros_like(g)) + (g * scale) ** 2
    model.zero_grad()
    model.train()
    return total


def chosen(scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The largest of all together."""
    values = torch.cat([s.flatten() for s in scores.values()])
    tau = values.sort(descending=True).values[math.ceil(len(values) * share) - 1]
    return {n: s >= tau for n, s in scores.items()}


@pytest.mark.parametrize(
    ("settings", "size", "clip"),
    [
        ({"estimate": "rows", "labels": "true", "rows": None}, 1, None),
        ({"estimate": "rows", "labels": "true", "rows": 10}, 1, None),
        ({"estimate": "batches"}, 8, 1.0),
        ({"estimate": "batches", "clip": 0.05}, 8, 0.05),  # of half of them
        ({"estimate": "batches", "clip": None}, 8, None),
    ],
)
def test_the_child_is_where_the_fisher_information_is_largest(
    settings: dict[str, Any], size: int, clip: float | None
) -> None:
    rows = [make_batch("one", step) for step in range(3)]
    model, bound = bind(ChildTuning.from_dict({"share": 0.2, **settings}), rows)
    held = bound.states["child_tuning"].slot("held")
    count = settings.get("rows") or 24
    pieces = [{k: v[i : i + size] for k, v in r.items()} for r in rows for i in range(0, 8, size)]
    expected = chosen(slow(model, pieces[: count // size], clip), 0.2)
    assert list(held) == list(expected)
    for name, moves in expected.items():
        assert torch.equal(held[name].isnan(), moves), name
        assert torch.equal(held[name][~moves], model.get_parameter(name)[~moves])


def test_the_ways_to_estimate_choose_differently() -> None:
    """Or the test above could not tell them apart."""
    rows, found = [make_batch("one", step) for step in range(3)], []
    for settings in ({"labels": "true"}, {"estimate": "batches"},
                     {"estimate": "batches", "clip": 0.05}):  # fmt: skip
        _, bound = bind(ChildTuning.from_dict({"share": 0.2, **settings}), rows)
        held = bound.states["child_tuning"].slot("held")
        found.append(torch.cat([t.isnan().flatten() for t in held.values()]))
    assert not any(torch.equal(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_exactly_the_child_moves_from_the_first_step_on() -> None:
    for toy, seen in both_tasks(ChildTuning(share=0.2)):
        held = toy.bound.states["child_tuning"].slot("held")
        assert sum(int(t.isnan().sum()) for t in held.values()) == math.ceil(
            0.2 * sum(t.numel() for t in held.values())
        )
        for now in seen[1:]:
            for name, values in held.items():
                moves = now[name] != seen[0][name]
                assert torch.equal(moves, values.isnan()), name
        for name in seen[0].keys() - held.keys():
            assert (seen[-1][name] != seen[0][name]).any()


def test_with_gradients_alone_decay_moves_the_rest() -> None:
    (_, first), _ = both_tasks(ChildTuning(share=0.2, freeze="gradient"))
    name = "encoder.layers.0.up.weight"
    assert (first[-1][name] != first[0][name]).all()


@pytest.mark.parametrize("estimate", ["rows", "batches"])
def test_without_rows_it_is_refused_before_the_first_step(estimate: str) -> None:
    toy = ToyTraining(ChildTuning.from_dict({"estimate": estimate}))
    model = toy.add_model("one")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Refused, match="no rows to estimate"):
        toy.bound.begin_task("one", optimizer, 9, model=model)
