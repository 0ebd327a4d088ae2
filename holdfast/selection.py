"""Which entries of a tensor are its largest: thresholds and masks by rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def select(
    scores: Mapping[str, Tensor], drop: float, scope: Literal["tensor", "global"] = "tensor"
) -> dict[str, Tensor]:
    """True where an entry's score is at least that of rank ⌈n (1 − drop)⌉, counted from the top.

    Entries that tie with the threshold are all kept, so equal scores keep everything.
    """
    if scope == "global" and scores:
        tau = threshold(torch.cat([s.flatten() for s in scores.values()]), drop)
        return {n: s >= tau for n, s in scores.items()}
    return {n: s >= threshold(s.flatten(), drop) for n, s in scores.items()}


def threshold(scores: Tensor, drop: float) -> Tensor:
    """The score of rank ⌈n (1 − drop)⌉ from the top, of n ≥ 1 scores in one dimension."""
    n = scores.numel()
    rank = min(max(math.ceil(n * (1 - drop)), 1), n)
    return scores.kthvalue(n - rank + 1).values
