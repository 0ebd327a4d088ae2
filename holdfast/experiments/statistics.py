"""How sure a number is: noise of one score, spread over seeds, differences a referee accepts.

Values that are None were not measured and are left out; a result that needs them is None. Nothing
here depends on the order of seeds or labels. docs/statistics.md says when to trust what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.experiments.metrics import Cell

if TYPE_CHECKING:
    import numpy as np

Scores = Mapping[int, Cell]  # by seed
EXACT = 8  # seeds up to which every resample is enumerated: 6,435 of them
DRAWN = 10_000  # resamples of more seeds
MOST = 1_000_000  # seeds beyond which it is said that no number is enough


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


class Against(NamedTuple):
    """a minus the best of several controls; `against_best` has the formulas."""

    mean: Cell  # to the control that was chosen: the difference of two columns of a table
    low: Cell  # interval of the difference, the choice of the control accounted for
    high: Cell
    n: int  # pairs of seeds
    p: Cell  # two-sided, of the same t statistic as the interval
    sd: Cell  # of the paired differences to the chosen control
    se: Cell  # standard error that the interval is made of


def against_best(
    mine: Scores,
    controls: Mapping[str, Scores],
    chosen_by: Mapping[str, Scores],
    chosen: str,
    *,
    confidence: float = 0.95,
) -> Against:
    """mine minus the control that was `chosen`, paired by seed, where its choice is noisy too.

    With D the mean difference over n seeds, the seeds are resampled, and the control of each
    resample b is chosen anew, by the highest mean of `chosen_by`; D_b is the difference to it::

        centre     D - (mean_b D_b - D_0)               D_0: chosen anew on the seeds themselves
        se         max( sd / sqrt(n),  sqrt(n / (n - 1)) sd_b D_b )
        interval   centre ± t(n - 1) se

    The centre is corrected for the bias of a choice: the best of several noisy rates looks better
    than it is. With one control this is the paired t interval. Rates that did not score all seeds
    of the pairs are not chosen from; equal means share the choice.
    """
    from scipy.stats import t

    seeds = sorted(s for s in mine if _has(mine, s) and _has(controls[chosen], s))
    gaps = [_rounded(mine, controls[chosen], seed) for seed in seeds]
    spread, n = mean_spread(gaps), len(seeds)
    if spread.mean is None or spread.sd is None:
        return Against(spread.mean, None, None, n, None, None, None)
    centre, se = spread.mean, spread.sd / math.sqrt(n)
    rates = [
        k for k in controls if all(_has(controls[k], s) and _has(chosen_by[k], s) for s in seeds)
    ]
    if len(rates) > 1:
        import numpy as np

        gap = np.array([[_rounded(mine, controls[k], s) for s in seeds] for k in rates])
        score = np.array([[chosen_by[k][s] for s in seeds] for k in rates], dtype=float)
        shares, chance = resamples(n)  # (b, n), (b,)

        def differences(weights: np.ndarray) -> np.ndarray:
            return (_picked(score @ weights.T) * (gap @ weights.T)).sum(0)

        found = differences(shares)
        middle = float(chance @ found)
        centre -= middle - float(differences(np.full((1, n), 1 / n))[0])
        se = max(se, math.sqrt(n / (n - 1) * float(chance @ (found - middle) ** 2)))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * se
    p = 2 * float(t.sf(abs(centre) / se, n - 1)) if se > 1e-12 else float(abs(centre) < 1e-12)
    return Against(spread.mean, centre - half, centre + half, n, p, spread.sd, se)


def choice_shares(chosen_by: Mapping[str, Scores]) -> dict[str, float]:
    """How often each is the best in mean when the seeds that all have are resampled; sums to 1.

    Empty if there is no seed that all have.
    """
    seeds = shared_seeds(chosen_by)
    if not seeds:
        return {}
    import numpy as np

    scores = np.array([[values[s] for s in seeds] for values in chosen_by.values()], dtype=float)
    shares, chance = resamples(len(seeds))
    often = _picked(scores @ shares.T) @ chance
    return {label: float(share) for label, share in zip(chosen_by, often, strict=True)}


def shared_seeds(by_label: Mapping[Any, Scores]) -> list[int]:
    """The seeds that every label measured, sorted."""
    every = [{s for s in values if _has(values, s)} for values in by_label.values()]
    return sorted(set.intersection(*every)) if every else []


@lru_cache(maxsize=32)
def resamples(n: int, *, exact: int = EXACT, drawn: int = DRAWN) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap resamples of n values: shares of each (b, n), and how likely each is (b,).

    Up to `exact` values these are all of them, with their multinomial probabilities; beyond that
    `drawn`, from a generator of its own.
    """
    from itertools import combinations_with_replacement as multisets

    import numpy as np

    if n > exact:
        found = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=drawn)
        return found / n, np.full(drawn, 1 / drawn)
    counts = np.array([np.bincount(c, minlength=n) for c in multisets(range(n), n)])
    ways = np.array(
        [math.factorial(n) / math.prod(map(math.factorial, c)) for c in counts.tolist()]
    )
    return counts / n, ways / n**n


def holm(values: Sequence[Cell]) -> list[Cell]:
    """p-values corrected for their number (Holm 1979); None stays None and does not count.

    Of m sorted values the i-th (from 0) becomes `max_{k <= i} min(1, (m - k) p_k)`.
    """
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    found: list[Cell] = [None] * len(values)
    least = 0.0
    for k, (p, i) in enumerate(order):
        found[i] = least = max(least, min(1.0, (len(order) - k) * p))
    return found


def power(effect: float, sd: float, n: int, *, alpha: float = 0.05) -> float:
    """Chance that n pairs show a mean difference of `effect`: two-sided paired t test.

    Noncentral t with n - 1 degrees of freedom and noncentrality `effect sqrt(n) / sd`.
    """
    from scipy.stats import nct, t

    if n < 2 or not effect:
        return 0.0 if n < 2 else alpha
    # beyond 30 it is over .98 with two pairs, 1 with more, and scipy is no longer exact
    away = min(abs(effect) * math.sqrt(n) / sd, 30.0) if sd else 30.0
    edge = float(t.ppf(1 - alpha / 2, n - 1))
    return float(nct.sf(edge, n - 1, away) + nct.cdf(-edge, n - 1, away))


def seeds_needed(effect: Cell, sd: Cell, *, wanted: float = 0.8) -> int | None:
    """Pairs of seeds with which `power` is `wanted` at the spread `sd` of paired differences.

    None without an effect or a spread, or where `MOST` would not do.
    """
    if effect is None or sd is None or not effect:
        return None
    high = 2
    while power(effect, sd, high) < wanted:
        high *= 2
        if high > MOST:
            return None
    low = high // 2  # not enough, or below two
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, sd, middle) >= wanted else (middle, high)
    return high


class Pooled(NamedTuple):
    """A difference over several sequences of tasks, each weighing the same."""

    mean: Cell
    low: Cell  # None below two sequences
    high: Cell
    sequences: int
    p: Cell


def pooled(parts: Sequence[tuple[float, float]], *, confidence: float = 0.95) -> Pooled:
    """The mean of differences, one a sequence with its standard error over seeds.

    The standard error is the one of a hierarchical bootstrap that draws sequences, then seeds
    within each, with both variances unbiased, and the interval has J - 1 degrees of freedom::

        se^2 = ( var_j D_j + mean_j se_j^2 ) / J
    """
    spread = mean_spread(mean for mean, _ in parts)
    if spread.mean is None or spread.sd is None:
        return Pooled(spread.mean, None, None, spread.n, None)
    from scipy.stats import t

    within = math.fsum(se * se for _, se in parts) / spread.n
    se = math.sqrt((spread.sd**2 + within) / spread.n)
    half = float(t.ppf((1 + confidence) / 2, spread.n - 1)) * se
    zero = abs(spread.mean) < 1e-12
    p = 2 * float(t.sf(abs(spread.mean) / se, spread.n - 1)) if se > 1e-12 else float(zero)
    return Pooled(spread.mean, spread.mean - half, spread.mean + half, spread.n, p)


class Repeats(NamedTuple):
    """Runs of one seed with the same settings: what a score moves by when nothing was changed."""

    pairs: int
    sd: Cell  # of one run: sqrt(sum of squared differences / (2 pairs))
    largest: Cell  # difference of a pair


def repeats(pairs: Iterable[tuple[Cell, Cell]]) -> Repeats:
    """The noise floor; pairs of which one was not measured are left out, none is not measured."""
    gaps = _known(None if a is None or b is None else abs(a - b) for a, b in pairs)
    if not gaps:
        return Repeats(0, None, None)
    sd = math.sqrt(math.fsum(gap * gap for gap in gaps) / (2 * len(gaps)))
    return Repeats(len(gaps), sd, max(gaps))


def _picked(means: np.ndarray) -> np.ndarray:
    """(rates, b) means -> 1 where a rate is the best of its resample, shared where some tie."""
    best = means >= means.max(0) - 1e-12
    share: np.ndarray = best / best.sum(0)
    return share


def _has(values: Scores, seed: int) -> bool:
    value = values.get(seed)
    return value is not None and math.isfinite(value)


def _rounded(a: Scores, b: Scores, seed: int) -> float:
    """a - b of a seed, rounded: 0.3 - 0.2 and 0.2 - 0.1 are one difference."""
    return round((a[seed] or 0.0) - (b[seed] or 0.0), 12)


def _known(values: Iterable[Cell] | Sequence[Cell]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]
