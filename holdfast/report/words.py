"""Numbers and names as text: one line each, whatever an untrusted name contains."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import TYPE_CHECKING

from holdfast.experiments.metrics import Cell
from holdfast.experiments.statistics import Spread, noise

if TYPE_CHECKING:
    from holdfast.report.facts import GroupFacts, TaskFacts

DASH = "–"
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")


def clean(text: object, *, width: int | None = None) -> str:
    """A name on one line: no terminal codes, control characters or bidi overrides (S9)."""
    line = _BIDI.sub("", _ANSI.sub("", str(text)))
    line = "".join(
        (" " if char in "\n\r\t\v\f\x85\u2028\u2029" else "")
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        else char
        for char in line
    )
    line = " ".join(line.split()) or "(no name)"
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def short(text: object) -> str:
    """A name that fits a sentence or a table's head; pages give the whole one beside it."""
    return clean(text, width=48)


def number(value: Cell, *, sign: bool = False, digits: int = 3) -> str:
    """A score as text; a dash where nothing was measured."""
    if value is None or not math.isfinite(value):
        return DASH
    value = round(value, digits) + 0.0  # no -0.000
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\u2212")


def spread_text(spread: Spread, *, sign: bool = False) -> str:
    """`0.741 ± 0.012`, without the spread below two runs."""
    text = number(spread.mean, sign=sign)
    return text if spread.sd is None else f"{text}\u00a0±\u00a0{number(spread.sd)}"


def noise_note(tasks: list[TaskFacts]) -> str:
    """Why some scores are shown without their noise; empty if none is."""
    bare = list(dict.fromkeys(t.metric for t in tasks if t.final is not None and t.noise is None))
    return f"no noise of {' or '.join(bare)}: it needs the predictions, not kept" if bare else ""


def points(value: Cell) -> str:
    """A difference of scores in points: `−21.1 points`."""
    return DASH if value is None else f"{number(100 * value, sign=True, digits=1)} points"


def run_sentences(tasks: list[TaskFacts]) -> list[str]:
    """Plain words: what each old task lost, and by how much one score may be off."""
    new = tasks[-1]
    if new.final is None:
        done = sum(task.learned is not None for task in tasks)
        return [f"Unfinished: {done} of {len(tasks)} tasks learned so far."]
    reached = f"{short(new.name)} reached {number(new.final)}"
    if len(tasks) > 1:
        return [*(_lost(task, new) for task in tasks[:-1]), f"{reached}."]
    rows = new.rows["evaluation"]
    off = "" if new.noise is None else f", ± {number(new.noise)} on {rows} rows"
    return [f"{reached} ({new.metric}{off})."]


def _lost(task: TaskFacts, new: TaskFacts) -> str:
    """What an old task lost by the end, and whether that is within the noise of the scores."""
    name = short(task.name)
    if task.learned is None or task.final is None:
        return f"What {name} lost was not measured."
    change = task.final - task.learned
    if round(change, 3) == 0:
        moved = f"{name} stayed at {number(task.final)}"
    else:
        verb = "fell" if change < 0 else "rose"
        moved = f"{name} {verb} from {number(task.learned)} to {number(task.final)}"
    after, off, unsure = f"After learning {short(new.name)}, {moved}", "", ""
    rows = task.rows["evaluation"]
    before = noise(task.metric, task.learned, rows)
    if before is not None and task.noise is not None:
        off = f"; noise of a {rows}-row score ± {number(100 * task.noise, digits=1)}"
        # two standard errors of a difference of two scores
        unsure = ": within noise" if abs(change) <= 2 * math.hypot(before, task.noise) else ""
    return f"{after} ({points(change)}{off}){unsure}."


def study_sentences(groups: list[GroupFacts], control: str | None) -> list[str]:
    """Plain words: what each recipe kept and learned, then each against the control."""
    runs = [run for group in groups for run in group.runs]
    if len(runs) == 1:
        return runs[0].sentences
    tasks = runs[0].tasks
    main, called = ("new", "score") if len(tasks) == 1 else ("new_plus_old", "new plus old")
    everything = len(groups)
    if everything > 4:
        known = [group for group in groups if group.spread[main].mean is not None]
        best = sorted(known, key=lambda group: -(group.spread[main].mean or 0.0))[:3]
        groups = [group for group in groups if group.control or group in best]
    new = short(tasks[-1].name)
    old = short(tasks[0].name) if len(tasks) == 2 else f"the {len(tasks) - 1} tasks before"
    said = []
    for group in groups:
        over = "1 run" if len(group.runs) == 1 else f"{len(group.runs)} runs"
        learned = f"{new} reached {spread_text(group.spread['new'])}"
        if len(tasks) == 1:
            said.append(f"{group.label} ({over}): {learned}.")
            continue
        before, after = group.spread["old_before"], group.spread["old_after"]
        lost = before.mean is not None and after.mean is not None
        change = (after.mean or 0.0) - (before.mean or 0.0) if lost else None
        said.append(
            f"{group.label} ({over}): after learning {new}, {old} went from {number(before.mean)} "
            f"to {spread_text(after)} ({points(change)}); {learned}."
        )
    for group in groups:
        gap = group.difference.get(main)
        if gap is None or gap.mean is None:
            continue
        sure = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        interval = (
            ""
            if gap.low is None
            else f", 95 % interval {number(gap.low, sign=True)} to {number(gap.high, sign=True)}"
        )
        verdict = "" if sure else ": not a difference these seeds can show"
        said.append(
            f"{group.label} against {control}, paired over {gap.n} "
            f"seed{'s' if gap.n != 1 else ''}: {called} "
            f"{number(gap.mean, sign=True)}{interval}{verdict}."
        )
    if len(groups) < everything:
        said.append(
            f"Above: the control and the three highest of {everything}; the table has them all."
        )
    return said
