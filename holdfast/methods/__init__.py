"""The methods: one file each. `METHODS` is the one list of those that come with holdfast.

Another package adds one by an entry point, which is looked up only for names that are not here:

    [project.entry-points."holdfast.methods"]
    mine = "my_package:Mine"
"""

from __future__ import annotations

from holdfast.engine.method import Method
from holdfast.errors import Refused
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
from holdfast.plugins import plugin

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (DPS, EWC, GPM, KfacEWC, KLAnchor, L2SP, LwF, Merge, Replay, WiSE)
}
GROUP = "holdfast.methods"


def method_named(name: str) -> type[Method]:
    """The method called `name`: one of `METHODS`, or from an installed package."""
    if name in METHODS:
        return METHODS[name]
    made, whence = plugin(GROUP, name, METHODS)
    if not (isinstance(made, type) and issubclass(made, Method) and made.name == name):
        raise Refused(f"{whence} is no method called {name!r}",
                      remedy="derive it from holdfast.Method, and give it this name")  # fmt: skip
    return made


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
