"""The three scenarios of continual learning: van de Ven, Tuytelaars & Tolias, "Three types of
incremental learning", Nature Machine Intelligence 2022. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCENARIOS = {
    "task-incremental": "each task has outputs of its own, and whoever asks says which task a row "
    "belongs to",
    "domain-incremental": "all tasks have the same outputs, and nobody says which task a row "
    "belongs to",
    "class-incremental": "one head over the labels of all tasks so far, and nobody says which task "
    "a row belongs to",
}
APART = "Scores of different scenarios do not compare."


def scenario_of(tasks: Sequence[Mapping[str, Any]], *, own_heads: bool) -> str | None:
    """The scenario of a record's tasks; None for a single one, which all three have in common, and
    for networks of a user's own, which decide by themselves what their tasks share."""
    if len(tasks) < 2 or tasks[0].get("kind") == "module":
        return None
    if own_heads:
        return "task-incremental"
    labels = [set(task.get("labels") or ()) for task in tasks]
    return "domain-incremental" if all(s == labels[0] for s in labels) else "class-incremental"
