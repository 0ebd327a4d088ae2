"""SIFT"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.sift import SIFT

CONTRACT: list[tuple[Method, float]] = [
    (SIFT(), 4),
    (SIFT(share=0.2, batches=2, modules="all", head=False, freeze="gradient", decay="none"), 4),
    (SIFT(score="random", share=0.3, batches=3, others="train", decay="none"), 4),
]
