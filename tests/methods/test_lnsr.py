"""LNSR."""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods import LNSR

CONTRACT: list[tuple[Method, float]] = [
    (LNSR(), 0),
    (LNSR(strength=3.0, layer=0, epsilon=0.2), 0),
    (LNSR(layer=1, noise="manifold"), 0),
]
ACCUMULATES = False
