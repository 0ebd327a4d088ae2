"""What a run and a comparison found, in plain sentences."""

from __future__ import annotations

import math

from holdfast.experiments.scenario import APART, SCENARIOS
from holdfast.experiments.statistics import noise
from holdfast.report.facts import (
    Comparison,
    FrontFacts,
    GroupFacts,
    PooledFacts,
    RunFacts,
    TaskFacts,
)
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
    unlearned = run.learned and not any(run.learned)
    return [*([nothing(run.tasks)] if unlearned else []), *_run_sentences(run)]


def nothing(tasks: list[TaskFacts]) -> str:
    """The headline where no score is better than that of a constant answer."""
    floors = ", ".join(
        f"{short(t.name)} {number(t.constant)}" for t in tasks if t.constant is not None
    )
    return f"Nothing was learned: no score is better than one answer for all rows ({floors})."


def _run_sentences(run: RunFacts) -> list[str]:
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
    said = [nothing(tasks)] if study.nothing_learned else []
    for group in groups:
        over = "1 run" if len(group.runs) == 1 else f"{len(group.runs)} runs"
        learned = f"{new} reached {spread_text(group.spread['new'])}"
        if group.failed and not study.nothing_learned:
            over += f", {group.failed} failed"
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
    for group in [] if study.nothing_learned else groups:
        gap = group.difference.get(main)
        if gap is None or gap.mean is None:
            continue
        sure = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        interval = (
            ""
            if gap.low is None
            else f", 95 % interval {number(gap.low, sign=True)} to {number(gap.high, sign=True)}"
        )
        verdict = _verdict(group, main, sure=sure)
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


def _verdict(group: GroupFacts, main: str, *, sure: bool) -> str:
    """What the interval, the other recipes of the table and the number of seeds leave of it."""
    judged = group.judged.get(main)
    if sure and judged is not None and judged.holm is not None and judged.holm >= 0.05:
        return f": not beside the other recipes of the table (Holm's p {number(judged.holm)})"
    if sure:
        return ""
    seen = None if judged is None else judged.seeds_for_seen
    more = f" ({seen:,} would, were it real)" if seen and seen > len(group.runs) else ""
    return f": not a difference these seeds can show{more}"


def judge_sentences(study: Comparison) -> list[str]:
    """What failed, how the control was chosen, what more seeds would show, noise, matched scores.

    Empty for one recipe alone, and for runs that learned nothing.
    """
    if len(study.groups) < 2 or study.nothing_learned:
        return []
    return [*_failed(study), *_chosen(study), *_needed(study), _floor(study),
            *(_kept(front) for front in study.fronts if not front.control)]  # fmt: skip


def _failed(study: Comparison) -> list[str]:
    if not any(group.failed for group in study.groups):
        return []
    return ["Failed: runs in which a task, just learned, scored no better than one answer for all "
            "its rows; they stay in all means."]  # fmt: skip


def _chosen(study: Comparison) -> list[str]:
    choice = study.choice
    if choice is None or len(choice.scores) < 2:
        return []
    share = choice.shares.get(choice.chosen)
    often = "" if share is None else f"; {100 * share:.0f} % of resamples of the seeds choose it"
    said = (f"{choice.chosen} is the best of {len(choice.scores)} flat rates on {choice.rows} "
            f"rows{often}.")  # fmt: skip
    ties = [label for label in choice.tied if label != choice.chosen]
    if not ties:
        return [said]
    one = "one seed cannot tell rates apart" if len(study.groups[0].runs) < 2 else (
        "their difference is within the noise of the seeds")  # fmt: skip
    return [said, f"It is a tie with {', '.join(ties)}: {one}."]


def _needed(study: Comparison) -> list[str]:
    judged = [(group, group.judged[study.main]) for group in study.groups if group.judged]
    told = [f"{group.label} {j.seeds_for_point:,}" for group, j in judged if j.seeds_for_point]
    if not told:
        return []
    return ["Seeds that would show 1 point of difference to the control (power 0.8, at the spread "
            f"seen): {', '.join(told)}."]  # fmt: skip


def _floor(study: Comparison) -> str:
    called = "score" if study.main == "new" else "new plus old"
    floor = study.repeats.get(study.main)
    if floor is None or not floor.pairs:
        return "Noise floor: not measured; no seed was run twice with the same settings."
    pairs = f"{floor.pairs} pair{'s' if floor.pairs != 1 else ''}"
    return (f"Noise floor: a seed that was run twice moved {called} by {number(floor.largest)} at "
            f"most ({pairs}).")  # fmt: skip


def _kept(front: FrontFacts) -> str:
    """What it keeps beside plain where both learn the new task as well."""
    where = f"at a new score of {number(front.high)} {front.label} keeps {number(front.kept)}"
    said = f"At matched scores: {where}, plain {number(front.plain_kept)}"
    interval = ""
    if front.more_low is not None:
        ends = f"{number(front.more_low, sign=True)} to {number(front.more_high, sign=True)}"
        interval = f" [{ends}]"
    if front.low != front.high:
        said += f"; from {number(front.low)} on, on average"
        return f"{said} {number(front.more, sign=True)}{interval}."
    return f"{said} ({number(front.more, sign=True)}{interval})."


def pool_sentences(pooled: list[PooledFacts]) -> list[str]:
    """Each recipe over all sequences of tasks that have it."""
    said = []
    for found in pooled:
        ends = f"{number(found.low, sign=True)} to {number(found.high, sign=True)}"
        corrected = found.holm is not None and found.holm >= 0.05
        verdict = ": not a difference that these sequences can show" if corrected else ""
        said.append(f"{found.label} over {len(found.sequences)} sequences of tasks: "
                    f"{number(found.mean, sign=True)}, 95 % interval {ends}{verdict}.")  # fmt: skip
    return said
