"""On which terms recipes stand beside each other: what was tuned, what is the same.

Read as it stands in a file of anybody's: what is not of the form that is expected is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from holdfast.report.facts import Comparison, GroupFacts
from holdfast.report.words import clean, number, short


def terms(study: Comparison) -> list[str]:
    """Sentences on equal configurations, tuning runs and a first task that is shared."""
    return [*_same(study), *_tuned(study), *_first(study)]


def _same(study: Comparison) -> list[str]:
    alike: dict[str, list[str]] = {}
    for group in study.groups:
        recipe = {k: v for k, v in group.runs[0].body["recipe"].items() if k != "name"}
        alike.setdefault(json.dumps([recipe, group.settings], sort_keys=True), []).append(
            group.label
        )
    return [f"{_listed(labels)} are one configuration: their runs are the same."
            for labels in alike.values() if len(labels) > 1]  # fmt: skip


def _tuned(study: Comparison) -> list[str]:
    lines = []
    for group in study.groups:
        with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):
            lines.append(_choice(group, group.runs[0].body["tuned"], len(study.tasks)))
    without = [g.label for g in study.groups if "tuned" not in g.runs[0].body]
    if lines and without:
        lines.append(f"Not tuned: {_listed(without)}.")
    return lines


def _choice(group: GroupFacts, told: Mapping[str, Any], tasks: int) -> str:
    """What was chosen of how many runs, by which score, within which ranges."""
    by = "score" if tasks == 1 else "new plus old"
    values = [
        f"{clean(word)} {told['values'][word]:g} of {low:g} to {high:g}" + (" (log)" if log else "")
        for word, (low, high, log) in told["ranges"].items()
    ]
    line = (
        f"{group.label}: number {told['chosen'] + 1} of {told['runs']:d} tuning runs, by {by} on "
        f"{clean(told['rows'])} rows ({number(told['score'])}, seed {told['seed']:d}): "
        f"{', '.join(values)}."
    )
    if told["diverged"]:
        line += f" {told['diverged']:d} diverged."
    if told["edges"]:
        ends = [f"{clean(word)} at its {clean(end)}" for word, end in told["edges"].items()]
        line += f" Chosen at an edge of its range: {', '.join(ends)} end; better may lie beyond."
    return line


def _first(study: Comparison) -> list[str]:
    labels: dict[str, None] = {}
    seconds: dict[str, list[float]] = {}
    for group in study.groups:
        for run in group.runs:
            with suppress(KeyError, TypeError, ValueError):
                told = run.body["first"]
                seconds.setdefault(str(told["folder"]), []).append(float(told["seconds"]))
                labels[group.label] = None
    if len(labels) < 2:
        return []
    saved = sum(sum(each[1:]) for each in seconds.values())
    return [
        f"{short(study.tasks[0].name)} was trained once a seed for {_listed(list(labels))}, which "
        f"do nothing in it. Each counts its seconds; {saved:.0f} s were not spent again."
    ]


def _listed(labels: list[str]) -> str:
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if labels[1:] else labels)
