"""The methods: one file each, found by themselves. `METHODS` is the one list of those that come
with holdfast; their classes are reached from here, and from `holdfast`, by name too.

A file `mine.py` holds one class whose `name` is "mine". Another package adds one by an entry point,
which is looked up only for names that are not here:

    [project.entry-points."holdfast.methods"]
    mine = "my_package:Mine"
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.plugins import plugin

GROUP = "holdfast.methods"


def _in_file(name: str) -> type[Method]:
    """The class of a file: the one whose `name` is the file's."""
    found = vars(importlib.import_module(f"{__name__}.{name}")).values()
    (made,) = (m for m in found if getattr(m, "name", None) == name and isinstance(m, type))
    return made


METHODS: dict[str, type[Method]] = {
    file.name: _in_file(file.name) for file in pkgutil.iter_modules(__path__) if not file.ispkg
}
CLASSES = {made.__name__: made for made in METHODS.values()}


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return CLASSES[name]


def method_named(name: str) -> type[Method]:
    """The method called `name`: one of `METHODS`, or from an installed package."""
    if name in METHODS:
        return METHODS[name]
    made, whence = plugin(GROUP, name, METHODS)
    if not (isinstance(made, type) and issubclass(made, Method) and made.name == name):
        raise Refused(f"{whence} is no method called {name!r}",
                      remedy="derive it from holdfast.Method, and give it this name")  # fmt: skip
    return made
