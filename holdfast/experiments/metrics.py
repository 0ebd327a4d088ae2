"""What was learned and what was lost, as pure functions of the score matrix.

`R[i][j]` is the score on task j after learning task i, for T tasks learned in order: row T-1 is
the end of the sequence, the diagonal is each task just after it was learned. A cell that was not
measured is None (NaN and infinity count as not measured). Whatever needs a missing cell is None
itself, never 0. Higher scores are better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from holdfast.tasks.task import METRICS

ROUNDED = 1e-6  # float32 may end beyond 1 by less

Cell = float | None
Matrix = Sequence[Sequence[Cell]]


def impossible(value: object, metric: str | None) -> bool:
    """Whether no model gets such a score: outside 0 to 1, or -1 to 1 of a correlation.

    A metric that is not one of ours is taken at its word.
    """
    low = -1.0 if metric in ("matthews", "spearman") else 0.0
    known = metric in METRICS and isinstance(value, int | float)
    return known and not low - ROUNDED <= value <= 1 + ROUNDED  # type: ignore[operator]


def square(scores: Matrix) -> list[list[Cell]]:
    """A copy of the T x T matrix with every unmeasured cell as None; ValueError if not square."""
    rows = [[_cell(value) for value in row] for row in scores]
    if not rows:
        raise ValueError("a score matrix has at least one task")
    for i, row in enumerate(rows):
        if len(row) != len(rows):
            raise ValueError(f"score matrix is not square: row {i} has {len(row)} of {len(rows)}")
    return rows


def forgetting_of(scores: Matrix, task: int) -> Cell:
    """`F_j = max_{i < T-1} R[i][j] - R[T-1][j]` of one task j (Chaudhry et al. 2018).

    Positive: worse than the best it ever was; negative: the end is its best. The maximum takes in
    every measured earlier row; rows from j on must be measured. None for the last task.
    """
    rows = square(scores)
    last = len(rows) - 1
    if not 0 <= task <= last:
        raise ValueError(f"no task {task} in a sequence of {last + 1}")
    earlier = [rows[i][task] for i in range(last)]
    end = rows[last][task]
    if task == last or end is None or None in earlier[task:]:
        return None
    return max(value for value in earlier if value is not None) - end


def forgetting(scores: Matrix) -> Cell:
    """`mean_{j < T-1} F_j`, see `forgetting_of`. Positive: worse. None for a single task."""
    return _mean([forgetting_of(scores, j) for j in range(len(square(scores)) - 1)])


def backward_transfer(scores: Matrix) -> Cell:
    """`mean_{j < T-1} (R[T-1][j] - R[j][j])` (Lopez-Paz & Ranzato 2017). Negative: forgetting."""
    rows = square(scores)
    last = len(rows) - 1
    return _mean([_minus(rows[last][j], rows[j][j]) for j in range(last)])


def forward_transfer(scores: Matrix, alone: Sequence[Cell] | None) -> Cell:
    """`mean_{j > 0} (R[j][j] - alone[j])`, where alone[j] is task j trained alone.

    Positive: the tasks before helped. None unless every later task was also trained alone.
    """
    rows = square(scores)
    if alone is None:
        return None
    if len(alone) != len(rows):
        raise ValueError(f"{len(alone)} scores of tasks alone for {len(rows)} tasks")
    return _mean([_minus(rows[j][j], _cell(alone[j])) for j in range(1, len(rows))])


def average(scores: Matrix) -> Cell:
    """`mean_j R[T-1][j]`: every task at the end of the sequence."""
    return _mean(square(scores)[-1])


def plasticity(scores: Matrix) -> Cell:
    """`mean_j R[j][j]`: every task just after it was learned."""
    rows = square(scores)
    return _mean([rows[j][j] for j in range(len(rows))])


def old_before(scores: Matrix) -> Cell:
    """`mean_{j < T-1} R[j][j]`: the old tasks, each just after it was learned."""
    rows = square(scores)
    return _mean([rows[j][j] for j in range(len(rows) - 1)])


def old_after(scores: Matrix) -> Cell:
    """`mean_{j < T-1} R[T-1][j]`: the old tasks at the end; minus `old_before` = backward transfer.

    None for a single task.
    """
    return _mean(square(scores)[-1][:-1])


def new_plus_old(scores: Matrix) -> Cell:
    """`R[T-1][T-1] + mean_{j < T-1} R[T-1][j]`: the reward of the learning-rate search papers.

    The new task is the last one. For two tasks it is `R[1][1] + R[1][0]`; 2.0 is perfect for
    metrics that end at 1. None for a single task.
    """
    rows = square(scores)
    new, old = rows[-1][-1], old_after(rows)
    return None if new is None or old is None else new + old


def summary(scores: Matrix, alone: Sequence[Cell] | None = None) -> dict[str, Cell]:
    """Every metric by name, as a record stores them."""
    return {
        "forgetting": forgetting(scores),
        "backward_transfer": backward_transfer(scores),
        "forward_transfer": forward_transfer(scores, alone),
        "average": average(scores),
        "plasticity": plasticity(scores),
        "new_plus_old": new_plus_old(scores),
    }


def _cell(value: Cell) -> Cell:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _minus(left: Cell, right: Cell) -> Cell:
    return None if left is None or right is None else left - right


def _mean(values: Sequence[Cell]) -> Cell:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
