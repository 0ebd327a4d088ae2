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
from holdfast.experiments.settings import defaults
from holdfast.experiments.statistics import (
    Difference,
    Spread,
    mean_spread,
    noise,
    paired_difference,
)
from holdfast.report.words import DASH, clean, short

CONTROL = "plain"
_CONTROL = re.compile(CONTROL + r"(?:[\s@:_,(=-]+(?:lr[\s=_:-]*)?[\d.e+-]+\)?)?")
# settings in which runs of one configuration may differ
PER_RUN = frozenset(
    {"seed", "data_seed", "output", "output_dir", "out", "device", "resume", "alone", "save_steps"}
)
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
class TaskFacts:
    """One task of one run: a column of its matrix."""

    name: str
    metric: str
    rows: dict[str, int | None]  # train, selection, evaluation
    labels: list[str] | None
    synthetic: bool
    source: str | None
    hash: str | None
    learned: Cell  # just after learning it
    final: Cell  # at the end of the sequence
    forgetting: Cell
    noise: Cell  # standard error of the final score
    alone: Cell
    seconds: Cell
    steps: Cell
    skipped: Cell


@dataclass(frozen=True)
class RunFacts:
    """One record: its matrix with the noise of every cell, and what repeats it."""

    label: str
    tasks: list[TaskFacts]
    scores: list[list[Cell]]
    noise: list[list[Cell]]
    metrics: dict[str, Cell]
    warnings: list[str]
    starts: list[float]  # step, counted over the sequence, at which each task began, if known
    history: list[tuple[float, list[Cell]]]  # step over the sequence; scores (T,)
    body: dict[str, Any]  # the record, cleaned of credentials


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
    difference: dict[str, Difference]  # to the control, by PAIRED; empty where there is none
    mean_scores: list[list[Cell]]
    sd_scores: list[list[Cell]]


@dataclass(frozen=True)
class Comparison:
    """Groups that learned the same tasks with the same model in the same scenario."""

    model: str
    tasks: list[TaskFacts]
    groups: list[GroupFacts]
    control: str | None
    scenario: str | None  # of continual learning; None for a single task
    warnings: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunFacts]:
        return [run for group in self.groups for run in group.runs]


def run_facts(record: Record, label: str | None = None) -> RunFacts:
    body = record.to_dict()
    scores = metrics.square(body["scores"])
    size = len(scores)
    starts, history = _history(body)
    tasks = [_task(body, scores, j) for j in range(size)]
    return RunFacts(
        label=label or run_label(body),
        tasks=tasks,
        scores=scores,
        noise=[
            [noise(task.metric, row[j], task.rows["evaluation"]) for j, task in enumerate(tasks)]
            for row in scores
        ],
        metrics=body["metrics"],
        warnings=_run_warnings(body, tasks),
        starts=starts,
        history=history,
        body=body,
    )


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Records grouped by what they learned, in which scenario, and by configuration, over seeds.

    A configuration is a recipe and every setting outside `PER_RUN`. The control is the one for
    which `is_control` holds; of several (one per flat rate), the one with the best new_plus_old
    (for a single task: score) on the selection rows, or on the evaluation rows if only these were
    scored: that favours the control, never the recipe it is compared with.
    """
    studies: dict[tuple[str, str | None], list[Record]] = {}
    for record in records:
        studies.setdefault((_study_key(record.to_dict()), record.scenario), []).append(record)
    found = [_comparison(group) for group in studies.values()]
    for (key, scenario), study in zip(studies, found, strict=True):
        if others := [str(s) for k, s in studies if k == key and s != scenario]:
            study.warnings.append(f"Also here, learned as {' and '.join(others)}. {APART}")
    return found


def run_label(body: dict[str, Any]) -> str:
    """`dps, seed 0`."""
    seed = body.get("seed")
    return recipe_name(body) + ("" if seed is None else f", seed {seed}")


def recipe_name(body: dict[str, Any]) -> str:
    return clean(body["recipe"].get("name") or "no recipe")


def _task(body: dict[str, Any], scores: list[list[Cell]], j: int) -> TaskFacts:
    task = body["tasks"][j]
    rows = {key: _count(task.get("rows"), key) for key in ("train", "selection", "evaluation")}
    metric = clean(task.get("metric") or "score")
    final = scores[-1][j]
    labels = task.get("labels")

    def at(key: str) -> Cell:
        values = body[key]
        return values[j] if j < len(values) else None

    return TaskFacts(
        name=clean(task["name"]),
        metric=metric,
        rows=rows,
        labels=[clean(label) for label in labels] if isinstance(labels, list) else None,
        synthetic=bool(task.get("synthetic")),
        source=clean(task["source"]) if task.get("source") else None,
        hash=clean(task["hash"]) if task.get("hash") else None,
        learned=scores[j][j],
        final=final,
        forgetting=metrics.forgetting_of(scores, j),
        noise=noise(metric, final, rows["evaluation"]),
        alone=body["alone"].get(task["name"]),
        seconds=at("seconds"),
        steps=at("steps"),
        skipped=at("skipped_steps"),
    )


def _count(rows: dict[str, Any] | None, key: str) -> int | None:
    value = (rows or {}).get(key)
    return None if value is None else int(value)


def _run_warnings(body: dict[str, Any], tasks: list[TaskFacts]) -> list[str]:
    said = [clean(line) for line in body["warnings"]]
    if body["status"] != "done":
        said.append("This run has not ended: what it has not measured is a dash.")
    for task, raw in zip(tasks, body["tasks"], strict=True):
        name = short(task.name)
        if task.synthetic:
            said.append(f"{name} is synthetic: generated rows, not text that people wrote.")
        if task.skipped:
            said.append(f"{name}: {task.skipped:g} steps skipped for non-finite gradients.")
        said += [f"{name}: {clean(line)}" for line in raw.get("warnings") or []]
    return said


def _history(body: dict[str, Any]) -> tuple[list[float], list[tuple[float, list[Cell]]]]:
    """Where tasks begin and what was measured, in steps counted over the whole sequence.

    If the steps of a history start again with every task, the tasks are laid end to end.
    """
    size, counts = len(body["tasks"]), body["steps"]
    by_task: dict[int, list[tuple[float, list[Cell]]]] = {}
    for point in body["history"]:
        learning, step = point.get("learning"), point.get("step")
        if learning is not None and step is not None:
            scores = [*(point.get("scores") or []), *[None] * size][:size]
            by_task.setdefault(int(learning), []).append((float(step), scores))
    again = any(by_task[k][0][0] <= by_task[k - 1][-1][0] for k in by_task if k - 1 in by_task)
    known = [] if None in counts else [float(sum(counts[:k])) for k in range(len(counts) + 1)]
    starts: list[float] = []
    points: list[tuple[float, list[Cell]]] = []
    for k in range(size):
        last = points[-1][0] if points else 0.0
        found = by_task.get(k, [])
        start = known[k] if k < len(known) else last
        shift = start if again else 0.0
        points += [(step + shift, scores) for step, scores in found]
        if found or k < len(known):
            starts.append(start)
    return starts, points


def _study_key(body: dict[str, Any]) -> str:
    # Training and selection rows differ by seed; what is compared is scored on the same rows.
    tasks = [
        [task["name"], task.get("evaluation_hash", task.get("hash")), task.get("metric")]
        for task in body["tasks"]
    ]
    return json.dumps([body["model"].get("name"), body["model"].get("hash"), tasks])


def _configuration(body: dict[str, Any]) -> dict[str, Any]:
    """What runs are compared by; a setting that came later than a run has its default."""
    known = {**defaults(), **body["settings"]}
    return {key: value for key, value in known.items() if key not in PER_RUN}


def _comparison(records: list[Record]) -> Comparison:
    by_key: dict[str, list[Record]] = {}
    warnings = []
    for record in records:
        body = record.to_dict()
        key = json.dumps([body["recipe"], _configuration(body)], sort_keys=True)
        by_key.setdefault(key, []).append(record)
    labels = _labels([group[0].to_dict() for group in by_key.values()])
    picked = {}
    for label, group in zip(labels, by_key.values(), strict=True):
        newest: dict[object, Record] = {}
        for i, record in enumerate(sorted(group, key=lambda record: str(record.created))):
            newest[i if record.seed is None else ("seed", record.seed)] = record
        if len(newest) < len(group):
            again = len(group) - len(newest)
            warnings.append(f"{label}: {again} older runs of a seed that ran again are left out.")
        picked[label] = sorted(newest.values(), key=lambda r: (r.seed is None, r.seed or 0))
        open_ = sum(record.status != "done" for record in picked[label])
        if open_ and len(records) > 1:
            warnings.append(f"{label}: {open_} of {len(picked[label])} runs have not ended.")
    chosen = _control(picked)
    groups = [_group(label, runs, picked.get(chosen or "")) for label, runs in picked.items()]
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
    )


def _labels(bodies: list[dict[str, Any]]) -> list[str]:
    """Recipe names, with the settings in which recipes of one name differ."""
    labels = []
    for body in bodies:
        name = recipe_name(body)
        same = [_configuration(other) for other in bodies if recipe_name(other) == name]
        mine = _configuration(body)
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in same)]
        labels.append(", ".join([name, *(f"{clean(k)} {_short(mine[k])}" for k in differing)]))
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


def _control(picked: dict[str, list[Record]]) -> str | None:
    names = [label for label, records in picked.items() if is_control(records[0].recipe)]

    def quality(label: str, which: str) -> Cell:
        matrices = [getattr(record, which) for record in picked[label]]
        if None in matrices:
            return None
        # a single task has no old one, and so no new_plus_old
        column = COLUMNS["new" if len(matrices[0]) == 1 else "new_plus_old"]
        return mean_spread(column(matrix) for matrix in matrices).mean

    for which in ("selection_scores", "scores"):
        quality_of = {label: quality(label, which) for label in names}
        known = {label: value for label, value in quality_of.items() if value is not None}
        if known and (len(known) == len(names) or which == "scores"):
            return max(known, key=lambda label: known[label])
    return names[0] if names else None


def _group(label: str, records: list[Record], control: list[Record] | None) -> GroupFacts:
    runs = [run_facts(record) for record in records]
    points_ = {name: [column(run.scores) for run in runs] for name, column in COLUMNS.items()}
    size = len(runs[0].scores)
    cells = [
        [mean_spread(run.scores[i][j] for run in runs) for j in range(size)] for i in range(size)
    ]
    first = runs[0].body
    mine = control is records
    return GroupFacts(
        label=label,
        recipe=recipe_name(first),
        settings=_configuration(first),
        control=mine,
        plain=is_control(first["recipe"]),
        runs=runs,
        seeds=[record.seed for record in records],
        spread={name: mean_spread(values) for name, values in points_.items()},
        points=points_,
        difference={}
        if mine or control is None
        else {
            key: paired_difference(_by_seed(records, key), _by_seed(control, key)) for key in PAIRED
        },
        mean_scores=[[cell.mean for cell in row] for row in cells],
        sd_scores=[[cell.sd for cell in row] for row in cells],
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
