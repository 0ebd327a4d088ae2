"""The methods: one file each. `METHODS` is the one list of those that come with holdfast.

A package of its own adds one by an entry point, and is asked only for a name that is not here:

    [project.entry-points."holdfast.methods"]
    mine = "my_package:Mine"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from holdfast.engine.method import Method
from holdfast.errors import Refused, nearest
from holdfast.methods.dps import DPS
from holdfast.methods.ewc import EWC
from holdfast.methods.gpm import GPM
from holdfast.methods.kfac_ewc import KfacEWC
from holdfast.methods.kl_anchor import KLAnchor
from holdfast.methods.l2sp import L2SP
from holdfast.methods.lwf import LwF
from holdfast.methods.merge import Merge
from holdfast.methods.replay import Replay
from holdfast.methods.wise import WiSE

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (DPS, EWC, GPM, KfacEWC, KLAnchor, L2SP, LwF, Merge, Replay, WiSE)
}
GROUP = "holdfast.methods"


def method_named(name: str) -> type[Method]:
    """The method of a name: one of `METHODS`, or of an installed package."""
    if name in METHODS:
        return METHODS[name]
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        known = [*METHODS, *(point.name for point in entry_points(group=GROUP))]
        raise Refused(f"no method {name!r}", remedy=nearest(name, known))
    if len(found) > 1:
        raise Refused(f"two packages have a method {name!r}: {', '.join(map(_package, found))}",
                      remedy="uninstall one of them")  # fmt: skip
    try:
        made = found[0].load()
    except (ImportError, AttributeError) as error:
        raise Refused(f"{found[0].value} of {_package(found[0])} cannot be loaded: {error}",
                      remedy="install it again") from None  # fmt: skip
    if not (isinstance(made, type) and issubclass(made, Method) and made.name == name):
        raise Refused(f"{found[0].value} of {_package(found[0])} is no method called {name!r}",
                      remedy="derive it from holdfast.Method, and give it this name")  # fmt: skip
    return made


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


__all__ = [
    "DPS",
    "EWC",
    "GPM",
    "L2SP",
    "METHODS",
    "KLAnchor",
    "KfacEWC",
    "LwF",
    "Merge",
    "Replay",
    "WiSE",
    "method_named",
]
