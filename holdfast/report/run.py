"""One record -> numbers: its tasks, its matrix with the noise of every cell, its history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.experiments import metrics
from holdfast.experiments.metrics import Cell, Named
from holdfast.experiments.record import Record
from holdfast.experiments.statistics import noise
from holdfast.report.words import clean, short


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
    constant: Cell  # what one answer for all evaluation rows scores; None: a record without it
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
    named: list[Named]  # metrics by the names that papers use, each with its formula

    @property
    def learned(self) -> list[bool]:
        """Of each task with a score and a constant: whether it beat one answer for all rows.

        The score just after learning it counts: what was learned and then lost was learned.
        """
        return [
            task.learned > task.constant
            for task in self.tasks
            if task.learned is not None and task.constant is not None
        ]

    @property
    def failed(self) -> bool | None:
        """Whether a task was not learned at all; None where that is not known."""
        return not all(self.learned) if self.learned else None


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
        named=metrics.named(
            scores,
            [body["alone"].get(task.name) for task in tasks],
            [(int(h["learning"]), _measured(h, size)) for h in body["history"]
             if h.get("learning") is not None],
        ),
    )  # fmt: skip


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
        constant=task.get("constant"),
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


def _measured(point: dict[str, Any], size: int) -> list[Cell]:
    """The scores of a point of the history, one a task."""
    return [*(point.get("scores") or []), *[None] * size][:size]


def _history(body: dict[str, Any]) -> tuple[list[float], list[tuple[float, list[Cell]]]]:
    """Where tasks begin and what was measured, in steps counted over the whole sequence.

    If the steps of a history start again with every task, the tasks are laid end to end.
    """
    size, counts = len(body["tasks"]), body["steps"]
    by_task: dict[int, list[tuple[float, list[Cell]]]] = {}
    for point in body["history"]:
        learning, step = point.get("learning"), point.get("step")
        if learning is not None and step is not None:
            by_task.setdefault(int(learning), []).append((float(step), _measured(point, size)))
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
