"""What other packages add to holdfast by entry points; looked up only for names not ours."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from holdfast.errors import Refused, nearest


def plugin(group: str, name: str, known: Iterable[str]) -> tuple[Any, str]:
    """The object that an installed package registers as `name` in a group, and its origin as text.

    `Refused` if no package does (`known` are the names that come with holdfast), if two do, and
    if it cannot be loaded.
    """
    found = list(entry_points(group=group, name=name))
    kind = group.removeprefix("holdfast.").removesuffix("s")
    if not found:
        names = [*known, *(point.name for point in entry_points(group=group))]
        raise Refused(f"no {kind} {name!r}", remedy=nearest(name, names))
    if len(found) > 1:
        raise Refused(f"two packages have a {kind} {name!r}: {', '.join(map(_package, found))}",
                      remedy="uninstall one of them")  # fmt: skip
    whence = f"{found[0].value} of {_package(found[0])}"
    try:
        return found[0].load(), whence
    except (ImportError, AttributeError) as error:
        raise Refused(f"{whence} cannot be loaded: {error}", remedy="install it again") from None


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
