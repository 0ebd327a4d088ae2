"""HFT"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.hft import HFT

CONTRACT: list[tuple[Method, float]] = [(HFT(), 0), (HFT(share=0.3, others="freeze"), 0)]
