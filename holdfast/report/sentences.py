"""What a run and a comparison found, in plain sentences."""

from __future__ import annotations

import math

from holdfast.experiments.scenario import APART, SCENARIOS
from holdfast.experiments.statistics import noise
from holdfast.report.facts import Comparison, RunFacts, TaskFacts
from holdfast.report.words import number, points, short, spread_text


def noise_note(tasks: list[TaskFacts]) -> str:
    """Why some scores are shown without their noise; empty if none is."""
    bare = list(dict.fromkeys(t.metric for t in tasks if t.final is not None and t.noise is None))
    return f"no noise of {' or '.join(bare)}: it needs the predictions, not kept" if bare else ""


def scenario_sentence(scenario: str | None) -> str:
    """What was asked of the model, and with what its numbers compare; empty for a single task."""
    if scenario is None:
        return ""
    source = "van de Ven et al. 2022"
    return f"{scenario.capitalize()} ({source}): {SCENARIOS[scenario]}. {APART}"


def run_sentences(run: RunFacts) -> list[str]:
    """Plain words: what each old task lost, and by how much one score may be off."""
    tasks = run.tasks
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


def study_sentences(study: Comparison) -> list[str]:
    """Plain words: what each recipe kept and learned, then each against the control."""
    runs, groups, control = study.runs, study.groups, study.control
    if len(runs) == 1:
        return run_sentences(runs[0])
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
