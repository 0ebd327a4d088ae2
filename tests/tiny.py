"""The smallest network, its optimizer, both bound, and short methods to bind them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.methods import DPS, EWC, L2SP, SIFT, ChildTuning, DynamicSubset, Replay
from holdfast.recipe import Recipe

# One of each kind, with stages as short as can be.
METHODS: list[Method] = [
    DPS(stage=2, drop=0.5),
    DPS(stage=2, drop=0.5, mix=True),
    DPS(stage=2, drop=0.5, score="retention"),
    EWC(strength=10.0),
    L2SP(strength=0.5),
    Replay(memory=8, share=0.5),
    SIFT(share=0.3, batches=2),
    ChildTuning(score="random", share=0.5),
    DynamicSubset(share=0.3),
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def adamw(model: nn.Module, **more: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, **more)


def bind(model: nn.Module, optimizer: Any, *methods: Method, **more: Any) -> Bound:
    return Recipe(methods=methods).bind(model, optimizer, **({"total_steps": 10} | more))
