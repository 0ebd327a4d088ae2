"""The numbers of a report, by hand."""

from __future__ import annotations

import dataclasses
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import record, study, two

from holdfast import EWC, Rates, Recipe
from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.report import as_text, comparison_table, facts, matrix_table
from holdfast.report.facts import RunFacts, comparisons, run_facts
from holdfast.report.general import general
from holdfast.report.sentences import run_sentences, study_sentences


def test_one_run() -> None:
    run = run_facts(two(0.8, 0.952, 0.741))
    first, last = run.tasks
    assert (first.learned, first.final) == (0.952, 0.741)
    assert first.forgetting == pytest.approx(0.211)
    assert first.noise == pytest.approx(0.01959, abs=1e-5)
    assert last.forgetting is None
    assert run.noise[0][1] is None and run.noise[1][1] == pytest.approx((0.16 / 500) ** 0.5)
    assert run.starts == [0.0, 50.0]
    assert run_sentences(run) == [
        "After learning snli, trec6 fell from 0.952 to 0.741 "
        "(−21.1 points; noise of a 500-row score ± 2.0).",
        "snli reached 0.800.",
    ]


def test_a_small_change_is_called_noise() -> None:
    (sentence, _) = run_sentences(run_facts(two(0.8, 0.90, 0.89)))
    assert sentence.endswith("± 1.4): within noise.")
    (sentence, _) = run_sentences(run_facts(two(0.8, 0.90, 0.90)))
    assert "trec6 stayed at 0.900 (+0.0 points" in sentence
    (sentence, _) = run_sentences(run_facts(two(0.8, 0.80, 0.90)))
    assert "rose from 0.800 to 0.900 (+10.0 points" in sentence and "within" not in sentence


def test_what_was_not_measured_is_not_told() -> None:
    assert run_sentences(run_facts(record([[0.9, None], [None, 0.8]]))) == [
        "What trec6 lost was not measured.",
        "snli reached 0.800.",
    ]
    unfinished = run_facts(record([[0.9, None], [None, None]], status="running"))
    assert run_sentences(unfinished) == ["Unfinished: 1 of 2 tasks learned so far."]
    assert any("has not ended" in line for line in unfinished.warnings)
    assert run_sentences(run_facts(record([[0.9]], kind="train"))) == [
        "trec6 reached 0.900 (accuracy, ± 0.013 on 500 rows)."
    ]


def test_starts_come_from_the_history_where_steps_are_unknown() -> None:
    assert run_facts(two(0.8, 0.9, 0.7, steps=[])).starts == [0.0, 50.0]


def test_steps_that_begin_again_are_put_end_to_end() -> None:
    made = two(0.8, 0.9, 0.7)
    wanted = run_facts(made).history
    assert [step for step, _ in wanted] == [10, 30, 50, 60, 80, 100]
    for point in made.history:
        point["step"] -= 50 * point["learning"]
    for steps in ([50, 50], []):
        made.steps = list(steps)
        again = run_facts(made)
        assert again.history == wanted and again.starts == [0.0, 50.0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(sorted(two(0.8, 0.9, 0.7).to_dict())), values, max_size=3))
def test_whatever_loads_has_facts(change: dict[str, object]) -> None:
    with suppress(Refused):
        made = Record.from_dict(two(0.8, 0.9, 0.7).to_dict() | change)
        as_text(matrix_table(made))
        as_text(comparison_table([made, two(0.8, 0.9, 0.7)]))


def test_recipes_over_seeds() -> None:
    (found,) = comparisons(study())
    plain, dps = found.groups
    assert found.control == plain.label == "plain" and plain.control and not dps.control
    assert plain.seeds == [0, 1, 2]
    assert plain.spread["old_after"].mean == pytest.approx(0.71)
    assert plain.spread["old_after"].sd == pytest.approx(0.01)
    assert dps.spread["forgetting"].mean == pytest.approx(0.13)
    assert dps.spread["new_plus_old"].mean == pytest.approx(1.61)
    assert dps.spread["old_before"] == pytest.approx((0.95, 0, 3, 0.95, 0.95))
    gap = dps.difference["old_after"]  # 0.10, 0.11, 0.12
    assert gap.mean == pytest.approx(0.11) and gap.n == 3
    assert gap.high == pytest.approx(0.11 + 4.302653 * 0.01 / 3**0.5)
    assert dps.difference["new"].mean == pytest.approx(-0.01)
    assert plain.difference == {}
    assert plain.mean_scores[1] == pytest.approx([0.71, 0.8]) and plain.mean_scores[0][1] is None
    assert study_sentences(found)[-1] == (
        "dps against plain, paired over 3 seeds: new plus old +0.100, "
        "95 % interval +0.075 to +0.125."
    )
    assert "Only 3 seeds for some recipes: differences need five or more." in found.warnings


def test_configurations_are_never_pooled() -> None:
    slow = [two(0.7, 0.9, 0.9, seed=s, lr=1e-5) for s in range(3)]
    (found,) = comparisons(study() + slow)
    assert [g.label for g in found.groups] == ["plain, lr 1e-05", "plain, lr 2e-05", "dps"]
    # 0.7 + 0.9 beats 0.8 + 0.71: the best flat rate is the control
    assert found.control == "plain, lr 1e-05"
    assert any("chosen on evaluation rows" in line for line in found.warnings)
    changed = study()[0]
    changed.recipe = changed.recipe | {"methods": []}
    (found,) = comparisons([*study(), changed])
    assert [g.label for g in found.groups] == ["plain", "dps", "dps (2)"]


def test_the_control_is_chosen_on_selection_rows() -> None:
    def with_selection(one: object, reward: float) -> object:
        return dataclasses.replace(one, selection_scores=[[0, None], [reward, 0]])  # type: ignore[type-var]

    fast = [with_selection(two(0.1, 0.9, 0.1, seed=s, lr=5e-5), 0.9) for s in range(2)]
    usual = [with_selection(two(0.8, 0.9, 0.7, seed=s), 0.5) for s in range(2)]
    (found,) = comparisons([*usual, *fast])  # type: ignore[list-item]
    assert found.control == "plain, lr 5e-05"
    assert not any("chosen on evaluation" in line for line in found.warnings)


@pytest.mark.parametrize("which", ["selection_scores", "scores"])
def test_the_control_of_a_single_task_is_the_best_flat_rate(which: str) -> None:
    """It has no new_plus_old: the rates are compared by its score."""
    runs = []
    for seed in range(5):
        for lr, score in ((2e-5, 0.7), (5e-5, 0.8), (2e-4, 0.9)):
            chosen = [[score]] if which == "selection_scores" else None
            runs.append(record([[score]], lr=lr, seed=seed, selection_scores=chosen))
        runs.append(record([[0.85]], recipe="dps", seed=seed, selection_scores=[[0.85]]))
    (found,) = comparisons(runs)
    assert found.control == "plain, lr 0.0002"
    (dps,) = (group for group in found.groups if group.recipe == "dps")
    assert dps.difference["new"].mean == pytest.approx(-0.05)


def test_many_recipes_are_summed_up_by_the_highest() -> None:
    many = [
        record([[0.1 * i]], recipe=name, kind="train", seed=seed)
        for i, name in enumerate(["plain", "a", "b", "c", "d"])
        for seed in range(2)
    ]
    many.append(record([[None]], recipe="e", kind="train"))
    (found,) = comparisons(many)
    assert [line.split(" ")[0] for line in study_sentences(found)[:4]] == ["plain", "b", "c", "d"]
    assert study_sentences(found)[4].startswith(
        "b against plain, paired over 2 seeds: score +0.200, 95 %"
    )
    assert study_sentences(found)[-1].startswith("Above: the control and the three highest of 6")


def test_other_tasks_or_models_are_other_studies() -> None:
    other = two(0.8, 0.9, 0.7)
    other.tasks[0]["hash"] = "sha256:different"
    model = two(0.8, 0.9, 0.7, model={"name": "bert"})
    assert len(comparisons([two(0.8, 0.9, 0.7), other, model])) == 3


def test_scenarios_never_stand_in_one_table() -> None:
    """The same tasks, model and recipe: harder, not worse."""
    one = two(0.8, 0.9, 0.7)
    other = two(0.6, 0.9, 0.1, scenario="class-incremental")
    found = comparisons([one, other, two(0.8, 0.9, 0.7, seed=1)])
    assert [(s.scenario, len(s.runs)) for s in found] == [
        ("task-incremental", 2),
        ("class-incremental", 1),
    ]
    for each, beside in zip(found, ("class", "task"), strict=True):
        (said,) = [w for w in each.warnings if "scenario" in w]
        assert said == (f"Also here, learned as {beside}-incremental. "
                        "Scores of different scenarios do not compare.")  # fmt: skip
    (alone,) = comparisons([one])
    assert not [w for w in alone.warnings if "scenario" in w]
    single = [record([[0.9]]), record([[0.8]], settings={"head": "shared"}, seed=1)]
    assert len(comparisons(single)) == 1  # a single task is the same in all of them


def test_a_seed_that_ran_again_counts_once() -> None:
    old = two(0.8, 0.9, 0.1, created="2026-01-01T00:00:00+00:00")
    new = two(0.8, 0.9, 0.7, created="2026-01-02T00:00:00+00:00")
    (found,) = comparisons([new, old])
    assert found.groups[0].points["old_after"] == [0.7]
    assert "plain: 1 older runs of a seed that ran again are left out." in found.warnings


def test_missing_cells_leave_the_rest_standing() -> None:
    records = study()
    records[0].scores[1][0] = None
    (found,) = comparisons(records)
    dps = found.groups[1]
    assert dps.spread["old_after"].n == 2 and dps.spread["new"].n == 3
    assert dps.difference["old_after"].n == 2


def test_no_control_is_said() -> None:
    mine = [two(0.8, 0.9, 0.7, recipe="a"), two(0.8, 0.9, 0.7, recipe="b")]
    (found,) = comparisons(mine)
    assert found.control is None
    assert "No control: no 'plain' here without methods, at flat rates." in found.warnings


@pytest.mark.parametrize(
    ("name", "control"),
    [("plain", True), ("plain@5e-5", True), ("plain-2e-05", True),
     ("plain (lr 5e-5)", True), ("plain lr=5e-5", True), ("plainer", False),
     ("plain+dps", False), ("plain-dps", False)],
)  # fmt: skip
def test_which_names_are_controls(name: str, control: bool) -> None:
    assert facts.is_control({"name": name}) is control


@pytest.mark.parametrize(
    "recipe",
    [Recipe(methods=[EWC()]), Recipe(rates=Rates.bertcl()),
     Recipe(rates=Rates.flat().freeze(below=0.5))],
    ids=["method", "rates", "frozen"],
)  # fmt: skip
def test_a_recipe_that_is_only_called_plain_is_no_control(recipe: Recipe) -> None:
    called = dataclasses.replace(recipe, name="plain")
    assert not facts.is_control(called.to_dict())
    assert facts.is_control(Recipe(name="plain", max_grad_norm=1.0).to_dict())
    mine = two(0.8, 0.9, 0.7, recipe="mine")
    (found,) = comparisons([dataclasses.replace(mine, recipe=called.to_dict()), mine])
    assert found.control is None


def test_a_warning_of_every_run_is_said_once() -> None:
    records = [two(0.8, 0.9, 0.7, seed=s, warnings=["slow disk"]) for s in range(2)]
    records[1].warnings.append("hot")
    (found,) = comparisons(records)
    assert found.warnings.count("slow disk") == 1 and "hot (plain, seed 1)" in found.warnings


def test_general_ability_is_a_mean_over_runs_of_one_text() -> None:
    """Before and after each task; another text of the same name is another measure."""

    def run(seed: int, base: float, mark: str, **after: float) -> RunFacts:
        text = {"source": "data/g.txt", "hash": mark * 9, "max_length": 16}
        general = {"reference": text, "base": {"nll": base}, "after": {
            name: {"nll": value, "kl": value / 10} for name, value in after.items()}}  # fmt: skip
        return run_facts(two(0.8, 0.9, 0.7, seed=seed, general=general))

    found = general([run(0, 3.0, "a", trec6=3.5, snli=4.0), run(1, 3.0, "a", trec6=4.5)])
    assert [s.mean for s in found["nll of g.txt (aaaaaa)"]] == [3.0, 4.0, 4.0]
    assert [s.mean for s in found["kl"]] == [None, pytest.approx(0.4), pytest.approx(0.4)]
    found = general([run(0, 3.0, "a", trec6=3.5), run(1, 2.0, "b", trec6=2.5)])
    assert [s.mean for s in found["nll of g.txt (bbbbbb)"]] == [2.0, 2.5, None]
    assert general([run_facts(two(0.8, 0.9, 0.7))]) == {}
