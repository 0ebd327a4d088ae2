"""What a trial tells on its way, and what ends it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from holdfast.errors import Refused
from holdfast.search.objective import (
    RUNGS,
    Diverged,
    Pruned,
    Scores,
    Watch,
    check_choice,
    evenly,
    rung_steps,
)


def watch(*, prune: bool = False, **more: Any) -> tuple[Watch, list[tuple[int, float]]]:
    told: list[tuple[int, float]] = []

    def tell(rung: int, value: float) -> bool:
        told.append((rung, value))
        return prune

    return Watch(evenly(3), tell, **more), told


def test_the_old_score_first_then_the_sum() -> None:
    made, told = watch()
    made.at(2, steps=5, old=0.7)
    made.at(4, steps=15, old=0.6, new=0.3)
    assert told == [(2, 0.7), (4, pytest.approx(0.9))]


def test_scores_that_are_equal_to_one_answer_for_all_rows_end_it_after_task_one_only() -> None:
    made, told = watch(floor=0.5)
    made.at(2, steps=10, old=0.5)  # it may still learn
    with pytest.raises(Pruned, match="collapsed") as end:
        made.at(3, steps=15, old=0.5)
    assert end.value.steps == 15 and len(told) == 1
    made.at(3, steps=15, old=0.51)
    made.at(6, steps=30, old=0.2, new=0.1)  # what is forgotten did not collapse
    control, _ = watch(floor=0.5, whole=True)  # or there might be nothing to compare with
    control.at(3, steps=15, old=0.4)


def test_what_is_not_finite_diverged() -> None:
    made, told = watch()
    for scores in ({"old": math.nan}, {"old": 0.5, "new": math.inf}):
        with pytest.raises(Diverged):
            made.at(4, steps=1, **scores)
    assert not told


def test_a_trial_that_reached_its_end_is_not_pruned() -> None:
    made, told = watch(prune=True)
    made.at(6, steps=30, old=0.2, new=0.1)
    assert len(told) == 1
    with pytest.raises(Pruned, match="rung 5"):
        made.at(5, steps=25, old=0.2, new=0.1)


def test_rungs_end_with_the_task() -> None:
    assert rung_steps(100, evenly(3)) == [34, 67, 100]
    assert rung_steps(2, evenly(3)) == [1, 2, 2]
    assert rung_steps(60, RUNGS["halving"]) == [10, 40, 60]
    for total in range(1, 400):  # k·total/n rounded up, whatever floats make of k/n
        assert rung_steps(total, evenly(7)) == [-(-k * total // 7) for k in range(1, 8)]
    assert all(rungs[-1] == 1 and list(rungs) == sorted(rungs) for rungs in RUNGS.values())


def test_values_of_both_objectives() -> None:
    found = Scores(old=0.9, new=0.6, old_after=0.8)
    assert found.values("new_plus_old") == [pytest.approx(1.4)]
    assert found.values("pareto") == [0.6, 0.8]
    assert not Scores(0.9, math.nan, 0.8).finite


def test_what_is_meant_by_no_pruner() -> None:
    assert check_choice("tpe", None, "new_plus_old") == "halving"
    assert check_choice("tpe", None, "pareto") == "none"
    assert check_choice("cmaes", "none", "new_plus_old") == "none"


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (("tpe", "halving", "pareto"), "--pruner"),
        (("tpe", "hyperband", "pareto"), "--pruner"),
        (("cmaes", None, "pareto"), "--sampler"),
        (("tqe", None, "new_plus_old"), "did you mean 'tpe'"),
        (("tpe", "halfing", "new_plus_old"), "did you mean 'halving'"),
        (("tpe", None, "parto"), "did you mean 'pareto'"),
    ],
)
def test_what_does_not_go_together_is_refused(choice: tuple[Any, ...], said: str) -> None:
    with pytest.raises(Refused, match=said):
        check_choice(*choice)


def test_a_task_that_was_learned_for_all_trials_has_no_rungs_and_costs_none_of_them() -> None:
    made, told = watch(prune=True, begun=1, shared=15, floor=0.5)
    assert [made.rung(1, k) for k in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(Pruned, match="rung 1") as end:
        made.at(1, steps=20, old=0.2, new=0.1)
    assert end.value.steps == 5
    made.at(3, steps=30, old=0.2, new=0.1)  # the end; that task one collapsed is no trial's fault
    assert told == [(1, pytest.approx(0.3)), (3, pytest.approx(0.3))] and made.spent == 15
    with pytest.raises(Diverged) as end_:
        made.at(2, steps=25, old=0.2, new=math.nan)
    assert end_.value.steps == 10
