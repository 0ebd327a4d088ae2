"""A recipe in a plain PyTorch loop: any model, any torch optimizer.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

import holdfast


def main() -> None:
    """Two tasks in a row on a small network, plain and with EWC; prints what was kept."""
    for recipe in (
        holdfast.Recipe(name="plain"),
        holdfast.Recipe(name="ewc", methods=[holdfast.EWC(strength=1e3)]),
    ):
        print(recipe.name, learn(recipe))


def learn(recipe: holdfast.Recipe) -> dict[str, float]:
    """Accuracy on each task after learning both."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    tasks = {name: rows(seed) for seed, name in enumerate(("first", "second"))}

    model = Wrapped(recipe.prepare(model))
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=1e-2), fused=True)
    bound = recipe.bind(model, optimizer, total_steps=100, task="first")
    for name, (x, y) in tasks.items():
        if name != "first":
            bound.begin_task(name, optimizer, 100)
        for _ in range(100):
            optimizer.zero_grad()
            batch = {"x": x, "y": y}
            output = model(**batch)
            loss = output.loss + (bound.penalty(batch, output) if bound.has_penalty else 0)
            loss.backward()
            optimizer.step()
        bound.end_task([{"x": x, "y": y}])
    bound.unbind()
    return {name: round(accuracy(model, *data), 2) for name, data in tasks.items()}


class Wrapped(nn.Module):
    """What methods expect of a model: called with a batch, it returns `loss` and `logits`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:
        logits = self.net(x)
        return Output(nn.functional.cross_entropy(logits, y), logits)


class Output:
    """A loss and its logits."""

    def __init__(self, loss: torch.Tensor, logits: torch.Tensor) -> None:
        self.loss, self.logits = loss, logits


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the task's own region, labelled by the side of the task's own plane."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 8, generator=generator)
    x[:, 0] = 4.0 * seed - 2.0
    return x, (x @ torch.randn(8, generator=generator) > 0).long()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(x, y).logits.argmax(-1) == y).float().mean())


if __name__ == "__main__":
    main()
