"""The order in which methods touch weights: what one holds still, none that follows may move."""

from __future__ import annotations

from holdfast.engine.method import Method, View
from holdfast.errors import Refused


def earlier(view: View, method: Method) -> tuple[Method, ...]:
    """The methods of the recipe that stand before one of them."""
    methods = view.bound.methods
    return methods[: methods.index(method)]


def later(view: View, method: Method) -> tuple[Method, ...]:
    """The methods of the recipe that stand after one of them."""
    methods = view.bound.methods
    return methods[methods.index(method) + 1 :]


def refuse_after_holding(view: View, method: Method) -> None:
    """In `begin_task` of a method that moves all entries in `after_step`."""
    if holding := [m.name for m in earlier(view, method) if m.holds]:
        raise Refused(f"it would move what {', '.join(holding)} held still", where=method.name,
                      remedy=f"list {method.name} before it")  # fmt: skip
