"""Records -> numbers: everything the terminal and the page show, computed once, drawn nowhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.experiments import metrics
from holdfast.experiments.metrics import Cell
from holdfast.experiments.record import Record
from holdfast.experiments.scenario import APART
from holdfast.experiments.statistics import (
    Difference,
    Repeats,
    Scores,
    Spread,
    mean_spread,
    paired_difference,
    repeats,
)
from holdfast.report import alike, judge
from holdfast.report.judge import Choice, FrontFacts, Judged, PooledFacts, pool
from holdfast.report.run import RunFacts, TaskFacts, recipe_name, run_facts, run_label
from holdfast.report.words import DASH, clean

__all__ = [
    "COLUMNS", "PAIRED", "Choice", "Comparison", "FrontFacts", "GroupFacts", "Judged",
    "PooledFacts", "RunFacts", "TaskFacts", "comparisons", "is_control", "pool", "recipe_name",
    "run_facts", "run_label",
]  # fmt: skip

CONTROL = "plain"
_CONTROL = re.compile(CONTROL + r"(?:[\s@:_,(=-]+(?:lr[\s=_:-]*)?[\d.e+-]+\)?)?")
# what a comparison shows of each run: name -> function of the score matrix
COLUMNS = {
    "new": lambda scores: metrics.square(scores)[-1][-1],
    "old_before": metrics.old_before,
    "old_after": metrics.old_after,
    "forgetting": metrics.forgetting,
    "new_plus_old": metrics.new_plus_old,
}
PAIRED = ("new", "old_after", "new_plus_old")


@dataclass(frozen=True)
class GroupFacts:
    """Runs that differ only in their seed."""

    label: str
    recipe: str
    settings: dict[str, Any]
    control: bool  # the one that differences are taken against
    plain: bool  # the control's recipe, at whatever rate
    runs: list[RunFacts]
    seeds: list[int | None]
    spread: dict[str, Spread]  # by COLUMNS
    points: dict[str, list[Cell]]  # by COLUMNS, one value a run
    difference: dict[str, Difference]  # to the control, by PAIRED; empty where there is none; the
    # interval of a recipe accounts for the choice of the control (see `judged`)
    kin: str  # equal for the same recipe on the same network, whatever the tasks
    mean_scores: list[list[Cell]]
    sd_scores: list[list[Cell]]
    failed: int | None  # runs in which a task was not learned; None where no constant is known
    judged: dict[str, Judged] = field(default_factory=dict)  # by PAIRED; empty for plain


@dataclass(frozen=True)
class Comparison:
    """Groups that learned the same tasks with the same model in the same scenario."""

    model: str
    tasks: list[TaskFacts]
    groups: list[GroupFacts]
    control: str | None
    scenario: str | None  # of continual learning; None for a single task
    warnings: list[str] = field(default_factory=list)
    choice: Choice | None = None  # of the control; None without one
    fronts: list[FrontFacts] = field(default_factory=list)  # plain first; empty for a single task
    repeats: dict[str, Repeats] = field(default_factory=dict)  # noise floor, by PAIRED; 0 pairs:
    # not measured

    @property
    def main(self) -> str:
        """The column that recipes are judged by."""
        return "new" if len(self.tasks) == 1 else "new_plus_old"

    @property
    def nothing_learned(self) -> bool:
        """Whether no run did better on any task than one answer for all rows."""
        return all(run.learned and not any(run.learned) for run in self.runs)

    @property
    def runs(self) -> list[RunFacts]:
        return [run for group in self.groups for run in group.runs]


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Records grouped by what they learned, in which scenario, and by configuration, over seeds.

    A configuration is a recipe and every setting outside `PER_RUN`. The control is the one for
    which `is_control` holds; of several (one per flat rate), the one with the best new_plus_old
    (for a single task: score) on the selection rows, or on the evaluation rows if only these were
    scored: that favours the control, never the recipe it is compared with.
    """
    studies: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        studies.setdefault((alike.study_key(record), record.scenario), []).append(record)
    found = [_comparison(group) for group in studies.values()]
    for (key, scenario), study in zip(studies, found, strict=True):
        if others := [str(s) for k, s in studies if k == key and s != scenario]:
            study.warnings.append(f"Also here, learned as {' and '.join(others)}. {APART}")
    return found


def _comparison(records: list[Record]) -> Comparison:
    by_key: dict[str, list[Record]] = {}
    warnings = alike.other_rows(records)
    for record in records:
        configuration = [record.recipe, alike.configuration(record.settings), alike.before(record)]
        key = json.dumps(configuration, sort_keys=True, default=str)
        by_key.setdefault(key, []).append(record)
    labels = _labels([group[0] for group in by_key.values()])
    picked, again_pairs = {}, []
    for label, group in zip(labels, by_key.values(), strict=True):
        newest: dict[object, Record] = {}
        for i, record in enumerate(sorted(group, key=lambda record: str(record.created))):
            one = i if record.seed is None else ("seed", record.seed)
            older = newest.get(one)
            if (
                older is not None
                and alike.rows_of(older) == alike.rows_of(record)
                and ((older.created, older.seconds) != (record.created, record.seconds))
            ):  # no copy of one file
                again_pairs.append((older, record))
            newest[one] = record
        if len(newest) < len(group):
            again = len(group) - len(newest)
            warnings.append(f"{label}: {again} older runs of a seed that ran again are left out.")
        picked[label] = sorted(newest.values(), key=lambda r: (r.seed is None, r.seed or 0))
        open_ = sum(record.status != "done" for record in picked[label])
        if open_ and len(records) > 1:
            warnings.append(f"{label}: {open_} of {len(picked[label])} runs have not ended.")
    if any(record.extra.get("serves") == "tuning" for record in records):
        warnings.append("Tuning runs are scored on selection rows alone; what was chosen by them "
                        "stands on the page of their comparison.")  # fmt: skip
    chosen, choice, chosen_by = _control(picked)
    scores: dict[str, dict[str, Scores]] = {
        label: {c: _by_seed(runs, c) for c in PAIRED} for label, runs in picked.items()
    }
    judged: dict[str, Any] = {}
    if chosen is not None:
        plain = {label: scores[label] for label in chosen_by}
        others = {label: mine for label, mine in scores.items() if label not in plain}
        judged = judge.judge(others, plain, chosen_by, chosen)
        for label, mine in plain.items():
            if label != chosen:
                gaps = {c: paired_difference(mine[c], plain[chosen][c]) for c in PAIRED}
                judged[label] = gaps, {}
    groups = [_group(label, runs, chosen, *judged.get(label, ({}, {})))
              for label, runs in picked.items()]  # fmt: skip
    groups.sort(key=lambda group: (not group.control, not group.plain, _rate(group)))
    if len(groups) > 1:
        if chosen is None:
            warnings.append(f"No control: no {CONTROL!r} here without methods, at flat rates.")
        elif sum(g.plain for g in groups) > 1 and any(r.selection_scores is None for r in records):
            warnings.append("The control's rate was chosen on evaluation rows, which favours it.")
        few = min(len(group.seeds) for group in groups)
        if few < 5:
            seeds = "1 seed" if few == 1 else f"{few} seeds"
            warnings.append(f"Only {seeds} for some recipes: differences need five or more.")
    runs = [run for group in groups for run in group.runs]
    warnings += _merged(runs)
    chosen_label = next((group.label for group in groups if group.label == chosen), None)
    name = runs[0].body["model"].get("name")
    return Comparison(
        model=clean(name) if name else DASH,
        tasks=runs[0].tasks,
        groups=groups,
        control=chosen_label,
        scenario=records[0].scenario,
        warnings=list(dict.fromkeys(warnings)),
        choice=choice,
        fronts=_fronts(picked, scores, chosen) if len(runs[0].tasks) > 1 else [],
        repeats={c: repeats((COLUMNS[c](a.scores), COLUMNS[c](b.scores)) for a, b in again_pairs)
                 for c in PAIRED},
    )  # fmt: skip


def _labels(records: list[Record]) -> list[str]:
    """Recipe names, with what they came after and the settings in which those of a name differ."""
    labels, bodies = [], [record.to_dict() for record in records]
    for record, body in zip(records, bodies, strict=True):
        name = recipe_name(body)
        same = [alike.configuration(b["settings"]) for b in bodies if recipe_name(b) == name]
        mine = alike.configuration(body["settings"])
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in same)]
        told = [name, *(f"{clean(k)} {_short(mine[k])}" for k in differing)]
        if before := alike.before(record):
            named = [recipe_name({"recipe": r}) if alike.nameless(r) else "others" for r in before]
            told.append(f"after {' and '.join(dict.fromkeys(named))}")
        labels.append(", ".join(told))
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[i] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else clean(value, width=30)


def is_control(recipe: dict[str, Any]) -> bool:
    """Whether a recipe is named `plain`, `plain@2e-5`, `plain-2e-5` or the like, and is plain.

    That is: no methods, and one rate for every part.
    """
    rates = recipe.get("rates")
    curve = rates if isinstance(rates, dict) else {}
    flat = len({str(value) for value in curve.get("multipliers") or [1.0]}) == 1
    plain = flat and not curve.get("freeze_below") and not recipe.get("methods")
    return plain and _CONTROL.fullmatch(recipe_name({"recipe": recipe})) is not None


def _rate(group: GroupFacts) -> float:
    rate = group.settings.get("lr")
    return float(rate) if group.plain and isinstance(rate, int | float) else math.inf


def _control(
    picked: dict[str, list[Record]],
) -> tuple[str | None, Choice | None, dict[str, Scores]]:
    """The control's label, how it was chosen, and by which scores: label -> seed -> score."""
    names = [label for label, records in picked.items() if is_control(records[0].recipe)]
    # Plain after another recipe is a control of runs that all came after one.
    names = [label for label in names if not alike.before(picked[label][0])] or names
    if not names:
        return None, None, {}
    single = len(picked[names[0]][0].scores) == 1
    column = COLUMNS["new" if single else "new_plus_old"]  # a single task has no old one

    def values(label: str, which: str) -> list[tuple[int | None, Cell]]:
        found = [(record.seed, getattr(record, which)) for record in picked[label]]
        known = all(matrix is not None for _, matrix in found)
        return [(seed, column(matrix)) for seed, matrix in found] if known else []

    for rows, which in (("selection", "selection_scores"), ("evaluation", "scores")):
        scores = {label: values(label, which) for label in names}
        means = {k: mean_spread(v for _, v in found).mean for k, found in scores.items()}
        known = {label: mean for label, mean in means.items() if mean is not None}
        if known and (len(known) == len(names) or rows == "evaluation"):
            break
    by_seed: dict[str, Scores] = {
        k: {s: v for s, v in found if s is not None} for k, found in scores.items()
    }
    chosen = max(known, key=lambda label: known[label]) if known else names[0]
    return chosen, judge.choice(rows, chosen, means, by_seed), by_seed


def _fronts(
    picked: dict[str, list[Record]], scores: dict[str, dict[str, Scores]], chosen: str | None
) -> list[FrontFacts]:
    """Recipes that differ in numbers of their methods, or in the rate, are one recipe's front."""
    if chosen is None or len(picked) < 2:
        return []
    families: dict[str, list[str]] = {}
    for label, records in picked.items():
        families.setdefault(alike.family(records[0]), []).append(label)
    settings: dict[str, list[judge.Setting]] = {}
    for labels in sorted(families.values(), key=lambda labels: chosen not in labels):
        names = dict.fromkeys(recipe_name({"recipe": picked[label][0].recipe}) for label in labels)
        name = CONTROL if chosen in labels else " / ".join(names)
        settings[labels[0] if name in settings else name] = [
            (label, scores[label]["new"], scores[label]["old_after"]) for label in labels
        ]
    return judge.fronts(settings, CONTROL)


def _group(
    label: str,
    records: list[Record],
    chosen: str | None,
    difference: dict[str, Difference],
    judged: dict[str, Judged],
) -> GroupFacts:
    runs = [run_facts(record) for record in records]
    points_ = {name: [column(run.scores) for run in runs] for name, column in COLUMNS.items()}
    size = len(runs[0].scores)
    cells = [
        [mean_spread(run.scores[i][j] for run in runs) for j in range(size)] for i in range(size)
    ]
    first = runs[0].body
    failed = [run.failed for run in runs if run.failed is not None]
    return GroupFacts(
        label=label,
        recipe=recipe_name(first),
        settings=alike.configuration(first["settings"]),
        control=label == chosen,
        plain=is_control(first["recipe"]),
        runs=runs,
        seeds=[record.seed for record in records],
        spread={name: mean_spread(values) for name, values in points_.items()},
        points=points_,
        difference=difference,
        kin=alike.kin(records[0]),
        mean_scores=[[cell.mean for cell in row] for row in cells],
        sd_scores=[[cell.sd for cell in row] for row in cells],
        failed=sum(failed) if failed else None,
        judged=judged,
    )


def _by_seed(records: Iterable[Record], column: str) -> dict[int, Cell]:
    return {r.seed: COLUMNS[column](r.scores) for r in records if r.seed is not None}


def _merged(runs: list[RunFacts]) -> list[str]:
    """Each warning once, with the runs it is about unless that is all of them."""
    about: dict[str, list[str]] = {}
    for run in runs:
        for line in dict.fromkeys(run.warnings):
            about.setdefault(line, []).append(run.label)
    return [
        line if len(labels) == len(runs) else f"{line} ({'; '.join(labels)})"
        for line, labels in about.items()
    ]
