"""One comparison as the page shows it: its pictures, its tables, and what repeats its runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.experiments.metrics import Cell
from holdfast.experiments.statistics import Spread, mean_spread
from holdfast.report import general
from holdfast.report.canvas import Picture
from holdfast.report.draw import comparing, shown, within
from holdfast.report.facts import Comparison, GroupFacts, RunFacts, TaskFacts
from holdfast.report.protocol import ProtocolFacts, elsewhere, protocol_of
from holdfast.report.sentences import judge_sentences, noise_note, study_sentences
from holdfast.report.terms import terms
from holdfast.report.verdict import taken_of, verdict
from holdfast.report.words import clean, number, short

DETAILS = 24  # recipes and settings whose runs a page tells how to repeat
MATRICES = 24  # runs up to which the matrix of each stands there too


@dataclass(frozen=True)
class Matrix:
    """Scores by task learned and tested, each with what it may be off by and its shade."""

    label: str
    tasks: list[TaskFacts]
    scores: list[list[Cell]]
    off: list[list[Cell]]
    heat: list[list[int | None]]  # 0 to 10, from the lowest score of the study to the highest
    below: dict[str, list[str]]  # further rows, as text


@dataclass(frozen=True)
class Section:
    """One comparison with its pictures, as the template reads it."""

    study: Comparison
    verdict: list[str]
    words: list[str]  # what recipes kept and learned, one by one
    comparing: list[Picture]
    within: list[Picture]
    matrices: list[Matrix]
    off: str  # what ± is in them
    rows: list[GroupFacts]  # of the tables: equal recipes beside each other
    same: dict[str, str]  # label -> that of an earlier row with the same scores
    changed: list[tuple[str, str, Cell, Cell]]  # recipe, task, share, overlap
    classes: list[dict[str, Any]]  # of each task with labels: name, rows by label
    repeats: list[GroupFacts]
    by_run: dict[str, list[Matrix]]  # label of a group -> matrices of its runs
    use: dict[str, str] | None  # whose model, and the lines that load it
    exposures: list[str]
    synthetic: list[str]
    general: dict[str, dict[str, list[Spread]]]  # measure -> recipe -> before, after each task
    protocol: ProtocolFacts | None
    elsewhere: dict[str, dict[str, dict[str, Spread]]]  # recipe -> task learned -> task tested


def section(study: Comparison) -> Section:
    """Everything that the template reads of a comparison."""
    groups = [g for g in shown(study) if len(study.tasks) > 1 and _known(g.mean_scores)]
    known = [v for g in groups for v in _known(g.mean_scores)]
    limits = (min(known), max(known)) if known else (0.0, 0.0)
    few = MATRICES >= len(study.runs) > 1 and len(study.tasks) > 1
    rows, same = _beside(study)
    return Section(
        study=study,
        verdict=verdict(study),
        words=[*study_sentences(study), *judge_sentences(study), *terms(study)]
        if len(study.runs) > 1
        else [],
        comparing=comparing(study),
        within=[*within(study), *([drawn] if (drawn := general.draw(study)) else [])],
        matrices=[_matrix(g.label, g.runs, g.mean_scores, g.sd_scores, limits) for g in groups],
        off="Mean over seeds, ± standard deviation." if len(study.runs) > len(study.groups)
        else "± is the noise (standard error) of one score on that many rows"
        + (f"; {note}." if (note := noise_note(study.tasks)) else "."),
        rows=rows,
        same=same,
        changed=_changed(shown(study)),
        classes=[found for task in study.runs[0].body["tasks"] if (found := _classes(task))],
        repeats=shown(study, DETAILS),
        by_run={g.label: [_matrix(run.label, [run], run.scores, run.noise, limits)
                          for run in g.runs if few] for g in study.groups},
        use=_use(study),
        exposures=_unique(run.body["exposure"] for run in study.runs),
        synthetic=[task.name for task in study.tasks if task.synthetic],
        general=general.by_recipe(study),
        protocol=protocol_of(study),
        elsewhere={g.label: away for g in study.groups if (away := elsewhere(g.runs))},
    )  # fmt: skip


def _known(matrix: Sequence[Sequence[Cell]]) -> list[float]:
    return [value for row in matrix for value in row if value is not None]


def _matrix(
    label: str,
    runs: Sequence[RunFacts],
    scores: list[list[Cell]],
    off: list[list[Cell]],
    limits: tuple[float, float],
) -> Matrix:
    """Of one run with its noise and what it lost, or of several with their spread."""
    tasks, (low, high) = runs[0].tasks, limits
    below: dict[str, list[str]] = {}
    if len(runs) == 1:
        off = runs[0].noise
        below["forgetting"] = [number(task.forgetting, sign=True) for task in tasks]
        if any(task.alone is not None for task in tasks):
            below["trained alone"] = [number(task.alone) for task in tasks]
    heat = [[None if v is None else round(10 * (v - low) / (high - low or 1.0)) for v in row]
            for row in scores]  # fmt: skip
    return Matrix(label, tasks, scores, off, heat, below)


def _beside(study: Comparison) -> tuple[list[GroupFacts], dict[str, str]]:
    """The groups with those of equal scores beside each other, and whom each is as."""
    first: dict[object, str] = {}
    kin: dict[str, list[GroupFacts]] = {}
    for group in study.groups:
        scores = [(seed, run.scores) for seed, run in zip(group.seeds, group.runs, strict=True)]
        key = repr(scores) if any(_known(run.scores) for run in group.runs) else group.label
        kin.setdefault(first.setdefault(key, group.label), []).append(group)
    same = {group.label: label for label, found in kin.items() for group in found[1:]}
    return [group for found in kin.values() for group in found], same


def _changed(groups: Sequence[GroupFacts]) -> list[tuple[str, str, Cell, Cell]]:
    """What share of the entries that methods select among each task changed, over runs."""
    rows: list[tuple[str, str, Cell, Cell]] = []
    for group in groups:
        for task in group.runs[0].tasks:
            told = [run.body["movement"].get(task.name, {}) for run in group.runs]
            share, overlap = (mean_spread(each.get(key) for each in told).mean
                              for key in ("changed", "overlap"))  # fmt: skip
            if share is not None:
                rows.append((group.label, task.name, share, overlap))
    return rows


def _classes(task: dict[str, Any]) -> dict[str, Any] | None:
    """How many rows each label has in each split, where the record tells it."""
    labels, counts = task.get("labels"), task.get("classes")
    if not labels or not isinstance(counts, dict):
        return None
    columns = [counts.get(split) for split in ("train", "selection", "evaluation")]
    if any(not isinstance(column, list) or len(column) != len(labels) for column in columns):
        return None
    rows = zip(*columns, strict=True)
    return {"name": clean(task["name"]), "rows": list(zip(map(clean, labels), rows, strict=True))}


def _use(study: Comparison) -> dict[str, str] | None:
    """Two lines that load a model: that of the recipe to take, in its first seed."""
    group = study.groups[0] if len(study.runs) == 1 else taken_of(study)[0]
    done = [run for run in group.runs
            if run.body["status"] == "done" and run.body["settings"].get("out")]  # fmt: skip
    if not done:
        return None
    run = done[0]
    last = run.body["tasks"][-1]
    texts = '["…"], ["…"]' if last.get("pairs") else '["…"]'
    lines = (f"model = holdfast.load({clean(run.body['settings']['out'])!r})\n"
             f"model.predict({clean(last['name'])!r}, {texts})")  # fmt: skip
    return {"label": f"{short(group.label)}, seed {run.body['seed']}", "lines": lines}


def _unique(texts: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(clean(text) for text in texts if text))
