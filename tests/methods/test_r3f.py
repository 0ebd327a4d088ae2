"""R3F."""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods import R3F

CONTRACT: list[tuple[Method, float]] = [
    (R3F(), 0),
    (R3F(strength=0.5, epsilon=0.1, noise="normal", dropout="same", head="spectral"), 0),
]
ACCUMULATES = False
