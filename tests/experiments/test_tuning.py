"""Tuning runs: what is tried, and what is chosen of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import EWC, LISA, LwF, Recipe, Refused, ReInit
from holdfast.engine.method import Range
from holdfast.experiments import tuning
from holdfast.experiments.record import Record
from holdfast.experiments.tuning import RATE, Tuning, chosen, edge, quality, rates_around

RATES = Range(2e-5, 5e-4, log=True)
BOTH = Recipe(methods=[EWC(strength=33.0), LwF(rows="near")], name="both")


def tuned(recipe: Recipe = BOTH, label: str = "both", budget: int = 9) -> Tuning:
    return Tuning.of(recipe, label, rate=2e-4, rates=RATES, budget=budget)


def test_the_first_run_is_the_recipe_as_it_is_given() -> None:
    made = tuned()
    assert made.at(0) is BOTH
    assert made.values[0] == {RATE: 2e-4, "ewc.strength": 33.0, "ewc.decay": 1.0,
                              "lwf.strength": 1.0, "lwf.temperature": 2.0}  # fmt: skip


def test_values_go_into_the_methods_and_the_rest_stays() -> None:
    made = tuned()
    ewc, lwf = made.at(5).methods
    assert isinstance(ewc, EWC) and isinstance(lwf, LwF) and lwf.rows == "near"
    assert ewc.strength == made.values[5]["ewc.strength"] != 33.0
    assert lwf.temperature == made.values[5]["lwf.temperature"]
    assert made.at(5).name == "both"


def test_eight_draws_lie_in_eight_equal_parts_of_every_range() -> None:
    """Of the logarithm where the range says so: what a wrong scale, or chance, would break."""
    made = tuned()
    for word, (low, high, log) in made.ranges.items():
        if log:
            shares = [math.log(v[word] / low) / math.log(high / low) for v in made.values[1:]]
        else:
            shares = [(v[word] - low) / (high - low) for v in made.values[1:]]
        assert sorted(int(8 * share) for share in shares) == list(range(8)), word


def test_more_runs_go_on_where_fewer_ended() -> None:
    assert tuned(budget=12).values[:5] == tuned(budget=5).values
    assert len(tuned(budget=1).values) == 1


def test_all_recipes_try_the_same_rates_and_each_its_own_settings() -> None:
    one, two, plain = tuned(), tuned(label="other"), tuned(Recipe(name="plain"), "plain")
    rates = [v[RATE] for v in one.values]
    assert rates == [v[RATE] for v in two.values] == [v[RATE] for v in plain.values]
    assert [v["ewc.strength"] for v in one.values[1:]] != [
        v["ewc.strength"] for v in two.values[1:]
    ]
    assert [dict(v) for v in tuned().values] == [dict(v) for v in one.values]


def test_whole_numbers_stay_whole_and_all_are_drawn() -> None:
    made = tuned(Recipe(methods=[LISA(), ReInit()]), budget=65)
    every = [v["lisa.every"] for v in made.values]
    layers = [v["reinit.layers"] for v in made.values[1:]]
    assert all(type(v) is int and 5 <= v <= 100 for v in every)
    assert {layers.count(n) for n in range(1, 7)} <= {10, 11, 12}  # 64 / 6: the ends are no rarer
    made.at(64)


def test_rates_are_around_the_usual_one_or_those_asked_for() -> None:
    assert rates_around(2e-4) == pytest.approx(RATES) and rates_around(2e-4).log
    assert rates_around(2e-4, [1e-5, 1e-3])[:2] == (1e-5, 1e-3)


SCORES = st.lists(st.none() | st.sampled_from([0.1, 0.5, 0.5, 1.5]), min_size=1, max_size=8)


@given(SCORES)
def test_the_best_is_chosen_and_of_equal_ones_the_first(scores: list[float | None]) -> None:
    """A twin: look at each in turn, keep what is strictly better."""
    best = None
    for i, score in enumerate(scores):
        if score is not None and (best is None or score > scores[best]):  # type: ignore[operator]
            best = i
    if best is None:
        with pytest.raises(Refused, match="diverged"):
            chosen(scores)
    else:
        assert chosen(scores) == best


def record(scores: list[list[float | None]], selection: Any) -> Record:
    tasks = [{"name": f"t{i}"} for i in range(len(scores))]
    return Record(tasks=tasks, scores=scores, selection_scores=selection)


def test_runs_are_chosen_by_new_plus_old_on_selection_rows_alone() -> None:
    none: list[list[float | None]] = [[None] * 3 for _ in range(3)]
    after: list[list[float | None]] = [[0.9, None, None], [0.1, 0.9, None], [0.2, 0.4, 0.7]]
    assert quality(record(none, after)) == pytest.approx(0.7 + (0.2 + 0.4) / 2)
    assert quality(record([[0.1]], [[0.8]])) == 0.8
    with pytest.raises(Refused, match="--selection"):
        quality(record(after, none))


@pytest.mark.parametrize(
    ("value", "where", "end"),
    [
        (2.1e-5, RATES, "low"), (1e-4, RATES, None), (4.9e-4, RATES, "high"),
        (4e-4, RATES, None),  # within 5 % on a linear scale only from the other side
        (1e-3, RATES, "high"), (0, RATES, "low"),
        (1.0, Range(0.5, 1.0), "high"), (0.524, Range(0.5, 1.0), "low"),
        (0.53, Range(0.5, 1.0), None), (None, RATES, None),
    ],
)  # fmt: skip
def test_a_choice_at_the_edge_of_its_range_is_told(
    value: Any, where: Range, end: str | None
) -> None:
    assert edge(value, where) == end


def test_what_a_record_is_told_of_the_choice() -> None:
    told = tuned(budget=3).told([None, 0.4, 0.6])
    assert (told["runs"], told["chosen"], told["score"], told["diverged"]) == (3, 2, 0.6, 1)
    assert told["values"] == tuned().values[2] and told["seed"] == tuning.SEED
    assert told["scores"] == [None, 0.4, 0.6]
    assert told["ranges"][RATE] == [2e-5, 5e-4, True]
    assert tuned(budget=1).told([0.1])["edges"] == {"ewc.decay": "high"}  # 1 of 0.5 to 1
