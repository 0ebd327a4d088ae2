"""Whether a model still does what an earlier one did: task by task, on the same rows.

Both models answer every evaluation row of a task, and rows are drawn anew with replacement (a
paired bootstrap; Koehn, EMNLP 2004): rows that both get right, or both wrong, add no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from holdfast.errors import Refused
from holdfast.experiments.origin import FromRun, again
from holdfast.experiments.serving import Served, load
from holdfast.files import write_text_atomic
from holdfast.tasks import Task
from holdfast.tasks.kinds import Measured, kind_of

DRAWS, LEVEL = 1000, 0.90  # resamples; of the interval, so 95 % on either side
MANY = 10**7  # rows; no advice above


@dataclass(frozen=True)
class Verdict:
    """One task: scores before and after, their difference and its interval.

    verdict: `lost` if even the interval's upper end lies below what may be forgotten, `kept` if
    its lower end does not, else `unclear`: too few rows to tell. rows_needed: about how many would.
    """

    task: str
    metric: str
    rows: int
    before: float
    after: float
    low: float
    high: float
    verdict: Literal["kept", "lost", "unclear"]
    rows_needed: int | None

    @property
    def change(self) -> float:
        return self.after - self.before


def judge(
    before: Served, after: Served, tasks: Sequence[Task], *, max_forgetting: float
) -> list[Verdict]:
    """A verdict for each task, on its evaluation rows; the same for the same models and rows."""
    return [_verdict(t, _answers(before, t), _answers(after, t), max_forgetting) for t in tasks]


def judge_run(folder: Path, *, max_forgetting: float) -> list[Verdict]:
    """A verdict for each task of a run but the last: as it was just learned, against the end."""
    run, after = FromRun(folder), load(folder)
    tested = [cell is not None for cell in run.record.scores[-1]]
    found, homes = [], dict[Path, list[Task]]()
    for place, told in enumerate(run.record.tasks[:-1]):
        if tested[place]:  # else its rows are gone
            # Tasks taken over from another run share the folder of the last of them.
            home = next(h for i in range(place, run.size) if (h := run.home(i)).is_dir())
            homes.setdefault(home, []).append(again(told))
    for home, tasks in homes.items():
        found += judge(load(home), after, tasks, max_forgetting=max_forgetting)
    return found


def _answers(served: Served, task: Task) -> Measured:
    """What the task's score is made of, for each evaluation row: (rows, 2)."""
    kind, about = kind_of([task]), served.tasks[served.named(task.name)]
    labels, ours = about["labels"] or (), task.labels or ()
    other = not {*ours} <= {*labels} if served.one_head else {*labels} != {*ours}
    if (about["kind"], about["pairs"]) != (task.kind, task.pairs) or other:
        raise Refused(f"its {task.name} is another task", where=str(served.folder),
                      remedy="compare runs on the same tasks")  # fmt: skip
    theirs = task.renumbered(labels) if labels else task
    model = served.models[task.name]
    rows = kind.encode(theirs.evaluation, theirs, served.processor, max_length=served.max_length,
                       config=getattr(model, "config", None))  # fmt: skip
    found = kind.measure(model, rows, theirs, kind.collator(served.processor))
    return kind.aligned(found, about["labels"], ours)


def _verdict(task: Task, one: Measured, two: Measured, most: float) -> Verdict:
    kind, size, draws = kind_of([task]), len(one), np.random.default_rng(0)

    def change(rows: Any) -> float:
        return kind.total(task, two[rows]) - kind.total(task, one[rows])

    everything = np.arange(size)
    gap = change(everything)
    if (one == two).all():
        low = high = 0.0
    else:
        drawn = [change(draws.choice(everything, size)) for _ in range(DRAWS)]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    verdict: Literal["kept", "lost", "unclear"]
    edge = -most - 1e-9  # a fall by just as much as may be is none too many, in any rounding
    verdict = "kept" if low >= edge else "lost" if high < edge else "unclear"
    needed = None
    if verdict == "unclear":
        # An interval's width falls with the root of the number of rows.
        times = ((high - low) / 2 / max(abs(gap + most), 1e-9)) ** 2
        needed = math.ceil(size * times) if size * times < MANY else None
    was = kind.total(task, one)
    return Verdict(task.name, task.metric, size, was, was + gap, float(low), float(high),
                   verdict, needed)  # fmt: skip


def write_junit(verdicts: Sequence[Verdict], file: Path) -> None:
    """The verdicts as a JUnit report, which CI systems show: lost is a failure, unclear skipped."""
    suite = ElementTree.Element(
        "testsuite", name="holdfast check", tests=str(len(verdicts)),
        failures=str(sum(v.verdict == "lost" for v in verdicts)),
        skipped=str(sum(v.verdict == "unclear" for v in verdicts)),
    )  # fmt: skip
    for each in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname="holdfast.check", name=each.task)
        if each.verdict != "kept":
            kind = "failure" if each.verdict == "lost" else "skipped"
            ElementTree.SubElement(case, kind, message=line(each))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(
        file, f"<?xml version='1.0' encoding='utf-8'?>\n{ElementTree.tostring(suite, 'unicode')}"
    )


def line(verdict: Verdict) -> str:
    """One verdict in words."""
    told = (f"{verdict.metric} {verdict.before:.3f} before, {verdict.after:.3f} after: "
            f"{verdict.change:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}] "
            f"on {verdict.rows} rows")  # fmt: skip
    if verdict.verdict == "unclear":
        needed = "more" if verdict.rows_needed is None else f"about {verdict.rows_needed:,}"
        told += f"; {needed} rows would tell"
    return told
