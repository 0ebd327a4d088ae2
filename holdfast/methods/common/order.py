"""The order in which methods touch weights after a step: what one holds still, none may move."""

from __future__ import annotations

from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.methods.common.subnetwork import Subnetwork
from holdfast.methods.dps import DPS


def holds(method: Method) -> bool:
    """Whether a method puts entries back in `after_step`."""
    return isinstance(method, Subnetwork | DPS)


def refuse_after_holding(view: View, method: Method) -> None:
    """In `begin_task` of a method that moves all entries in `after_step`."""
    methods = view.bound.methods
    if holding := [m.name for m in methods[: methods.index(method)] if holds(m)]:
        raise Refused(f"it would move what {', '.join(holding)} held still", where=method.name,
                      remedy=f"list {method.name} before it")  # fmt: skip
