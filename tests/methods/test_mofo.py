"""MoFO against Adam written out, how many entries move, and where decay reaches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from subnetworks import both_tasks, gradient, scripted
from torch import nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods.mofo import MoFO

CONTRACT: list[tuple[Method, float]] = [
    (MoFO(), 0),
    (MoFO(share=0.3, modules="matrices", head=False, decay="all"), 0),
]


@pytest.mark.parametrize("decay", ["moving", "all"])
def test_trajectory_is_that_of_the_equations(decay: str) -> None:
    """Adam's m and v are those of all entries; the largest |m| of each tensor move."""
    lr, wd, b1, b2, eps = 0.05, 0.3, 0.9, 0.999, 1e-8
    _, seen = scripted(MoFO.from_dict({"share": 0.2, "decay": decay}), 12, lr=lr, weight_decay=wd)
    for name, w in seen[0].items():
        m, v, w = torch.zeros_like(w), torch.zeros_like(w), w.clone()
        for t in range(1, 13):
            g = gradient(t - 1, name, w.shape)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            update = lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            k = math.ceil(w.numel() * 0.2)
            moves = m.abs() >= m.abs().flatten().sort(descending=True).values[k - 1]
            shrunk = w * (1 - lr * wd)
            w = torch.where(moves, shrunk - update, shrunk if decay == "all" else w)
            torch.testing.assert_close(seen[t][name], w, rtol=1e-11, atol=1e-12)


def test_exactly_the_share_of_each_tensor_moves_in_each_step() -> None:
    for toy, seen in both_tasks(MoFO(share=0.15)):
        for before, after in pairwise(seen):
            for name, w in after.items():
                moved = int((w != before[name]).sum())
                if name.startswith(f"{toy.bound.task}/"):
                    assert moved == w.numel(), "the head trains whole"
                elif "embeddings" in name:  # not every token is in a batch
                    assert 0 < moved <= math.ceil(0.15 * w.numel())
                else:
                    assert moved == math.ceil(0.15 * w.numel()), name
        kept = toy.optimizer.state[toy.bound.weights["encoder.layers.0.up.weight"]]
        assert kept["exp_avg"].all() and kept["exp_avg_sq"].all(), "moments are dense"


def test_of_ties_the_first_move() -> None:
    model = nn.Linear(3, 2, bias=False)
    _, seen = scripted(MoFO(share=0.5), 2, model=model, gradients=lambda t, n, s: torch.ones(s))
    moved = seen[2]["weight"] != seen[0]["weight"]
    assert moved.tolist() == [[True, True, True], [False, False, False]]


def test_with_matrices_alone_biases_always_move() -> None:
    for modules, all_ in (("matrices", True), ("all", False)):
        _, seen = scripted(MoFO.from_dict({"modules": modules}), 1)
        assert bool((seen[1]["bias"] != seen[0]["bias"]).all()) == all_


def test_momentum_of_sgd_serves_and_none_is_refused() -> None:
    sgd = torch.optim.SGD
    _, seen = scripted(MoFO(share=0.2), 2, optimizer=sgd, lr=0.1, momentum=0.9)
    total = gradient(0, "weight", seen[0]["weight"].shape) * 0.9
    total += gradient(1, "weight", total.shape)
    moved = seen[2]["weight"] != seen[1]["weight"]
    assert torch.equal(moved, total.abs() >= total.abs().flatten().sort().values[-6])
    with pytest.raises(Refused, match="mofo: SGD has no momentum"):
        scripted(MoFO(), 2, optimizer=sgd, lr=0.1)
    with pytest.raises(Refused, match="the weight decay of SGD is in its gradient"):
        scripted(MoFO(decay="all"), 2, optimizer=sgd, lr=0.1, momentum=0.9, weight_decay=0.1)
    with pytest.raises(Refused, match="Adagrad has no momentum"):
        scripted(MoFO(), 2, optimizer=torch.optim.Adagrad, lr=0.1)
