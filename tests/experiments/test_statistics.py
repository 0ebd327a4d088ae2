"""Intervals and spreads against textbook numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.experiments.statistics import mean_spread, noise, paired_difference


def test_noise_of_an_accuracy_is_binomial() -> None:
    assert noise("accuracy", 0.5, 100) == pytest.approx(0.05)
    assert noise("accuracy", 0.741, 500) == pytest.approx(0.019592, abs=1e-6)


def test_a_perfect_score_is_not_exact() -> None:
    perfect, half = noise("accuracy", 1.0, 20), math.sqrt(0.025 * 0.975 / 20)
    assert perfect == pytest.approx(half)
    assert noise("accuracy", 0.0, 20) == pytest.approx(half)
    assert perfect < noise("accuracy", 0.95, 20)  # type: ignore[operator]


def test_noise_of_correlations_matches_simulation() -> None:
    import numpy as np
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 200))
    y = 0.7 * x + math.sqrt(1 - 0.49) * rng.standard_normal((400, 200))
    seen = [float(spearmanr(a, b).statistic) for a, b in zip(x, y, strict=True)]
    assert noise("spearman", float(np.mean(seen)), 200) == pytest.approx(np.std(seen), rel=0.12)

    # (1 - .25) sqrt(1.125 / 4): few rows, where the 3 that are taken off count
    assert noise("spearman", 0.5, 7) == pytest.approx(0.75 * math.sqrt(1.125 / 4))

    truth = rng.integers(0, 2, (400, 200)) * 2 - 1
    guess = np.where(rng.random((400, 200)) < 0.8, truth, -truth)
    phi = (truth * guess).mean(1)
    assert noise("matthews", float(phi.mean()), 200) == pytest.approx(phi.std(), rel=0.12)


@pytest.mark.parametrize(
    ("metric", "score", "rows"),
    [("accuracy", None, 10), ("accuracy", 0.5, None), ("accuracy", 0.5, 0), ("f1", 0.5, 10),
     ("accuracy", math.nan, 10), ("spearman", 0.5, 3), ("bleu", 0.5, 10)],
)  # fmt: skip
def test_no_formula_no_noise(metric: str, score: float | None, rows: int | None) -> None:
    assert noise(metric, score, rows) is None


def test_mean_spread_by_hand() -> None:
    spread = mean_spread([1.0, None, 2.0, math.nan, 3.0])
    assert spread == (2.0, 1.0, 3, 1.0, 3.0)
    assert mean_spread([0.5]) == (0.5, None, 1, 0.5, 0.5)
    assert mean_spread([None]) == (None, None, 0, None, None)


def test_paired_difference_by_hand() -> None:
    a = {0: 0.9, 1: 0.8, 2: 0.85, 7: 0.1}
    b = {0: 0.8, 1: 0.6, 2: 0.55, 9: 0.0}
    gap = paired_difference(a, b)
    # differences 0.1, 0.2, 0.3: sd 0.1, t(0.975, 2) = 4.302653
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert gap.mean == pytest.approx(0.2) and gap.n == 3
    assert (gap.low, gap.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert gap.p == pytest.approx(0.25)  # two of the eight signs are as extreme
    assert gap.smallest_p == 0.25


def test_pairs_that_are_few_or_equal() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}) == (None, None, None, 0, None, None)
    assert paired_difference({0: 1.0}, {0: None}).n == 0
    one = paired_difference({0: 0.75}, {0: 0.5})
    assert one == (0.25, None, None, 1, None, None)
    same = paired_difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert same.mean == 0 and same.p == 1.0


def test_differences_that_are_equal_but_for_rounding_tie() -> None:
    """.3 - .2 is not .2 - .1 to a computer, and .1 + .2 not .3."""
    a, b = (0.2, 0.9, 0.3, 0.7, 0.6), (0.1, 0.8, 0.2, 0.8, 0.4)
    # ranks 2.5, 2.5, 2.5, -2.5, 5: ten of the 32 signs have a sum of 2.5 or less on either side
    assert paired_difference(dict(enumerate(a)), dict(enumerate(b))).p == pytest.approx(10 / 32)
    none = paired_difference(dict.fromkeys(range(5), 0.1 + 0.2), dict.fromkeys(range(5), 0.3))
    assert none.p == 1.0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_difference_to_itself_is_nothing(values: list[float]) -> None:
    seeds = dict(enumerate(values))
    gap = paired_difference(seeds, seeds)
    assert (gap.mean, gap.low, gap.high, gap.p) == (0, 0, 0, 1)
