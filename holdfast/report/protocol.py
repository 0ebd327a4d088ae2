"""What a record keeps of a protocol and of tests on other tasks, for the page and the terminal.

Read as it stands in a file of anybody's: whatever is not of the form that is expected is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.experiments.statistics import Spread, mean_spread
from holdfast.report.facts import Comparison, RunFacts
from holdfast.report.words import clean, spread_text


@dataclass(frozen=True)
class Figure:
    """What others report: the average of all tasks at the end."""

    method: str
    average: float  # in percent
    model: str
    source: str


@dataclass(frozen=True)
class ProtocolFacts:
    """The protocol of a comparison's runs."""

    name: str
    about: str
    source: str
    differs: list[str]
    left_out: list[str]
    figures: list[Figure]  # shown only beside plain
    caveats: list[str]  # why these may not compare
    plain: Spread  # average of all tasks at the end, of the control
    control: str | None


def protocol_of(study: Comparison) -> ProtocolFacts | None:
    """The protocol that all runs are of; None if they are of none, or of several."""
    told = [run.body.get("protocol") for run in study.runs]
    names = {str(each.get("name")) if isinstance(each, dict) else None for each in told}
    if len(names) > 1 or not isinstance(told[0], dict):
        return None
    control = next((group for group in study.groups if group.control), None)
    ends = [run.metrics["average"] for run in control.runs] if control else []
    return ProtocolFacts(
        name=clean(told[0].get("name") or ""),
        about=clean(told[0].get("about") or ""),
        source=clean(told[0].get("source") or ""),
        differs=_texts(told, "differs"),
        left_out=_texts(told, "left_out"),
        caveats=_texts(told, "caveats"),
        figures=_figures(told[0].get("cited")),
        plain=mean_spread(ends),
        control=study.control,
    )


def elsewhere(runs: Sequence[RunFacts]) -> dict[str, dict[str, Spread]]:
    """Scores on tasks that were only tested on: task learned -> other task -> over runs."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        told = run.body.get("elsewhere")
        for task, scores in told.items() if isinstance(told, dict) else ():
            for other, value in scores.items() if isinstance(scores, dict) else ():
                if _number(value):
                    found.setdefault(clean(task), {}).setdefault(clean(other), []).append(value)
    return {task: {other: mean_spread(values) for other, values in others.items()}
            for task, others in found.items()}  # fmt: skip


def elsewhere_lines(runs: Sequence[RunFacts]) -> list[str]:
    """`after snli: sick 0.512, hans 0.503`, a line a task learned."""
    return [
        f"after {task}: " + ", ".join(f"{other} {spread_text(v)}" for other, v in others.items())
        for task, others in elsewhere(runs).items()
    ]


def _texts(told: Sequence[Any], key: str) -> list[str]:
    """The lines of all runs, each once."""
    found = [each[key] for each in told if isinstance(each, dict) and key in each]
    return list(dict.fromkeys(clean(line) for lines in found if isinstance(lines, list)
                              for line in lines))  # fmt: skip


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figures(cited: object) -> list[Figure]:
    found = []
    for each in cited if isinstance(cited, list) else ():
        averages = each.get("averages") if isinstance(each, dict) else None
        for method, value in averages.items() if isinstance(averages, dict) else ():
            if _number(value):
                found.append(Figure(clean(method), value, clean(each.get("model")),
                                    clean(each.get("source"))))  # fmt: skip
    return found
