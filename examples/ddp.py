"""A recipe under DistributedDataParallel: two tasks in a row, each rank on its part of a batch.

torchrun --nproc-per-node 2 examples/ddp.py        (or, for one process: python examples/ddp.py)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import holdfast


def main() -> None:
    """Learn both tasks; rank 0 prints what was kept of each."""
    many = "RANK" in os.environ
    if many:
        dist.init_process_group("gloo")  # "nccl" where each rank has a GPU
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)

    torch.manual_seed(0)
    recipe = holdfast.Recipe(methods=[holdfast.DPS(), holdfast.EWC(strength=1e3)])
    model = recipe.prepare(Net())
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=1e-2))
    bound = recipe.unbound(seed=0)
    net: nn.Module = model
    for task in (0, 1):
        bound.begin_task(f"task {task}", optimizer, 60, model=model)
        if many and net is model:
            net = DistributedDataParallel(model)
        x, y = rows(task)
        for _ in range(60):
            optimizer.zero_grad()
            net(x.chunk(ranks)[rank], y.chunk(ranks)[rank]).loss.backward()
            optimizer.step()
        # All rows, on every rank: methods split them over ranks and add up the results.
        bound.end_task([{"x": a, "y": b} for a, b in zip(x.split(32), y.split(32), strict=True)])
    bound.unbind()
    if rank == 0:
        for task in (0, 1):
            x, y = rows(task)
            print(f"task {task}: {(model(x, y).logits.argmax(-1) == y).float().mean():.2f}")
    if many:
        dist.destroy_process_group()


@dataclass
class Output:
    """What methods expect of a model's output."""

    loss: torch.Tensor
    logits: torch.Tensor


class Net(nn.Module):
    """A small classifier that is called with a batch and returns loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:
        logits = self.net(x)
        return Output(nn.functional.cross_entropy(logits, y), logits)


def rows(task: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the task's own region, labelled by the side of the task's own plane."""
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(256, 8, generator=generator)
    x[:, 0] = 4.0 * task - 2.0
    return x, (x @ torch.randn(8, generator=generator) > 0).long()


if __name__ == "__main__":
    main()
