"""What a referee asks of a comparison: was the control chosen fairly, and would it come out again.

Every number here is of the paired scores of a table, computed by `holdfast.experiments.statistics`
and `holdfast.experiments.metrics`; docs/statistics.md says when to trust which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.experiments import metrics
from holdfast.experiments.metrics import Cell
from holdfast.experiments.statistics import (
    Against,
    Difference,
    Scores,
    against_best,
    choice_shares,
    holm,
    mean_spread,
    paired_difference,
    pooled,
    resamples,
    seeds_needed,
    shared_seeds,
)

if TYPE_CHECKING:
    from holdfast.report.facts import Comparison

POINT = 0.01  # a point: the effect whose number of seeds is always told


@dataclass(frozen=True)
class Judged:
    """How sure a recipe's difference to the control is, beyond its interval."""

    p: Cell  # paired t, two-sided, with the choice of the control accounted for
    se: Cell  # standard error that p and the interval are made of
    holm: Cell  # p corrected for all recipes of the table (Holm), in this column
    fixed_low: Cell  # the paired t interval that takes the control as given
    fixed_high: Cell
    seeds_for_point: int | None  # to see a difference of `POINT` with power .8, at the spread seen
    seeds_for_seen: int | None  # to see the difference seen; None where it is 0 or sd is unknown


@dataclass(frozen=True)
class Choice:
    """How the control was chosen among flat rates, and how sure that choice is."""

    rows: str  # "selection", or "evaluation": on the rows that are reported too
    chosen: str  # label of its group
    scores: dict[str, Cell]  # label of each rate -> mean score it was chosen by
    shares: dict[str, float]  # label -> how often it is chosen when seeds are resampled; sums to 1
    tied: list[str]  # the chosen one and those within the noise of the seeds; one seed: all


@dataclass(frozen=True)
class FrontFacts:
    """A recipe at several rates or strengths, beside plain at its flat rates.

    At a matched score of the new task: `holdfast.experiments.metrics.kept_at` and its kin.
    """

    label: str
    control: bool  # plain itself
    points: list[tuple[str, float, float]]  # label of the group, mean new, mean old after
    front: list[tuple[float, float]]  # (new, old after) that no other setting beats, by new
    low: Cell  # range of new scores that it and plain both reached; low = high: a point
    high: Cell
    kept: Cell  # old score where the new one is `high`: of this recipe
    plain_kept: Cell  # and of plain
    area: Cell  # ∫ old d new from `low` to `high`
    plain_area: Cell
    more: Cell  # mean height above plain's front over the range, in units of the score
    more_low: Cell  # its 95 % interval over seeds, by resampling them; None below two seeds
    more_high: Cell


@dataclass(frozen=True)
class PooledFacts:
    """One recipe against the best flat rate over several sequences of tasks, each of one weight."""

    label: str
    model: str
    scenario: str | None
    sequences: list[str]  # `a → b`, those that have the recipe and a control
    mean: Cell  # new + old (single tasks: score) minus the control's
    low: Cell  # 95 % interval over sequences and seeds; None for one sequence
    high: Cell
    p: Cell
    holm: Cell  # over the recipes of the model and scenario


def judge(
    recipes: Mapping[str, Mapping[str, Scores]],
    controls: Mapping[str, Mapping[str, Scores]],
    chosen_by: Mapping[str, Scores],
    chosen: str,
) -> dict[str, tuple[dict[str, Difference], dict[str, Judged]]]:
    """Each recipe against the control, column by column: its differences, and how sure they are.

    recipes, controls: label -> column -> scores by seed. chosen_by: label of a control -> what it
    was chosen by.
    """
    columns = list(controls[chosen])
    by_column: dict[str, dict[str, Against]] = {}
    corrected: dict[str, dict[str, Cell]] = {}
    for column in columns:
        theirs = {label: scores[column] for label, scores in controls.items()}
        found = {
            label: against_best(mine[column], theirs, chosen_by, chosen)
            for label, mine in recipes.items()
        }
        by_column[column] = found
        corrected[column] = dict(zip(found, holm([a.p for a in found.values()]), strict=True))
    judged = {}
    for label, mine in recipes.items():
        differences, sure = {}, {}
        for column in columns:
            gap = by_column[column][label]
            fixed = paired_difference(mine[column], controls[chosen][column])
            differences[column] = fixed._replace(low=gap.low, high=gap.high)
            sure[column] = Judged(
                p=gap.p,
                se=gap.se,
                holm=corrected[column][label],
                fixed_low=fixed.low,
                fixed_high=fixed.high,
                seeds_for_point=seeds_needed(POINT, gap.sd),
                seeds_for_seen=seeds_needed(gap.mean, gap.sd),
            )
        judged[label] = differences, sure
    return judged


def choice(
    rows: str, chosen: str, scores: Mapping[str, Cell], chosen_by: Mapping[str, Scores]
) -> Choice:
    """How sure the choice is: resampled over seeds, and which rates tie with the chosen one."""
    tied = []
    for label, theirs in chosen_by.items():
        gap = paired_difference(chosen_by[chosen], theirs)
        if label == chosen or gap.low is None or gap.low <= 0:
            tied.append(label)
    return Choice(rows, chosen, dict(scores), choice_shares(chosen_by), tied)


Setting = tuple[str, Scores, Scores]  # label of a group; new, old after by seed


def fronts(families: Mapping[str, Sequence[Setting]], plain: str) -> list[FrontFacts]:
    """Each recipe over its settings beside `plain` over its rates, plain first.

    Settings that did not measure both scores are left out, and recipes without any.
    """
    theirs = _measured(families[plain])
    made = []
    for label in sorted(families, key=lambda label: label != plain):
        mine = _measured(families[label])
        points = [(new, old) for _, new, old in _means(mine)]
        beside = [(new, old) for _, new, old in _means(theirs)]
        found = metrics.matched(points, beside)
        if found is None:
            continue
        low, high = found
        interval = (None, None) if label == plain else _more(mine, theirs)
        made.append(
            FrontFacts(
                label=label,
                control=label == plain,
                points=_means(mine),
                front=metrics.front(points),
                low=low,
                high=high,
                kept=metrics.kept_at(points, high),
                plain_kept=metrics.kept_at(beside, high),
                area=metrics.area(points, low, high),
                plain_area=metrics.area(beside, low, high),
                more=metrics.kept_more(points, beside),
                more_low=interval[0],
                more_high=interval[1],
            )
        )
    return made


def _measured(settings: Sequence[Setting]) -> list[Setting]:
    return [s for s in settings if None not in (mean_spread(s[1].values()).mean,
                                                mean_spread(s[2].values()).mean)]  # fmt: skip


def _means(settings: Sequence[Setting]) -> list[tuple[str, float, float]]:
    return [
        (label, mean_spread(new.values()).mean or 0.0, mean_spread(old.values()).mean or 0.0)
        for label, new, old in settings
    ]


def _more(mine: Sequence[Setting], theirs: Sequence[Setting]) -> tuple[Cell, Cell]:
    """The interval of `kept_more` over the seeds that all settings have: D ± t(n - 1) se.

    se is the standard deviation over resamples of the seeds, times sqrt(n / (n - 1)).
    """
    sides = (mine, theirs)
    columns = {(i, j, k): scores for i, side in enumerate(sides)
               for j, (_, *both) in enumerate(side) for k, scores in enumerate(both)}  # fmt: skip
    seeds = shared_seeds(columns)
    n = len(seeds)
    if n < 2:
        return None, None
    import numpy as np
    from scipy.stats import t

    weights, chance = resamples(n, exact=6, drawn=1000)
    weights = np.concatenate([np.full((1, n), 1 / n), weights])
    means = {at: weights @ np.array([scores[s] for s in seeds], dtype=float)
             for at, scores in columns.items()}  # fmt: skip
    found = []
    for b in range(len(weights)):
        points = [[(float(means[i, j, 0][b]), float(means[i, j, 1][b])) for j in range(len(side))]
                  for i, side in enumerate(sides)]  # fmt: skip
        found.append(metrics.kept_more(*points) or 0.0)
    middle = float(chance @ found[1:])
    variance = float(chance @ [(value - middle) ** 2 for value in found[1:]])
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(variance * n / (n - 1))
    return found[0] - half, found[0] + half


def pool(studies: Sequence[Comparison]) -> list[PooledFacts]:
    """Each recipe over the sequences of tasks that have it, by model and scenario.

    Only recipes of two sequences or more: for one, its own table says it. Another recipe, or
    network, of the same name is another. Sequences of which nothing was learned tell no difference.
    """
    found: dict[tuple[str, str | None], dict[tuple[str, str], list[tuple[str, float, float]]]] = {}
    for study in studies:
        if study.nothing_learned:
            continue
        order = " → ".join(task.name for task in study.tasks)
        here = found.setdefault((study.model, study.scenario), {})
        for group in study.groups:
            gap, sure = group.difference.get(study.main), group.judged.get(study.main)
            if gap is not None and gap.mean is not None and sure is not None:
                here.setdefault((group.label, group.kin), []).append(
                    (order, gap.mean, sure.se or 0.0)
                )
    made = []
    for (model, scenario), recipes in found.items():
        several = {key: parts for key, parts in recipes.items() if len(parts) > 1}
        over = {key: pooled([part[1:] for part in parts]) for key, parts in several.items()}
        corrected = holm([p.p for p in over.values()])
        for (key, parts), value in zip(several.items(), corrected, strict=True):
            p = over[key]
            made.append(PooledFacts(key[0], model, scenario, [part[0] for part in parts],
                                    p.mean, p.low, p.high, p.p, value))  # fmt: skip
    return made
