"""The first words of a page: which recipe to take, how sure that is, and what it costs."""

from __future__ import annotations

from typing import NamedTuple

from holdfast.experiments.metrics import Cell
from holdfast.experiments.statistics import mean_spread
from holdfast.report.facts import Comparison, GroupFacts
from holdfast.report.sentences import run_sentences, study_sentences
from holdfast.report.words import amount, number, short, size

SURE = 0.05  # Holm's p below which a difference counts beside the other recipes of a table


class Cost(NamedTuple):
    """Means over the runs of a recipe."""

    seconds: Cell  # of a run, measuring included
    bytes: Cell  # what methods hold at its end, beside the model


def cost(group: GroupFacts) -> Cost:
    bodies = [run.body for run in group.runs]
    seconds = [[value for value in body["seconds"] if value is not None] for body in bodies]
    states = [[s for s in body["methods_state"].values() if isinstance(s, dict)] for body in bodies]
    held = [
        [s["bytes"] for s in state if isinstance(s.get("bytes"), int | float)] for state in states
    ]
    return Cost(
        mean_spread(sum(values) for values in seconds if values).mean,
        mean_spread(map(sum, held)).mean,
    )


def verdict(study: Comparison) -> list[str]:
    """Which recipe to take and why, then what it costs; of one run what it lost and learned."""
    if len(study.runs) == 1:
        return run_sentences(study.runs[0])
    if study.nothing_learned:
        return study_sentences(study)[:1]
    taken, said = taken_of(study)
    return [said, *_costs(study, taken)]


def taken_of(study: Comparison) -> tuple[GroupFacts, str]:
    """The recipe to take: the best that is surely better than the control, else the control."""
    ranked = sorted(study.groups, key=lambda g: -(_mean(g, study) or float("-inf")))
    best = ranked[0]
    if len(study.groups) == 1:
        return best, f"{short(best.label)} alone: nothing to compare it with."
    control = next((group for group in study.groups if group.control), None)
    if control is None:
        return best, (f"No verdict without a control: plain at several flat rates is what recipes "
                      f"are measured against. The highest is {short(best.label)}.")  # fmt: skip
    others = [group for group in ranked if group.judged and _mean(group, study) is not None]
    called = "the score" if study.main == "new" else "new plus old"
    for group in others:
        gap, judged = group.difference[study.main], group.judged[study.main]
        if (gap.low or 0) > 0 and (judged.holm is None or judged.holm < SURE):
            return group, (f"Take {short(group.label)}: {called} is higher than "
                           f"{short(control.label)}'s {_by(group, study)}.")  # fmt: skip
    if not others:
        return control, f"Take {short(control.label)}, the best of the flat rates."
    top = others[0]
    seen = top.judged[study.main].seeds_for_seen
    more = f"; {seen:,} seeds would, were it real" if seen and seen > len(top.runs) else ""
    if (top.difference[study.main].high or 0) < 0:
        return control, f"Take {short(control.label)}: {called} of every other recipe is lower."
    return control, (f"Take {short(control.label)}: no recipe is better by a difference that these "
                     f"seeds can show. The highest of them is {short(top.label)}, "
                     f"{_by(top, study)}{more}.")  # fmt: skip


def _mean(group: GroupFacts, study: Comparison) -> Cell:
    return group.spread[study.main].mean


def _by(group: GroupFacts, study: Comparison) -> str:
    """`by +0.083 (95 % interval +0.049 to +0.118, 3 seeds)`."""
    gap = group.difference[study.main]
    over = f"{gap.n} seed{'s' if gap.n != 1 else ''}"
    if gap.low is not None:
        low, high = number(gap.low, sign=True), number(gap.high, sign=True)
        over = f"95 % interval {low} to {high}, {over}"
    return f"by {number(gap.mean, sign=True)} ({over})"


def _costs(study: Comparison, taken: GroupFacts) -> list[str]:
    """`A run took 64 s (plain 61 s); its methods hold 86.6 MB beside the model.`"""
    mine, theirs = cost(taken), next((cost(g) for g in study.groups if g.control), None)
    if mine.seconds is None:
        return []
    said = f"A run took {amount(mine.seconds)} s"
    if theirs is not None and theirs.seconds is not None and not taken.control:
        said += f" (the control {amount(theirs.seconds)} s)"
    held = f"its methods hold {size(mine.bytes)} beside the model" if mine.bytes else (
        "it holds nothing beside the model")  # fmt: skip
    return [f"{said}; {held}."]
