"""DynamicSubset"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.dynamic_subset import DynamicSubset

CONTRACT: list[tuple[Method, float]] = [
    (DynamicSubset(), 4),
    (DynamicSubset(share=0.2, modules=("*.up.*", "*.down.*"), head=False), 4),
]
