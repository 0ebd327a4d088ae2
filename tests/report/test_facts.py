"""The numbers of a report, by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import record, study, two
from scipy.stats import ttest_1samp

from holdfast import EWC, Rates, Recipe
from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.experiments.statistics import holm, pooled, seeds_needed
from holdfast.report import as_text, comparison_rows, comparison_table, facts, matrix_table
from holdfast.report.facts import RunFacts, comparisons, pool, run_facts
from holdfast.report.general import general
from holdfast.report.sentences import judge_sentences, run_sentences, study_sentences


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


# --- what a referee asks ------------------------------------------------------------------------


def rated(new: float, after: float, *, selected: float | None = None, **more: Any) -> Record:
    """A run of two tasks that scored new + old `selected` on selection rows; constants .6, .5."""
    made = two(new, 0.9, after, **more)
    for task, constant in zip(made.tasks, (0.6, 0.5), strict=True):
        task["constant"] = constant
    made.selection_scores = None if selected is None else [[0, None], [selected, 0]]
    return made


def flat_rates(*, chosen: Sequence[Sequence[float]]) -> list[Record]:
    """A flat rate a row of `chosen`, which has what each of its seeds scored on selection rows."""
    return [
        rated(0.8 - 0.02 * k + 0.01 * s, 0.7, selected=value, seed=s, lr=(k + 1) * 1e-5)
        for k, values in enumerate(chosen) for s, value in enumerate(values)
    ]  # fmt: skip


def test_the_choice_of_the_control_is_told_with_its_ties() -> None:
    (found,) = comparisons([
        *flat_rates(chosen=[(1.5, 1.6, 1.5), (1.6, 1.5, 1.51), (1.0, 1.1, 1.0)]),
        *(rated(0.9, 0.8, seed=s, recipe="dps", selected=1.7) for s in range(3)),
    ])  # fmt: skip
    choice = found.choice
    assert choice is not None and choice.rows == "selection"
    assert found.control == choice.chosen == "plain, lr 2e-05"
    assert choice.scores["plain, lr 3e-05"] == pytest.approx(3.1 / 3)
    assert choice.tied == ["plain, lr 1e-05", "plain, lr 2e-05"]
    first, second, third = choice.shares.values()
    assert third == 0 and first + second == pytest.approx(1) and 0.3 < first < second
    said = judge_sentences(found)
    assert said[0].startswith("plain, lr 2e-05 is the best of 3 flat rates on selection rows; ")
    assert said[1] == ("It is a tie with plain, lr 1e-05: their difference is within the noise of "
                       "the seeds.")  # fmt: skip
    # the choice makes the interval wider than the one that takes the control as given
    dps = found.groups[-1]
    gap, sure = dps.difference["new"], dps.judged["new"]
    assert sure.fixed_low is not None and gap.low is not None and gap.high is not None
    assert gap.high - gap.low > sure.fixed_high - sure.fixed_low  # type: ignore[operator]
    assert found.groups[0].judged == {} == found.groups[1].judged  # what was chosen from


def test_one_seed_tells_no_rates_apart() -> None:
    (found,) = comparisons(flat_rates(chosen=[(1.5,), (1.0,)]))
    assert found.choice is not None and len(found.choice.tied) == 2
    assert any("one seed cannot tell rates apart" in line for line in judge_sentences(found))


def test_p_values_are_corrected_for_all_recipes_of_the_table() -> None:
    recipes = {
        "a": (0.05, 0.06, 0.09, 0.05),
        "b": (0.01, -0.01, 0.0, 0.02),
        "c": (0.1, 0.2, 0.1, 0.1),
    }
    runs = [two(0.8, 0.9, 0.7, seed=s) for s in range(4)]
    runs += [two(0.8 + more, 0.9, 0.7, recipe=name, seed=s)
             for name, values in recipes.items() for s, more in enumerate(values)]  # fmt: skip
    (found,) = comparisons(runs)
    judged = {g.label: g.judged["new_plus_old"] for g in found.groups if g.judged}
    for name, values in recipes.items():
        assert judged[name].p == pytest.approx(ttest_1samp(values, 0).pvalue)
        assert judged[name].seeds_for_seen == seeds_needed(fmean(values), stdev(values))
        assert judged[name].seeds_for_point == seeds_needed(0.01, stdev(values))
    assert [judged[k].holm for k in "abc"] == holm([judged[k].p for k in "abc"])
    c = next(line for line in study_sentences(found) if line.startswith("c against plain"))
    assert judged["c"].holm is not None and judged["c"].p < 0.05 > judged["c"].holm  # type: ignore[operator]
    assert c.endswith("interval +0.045 to +0.205.")
    b = next(line for line in study_sentences(found) if line.startswith("b against plain"))
    assert b.endswith(f"can show ({judged['b'].seeds_for_seen} would, were it real).")


def test_an_interval_that_other_recipes_take_back() -> None:
    """p .018 alone; with five more recipes in the table, .11."""
    runs = [two(0.8, 0.9, 0.7, seed=s) for s in range(4)]
    for k in range(6):
        runs += [two(0.8 + (v if k == 0 else v * (-1) ** s), 0.9, 0.7, seed=s, recipe=f"r{k}")
                 for s, v in enumerate((0.05, 0.06, 0.10, 0.04))]  # fmt: skip
    (found,) = comparisons(runs)
    said = next(line for line in study_sentences(found) if line.startswith("r0 against plain"))
    assert ": not beside the other recipes of the table (Holm's p 0.106)" in said


def test_failed_runs_are_counted() -> None:
    """At or below one answer for all rows: .6 of the old task, .5 of the new one."""
    runs = [rated(0.8, 0.7, seed=s) for s in range(3)]
    runs += [rated(new, 0.7, seed=s, recipe="dps") for s, new in enumerate((0.5, 0.51, 0.4))]
    runs.append(two(0.1, 0.1, 0.1, recipe="old"))  # of before constants were kept
    (found,) = comparisons(runs)
    assert [g.failed for g in found.groups] == [0, 2, None]
    assert not found.nothing_learned
    assert any(line.startswith("dps (3 runs, 2 failed): ") for line in study_sentences(found))
    assert judge_sentences(found)[0].startswith("Failed: ")
    (found,) = comparisons([*runs[:3], runs[4]])
    assert not any("ailed" in s for s in [*study_sentences(found), *judge_sentences(found)])
    (dps,) = [row for row in comparison_rows(runs) if row["recipe"] == "dps"]
    assert (dps["failed"], dps["new_min"], dps["new_max"]) == (2, 0.4, 0.51)


def test_that_nothing_was_learned_is_the_headline() -> None:
    runs = [rated(0.5, 0.9, seed=s, recipe=r) for s in range(2) for r in ("plain", "dps")]
    for run in runs:
        run.scores = [[0.6, None], [0.6, 0.45]]
    (found,) = comparisons(runs)
    assert found.nothing_learned and [g.failed for g in found.groups] == [2, 2]
    headline = ("Nothing was learned: no score is better than one answer for all rows "
                "(trec6 0.600, snli 0.500).")  # fmt: skip
    assert study_sentences(found)[0] == headline
    assert not any("against" in line for line in study_sentences(found))
    assert judge_sentences(found) == []
    table = " ".join(as_text(comparison_table(runs), width=160).split())
    assert headline in table and "2, 2 failed" in table
    (one,) = comparisons(runs[:1])
    assert study_sentences(one)[0] == headline
    runs[0].scores[0][0] = 0.61  # learned, if only by one run and on one task
    (found,) = comparisons(runs)
    assert not found.nothing_learned and found.groups[0].failed == 2


def test_a_run_that_was_repeated_gives_the_noise_floor() -> None:
    first = two(0.8, 0.9, 0.70, created="2026-01-01T00:00:00+00:00")
    again = two(0.8, 0.9, 0.73, created="2026-01-02T00:00:00+00:00")
    other = two(0.8, 0.9, 0.8, recipe="dps")
    (found,) = comparisons([first, again, other])
    assert found.repeats["new_plus_old"] == (1, pytest.approx(0.03 / 2**0.5), pytest.approx(0.03))
    assert found.repeats["new"].largest == 0
    assert any("moved new plus old by 0.030 at most (1 pair)" in s for s in judge_sentences(found))
    (found,) = comparisons([first, dataclasses.replace(first), other])  # a copy is no repeat
    assert found.repeats["new"].pairs == 0
    assert any("Noise floor: not measured" in line for line in judge_sentences(found))


def test_recipes_are_compared_at_matched_scores_of_the_new_task() -> None:
    """Plain from .9 + .6 … to .6 + .9, a straight line; the recipe .1 above it, less far."""
    runs = [
        two(new + off, 0.95, 1.5 - new - off + above, seed=s, lr=lr, recipe=recipe)
        for recipe, above, rates in (("plain", 0.0, (0.6, 0.75, 0.9)), ("dps", 0.1, (0.7, 0.8)))
        for lr, new in enumerate(rates, 1) for s, off in enumerate((-0.01, 0.01))
    ]  # fmt: skip
    (found,) = comparisons(runs)
    plain, dps = found.fronts
    assert plain.control and [len(f.points) for f in found.fronts] == [3, 2]
    assert plain.front == [pytest.approx(p) for p in ((0.6, 0.9), (0.75, 0.75), (0.9, 0.6))]
    assert (dps.low, dps.high) == pytest.approx((0.7, 0.8))
    assert (dps.kept, dps.plain_kept, dps.more) == pytest.approx((0.8, 0.7, 0.1))
    assert (dps.area, dps.plain_area) == pytest.approx((0.085, 0.075))
    assert (dps.more_low, dps.more_high) == pytest.approx((0.1, 0.1))  # for every seed
    assert judge_sentences(found)[-1] == (
        "At matched scores: at a new score of 0.800 dps keeps 0.800, plain 0.700; from 0.700 on, "
        "on average +0.100 [+0.100 to +0.100]."
    )


def test_strengths_of_a_recipe_are_one_front_and_other_recipes_are_not() -> None:
    def run(name: str, **method: Any) -> Record:
        made = two(0.8, 0.9, 0.7, recipe=name)
        return dataclasses.replace(made, recipe={"name": name, "methods": {"ewc": method}})

    (found,) = comparisons([
        two(0.8, 0.9, 0.7), run("weak", strength=1.0), run("strong", strength=1e3),
        run("online", strength=1.0, online=True),
    ])  # fmt: skip
    assert [(f.label, len(f.points)) for f in found.fronts] == [
        ("plain", 1), ("weak / strong", 2), ("online", 1)
    ]  # fmt: skip
    assert all(f.more_low is None for f in found.fronts)  # one seed


def test_recipes_are_pooled_over_sequences() -> None:
    gaps = {("a", "b"): (0.05, 0.07), ("b", "c"): (0.02, 0.03), ("c", "d"): (0.04, 0.06)}
    runs = [
        two(0.8 + more, 0.9, 0.7, names=list(names), recipe=recipe, seed=s)
        for names, values in gaps.items() for s, value in enumerate(values)
        for recipe, more in (("plain", 0.0), ("dps", value))
    ]  # fmt: skip
    (dps,) = pool(comparisons(runs))
    means, errors = (0.06, 0.025, 0.05), (0.01, 0.005, 0.01)
    wanted = pooled(list(zip(means, errors, strict=True)))
    assert dps.label == "dps" and dps.sequences == ["a → b", "b → c", "c → d"]
    assert (dps.mean, dps.low, dps.high, dps.p) == pytest.approx(
        (wanted.mean, wanted.low, wanted.high, wanted.p)
    )
    text = " ".join(as_text(comparison_table(runs), width=200).split())
    assert "dps over 3 sequences of tasks: +0.045, 95 % interval" in text
    assert pool(comparisons(runs[:4])) == []
    for run in runs[:4]:
        for task in run.tasks:
            task["constant"] = 1.0
    assert pool(comparisons(runs))[0].sequences == ["b → c", "c → d"]  # nothing learned of a, b


def test_nothing_measured_gives_empty_facts() -> None:
    """No traceback for what is unknown: single seeds, no seed, no score, equal scores."""
    blank = [record([[None, None], [None, None]], recipe=r, seed=s)
             for r in ("plain", "dps") for s in (0, 1, None)]  # fmt: skip
    equal = [two(0.8, 0.9, 0.7, recipe=r, seed=s) for r in ("plain", "dps") for s in range(3)]
    alone = [record([[0.5]], recipe=r) for r in ("plain", "dps")]
    for runs in (blank, equal, alone):
        (found,) = comparisons(runs)
        as_text(comparison_table(runs))
        assert study_sentences(found) and judge_sentences(found)
        assert comparison_rows(runs)
    (found,) = comparisons(blank)
    assert found.fronts == [] and found.groups[1].failed is None and not found.nothing_learned
    (found,) = comparisons(equal)
    assert found.groups[1].judged["new"].p == 1 and found.fronts[1].more == 0


def test_what_went_on_from_another_recipe_is_a_configuration_of_its_own() -> None:
    """Plain on the last task, after another recipe on those before, is not plain on all."""
    plain = two(0.8, 0.9, 0.7)
    after = two(0.9, 0.9, 0.8, seed=1)
    after.extra |= {"from": "runs/dps", "began": [{"name": "dps", "methods": {"dps": {}}}]}
    again = two(0.8, 0.9, 0.7, seed=2)
    again.extra |= {"from": "runs/plain", "began": [again.recipe | {"name": "plain@1"}]}
    older = two(0.8, 0.9, 0.7, seed=3)  # of before it was noted
    older.extra["from"] = "runs/unknown"
    (found,) = comparisons([plain, after, again, older])
    told = {g.label: g.seeds for g in found.groups}
    assert told == {"plain": [0, 2], "plain, after dps": [1], "plain, after others": [3]}
    assert found.control == "plain"  # not the best of them: it is no flat rate of plain
    after.extra["began"] = "damaged"
    assert comparisons([after])[0].groups[0].label == "plain, after others"


def test_what_only_has_the_name_of_another_is_not_pooled_with_it() -> None:
    def runs(names: list[str], **more: Any) -> list[Record]:
        return [dataclasses.replace(two(0.8 + gap * (1 + s), 0.9, 0.7, names=names, seed=s,
                                        recipe=recipe), **(more if gap or "model" in more else {}))
                for s in range(2) for recipe, gap in (("plain", 0.0), ("dps", 0.05))]  # fmt: skip

    first, name = runs(["a", "b"]), {"name": "dps"}
    weights = {"model": {"name": "minilm", "hash": "sha256:bb"}}
    method = {"recipe": name | {"methods": {"ewc": {"strength": 1.0}}}}
    weaker = {"recipe": name | {"methods": {"dps": {"drop": 0.9}}, "max_grad_norm": 1.0}}
    for other in (weights, method, weaker):
        assert pool(comparisons(first + runs(["b", "c"], **other))) == []
    assert len(pool(comparisons(first + runs(["b", "c"])))) == 1
    tuned = [{"extra": {"tuned": {}}, "recipe": name | {"methods": {"dps": {"drop": drop}}}}
             for drop in (0.1, 0.9)]  # fmt: skip
    both = [run for i, one in enumerate(tuned) for run in runs([f"a{i}", f"b{i}"], **one)]
    assert len(pool(comparisons(both))) == 1  # each sequence's budget chose its own
    curves = [{"multipliers": [1.0, m], "provenance": {"by": "a probe"}} for m in (0.1, 0.9)]
    found = [{"recipe": name | {"rates": curve}} for curve in curves]
    both = [run for i, one in enumerate(found) for run in runs([f"a{i}", f"b{i}"], **one)]
    assert len(pool(comparisons(both))) == 1


def test_commits_of_one_hub_id_are_other_models() -> None:
    one, two_ = ({"name": "org/model", "hash": None, "revision": r} for r in ("aa", "bb"))
    assert len(comparisons([two(0.8, 0.9, 0.7, model=one), two(0.8, 0.9, 0.7, model=two_)])) == 2


def test_other_rows_with_one_seed_are_told_and_are_no_noise() -> None:
    """The training file was changed between two runs, the evaluation rows were not."""
    one = two(0.8, 0.9, 0.7, created="2026-01-01T00:00:00+00:00")
    changed = two(0.9, 0.9, 0.7, recipe="dps", created="2026-01-02T00:00:00+00:00")
    for run in (one, changed):
        for task in run.tasks:
            task["evaluation_hash"] = "sha256:same"
    changed.tasks[0]["hash"] = "sha256:changed"
    said = "Seed 0: runs learned other rows of trec6. They differ in more than the recipe."
    (found,) = comparisons([one, changed])
    assert said in found.warnings
    again = dataclasses.replace(changed, recipe=one.recipe)
    (found,) = comparisons([one, again])
    assert said in found.warnings and found.repeats["new"].pairs == 0
    fewer = dataclasses.replace(changed, settings={**changed.settings, "train_size": 100})
    (found,) = comparisons([one, fewer, dataclasses.replace(one, seed=1)])
    assert said not in found.warnings  # it says so itself
