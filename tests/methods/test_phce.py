"""PHCE: the equation, its joint, and the gradient that it leaves of cross-entropy's."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast import Refused
from holdfast.engine.method import Method
from holdfast.methods.phce import PHCE, partial

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [(PHCE(), 0), (PHCE(tau=5.0), 0)]


def loss(p: float, tau: float) -> float:
    """The equation, of a probability."""
    return float(partial(-torch.tensor(p, dtype=torch.float64).log(), tau))


def test_by_hand() -> None:
    assert loss(0.8, 2.0) == pytest.approx(0.2231435513)  # −log .8
    assert loss(0.25, 2.0) == pytest.approx(-0.5 + math.log(2) + 1)
    assert loss(1e-12, 4.0) == pytest.approx(math.log(4) + 1)  # where −log p is 27.6


@pytest.mark.parametrize("tau", [1.2, 2.0, 10.0])
def test_value_and_slope_are_continuous_at_the_joint(tau: float) -> None:
    joint, h = 1 / tau, 1e-6
    assert loss(joint, tau) == pytest.approx(math.log(tau))
    slopes = [(loss(joint + a, tau) - loss(joint + b, tau)) / (a - b) for a, b in ((h, 0), (0, -h))]
    assert slopes == pytest.approx([-tau, -tau], rel=1e-4)


def view(logits: Tensor, labels: Tensor, own: Tensor | None) -> Any:
    return SimpleNamespace(outputs=SimpleNamespace(logits=logits), inputs={"labels": labels},
                           loss=own)  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_with_the_models_own_loss_each_row_weighs_min_1_tau_p(scale: float) -> None:
    """Also where a trainer has scaled that loss for its accumulation."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 4, dtype=torch.float64)).float().requires_grad_()
    labels = torch.randint(4, (9,))
    own = scale * functional.cross_entropy(logits, labels)
    (own + PHCE(tau=3.0).penalty(view(logits, labels, own))).backward()
    p = logits.detach().softmax(1)
    weight = (3 * p[range(9), labels]).clamp(max=1)
    assert 0 < (weight < 1).sum() < 9
    usual = (p - functional.one_hot(labels, 4)) / 9
    torch.testing.assert_close(logits.grad, scale * weight[:, None] * usual, atol=1e-6, rtol=1e-5)


def test_other_rows_are_refused() -> None:
    numbers, tags = torch.zeros(2), torch.zeros(2, 3, dtype=torch.long)
    for logits, labels in (
        (nn.Parameter(torch.zeros(2, 1)), numbers),
        (torch.zeros(2, 3, 4), tags),
    ):
        with pytest.raises(Refused, match="phce: is for rows of one class each"):
            PHCE().penalty(view(logits, labels, None))


@pytest.mark.parametrize("of", ["weighted labels", "several members"])
def test_another_loss_of_the_model_is_refused(of: str) -> None:
    """-100 is no row, and does not count in the mean."""
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, -100])
    seen = view(logits, labels, None)
    seen.step, seen.outputs.loss = 0, functional.cross_entropy(logits, labels)
    PHCE().penalty(seen)
    weights = torch.tensor([4.0, 1, 1, 1])
    seen.outputs.loss = (
        3 * seen.outputs.loss
        if of == "several members"
        else functional.cross_entropy(logits, labels, weight=weights)
    )
    with pytest.raises(Refused, match="phce: the model's loss is not the cross-entropy"):
        PHCE().penalty(seen)
