"""A method of your own: it need not live inside of holdfast.

python examples/own_method.py

docs/own_method.md says how a package makes it known to recipe files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

import holdfast
from holdfast import Method, Range, View


@dataclass(frozen=True, kw_only=True)
class HoldHead(Method):
    """Hold a task's own head near the one it began with, which `head_first` fitted.

        P(w) = λ/2 · ‖w − w₀‖²        ∂P/∂w = λ (w − w₀)        w: the head, w₀: as the task began

    strength: λ ≥ 0.
    """

    name: ClassVar[str] = "hold_head"
    summary: ClassVar[str] = "pulls the head back to where the task began"
    paper: ClassVar[str] = "an example"
    bytes_per_weight: ClassVar[str] = "4 of the head's own weights, 0 of others"
    ranges: ClassVar[Mapping[str, Range]] = {"strength": Range(0.01, 10.0, log=True)}
    tunable: ClassVar[tuple[str, ...]] = ("strength",)

    strength: Annotated[float, Field(ge=0)] = 1.0

    def begin_task(self, view: View) -> None:
        # view.state is saved and follows its parameters by name; never change self.
        own = view.weights.keys() - view.shared.keys()
        view.state.weights["start"] = {n: view.weights[n].detach().clone() for n in own}

    def penalty_grad_(self, view: View) -> None:
        for name, start in view.state.slot("start").items():
            grad = view.grads[name]
            if grad is not None:
                grad.add_(view.weights[name].detach() - start, alpha=self.strength)


class Classifier(nn.Module):
    """An encoder below a head; called with a batch, it returns `loss` and `logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(self.encoder(x))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def moved(recipe: holdfast.Recipe, *, steps: int = 100) -> tuple[float, float]:
    """How far training moved the head from its first fit, and the share of right answers."""
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(256, 8)
    batch = {"x": x, "labels": (x @ torch.randn(8, 3)).argmax(1)}
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=1e-2))
    bound = recipe.bind(
        model, optimizer, total_steps=steps, task="points", shared=model.encoder, data=[batch]
    )
    start = model.head.weight.detach().clone()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    bound.end_task([batch])
    bound.unbind()
    right = (model(**batch).logits.argmax(1) == batch["labels"]).float().mean()
    return float((model.head.weight.detach() - start).norm()), float(right)


def main() -> None:
    """The same task without the method and with it."""
    first = holdfast.HeadFirst()
    for methods in ([], [HoldHead(strength=0.01)]):
        distance, right = moved(holdfast.Recipe(methods=methods, head_first=first))
        name = methods[0].name if methods else "without"
        print(f"{name}: the head moved by {distance:.2f}, {right:.0%} right")


if __name__ == "__main__":
    main()
