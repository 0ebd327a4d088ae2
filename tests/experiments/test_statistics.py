"""Intervals and spreads against textbook numbers."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from holdfast.experiments.statistics import (
    Scores,
    against_best,
    choice_shares,
    holm,
    mean_spread,
    noise,
    paired_difference,
    pooled,
    power,
    repeats,
    resamples,
    seeds_needed,
)


def test_noise_of_an_accuracy_is_binomial() -> None:
    assert noise("accuracy", 0.5, 100) == pytest.approx(0.05)
    assert noise("accuracy", 0.741, 500) == pytest.approx(0.019592, abs=1e-6)


def test_a_perfect_score_is_not_exact() -> None:
    perfect, half = noise("accuracy", 1.0, 20), math.sqrt(0.025 * 0.975 / 20)
    assert perfect == pytest.approx(half)
    assert noise("accuracy", 0.0, 20) == pytest.approx(half)
    assert perfect < noise("accuracy", 0.95, 20)  # type: ignore[operator]


def test_noise_of_correlations_matches_simulation() -> None:
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


# --- several controls, several recipes, several sequences ---------------------------------------

MINE = {0: 0.81, 1: 0.84, 2: 0.80}
RATES = {
    "low": {0: 0.70, 1: 0.79, 2: 0.72},
    "middle": {0: 0.76, 1: 0.73, 2: 0.77},
    "high": {0: 0.74, 1: 0.75, 2: 0.70},
}
CHOSEN_BY = {
    "low": {0: 0.71, 1: 0.80, 2: 0.70},
    "middle": {0: 0.75, 1: 0.74, 2: 0.76},
    "high": {0: 0.73, 1: 0.75, 2: 0.76},
}


def test_one_control_leaves_the_paired_t_interval() -> None:
    only = {"middle": RATES["middle"]}
    found, plain = against_best(MINE, only, only, "middle"), paired_difference(MINE, only["middle"])
    assert (found.mean, found.low, found.high) == pytest.approx((plain.mean, plain.low, plain.high))
    gaps = np.array([MINE[s] - only["middle"][s] for s in range(3)])
    assert found.p == pytest.approx(2 * t.sf(gaps.mean() / gaps.std(ddof=1) * 3**0.5, 2))
    # and so does a control that every resample chooses
    worse = {"other": dict.fromkeys(range(3), 0.1)}
    assert against_best(MINE, only | worse, only | worse, "middle") == pytest.approx(found)


def test_the_control_is_chosen_anew_in_each_of_the_27_resamples() -> None:
    """The slow twin: every way to draw three seeds, one after the other."""
    found, counts = [], dict.fromkeys(RATES, 0.0)
    for drawn in product(range(3), repeat=3):
        mean = {k: round(sum(v[s] for s in drawn), 9) for k, v in CHOSEN_BY.items()}
        best = [k for k in mean if mean[k] == max(mean.values())]
        for k in best:
            counts[k] += 1 / len(best) / 27
        gaps = [sum(MINE[s] - RATES[k][s] for s in drawn) / 3 for k in best]
        found.append(sum(gaps) / len(best))
    assert choice_shares(CHOSEN_BY) == pytest.approx(counts)
    assert min(counts.values()) > 0.1  # a case in which the choice is unsure

    ours = against_best(MINE, RATES, CHOSEN_BY, "middle")
    gap = np.array([MINE[s] - RATES["middle"][s] for s in range(3)])
    centre = 2 * gap.mean() - np.mean(found)
    se = max(gap.std(ddof=1) / 3**0.5, np.std(found) * (3 / 2) ** 0.5)
    assert ours.mean == pytest.approx(gap.mean()) and ours.se == pytest.approx(se)
    half = 4.302653 * se
    assert (ours.low, ours.high) == pytest.approx((centre - half, centre + half))
    assert ours.p == pytest.approx(2 * t.sf(abs(centre) / se, 2))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 9])
def test_resamples_have_the_moments_of_drawing_with_replacement(n: int) -> None:
    shares, chance = resamples(n)
    loose = 0.01 if n > 8 else 1e-12  # these are drawn
    assert chance.sum() == pytest.approx(1) and shares.sum(1) == pytest.approx(1)
    assert chance @ shares == pytest.approx(np.full(n, 1 / n), abs=loose)
    variance = (1 / n) * (1 - 1 / n) / n  # of a binomial count over n, as a share
    assert chance @ shares**2 - 1 / n**2 == pytest.approx(np.full(n, variance), abs=loose)


def test_the_interval_covers_where_one_that_takes_the_control_as_given_does_not() -> None:
    """The best of five rates, chosen on few rows: 95 % intervals of the gap to the truly best."""
    rng = np.random.default_rng(0)
    means = np.array([0, -0.01, -0.005, -0.02, -0.03])[:, None]
    fixed = ours = 0
    for _ in range(400):
        trained = means + rng.normal(0, 0.02, (5, 5))  # (rates, seeds)
        scores, chosen_by = (
            {str(k): dict(enumerate(row.tolist()))
             for k, row in enumerate(trained + rng.normal(0, off, (5, 5)))}
            for off in (0.005, 0.08)
        )  # fmt: skip
        mine = dict(enumerate(rng.normal(0, 0.002, 5).tolist()))
        best = max(chosen_by, key=lambda k: sum(chosen_by[k].values()))
        plain, found = (
            paired_difference(mine, scores[best]), against_best(mine, scores, chosen_by, best)
        )  # fmt: skip
        fixed += plain.low <= 0 <= plain.high
        ours += found.low <= 0 <= found.high
    assert fixed / 400 < 0.90
    assert 0.93 <= ours / 400 <= 0.98


scores = st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=4, max_size=4)


@settings(max_examples=30, deadline=None)
@given(scores, st.lists(st.tuples(scores, scores), min_size=1, max_size=3), st.data())
def test_neither_order_nor_a_constant_matters(
    mine: list[float], rates: list[tuple[list[float], list[float]]], data: st.DataObject
) -> None:
    """Of seeds and of labels; and a constant that is added to everything."""

    def found(order: list[int], labels: list[int], more: float = 0.0) -> list[float]:
        def by_seed(values: list[float]) -> Scores:
            return {s: values[s] + more for s in order}

        given = {str(k): by_seed(rates[k][0]) for k in labels}
        by = {str(k): by_seed(rates[k][1]) for k in labels}
        shares = choice_shares(by)
        told = against_best(by_seed(mine), given, by, "0")
        return [*map(float, told), *(shares[k] for k in sorted(shares))]

    seeds, labels = list(range(4)), list(range(len(rates)))
    usual = found(seeds, labels)
    mixed = found(data.draw(st.permutations(seeds)), data.draw(st.permutations(labels)))
    assert mixed == pytest.approx(usual, abs=1e-7)
    assert found(seeds, labels, 0.25) == pytest.approx(usual, abs=1e-7)


def test_whatever_is_missing_is_left_out() -> None:
    nothing = (None, None, None, 0, None, None, None)
    assert against_best({}, RATES, CHOSEN_BY, "low") == nothing
    assert against_best({0: None, 1: math.nan}, RATES, CHOSEN_BY, "low") == nothing
    one = against_best({0: 0.8}, RATES, CHOSEN_BY, "low")
    assert one == (pytest.approx(0.1), None, None, 1, None, None, None)
    # a rate that lacks a seed is not chosen from
    lame = CHOSEN_BY | {"low": {0: 9.0, 1: 9.0}}
    two = {k: RATES[k] for k in ("middle", "high")}
    assert against_best(MINE, RATES, lame, "middle") == against_best(MINE, two, CHOSEN_BY, "middle")
    assert choice_shares({}) == {} == choice_shares({"a": {0: 1.0}, "b": {1: 1.0}})
    assert choice_shares({"a": {0: 1.0, 1: 0.5}, "b": {0: 1.0, 1: 0.5}}) == {"a": 0.5, "b": 0.5}


def test_equal_values_are_no_traceback() -> None:
    same = dict.fromkeys(range(3), 0.5)
    equal = against_best(same, {"a": same, "b": same}, {"a": same, "b": same}, "a")
    assert equal == (0, 0, 0, 3, 1, 0, 0)
    # without any spread a difference is sure
    above = against_best(dict.fromkeys(range(3), 0.6), {"a": same}, {"a": same}, "a")
    assert above.p == 0 and (above.low, above.high) == pytest.approx((0.1, 0.1))


def test_holm_by_hand() -> None:
    # sorted .005 · 4, .01 · 3, .03 · 2, and .04 · 1, which must not be below the one before it
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]
    values = [0.01, 0.04, 0.03]
    for order in permutations(range(3)):
        assert holm([values[i] for i in order]) == [holm(values)[i] for i in order]


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_those_of_the_tables(effect: float, seeds: int) -> None:
    """Cohen's small, medium and large effects: paired t test, two-sided .05, power .8."""
    assert seeds_needed(effect, 1.0) == seeds
    assert seeds_needed(-effect * 0.01, 0.01) == seeds
    assert power(effect, 1.0, seeds) >= 0.8 > power(effect, 1.0, seeds - 1)


def test_seeds_needed_at_the_ends() -> None:
    assert seeds_needed(0.01, 0.0) == 2 == seeds_needed(1.0, 1e-9)
    assert seeds_needed(1e-9, 1.0) is None
    assert {seeds_needed(*case) for case in ((None, 1.0), (0.1, None), (0.0, 1.0))} == {None}
    assert power(0.0, 1.0, 5) == 0.05 and power(1.0, 1.0, 1) == 0


def test_pooled_is_the_hierarchical_bootstrap() -> None:
    """Sequences are drawn, then seeds within each; four of both, so that 4/3 unbiases both."""
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.02, 0.01, (4, 1)) + rng.normal(0, 0.02, (4, 4))  # (sequences, seeds)
    ours = pooled([(float(row.mean()), float(row.std(ddof=1)) / 2) for row in gaps])
    which = rng.integers(0, 4, (20_000, 4))
    drawn = gaps[which[:, :, None], rng.integers(0, 4, (20_000, 4, 4))].mean((1, 2))
    se = drawn.std() * (4 / 3) ** 0.5
    assert ours.mean == pytest.approx(gaps.mean()) and ours.sequences == 4
    assert (ours.high - ours.low) / 2 == pytest.approx(3.182446 * se, rel=0.02)
    assert pooled([(0.1, 0.01)]) == (0.1, None, None, 1, None)
    assert pooled([]) == (None, None, None, 0, None)
    assert pooled([(0.0, 0.0), (0.0, 0.0)]) == (0, 0, 0, 2, 1)


def test_the_noise_floor_by_hand() -> None:
    # differences .01 and -.03: sqrt((.0001 + .0009) / 4)
    found = repeats([(0.80, 0.79), (0.70, 0.73), (0.5, None)])
    assert found == (2, pytest.approx(0.00025**0.5), pytest.approx(0.03))
    assert repeats([]) == (0, None, None) == repeats([(None, 0.5)])
