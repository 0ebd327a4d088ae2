"""What was learned and what was lost, as pure functions of the score matrix.

`R[i][j]` is the score on task j after learning task i, for T tasks learned in order: row T-1 is
the end of the sequence, the diagonal is each task just after it was learned. A cell that was not
measured is None (NaN and infinity count as not measured). Whatever needs a missing cell is None
itself, never 0. Higher scores are better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from holdfast.tasks.task import METRICS

ROUNDED = 1e-6  # float32 may end beyond 1 by less

Cell = float | None
Matrix = Sequence[Sequence[Cell]]
Points = Sequence[tuple[float, float]]  # (new, old after) of each setting of a recipe


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


def average_incremental(scores: Matrix) -> Cell:
    """`mean_i mean_{j <= i} R[i][j]`: average incremental accuracy (Rebuffi et al. 2017)."""
    return _mean([_mean(row[: i + 1]) for i, row in enumerate(square(scores))])


def zero_shot_transfer(scores: Matrix, untrained: Sequence[Cell] | None) -> Cell:
    """`mean_{j > 0} (R[j-1][j] - b[j])`: forward transfer of Lopez-Paz & Ranzato (2017).

    untrained: b, the score on each task before anything was learned. It needs cells above the
    diagonal, which a run with a head for each task does not measure: then None.
    """
    rows = square(scores)
    if untrained is None:
        return None
    if len(untrained) != len(rows):
        raise ValueError(f"{len(untrained)} untrained scores for {len(rows)} tasks")
    return _mean([_minus(rows[j - 1][j], _cell(untrained[j])) for j in range(1, len(rows))])


def minimum_old(history: Iterable[tuple[int, Sequence[Cell]]], tasks: int) -> Cell:
    """`mean_{j < T-1} min of R_t[j] over all t after task j` (min-ACC, De Lange et al. 2023).

    history: (task being learned, scores (T,)) of each time that was measured while training. What
    the stability gap is seen by: far below the end where a task was lost and regained. None if an
    old task was never measured while a later one was learned.
    """
    points = list(history)
    lowest: list[Cell] = []
    for j in range(tasks - 1):
        later = [_cell(scores[j]) for learning, scores in points if learning > j]
        lowest.append(min((value for value in later if value is not None), default=None))
    return _mean(lowest)


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


class Named(NamedTuple):
    """A metric by the name that others use, with its formula: what it is divided by differs."""

    name: str
    formula: str
    value: Cell


def named(
    scores: Matrix,
    alone: Sequence[Cell] | None = None,
    history: Iterable[tuple[int, Sequence[Cell]]] = (),
) -> list[Named]:
    """Metrics that papers print under one name with several meanings; T counts tasks."""
    size = len(square(scores))
    transfer = backward_transfer(scores)
    by_all = None if transfer is None else transfer * (size - 1) / size
    return [
        Named("BWT / (T - 1)", "sum over old tasks of end - just learned, over T - 1", transfer),
        Named("BWT / T", "the same sum, over T (SEEKR, SAPT, TRACE)", by_all),
        Named("average incremental accuracy", "mean over stages of the mean over tasks so far",
              average_incremental(scores)),
        Named("minimum old score", "mean over old tasks of the lowest score while later ones were "
              "learned (selection rows)", minimum_old(history, size)),
        Named("forward transfer, beside alone", "mean over j > 1 of just learned - trained alone",
              forward_transfer(scores, alone)),
        Named("forward transfer, zero-shot", "mean over j > 1 of the score before it is learned - "
              "the score untrained", zero_shot_transfer(scores, None)),
    ]  # fmt: skip


def front(points: Points) -> list[tuple[float, float]]:
    """The points that none beats in both scores, by rising new score."""
    best: list[tuple[float, float]] = []
    for new, old in sorted(set(points), reverse=True):
        if not best or old > best[-1][1]:
            best.append((new, old))
    return best[::-1]


def kept_at(points: Points, new: float) -> Cell:
    """The old score that is kept where the new task is learned to `new`: the height of the front.

    Straight lines between the points of `front`, level before the first: a rate between two that
    were run is taken to lie between them. None beyond the highest new score.
    """
    best = front(points)
    if not best or new > best[-1][0] + 1e-12:
        return None
    for (low, before), (high, after) in pairwise(best):
        if low < new < high:
            return before + (after - before) * (new - low) / (high - low)
    return next((old for score, old in best if score >= new), best[-1][1])


def matched(mine: Points, theirs: Points) -> tuple[float, float] | None:
    """The range of new scores that both reached, from and to; None where one has no points.

    Where one begins above all that the other reached it is a point: what the lower one reached.
    """
    if not mine or not theirs:
        return None
    low = max(min(new for new, _ in points) for points in (mine, theirs))
    high = min(max(new for new, _ in points) for points in (mine, theirs))
    return min(low, high), high


def area(points: Points, low: float, high: float) -> Cell:
    """`∫ kept_at(x) dx` from low to high; None where `high` was not reached."""
    if kept_at(points, high) is None:
        return None
    edges = [low, *(new for new, _ in front(points) if low < new < high), high]
    heights = [kept_at(points, x) or 0.0 for x in edges]
    corners = pairwise(zip(edges, heights, strict=True))
    return math.fsum((b - a) * (left + right) / 2 for (a, left), (b, right) in corners)


def kept_more(mine: Points, theirs: Points) -> Cell:
    """Mean height of mine above theirs over the range of new scores that both reached.

    The difference of the two `area`s over the length of the range, in units of the score; over a
    range of one point, the difference there.
    """
    found = matched(mine, theirs)
    if found is None:
        return None
    low, high = found
    if high - low < 1e-12:
        return _minus(kept_at(mine, high), kept_at(theirs, high))
    above = _minus(area(mine, low, high), area(theirs, low, high))
    return None if above is None else above / (high - low)


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
