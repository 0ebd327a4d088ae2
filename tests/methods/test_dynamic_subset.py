"""Dynamic subset tuning: what differs from the start is as few as said, the rest equal to a bit."""

from __future__ import annotations

import math

import pytest
import torch
from subnetworks import both_tasks, gradient, scripted
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.methods.dynamic_subset import DynamicSubset

CONTRACT: list[tuple[Method, float]] = [
    (DynamicSubset(), 4),
    (DynamicSubset(share=0.2, modules=("*.up.*", "*.down.*"), head=False), 4),
]


def test_an_entry_comes_and_another_goes_back() -> None:
    """By hand, w − Θ0 under SGD of rate 1: the second step takes the third entry further than the
    first had come, and the third step the first again, from where it went back to."""
    steps = [[4.0, 1.0, 2.0, 0.0], [0.0, 3.0, 5.0, 1.0], [6.0, 0.0, 0.0, 0.0]]
    model = nn.Linear(4, 1, bias=False)
    start = model.weight.detach().clone()

    def scripts(step: int, name: str, shape: torch.Size) -> Tensor:
        return -torch.tensor([steps[step]])

    _, seen = scripted(DynamicSubset(share=0.25), 3, model=model, gradients=scripts,
                       optimizer=torch.optim.SGD, lr=1.0)  # fmt: skip
    expected = [[0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0],
                [6.0, 0.0, 0.0, 0.0]]  # fmt: skip
    for w, far in zip(seen, expected, strict=True):
        differs = w["weight"] != start
        assert differs.tolist() == [[bool(d) for d in far]]
        torch.testing.assert_close(w["weight"] - start, torch.tensor([far]))


def test_trajectory_is_that_of_the_equations() -> None:
    """Under momentum, kept for all entries, and decay."""
    lr, wd, beta = 0.05, 0.3, 0.9
    settings = {"lr": lr, "weight_decay": wd, "momentum": beta}
    _, seen = scripted(DynamicSubset(share=0.2), 12, optimizer=torch.optim.SGD, **settings)
    for name, start in seen[0].items():
        w, m = start.clone(), torch.zeros_like(start)
        k = math.ceil(w.numel() * 0.2)
        for t in range(12):
            m = beta * m + gradient(t, name, w.shape) + wd * w
            w = w - lr * m
            far = (w - start).abs()
            w = torch.where(far >= far.flatten().sort().values[-k], w, start)
            torch.testing.assert_close(seen[t + 1][name], w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_but_the_share_equals_the_start_bit_for_bit(dtype: torch.dtype) -> None:
    """In every step of both tasks, each from its own start; who differs changes."""
    share, changed = 0.1, False
    for toy, seen in both_tasks(DynamicSubset(share=share), dtype=dtype):
        masks = []
        for now in seen[1:]:
            differs = {n: w != seen[0][n] for n, w in now.items()}
            for name, d in differs.items():
                if name.startswith(f"{toy.bound.task}/"):
                    continue
                most = math.ceil(share * d.numel())
                # A step may be too small for bfloat16; not every token is in a batch.
                exact = dtype is torch.float32 and "embeddings" not in name
                assert d.sum() == most if exact else d.sum() <= most, name
            masks.append(differs["encoder.layers.0.up.weight"])
        changed |= not torch.equal(masks[0], masks[-1])
    assert changed


def test_of_ties_the_first_differ() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    _, seen = scripted(DynamicSubset(share=0.5), 2, model=model, weight_decay=0.0, lr=0.1,
                       gradients=lambda t, n, s: torch.ones(s))  # fmt: skip
    assert (seen[2]["weight"] != 0).tolist() == [[True, True, True], [False, False, False]]
