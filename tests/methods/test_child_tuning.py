"""ChildTuning"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.child_tuning import ChildTuning

CONTRACT: list[tuple[Method, float]] = [
    (ChildTuning(rows=6), 4),
    (ChildTuning(score="random", modules="all", head=False), 0),
    (ChildTuning(score="random", freeze="gradient", share=0.6), 0),
    (ChildTuning(estimate="batches", freeze="gradient", modules="linear"), 4),
]
