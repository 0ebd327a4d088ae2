"""A convolutional network of your own, on scikit-learn's digits: 0 to 4, then 5 to 9.

    holdfast sequence --model examples/cnn.py --tasks examples/cnn.py:low examples/cnn.py:high \
        --recipe default --epochs 10 --lr 3e-3 --out runs/cnn

One output for each of the ten digits serves both tasks (class-incremental learning).
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 2 * 2, 10),
    )  # fmt: skip


def tasks() -> dict[str, Any]:
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype("float32")  # (1797, 1, 8, 8)
    found = {}
    for name, of in (("low", digits.target < 5), ("high", digits.target >= 5)):
        rows = {"x": images[of], "labels": digits.target[of]}
        found[name] = {"train": rows, "loss": loss, "score": score, "metric": "accuracy"}
    return found


def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits = net(batch["x"])
    return functional.cross_entropy(logits, batch["labels"]), logits


def score(net: nn.Module, batch: Any) -> Tensor:
    return torch.eq(net(batch["x"]).argmax(-1), batch["labels"]).float()
