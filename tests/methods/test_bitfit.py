"""BitFit"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.methods.bitfit import BitFit

CONTRACT: list[tuple[Method, float]] = [(BitFit(), 0)]
