"""The methods: one file each. `METHODS` is the one list of them."""

from __future__ import annotations

from holdfast.method import Method
from holdfast.methods.dps import DPS
from holdfast.methods.ewc import EWC
from holdfast.methods.l2sp import L2SP
from holdfast.methods.replay import Replay

METHODS: dict[str, type[Method]] = {m.name: m for m in (DPS, EWC, L2SP, Replay)}

__all__ = ["DPS", "EWC", "L2SP", "METHODS", "Replay"]
