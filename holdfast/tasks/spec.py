"""The spec by which a task is named: `where?option=value&…`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from holdfast.errors import Refused, nearest
from holdfast.tasks.files import is_data_file, is_text
from holdfast.tasks.table import Columns, shown
from holdfast.tasks.task import METRICS

_COLUMNS = ("text", "pair", "label", "answer", "name", "metric", "evaluation")
_ALLOWED = {
    "folder": _COLUMNS,
    "file": (*_COLUMNS, "type", "quotes"),
    "hub": (*_COLUMNS, "type", "config", "revision"),
    "text": ("name",),
    "builtin": ("name",),
}

TYPES = ("classification", "regression", "generation")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*){0,2}", re.ASCII)


@dataclass(frozen=True)
class Options:
    """What may follow the `?`."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    answer: str | None = None  # the column of the text to generate
    metric: str | None = None
    evaluation: str | None = None  # a file beside the data file, or the name of a split
    name: str | None = None
    type: str | None = None  # classification | regression | generation
    quotes: str | None = None  # none: quotes in CSV and TSV are ordinary characters
    config: str | None = None  # of a Hub dataset
    revision: str | None = None  # of a Hub dataset

    @property
    def columns(self) -> Columns:
        return Columns(self.text, self.pair, self.label, self.answer)


@dataclass(frozen=True)
class Spec:
    """`kind` is folder, file, text, hub or builtin; `place` the path or name that follows."""

    kind: str
    place: str
    options: Options


def parse(text: str) -> Spec:
    """What kind of source `text` names. A path that exists wins over a Hub id."""
    if not text.strip():
        raise Refused("no task named", remedy="name a folder, a file, builtin:NAME or a Hub id")
    place, query = text, ""
    if not _exists(Path(text)):
        place, _, query = text.partition("?")
    kind = _kind(place)
    options = _options(query, text, _ALLOWED[kind]) if query or place != text else Options()
    prefixed = kind in ("builtin", "hub")
    return Spec(kind, place.removeprefix(f"{kind}:") if prefixed else place, options)


def _kind(place: str) -> str:
    if place.startswith("builtin:"):
        return "builtin"
    if place.startswith("hub:"):
        if not _HUB_ID.fullmatch(place.removeprefix("hub:")):
            raise Refused("not a Hub id", where=shown(place), remedy="as hub:owner/name")
        return "hub"
    if _exists(Path(place)) and Path(place).is_dir():
        return "folder"
    if is_text(place):
        return "text"
    if _exists(Path(place)):
        return "file"
    return "hub" if _looks_like_hub(place) else "file"


def _looks_like_hub(place: str) -> bool:
    if len(place) > 200 or is_data_file(place) or not _HUB_ID.fullmatch(place):
        return False
    return "/" not in place or not _exists(Path(place.split("/", 1)[0]))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _options(query: str, text: str, known: tuple[str, ...]) -> Options:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        raise Refused(
            f"{shown(query)} is not option=value&option=value", where=shown(text)
        ) from None
    found = dict(pairs)
    for key, value in pairs:
        if key not in known:
            raise Refused(f"no option {shown(key)}", where=shown(text), remedy=nearest(key, known))
        if not value:
            raise Refused(f"option {key} is empty", where=shown(text))
    if len(found) < len(pairs):
        raise Refused("an option stands twice", where=shown(text))
    allowed = {"metric": METRICS, "type": TYPES, "quotes": ("none",)}
    for key, values in allowed.items():
        if key in found and found[key] not in values:
            raise Refused(
                f"{key} {shown(found[key])}", where=shown(text), remedy=nearest(found[key], values)
            )
    return Options(**found)
