"""An autoencoder of your own, on scikit-learn's digits: round ones first, then straight ones.

    holdfast sequence --model examples/autoencoder.py \
        --tasks examples/autoencoder.py:round examples/autoencoder.py:straight \
        --recipe merge --epochs 10 --lr 3e-3 --out runs/autoencoder

It has no labels. The score is 1 minus the share of a picture's variance that is lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from torch import Tensor, nn


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12),
        nn.ReLU(), nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 64),
    )  # fmt: skip


def tasks() -> dict[str, Any]:
    digits = load_digits()
    x = digits.data / 16 - 0.3
    found = {}
    for name, of in (("round", (0, 6, 8, 9)), ("straight", (1, 4, 7))):
        rows = {"x": x[np.isin(digits.target, of)]}
        found[name] = {"train": rows, "loss": loss, "score": score, "metric": "variance kept"}
    return found


def loss(net: nn.Module, batch: Any) -> Tensor:
    return (net(batch["x"]) - batch["x"]).square().mean()


def score(net: nn.Module, batch: Any) -> Tensor:
    x = batch["x"]
    return 1 - (net(x) - x).square().sum(-1) / (x - x.mean(-1, keepdim=True)).square().sum(-1)
