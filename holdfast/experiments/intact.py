"""Whether a record has the structure that a report relies on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments import metrics

REPEAT = "run it again, or leave this file out"

_LISTS = ("tasks", "scores", "history", "seconds", "steps", "skipped_steps", "warnings")
_DICTS = ("model", "alone", "recipe", "settings", "versions", "methods_state", "before_end",
          "head_first", "general", "movement")  # fmt: skip


@contextlib.contextmanager
def drawn(what: str) -> Iterator[None]:
    """While what strangers sent is drawn: where its values do not fit together, `what` is damaged.

    `check` tells the usual damage by name; this is for the rest.
    """
    try:
        yield
    except Refused:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Refused(f"damaged {what} ({said[:200]})", remedy=REPEAT) from error


def check(body: Mapping[str, Any], where: str | None) -> None:
    """Check the structure a report relies on, so that a damaged file is not half drawn."""

    def fault(key: str, wanted: str) -> Refused:
        return Refused(f"damaged record: {key} is not {wanted}", where=where, remedy=REPEAT)

    for key in _LISTS:
        if key in body and not isinstance(body[key], list):
            raise fault(key, "a list")
    for key in _DICTS:
        if key in body and not isinstance(body[key], dict):
            raise fault(key, "a mapping")
    tasks = body.get("tasks")
    if not tasks or not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tasks):
        raise fault("tasks", "a list of named tasks")
    for task in tasks:
        for key in ("labels", "warnings"):
            if not isinstance(task.get(key) or [], list):
                raise fault(f"{key} of task {task['name']!r}", "a list")
        rows, constant = task.get("rows") or {}, task.get("constant")
        if not all(isinstance(task.get(key), str | None) for key in ("metric", "kind")):
            raise fault(f"metric or kind of task {task['name']!r}", "a text")
        if not isinstance(rows, dict) or not all(map(_number, [*rows.values(), constant])):
            raise fault(f"rows or constant of task {task['name']!r}", "a count for each split")
    curve = body.get("recipe", {}).get("rates")
    if isinstance(curve, dict) and not isinstance(curve.get("multipliers") or [], list):
        raise fault("multipliers of recipe", "a list")
    for key in ("scores", "selection_scores"):
        matrix = body.get(key)
        if matrix is not None and not (isinstance(matrix, list) and all(map(_cells, matrix))):
            raise fault(key, "a matrix of numbers")
    told = [t.get("metric") if t.get("kind") != "module" else None for t in tasks]
    for row in [*(body.get("scores") or []), *(body.get("selection_scores") or [])]:
        for value, metric in zip(row, told, strict=False):
            if metrics.impossible(value, metric):
                raise fault("scores", f"within the bounds of {metric}: {value}")
    if not all(_number(value) for value in body.get("alone", {}).values()):
        raise fault("alone", "a number for each task")
    told = body.get("general", {})
    after = told.get("after", {})
    points = [told.get("base", {}), *(after.values() if isinstance(after, dict) else [None])]
    good = all(isinstance(p, dict) and all(map(_number, p.values())) for p in points)
    if not good or not isinstance(told.get("reference") or {}, dict):
        raise fault("general", "a number for each measure")
    for m in body.get("movement", {}).values():
        far = m.get("parts", {}) if isinstance(m, dict) else None
        if not isinstance(far, dict) or not all(
            map(_number, [m.get("changed"), m.get("overlap"), *far.values()])
        ):
            raise fault("movement", "a number for each part")
    for key in ("seconds", "steps", "skipped_steps"):
        if not _cells(body.get(key, [])):
            raise fault(key, "a list of numbers")
    for point in body.get("history", []):
        good = isinstance(point, dict) and _cells(point.get("scores") or [])
        if not good or not all(_number(point.get(k)) for k in ("learning", "step", "loss")):
            raise fault("history", "a list of scores by step")
    if (rates := body.get("rates")) is not None:
        curves = isinstance(rates, dict) and isinstance(rates.get("order"), list)
        if not curves or not _cells(rates.get("multiplier")):
            raise fault("rates", "multipliers by part")
        if len(rates["order"]) != len(rates["multiplier"]):
            raise fault("rates", "one multiplier a part")
    if not isinstance(body.get("command", []), list | None):
        raise fault("command", "a list of words")
    for key in ("seed", "elapsed"):
        if not _number(body.get(key)):
            raise fault(key, "a number")


def _number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return value is None or isinstance(value, float)


def _cells(values: object) -> bool:
    return isinstance(values, list) and all(map(_number, values))
