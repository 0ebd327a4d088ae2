"""MoFO"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.mofo import MoFO

CONTRACT: list[tuple[Method, float]] = [
    (MoFO(), 0),
    (MoFO(share=0.3, modules="matrices", head=False, decay="all"), 0),
]
