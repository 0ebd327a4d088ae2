"""A folder of splits: `train` and `validation` as JSONL, `meta.json` with labels and metric."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import Refused, nearest
from holdfast.tasks.files import label, must_exist, parse_json
from holdfast.tasks.labels import MAX_CLASSES, MAX_NAME
from holdfast.tasks.spec import TYPES
from holdfast.tasks.table import shown
from holdfast.tasks.task import METRICS

_MAX_META = 2**20  # bytes
_KEYS = ("task", "labels", "metric", "kind")
_SUFFIXES = (".jsonl.gz", ".jsonl")


class Meta(NamedTuple):
    name: str
    labels: tuple[str, ...] | None  # in id order; None means regression
    metric: str | None
    kind: str | None  # one of TYPES; None: by the labels


def meta(folder: Path) -> Meta:
    """What `meta.json` says."""
    path = must_exist(folder / "meta.json")
    where = label(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_META + 1)
    except UnicodeDecodeError:
        raise Refused("not UTF-8", where=where) from None
    except OSError as error:
        raise Refused(f"cannot be read ({error.strerror})", where=where) from None
    if len(text) > _MAX_META:
        raise Refused("larger than a megabyte", where=where)
    found = parse_json(text, where)
    kind = found.get("kind") if isinstance(found, dict) else None
    if kind not in (None, *TYPES):
        raise Refused(f"kind {shown(kind)}", where=where, remedy=nearest(str(kind), TYPES))
    if not isinstance(found, dict) or ("labels" not in found and kind is None):
        raise Refused(
            "no 'labels'", where=where, remedy='as {"labels": ["no", "yes"], "metric": "accuracy"}'
        )
    for key in found:  # other keys describe the data; a misspelt one would be ignored
        near = difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.8)
        if near and near[0] not in found:
            raise Refused(f"unknown key {shown(key)}", where=where,
                          remedy=f"did you mean {near[0]!r}?")  # fmt: skip
        one = "kind" if key in ("type", "task_type") else "metric"
        known = TYPES if one == "kind" else METRICS
        if key not in _KEYS and one not in found and found[key] in known:
            raise Refused(f"{shown(key)} is not read, and says {shown(found[key])}",
                          where=where, remedy=f"call it {one!r}")  # fmt: skip
    named = kind in ("classification", "multilabel", "tokens")
    if kind is not None and (found.get("labels") is not None) != named:
        raise Refused(f"kind {shown(kind)} {'needs' if named else 'has no'} 'labels'",
                      where=where)  # fmt: skip
    name, metric = found.get("task") or folder.resolve().name, found.get("metric")
    if not isinstance(name, str) or not isinstance(metric, str | None):
        raise Refused("'task' and 'metric' are texts", where=where)
    return Meta(name, _labels(found.get("labels"), where), metric, kind)


def _labels(found: Any, where: str) -> tuple[str, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise Refused("'labels' is a list of names in id order, or null", where=where)
    if len(set(found)) < len(found) or not all(name.strip() for name in found):
        raise Refused("'labels' has a name twice or empty", where=where)
    if len(found) < 2:
        raise Refused(
            "a classification needs two labels", where=where, remedy="null means regression"
        )
    if len(found) > MAX_CLASSES or max(map(len, found)) > MAX_NAME:
        raise Refused(f"above {MAX_CLASSES} labels or {MAX_NAME} characters", where=where)
    for name in found:
        if not name.isprintable():
            raise Refused(f"label {shown(name)} cannot be printed", where=where)
    return tuple(found)


def find(folder: Path, name: str) -> Path | None:
    """The file of a split, gzipped or plain."""
    found = [path for end in _SUFFIXES if (path := inside(folder, name + end)).is_file()]
    if len(found) > 1:
        raise Refused(
            f"both {found[0].name} and {found[1].name} are there",
            where=label(folder),
            remedy="leave one",
        )
    return found[0] if found else None


def split(folder: Path, name: str) -> Path:
    """The file of a split that must be there."""
    return find(folder, name) or must_exist(inside(folder, name + _SUFFIXES[0]))


def inside(folder: Path, name: str) -> Path:
    """`name` within `folder`; a path that leads out of it is refused."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise Refused(f"{shown(name)} leads out of the folder", where=label(folder))
    return folder / name
