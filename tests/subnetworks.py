"""What the tests of subnetwork methods share: weights and moments of the toy's two tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.recipe import Recipe
from holdfast.testing.toy import TASKS, ToyTraining

Weights = dict[str, Tensor]
Gradient = Callable[[int, str, torch.Size], Tensor]


def copies(bound: Bound) -> Weights:
    return {n: w.detach().clone() for n, w in bound.weights.items()}


def both_tasks(
    method: Method, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[ToyTraining, list[Weights]]]:
    """Each task as it is learned, under AdamW with momentum and decay: the weights at its start
    and after each step."""
    toy = ToyTraining(method, dtype=dtype)
    for task in TASKS:
        toy.begin(task)
        seen = [copies(toy.bound)]
        for step in range(toy.steps):
            toy.learn(step, step + 1)
            seen.append(copies(toy.bound))
        yield toy, seen
        toy.end()


def gradient(step: int, name: str, shape: torch.Size) -> Tensor:
    """Of very different sizes, so that a mean, a sum and a maximum rank differently."""
    draw = torch.Generator().manual_seed(1000 * step + len(name))
    g = torch.randn(shape, generator=draw, dtype=torch.float64)
    return g * torch.exp(torch.randn(shape, generator=draw, dtype=torch.float64))


def scripted(
    method: Method,
    steps: int,
    *,
    model: nn.Module | None = None,
    gradients: Gradient = gradient,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: float,
) -> tuple[Bound, list[Weights]]:
    """A linear layer (or `model`) moved by scripted gradients: its weights before and after each
    step. By default AdamW with a decay that shows."""
    torch.manual_seed(0)
    model = model if model is not None else nn.Linear(6, 5).double()
    settings = settings or {"lr": 0.05, "weight_decay": 0.3}
    made = optimizer(model.parameters(), **settings)
    bound = Recipe(methods=[method]).bind(model, made, total_steps=steps)
    seen = [copies(bound)]
    for step in range(steps):
        for name, w in bound.weights.items():
            w.grad = gradients(step, name, w.shape).to(w.dtype)
        made.step()
        seen.append(copies(bound))
    return bound, seen
