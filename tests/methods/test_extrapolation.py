"""Extrapolation on quadratics by hand, along the gradient, Adam's direction and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import Extrapolation
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import ToyTraining

CONTRACT: list[tuple[Method, float]] = [
    (Extrapolation(), 4),
    (Extrapolation(rate=0.02, direction="adam"), 0),
    (Extrapolation(rate=0.1, direction="noise"), 0.2),
]
CURVE = torch.tensor([[1.0, 3.0, 0.5]], dtype=torch.float64)


def quadratic(
    method: Extrapolation, kind: type[torch.optim.Optimizer], steps: int, **settings: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before each step, and the gradients of ½ Σ c w² that it made."""
    model = nn.Linear(3, 1, bias=False).double()
    w = model.weight
    with torch.no_grad():
        w.copy_(torch.tensor([[1.0, -2.0, 4.0]]))
    optimizer = kind([w], lr=0.1, **settings)
    Recipe(methods=[method]).bind(model, optimizer, total_steps=steps)
    weights, grads = [], []
    for _ in range(steps):
        weights.append(w.detach().clone())
        optimizer.zero_grad()
        (CURVE / 2 * model.weight.square()).sum().backward()
        assert w.grad is not None
        grads.append(w.grad.clone())
        optimizer.step()
    return weights, grads


def test_along_the_last_gradient_by_hand() -> None:
    """gᵗ = c (xᵗ − γ̂ gᵗ⁻¹), xᵗ⁺¹ = xᵗ − lr gᵗ."""
    weights, grads = quadratic(Extrapolation(rate=0.3), torch.optim.SGD, 5)
    x, last = torch.tensor([[1.0, -2.0, 4.0]]).double(), torch.zeros(1, 3).double()
    for w, g in zip(weights, grads, strict=True):
        torch.testing.assert_close(w, x)
        last = CURVE * (x - 0.3 * last)
        torch.testing.assert_close(g, last)
        x = x - 0.1 * last


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_along_adams_direction_by_hand(kind: Any) -> None:
    """The shift is γ̂ / lr times the step that Adam made last (without decay)."""
    settings = {"weight_decay": 0.0, "betas": (0.8, 0.9)}
    method = Extrapolation(rate=0.05, direction="adam")
    weights, grads = quadratic(method, kind, 6, **settings)
    assert torch.equal(grads[0], CURVE * weights[0])
    for t in range(1, 6):
        step = weights[t] - weights[t - 1]
        torch.testing.assert_close(grads[t], CURVE * (weights[t] + 0.05 / 0.1 * step))


def test_without_adams_moments_its_direction_is_refused() -> None:
    with pytest.raises(Refused, match=r"extrapolation\.direction: SGD has not Adam's moments"):
        quadratic(Extrapolation(direction="adam"), torch.optim.SGD, 2, momentum=0.9)


def test_noise_has_the_norm_of_the_last_gradient_and_another_direction() -> None:
    model = nn.Linear(500, 40).double()
    w, b = model.weight, model.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Recipe(methods=[Extrapolation(rate=0.5, direction="noise")]).bind(
        model, optimizer, total_steps=9
    )
    shifts, last = [], torch.zeros(40, 500).double()
    for step in range(3):
        seen = model.weight
        assert torch.equal(seen, model.weight), "one draw a step"
        shifts.append(w.detach() - seen.detach())
        assert shifts[step].norm() == pytest.approx(0.5 * float(last.norm()), rel=0.03)
        assert abs(float((shifts[step] * last).sum())) <= 0.05 * shifts[step].norm() * last.norm()
        last = torch.randn(40, 500).double() * (step + 1)
        w.grad, b.grad = last.clone(), torch.zeros_like(b)
        optimizer.step()
    assert not torch.equal(shifts[1], shifts[2])


@pytest.mark.parametrize("direction", ["gradient", "adam", "noise"])
def test_at_rate_zero_it_is_plain_bit_for_bit(direction: Any) -> None:
    plain = ToyTraining(None).learn_all()
    same(
        ToyTraining(Extrapolation(rate=0.0, direction=direction)).learn_all().weights(),
        plain.weights(),
    )


def test_a_task_begins_with_nothing_of_the_one_before() -> None:
    toy = ToyTraining(Extrapolation())
    toy.begin("one")
    toy.learn()
    assert toy.bound.states["extrapolation"].weights["last"]
    toy.end()
    toy.begin("two")
    assert not toy.bound.states["extrapolation"].weights


def test_what_is_kept_is_the_gradient_as_the_step_took_it() -> None:
    """Clipped; and nothing for a tensor that had none."""
    toy = ToyTraining(Extrapolation())
    toy.begin("one")
    toy.backward(0)
    out = next(iter(toy.bound.weights))
    for name, w in toy.bound.weights.items():
        w.grad = None if name == out else 100 * torch.ones_like(w)
    toy.optimizer.step()
    last = toy.bound.states["extrapolation"].weights["last"]
    assert last.keys() == toy.bound.weights.keys() - {out}
    square = sum(float(g.square().sum()) for g in last.values())
    assert square == pytest.approx(1.0, rel=1e-4)


def test_a_model_in_evaluation_mode_is_refused() -> None:
    toy = ToyTraining(Extrapolation())
    toy.begin("one")
    toy.model.eval()
    toy.backward(0)
    with pytest.raises(Refused, match=r"no looking ahead.*evaluation mode"):
        toy.optimizer.step()
