"""The best trials again with further selection seeds, and a first task learned once a seed."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTROLS, STEPS, finish, make_result, plan, take
from test_result import row

from holdfast.experiments.engines.local import Local
from holdfast.search.objective import Scores, Watch
from holdfast.search.plan import Plan, refuse_other
from holdfast.search.result import confirmation
from holdfast.search.rows import TrialRow, best, best_of, noise, rows
from holdfast.search.run import search, together
from holdfast.search.study import Study
from holdfast.search.worker import Replicate, work

FURTHER = [2**19, 2**19 + 1]


def tried(number: int, *values: float | None, seeds: int = 1, **more: Any) -> TrialRow:
    """A trial of these values of new + old: with its own seeds, then with further ones."""
    own, further = values[:seeds], values[seeds:]
    known = [v for v in own if v is not None]
    confirming = [
        {"number": 100 + number, "seed": 2**19 + i, "state": "fail" if v is None else "complete",
         "new": None if v is None else v - 0.5, "old_after": None if v is None else 0.5,
         "steps": STEPS}
        for i, v in enumerate(further)
    ]  # fmt: skip
    replicates = [{"seed": i, "new": v - 0.5, "old_after": 0.5} for i, v in enumerate(known)]
    return row(number, sum(known) / seeds - 0.5, 0.5, confirming=confirming,
               replicates=replicates, **more)  # fmt: skip


# --- who wins -----------------------------------------------------------------------------------


def test_the_winner_has_the_best_mean_over_all_its_seeds() -> None:
    """Not the highest score of a seed, nor the best of the first, the last or the further seeds."""
    lucky, steady = tried(1, 1.6, 1.0, 1.0), tried(2, 1.5, 1.3, 1.3)
    later, last = tried(3, 1.2, 1.45, 1.35), tried(4, 1.2, 1.0, 1.7)
    found = [tried(0, 1.19), lucky, steady, later, last]
    assert [r.number for r in best_of(found, 2)] == [1, 2]
    top = best(found)
    assert top is steady and top.rank[1] == pytest.approx(4.1 / 3)
    assert sorted(found, key=lambda r: r.rank)[0].number == 0


def test_a_seed_of_a_replicate_weighs_as_a_further_one() -> None:
    one = tried(0, 1.0, 2.0, 1.2, seeds=2)
    assert one.value == pytest.approx(1.5) and one.rank[1] == pytest.approx(4.2 / 3)
    # (3 + 1.2) / 3 against (2.6 + 1.7) / 3: means of means would have it the other way round
    assert best([one, tried(1, 1.3, 1.3, 1.7, seeds=2)]).number == 1  # type: ignore[union-attr]
    assert best([tried(0, 1.6, 1.6, 0.9, seeds=2), tried(1, 1.2, 1.2, 1.4, seeds=2)]).number == 0  # type: ignore[union-attr]  # fmt: skip


def test_what_was_not_confirmed_or_diverged_is_no_winner() -> None:
    """Its score was the highest of many; the mean of the others was not chosen so."""
    found = [tried(0, 1.9, 1.9, None), tried(1, 1.4, 1.1, 1.1), tried(2, 1.35)]
    assert best(found).number == 1  # type: ignore[union-attr]
    flat = [tried(3, 1.3, 1.0, 1.0, kind="flat"), tried(4, 1.25, kind="flat")]
    assert best([*found, *flat], kind="flat").number == 3  # type: ignore[union-attr]
    none = [tried(0, 1.9, None, None), tried(1, 1.4, None, None)]
    assert best(none).number == 0  # type: ignore[union-attr]
    assert confirmation(none)["sentence"].startswith("Not confirmed")  # type: ignore[index]


def test_the_lead_is_paired_and_the_noise_pooled_within_trials() -> None:
    found = [tried(0, 1.6, 1.0, 1.2), tried(1, 1.5, 1.45, 1.45), tried(2, 1.1)]
    said = confirmation(found)
    assert said is not None and (said["before"], said["after"]) == (0, 1)
    # gaps -.1 .45 .25: mean .2, sd .2784, t(2) = 4.303: ± .6916
    lead = said["lead"]
    assert (lead["mean"], lead["low"], lead["n"], lead["over"]) == (
        pytest.approx(0.2), pytest.approx(0.2 - 0.6916, abs=1e-4), 3, 0,
    )  # fmt: skip
    # further seeds only: squares .02 and 0 over two degrees of freedom, not the .21 of all seeds
    assert said["noise_sd"] == noise(found) == pytest.approx(0.1)
    assert said["sentence"] == (
        "Trial 1 leads, before it trial 0 did, after confirming, over 3 selection seeds: lead of "
        "+0.200 over trial 0, 95 % interval [-0.492, +0.892], noise sd 0.100 of one score."
    )
    assert confirmation([tried(0, 1.6), tried(1, 1.5)]) is None and noise([tried(0, 1.6)]) is None


# --- who is trained again -------------------------------------------------------------------------


def value(number: int, seed: int) -> float:
    """Trial 8 is lucky with the search's seed, trial 9 is the best of all seeds."""
    luck = {8: 0.5, 9: 0.2, 10: 0.1}.get(number, 0.0) if seed < 2**19 else 0.0
    return 1.0 + luck + 0.2 * (number == 9) + 0.01 * ((seed * (number + 1)) % 3)


def lucky(job: Replicate, watch: Watch) -> Scores:
    watch.at(1, steps=5, old=0.3)
    name = job.recipe.name.removeprefix("trial ")  # the one it confirms, where it confirms one
    number = int(name) if name.isdigit() else job.number
    return Scores(0.9, value(number, job.seed) - 0.5, 0.5, STEPS, 1.0)


def make_lucky(_: Plan) -> Any:
    return lucky


def confirming(place: Path, **more: Any) -> Plan:
    return plan(place, trials=15, confirm=2, **more)


def test_the_best_are_trained_again_within_the_budget(place: Path, tmp_path: Path) -> None:
    of = Study(tmp_path, confirming(place))
    seen: list[Replicate] = []
    assert work(of, lambda job, watch: seen.append(job) or lucky(job, watch)) == 15  # type: ignore[func-returns-value]
    assert of.over and of.counts() == {"complete": 15} and of.claim() is None
    again = seen[11:]
    # with one seed all of them, before the next: a search that is cut short is paired
    assert [(j.recipe.name, j.seed) for j in again] == [
        (f"trial {n}", seed) for seed in FURTHER for n in (8, 9)
    ]  # fmt: skip
    assert [j.folder.name for j in again] == ["11", "12", "13", "14"]
    by = {j.number: j for j in seen}
    for j in again:
        first = by[8 if j.recipe.name == "trial 8" else 9]
        assert (j.lr, j.recipe.rates.multipliers) == (first.lr, first.recipe.rates.multipliers)
    found = rows(of.trials(), of.plan.space)
    assert len(found) == 11 and [len(r.confirming) for r in found[7:]] == [0, 2, 2, 0]
    assert best_of(found, 1)[0].number == 8 and best(found) is found[9]
    assert not set(FURTHER) & {*of.plan.seeds, *of.plan.fresh_seeds}
    # what confirms tells no rung: a pruner would compare it with other seeds
    assert [bool(t.intermediate_values) for t in of.trials()] == [True] * 11 + [False] * 4


def test_a_control_that_leads_is_confirmed_too(place: Path, tmp_path: Path) -> None:
    of = Study(tmp_path, confirming(place))
    jobs: list[Replicate] = []

    def train(job: Replicate, watch: Watch) -> Scores:
        jobs.append(job)
        assert watch.whole == (job.number < CONTROLS or job.number >= 11)
        return Scores(0.9, 0.5 + (job.number in (1, 4)) / 10, 0.5, STEPS, 1.0)

    work(of, train)
    rates = [j.lr for j in jobs]
    assert rates[11:] == [rates[1], rates[4]] * 2


def test_two_workers_share_the_confirming_runs(place: Path, tmp_path: Path) -> None:
    one, two = (Study(tmp_path, confirming(place)) for _ in range(2))
    for number in range(11):
        finish(take(one), Scores(0.9, value(number, 0) - 0.5, 0.5, STEPS))
    claims = [take(study) for _ in range(2) for study in (one, two)]
    assert [(c.confirms, *c.seeds) for c in claims] == [(n, s) for s in FURTHER for n in (8, 9)]
    assert one.claim() is None and two.claim() is None and not one.over
    for claim in claims:
        finish(claim)
    assert one.over and two.over and len(one.trials()) == 15


def test_nothing_is_confirmed_before_all_others_are_finished(place: Path, tmp_path: Path) -> None:
    """The last of them may be the best."""
    of = Study(tmp_path, confirming(place))
    held = [take(of) for _ in range(11)]
    for number, claim in enumerate(held[:-1]):
        finish(claim, Scores(0.9, value(number, 0) - 0.5, 0.5, STEPS))
    assert of.claim() is None and not of.over
    finish(held[-1], Scores(0.9, 0.9, 0.9, STEPS))
    claims = [take(of) for _ in range(2)]  # kept: what is let go of is taken again
    assert [c.confirms for c in claims] == [10, 8]


def test_killed_while_confirming_the_same_one_wins(place: Path, tmp_path: Path) -> None:
    whole = Study(tmp_path / "whole", confirming(place))
    work(whole, lucky)

    def killed(job: Replicate, watch: Watch) -> Scores:
        if job.number == 13:
            raise ZeroDivisionError
        return lucky(job, watch)

    with pytest.raises(ZeroDivisionError):
        work(Study(tmp_path / "cut", confirming(place)), killed)
    again = Study(tmp_path / "cut", confirming(place))
    assert work(again, lucky) == 2
    facts = [confirmation(rows(s.trials(), s.plan.space)) for s in (whole, again)]
    assert facts[0] == facts[1] and facts[0] is not None and facts[0]["after"] == 9


def killed_while_confirming(_: object) -> object:
    """Dies by SIGKILL in the first confirming run of all; then as `lucky`."""
    mark = Path(os.environ["HOLDFAST_TEST_MARK"])

    def train(job: Any, watch: Any) -> object:
        if job.seed >= 2**19 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return lucky(job, watch)

    return train


@pytest.mark.slow
def test_a_process_killed_while_confirming_is_replaced(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("HOLDFAST_TEST_MARK", str(tmp_path / "mark"))
    of = Study(tmp_path / "out", confirming(place))
    together(of, Local(2), killed_while_confirming, make_result, progress=False)
    assert of.counts() == {"complete": 15}
    assert Counter(t.user_attrs["attempts"] for t in of.trials()) == {1: 14, 2: 1}
    assert best(rows(of.trials(), of.plan.space)).number == 9  # type: ignore[union-attr]


def test_a_finished_study_may_be_confirmed_later(place: Path, tmp_path: Path) -> None:
    """It is the same search; only the confirming runs are made, and more seeds add to them."""
    short = plan(place, trials=11)
    work(Study(tmp_path, short), lucky)
    assert best(rows(Study(tmp_path, short).trials(), short.space)).number == 8  # type: ignore[union-attr]
    assert work(Study(tmp_path, confirming(place)), lucky) == 4
    more = Study(tmp_path, plan(place, trials=17, confirm=2, confirm_seeds=3))
    assert work(more, lucky) == 2 and len(more.trials()) == 17
    assert best(rows(more.trials(), more.plan.space)).number == 9  # type: ignore[union-attr]
    assert more.plan.fresh_seeds == short.fresh_seeds


def test_the_files_say_who_led_and_who_won(place: Path, tmp_path: Path) -> None:
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    body = search(
        str(place / "bert"), tasks, out=tmp_path, train=make_lucky, evaluate=make_result,
        progress=False, trials=15, confirm=2, sampler="random", pruner="none", epochs=1.0,
        max_length=16, selection=12, parts=4,
    )  # fmt: skip
    said = json.loads((tmp_path / "search.json").read_text())["confirmation"]
    assert (said["before"], said["after"], body["winner"]) == (8, 9, 9)
    assert said["seeds"] == FURTHER and said["counts"] == {"complete": 4}
    for trial in said["trials"]:
        wanted = {s: value(trial["number"], s) for s in (0, *FURTHER)}
        assert {int(s): v for s, v in trial["by_seed"].items()} == pytest.approx(wanted)
        assert trial["mean"] == pytest.approx(math.fsum(wanted.values()) / 3)
    assert body["steps"]["spent"] == 11 * STEPS and body["steps"]["confirming"] == 4 * STEPS
    assert body["planned"] == 11 and len((tmp_path / "trials.csv").read_text().splitlines()) == 12
    assert body["final"][0]["trial"] == 9


def test_an_older_study_learned_task_one_in_each_trial(place: Path) -> None:
    made = plan(place)
    before = {k: v for k, v in made.identity.items() if k != "learn_old"}
    refuse_other(before, made.identity, "out")
    with pytest.raises(Exception, match='learn_old: "each" → "once"'):
        refuse_other(before, replace(made, learn_old="once").identity, "out")
