"""LISA"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.lisa import LISA

CONTRACT: list[tuple[Method, float]] = [(LISA(every=2), 0), (LISA(layers=2, every=0.3), 0)]
