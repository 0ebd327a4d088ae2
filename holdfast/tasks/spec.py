"""The spec by which a task is named: `where?option=value&…`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from holdfast.errors import Refused, nearest
from holdfast.files import must_be_utf8
from holdfast.tasks.files import is_data_file, is_text
from holdfast.tasks.table import Columns, pieces, shown
from holdfast.tasks.task import METRICS

_ROWS = (
    "text", "pair", "label", "answer", "prompt", "name", "metric", "evaluation", "type", "bad_rows",
    "strip", "labels", "per_class",
)  # fmt: skip
_ALLOWED = {
    "folder": _ROWS,
    "file": (*_ROWS, "quotes", "separator"),
    "hub": (*_ROWS, "config", "revision"),
    "text": ("name",),
    "builtin": ("name", "per_class"),
    "module": ("name",),
}

PLACE = re.compile(r"(?P<file>.+\.py)(?::(?P<task>.+))?", re.DOTALL)  # net.py:TASK
TYPES = ("classification", "multilabel", "regression", "tokens", "generation")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*){0,2}", re.ASCII)


def in_order(tasks: Any) -> list[str | Path]:
    """The names of tasks, as a list: one text alone would be read letter by letter, and a set has
    no order."""
    if isinstance(tasks, str | bytes | Path | Mapping | Set) or not isinstance(tasks, Iterable):
        raise Refused(f"must be a list of tasks, not {shown(tasks)}", where="--tasks",
                      remedy='tasks=["a.csv", "b.csv"]')  # fmt: skip
    found = list(tasks)
    if strange := [one for one in found if not isinstance(one, str | Path)]:
        raise Refused(f"a task is named by a text, not {shown(strange[0])}", where="--tasks",
                      remedy='a file, a folder or builtin:NAME, as "reviews.csv"')  # fmt: skip
    return found


@dataclass(frozen=True)
class Options:
    """What may follow the `?`."""

    text: str | None = None  # a column, or a text with columns in braces
    pair: str | None = None
    label: str | None = None
    answer: str | None = None  # the column of the text to generate
    prompt: str | None = None  # a text with columns in braces, to be answered
    metric: str | None = None
    evaluation: str | None = None  # a file beside the data file, or the name of a split
    name: str | None = None
    type: str | None = None  # one of TYPES
    bad_rows: str | None = None  # skip: bad rows are left out and counted, not refused
    strip: str | None = None  # yes: labels lose blanks around them, and spellings by case are one
    labels: str | None = None  # what the labels are called, in id order, with | between them
    per_class: str | None = None  # at most so many training rows of each class
    quotes: str | None = None  # none: quotes in CSV and TSV are ordinary characters
    separator: str | None = None  # of CSV and TSV: a character, or tab
    config: str | None = None  # of a Hub dataset
    revision: str | None = None  # of a Hub dataset

    @property
    def columns(self) -> Columns:
        return Columns(self.text, self.pair, self.label, self.answer, self.prompt)

    @property
    def written(self) -> dict[str, Any]:
        """How CSV and TSV are written, as `files.read` takes it."""
        mark = "\t" if self.separator == "tab" else self.separator
        return {"quotes": self.quotes is None, "separator": mark}


@dataclass(frozen=True)
class Spec:
    """`kind` is folder, file, text, module, hub or builtin; `place` the path or name there."""

    kind: str
    place: str
    options: Options


def parse(text: str) -> Spec:
    """What kind of source `text` names. A path that exists wins over a Hub id."""
    if not text.strip():
        raise Refused("no task named", remedy="name a folder, a file, builtin:NAME or a Hub id")
    must_be_utf8(text)
    place, query = text, ""
    if not _exists(Path(text)):
        place, _, query = text.partition("?")
    kind = _kind(place)
    options = _options(query, text, _ALLOWED[kind]) if query or place != text else Options()
    prefixed = kind in ("builtin", "hub")
    return Spec(kind, place.removeprefix(f"{kind}:") if prefixed else place, options)


def with_options(text: str, /, **given: str) -> str:
    """`text` with options added that it lacks, if its kind of source has them."""
    asked = parse(text)
    known = [key for key in _ALLOWED[asked.kind] if getattr(asked.options, key) is None]
    new = urlencode({key: value for key, value in given.items() if key in known})
    return text + ("?" if asked.options == Options() else "&") + new if new else text


def template_in(text: str) -> dict[str, str]:
    """The option of a spec by which texts are made of columns; none where they are a column."""
    options = parse(text).options if text.strip() else Options()
    made = options.columns.template
    return {} if made is None else {"text" if options.prompt is None else "prompt": made}


def _kind(place: str) -> str:
    if place.startswith("builtin:"):
        return "builtin"
    if place.startswith("hub:"):
        if not _HUB_ID.fullmatch(place.removeprefix("hub:")):
            raise Refused("not a Hub id", where=shown(place), remedy="as hub:owner/name")
        return "hub"
    if PLACE.fullmatch(place):
        return "module"
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
    allowed = {"metric": METRICS, "type": TYPES, "quotes": ("none",), "bad_rows": ("skip",),
               "strip": ("yes",)}  # fmt: skip
    for key, values in allowed.items():
        if key in found and found[key] not in values:
            raise Refused(
                f"{key} {shown(found[key])}", where=shown(text), remedy=nearest(found[key], values)
            )
    if not re.fullmatch(r'tab|[^\w"\r\n\0]', mark := found.get("separator", "tab")):
        raise Refused(f"separator {shown(mark)}", where=shown(text), remedy="a character, or tab")
    if not re.fullmatch(r"[1-9]\d{0,8}", found.get("per_class", "1")):
        raise Refused(f"per_class {shown(found['per_class'])} is no count of rows",
                      where=shown(text))  # fmt: skip
    if not any(blank for _, blank in pieces(found.get("prompt", "{text}"))):
        raise Refused("prompt has no column in braces", where=shown(text),
                      remedy="as prompt={text} Sentiment:")  # fmt: skip
    if "prompt" in found and found.get("type", "generation") != "generation":
        raise Refused(f"a {found['type']} has no prompt", where=shown(text),
                      remedy="say type=generation")  # fmt: skip
    return Options(**found)
