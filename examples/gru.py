"""A recurrent network of your own: does a sequence of numbers rise, then does it swing?

    holdfast sequence --model examples/gru.py --tasks examples/gru.py:rises examples/gru.py:swings \
        --recipe ewc --epochs 10 --lr 3e-3 --out runs/gru

Each task has an output of its own; a network decides by itself what its tasks share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS = 20


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 32, batch_first=True)
        self.heads = nn.ModuleDict({name: nn.Linear(32, 1) for name in ("rises", "swings")})

    def forward(self, x: Tensor, task: str) -> Tensor:
        last = self.gru(x)[1][-1]  # the state after the last step: (rows, 32)
        answer: Tensor = self.heads[task](last)
        return answer[:, 0]


def model() -> nn.Module:
    return Reader()


def tasks() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    found = {}
    for name in ("rises", "swings"):
        yes = draw.integers(0, 2, 600)
        at = np.linspace(0, 1, STEPS)
        trend = (2 * yes - 1)[:, None] * at if name == "rises" else 0.0
        swing = yes[:, None] * np.sin(12 * at) if name == "swings" else 0.0
        x = trend + swing + draw.normal(0, 0.3, (600, STEPS))
        rows = {"x": x[:, :, None], "y": yes.astype(float)}
        found[name] = {
            "train": rows, "loss": partial(loss, task=name), "score": partial(score, task=name),
            "predict": partial(predict, task=name), "metric": "accuracy",
        }  # fmt: skip
    return found


def loss(net: nn.Module, batch: Any, *, task: str) -> Tensor:
    return functional.binary_cross_entropy_with_logits(net(batch["x"], task), batch["y"])


def score(net: nn.Module, batch: Any, *, task: str) -> Tensor:
    return torch.eq(net(batch["x"], task) > 0, batch["y"] > 0.5).float()


def predict(net: nn.Module, batch: Any, *, task: str) -> list[bool]:
    found: list[bool] = (net(batch["x"], task) > 0).tolist()
    return found
