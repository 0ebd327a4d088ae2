"""SMART."""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods import SMART

CONTRACT: list[tuple[Method, float]] = [
    (SMART(), 0),
    (SMART(delta="code", strength=0.3, dropout="same"), 0),
    (SMART(epsilon=0.1, start=0.1, rate=0.1, ascents=2, proximal=1.0), 4),
]
ACCUMULATES = False
