"""Every metric against a number worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Refused
from holdfast.experiments import metrics
from holdfast.tasks.scores import constant_score, score

TWO = [[0.9, None], [0.7, 0.8]]
# task 0: 0.9, 0.95 (rose), 0.6; task 1: 0.8, 0.85 (rose); task 2 just learned
THREE = [[0.9, None, None], [0.95, 0.8, None], [0.6, 0.85, 0.7]]
EVERY = [
    metrics.forgetting,
    metrics.backward_transfer,
    metrics.average,
    metrics.plasticity,
    metrics.new_plus_old,
    metrics.old_before,
    metrics.old_after,
]


def test_two_tasks_by_hand() -> None:
    assert metrics.forgetting(TWO) == pytest.approx(0.2)
    assert metrics.backward_transfer(TWO) == pytest.approx(-0.2)
    assert metrics.average(TWO) == pytest.approx(0.75)
    assert metrics.plasticity(TWO) == pytest.approx(0.85)
    assert metrics.new_plus_old(TWO) == pytest.approx(1.5)
    assert metrics.old_before(TWO) == 0.9
    assert metrics.old_after(TWO) == 0.7


def test_three_tasks_by_hand() -> None:
    # the best of task 0 was 0.95, not its just-learned 0.9; task 1 ended at its best
    assert metrics.forgetting_of(THREE, 0) == pytest.approx(0.35)
    assert metrics.forgetting_of(THREE, 1) == pytest.approx(-0.05)
    assert metrics.forgetting_of(THREE, 2) is None
    assert metrics.forgetting(THREE) == pytest.approx(0.15)
    assert metrics.backward_transfer(THREE) == pytest.approx((-0.3 + 0.05) / 2)
    assert metrics.average(THREE) == pytest.approx(2.15 / 3)
    assert metrics.plasticity(THREE) == pytest.approx(0.8)
    assert metrics.new_plus_old(THREE) == pytest.approx(0.7 + 1.45 / 2)


def test_a_row_before_the_task_was_learned_counts_as_earlier() -> None:
    zero_shot = [[0.9, 0.99], [0.7, 0.8]]
    assert metrics.forgetting(zero_shot) == pytest.approx(0.2)  # the last task has no forgetting
    zero_shot = [[0.9, 0.99, None], [0.9, 0.8, None], [0.9, 0.8, 0.7]]
    assert metrics.forgetting_of(zero_shot, 1) == pytest.approx(0.19)


def test_forward_transfer_needs_every_later_task_alone() -> None:
    assert metrics.forward_transfer(TWO, None) is None
    assert metrics.forward_transfer(TWO, [None, 0.75]) == pytest.approx(0.05)
    assert metrics.forward_transfer(THREE, [0.9, 0.7, 0.9]) == pytest.approx(-0.05)
    assert metrics.forward_transfer(THREE, [0.9, 0.7, None]) is None
    with pytest.raises(ValueError, match="1 scores"):
        metrics.forward_transfer(TWO, [0.5])


def test_one_task_forgets_nothing_measurable() -> None:
    one = [[0.8]]
    assert metrics.average(one) == metrics.plasticity(one) == 0.8
    for value in (metrics.forgetting, metrics.backward_transfer, metrics.new_plus_old):
        assert value(one) is None
    assert metrics.forward_transfer(one, [0.7]) is None
    assert metrics.summary(one, [0.7])["forward_transfer"] is None


def test_a_missing_cell_makes_none_of_what_needs_it() -> None:
    unfinished = [[0.9, None], [None, None]]
    assert [metric(unfinished) for metric in EVERY] == [None, None, None, None, None, 0.9, None]
    hole = [[0.9, None, None], [None, 0.8, None], [0.6, 0.8, 0.7]]
    assert metrics.forgetting(hole) is None
    assert metrics.backward_transfer(hole) == pytest.approx(-0.15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_was_not_measured(bad: float) -> None:
    assert metrics.forgetting([[bad, None], [0.7, 0.8]]) is None
    assert metrics.average([[0.9, None], [bad, 0.8]]) is None


@pytest.mark.parametrize("ragged", [[], [[0.1, 0.2]], [[0.1], [0.2, 0.3]], [[0.1, 0.2], [0.3]]])
def test_a_matrix_that_is_not_square_is_an_error(ragged: list[list[float]]) -> None:
    for metric in EVERY:
        with pytest.raises(ValueError, match="score matrix"):
            metric(ragged)


def test_no_such_task() -> None:
    with pytest.raises(ValueError, match="no task 2"):
        metrics.forgetting_of(TWO, 2)


matrices = st.integers(1, 4).flatmap(
    lambda n: st.lists(
        st.lists(st.none() | st.floats(-1, 1), min_size=n, max_size=n), min_size=n, max_size=n
    )
)


@given(matrices)
def test_the_argument_is_never_touched(scores: list[list[float | None]]) -> None:
    before = copy.deepcopy(scores)
    metrics.summary(scores, [0.5] * len(scores))
    assert scores == before


@given(matrices)
def test_the_metrics_agree_with_each_other(scores: list[list[float | None]]) -> None:
    found = metrics.summary(scores)
    before, after = metrics.old_before(scores), metrics.old_after(scores)
    if before is not None and after is not None:
        assert found["backward_transfer"] == pytest.approx(after - before, abs=1e-12)
    if found["forgetting"] is not None and found["backward_transfer"] is not None:
        assert found["forgetting"] >= -found["backward_transfer"] - 1e-12


def test_scores_by_hand() -> None:
    truth, given_ = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]  # tp 2, fp 1, fn 1, tn 1
    assert score("accuracy", truth, given_) == pytest.approx(0.6)
    assert score("f1", truth, given_) == pytest.approx(2 / 3)
    # (2*1 - 1*1) / sqrt(3*3*2*2)
    assert score("matthews", truth, given_) == pytest.approx(1 / 6)
    assert score("spearman", [1, 2, 3], [10.0, 30.0, 20.0]) == pytest.approx(0.5)


def test_f1_is_macro_above_two_classes() -> None:
    # class 0: f1 1; class 1: precision 1, recall 1/2; class 2: precision 1/2, recall 1
    macro = (1 + 2 / 3 + 2 / 3) / 3
    assert score("f1", [0, 1, 1, 2], [0, 1, 2, 2]) == pytest.approx(macro)
    # three classes of which the evaluation rows have two: still macro
    assert score("f1", [0, 0, 1], [0, 1, 1], classes=3) == pytest.approx(2 / 3)
    assert score("f1", [0, 0, 1], [0, 1, 1]) == pytest.approx(2 / 3)
    assert score("f1", [0, 0, 0, 1], [0, 0, 1, 1], classes=3) == pytest.approx(0.8 / 2 + 1 / 3)


def test_constant_predictions_score_zero_and_warn_of_nothing() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score("spearman", [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0
        assert score("matthews", [0, 1, 1], [1, 1, 1]) == 0.0
        assert score("matthews", [1, 1, 1], [1, 1, 1]) == 0.0
        assert score("f1", [1, 1], [0, 0]) == 0.0


def test_what_cannot_be_scored_says_so() -> None:
    with pytest.raises(Refused, match="did you mean 'accuracy'"):
        score("acuracy", [1], [1])
    with pytest.raises(ValueError, match="2 predictions for 1 rows"):
        score("accuracy", [1], [1, 0])
    with pytest.raises(ValueError, match="no rows"):
        score("accuracy", [], [])
    with pytest.raises(ValueError, match="not finite"):
        score("spearman", [1.0, 2.0], [math.nan, 1.0])
    with pytest.raises(ValueError, match="one value a row"):
        score("accuracy", [[1], [0]], [[1], [0]])  # type: ignore[list-item]


def test_metrics_by_the_names_of_others() -> None:
    history = [(0, [0.5, None, None]), (1, [0.85, 0.3, None]), (1, [0.9, 0.7, None]),
               (2, [0.4, 0.8, 0.2]), (2, [0.6, None, 0.7])]  # fmt: skip
    found = {m.name: m.value for m in metrics.named(THREE, [None, 0.7, 0.6], history)}
    assert found["BWT / (T - 1)"] == pytest.approx((-0.3 + 0.05) / 2)
    assert found["BWT / T"] == pytest.approx((-0.3 + 0.05) / 3)
    # after one task .9, after two (.95 + .8) / 2, after three 2.15 / 3
    assert found["average incremental accuracy"] == pytest.approx((0.9 + 0.875 + 2.15 / 3) / 3)
    # task 0 fell to .4 while task 2 was learned, task 1 to .8: what it had while learned is its own
    assert found["minimum old score"] == pytest.approx((0.4 + 0.8) / 2)
    assert found["forward transfer, beside alone"] == pytest.approx((0.1 + 0.1) / 2)
    assert found["forward transfer, zero-shot"] is None
    zero = [[0.9, 0.6, None], [0.95, 0.8, 0.5], [0.6, 0.85, 0.7]]
    assert metrics.zero_shot_transfer(zero, [0.5, 0.5, 0.3]) == pytest.approx((0.1 + 0.2) / 2)
    with pytest.raises(ValueError, match="2 untrained scores for 3 tasks"):
        metrics.zero_shot_transfer(zero, [0.5, 0.5])
    assert metrics.minimum_old(history[:3], 3) is None  # task 1 was not yet old
    alone = {m.name: m.value for m in metrics.named([[0.9]])}
    assert {k for k, v in alone.items() if v is not None} == {"average incremental accuracy"}


LINE = [(0.2, 0.8), (0.6, 0.4)]


def test_a_front_of_a_known_area() -> None:
    inside = [*LINE, (0.4, 0.3), (0.1, 0.8), (0.2, 0.8)]
    assert metrics.front(inside) == LINE  # what none beats, once
    assert metrics.area(inside, 0.2, 0.6) == pytest.approx(0.4 * 0.6)
    assert metrics.area(LINE, 0.0, 0.4) == pytest.approx(0.2 * 0.8 + 0.2 * 0.7)  # level before
    assert metrics.kept_at(inside, 0.5) == pytest.approx(0.5)
    assert metrics.kept_at(inside, 0.1) == metrics.kept_at(inside, 0.2) == 0.8
    assert metrics.kept_at(inside, 0.6) == 0.4
    assert metrics.kept_at(inside, 0.61) is None and metrics.area(LINE, 0.2, 0.61) is None
    assert metrics.kept_at([], 0.1) is None and metrics.front([]) == []


def test_recipes_are_compared_where_both_learned_as_much() -> None:
    higher = [(new, old + 0.1) for new, old in LINE]
    assert metrics.kept_more(higher, LINE) == pytest.approx(0.1)
    # from .4 to .6, where it lies .05 above all along
    shifted = [(0.4, 0.65), (0.8, 0.25)]
    assert metrics.matched(shifted, LINE) == (0.4, 0.6)
    assert metrics.kept_more(shifted, LINE) == pytest.approx(0.05)
    # what learns more at every setting is compared at the most that the other learned
    assert metrics.matched([(0.9, 0.7)], LINE) == (0.6, 0.6)
    assert metrics.kept_more([(0.9, 0.7)], LINE) == pytest.approx(0.3)
    assert metrics.matched([], LINE) is None and metrics.kept_more(LINE, []) is None


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5)


@given(points, points)
def test_keeping_more_has_a_mirror_image(
    mine: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> None:
    more, less = metrics.kept_more(mine, theirs), metrics.kept_more(theirs, mine)
    assert more is not None and less is not None and -1 - 1e-9 <= more <= 1 + 1e-9
    assert more == pytest.approx(-less, abs=1e-9)
    assert metrics.kept_more(mine, mine) == pytest.approx(0)


def test_the_score_of_one_answer() -> None:
    labels = [0, 0, 0, 1]
    assert constant_score("accuracy", labels, 2) == 0.75
    # of the second label, though it is the rarer: 2 · ¼ · 1 / (¼ + 1)
    assert constant_score("f1", labels, 2) == pytest.approx(0.4)
    # the mean over the classes that occur: of the first 2 · ¾ / (1 + ¾), of the second 0
    assert constant_score("f1", labels, 3) == pytest.approx(3 / 7)
    assert constant_score("matthews", labels, 2) == 0.05
    assert constant_score("spearman", [0.1, 0.2, 3.0]) == 0.05
    assert constant_score("exact_match", ["The yes.", "yes", "no"]) == pytest.approx(2 / 3)
    assert constant_score("rouge_l", ["yes", "no"]) == 0
    assert constant_score("entity_f1", [(0, 1, 2), (0,)], 3) == 0  # tags
    assert constant_score("accuracy", [(0, 1), ()], 2) == 0  # several labels a row
