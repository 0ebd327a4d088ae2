"""How sure a number is: noise of one score, spread over seeds, paired differences.

Values that are None were not measured and are left out; a result that needs them is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from holdfast.experiments.metrics import Cell


class Spread(NamedTuple):
    """Values over seeds; sd divides by n - 1 and is None below two values."""

    mean: Cell
    sd: Cell
    n: int
    min: Cell
    max: Cell


class Difference(NamedTuple):
    """a - b over the seeds that both have."""

    mean: Cell
    low: Cell  # t interval of the mean difference; None below two pairs
    high: Cell
    n: int
    p: Cell  # Wilcoxon signed-rank, two-sided
    smallest_p: Cell  # what n pairs can reach at best: 0.0625 for five seeds


def noise(metric: str, score: Cell, rows: int | None) -> Cell:
    """Standard error of one score over `rows` evaluation rows; None where no formula holds.

    accuracy: `sqrt(p (1 - p) / n)`, with p kept half a row from 0 and 1, so that a perfect score
    of 20 rows does not claim to be exact. spearman: `(1 - r^2) sqrt((1 + r^2 / 2) / (n - 3))`
    (Bonett & Wright 2000, by the delta method). matthews: `sqrt((1 - r^2) / n)`, exact for two
    balanced classes, an approximation elsewhere. f1 needs the predictions, which no record keeps:
    None.
    """
    if score is None or not math.isfinite(score) or rows is None or rows < 1:
        return None
    if metric == "accuracy":
        half = 0.5 / rows
        p = min(max(score, half), 1 - half)
        return math.sqrt(p * (1 - p) / rows)
    r2 = min(score * score, 1.0)
    if metric == "spearman" and rows > 3:
        return (1 - r2) * math.sqrt((1 + r2 / 2) / (rows - 3))
    if metric == "matthews":
        return math.sqrt((1 - r2) / rows)
    return None


def mean_spread(values: Iterable[Cell]) -> Spread:
    """Mean, standard deviation, count, minimum and maximum of the measured values."""
    known = _known(values)
    if not known:
        return Spread(None, None, 0, None, None)
    n = len(known)
    mean = math.fsum(known) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (n - 1)) if n > 1 else None
    return Spread(mean, sd, n, min(known), max(known))


def paired_difference(
    a: Mapping[int, Cell], b: Mapping[int, Cell], *, confidence: float = 0.95
) -> Difference:
    """a - b, paired by seed: mean, t interval, Wilcoxon signed-rank p-value.

    Seeds that only one side has, or did not measure, are left out. Pairs without a difference do
    not count in the p-value; if no pair differs it is 1.
    """
    pairs = [(a[seed], b[seed]) for seed in a if seed in b]
    gaps = _known(None if x is None or y is None else x - y for x, y in pairs)
    n = len(gaps)
    spread = mean_spread(gaps)
    if spread.mean is None or spread.sd is None:
        return Difference(spread.mean, None, None, n, None, None)
    from scipy.stats import t, wilcoxon

    half = float(t.ppf((1 + confidence) / 2, n - 1)) * spread.sd / math.sqrt(n)
    # rounded, because 0.3 - 0.2 and 0.2 - 0.1 must tie; scipy is exact for few pairs, ties or not
    moved = [gap for gap in (round(gap, 12) for gap in gaps) if gap]
    p = float(wilcoxon(moved).pvalue) if moved else 1.0
    return Difference(spread.mean, spread.mean - half, spread.mean + half, n, p, 2.0 ** (1 - n))


def _known(values: Iterable[Cell] | Sequence[Cell]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]
