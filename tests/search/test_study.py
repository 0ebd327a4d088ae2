"""Who works on which trial: nothing twice, nothing lost, nothing beyond the plan."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTROLS, GOOD, finish, plan, take

from holdfast.errors import Refused
from holdfast.experiments import lease
from holdfast.search import plan as plans
from holdfast.search import storage
from holdfast.search.objective import Scores
from holdfast.search.study import ATTEMPTS, Study


def past_controls(study: Study) -> None:
    for _ in range(CONTROLS):
        finish(take(study))


def test_controls_come_first_and_trials_end_at_the_plan(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    labels = [c.label for c in study.plan.controls]
    assert len(labels) == CONTROLS
    claims = [take(study) for _ in range(12)]
    assert [c.number for c in claims] == list(range(12))
    assert [c.control for c in claims] == [*labels, *[None] * 5]
    assert claims[0].params == study.plan.controls[0].params
    assert study.claim() is None and not study.over
    for claim in claims:
        finish(claim)
    assert study.claim() is None and study.over
    assert study.counts() == {"complete": 12}


def test_two_workers_never_have_one_trial(place: Path, tmp_path: Path) -> None:
    one, two = Study(tmp_path, plan(place)), Study(tmp_path, plan(place))
    claims = [take(study) for _ in range(6) for study in (one, two)]
    assert sorted(c.number for c in claims) == list(range(12))
    assert one.claim() is None and two.claim() is None
    assert len(one.trials()) == 12


def ask_all(folder: Path, place: Path, found: Any) -> None:
    study = Study(folder, plan(place, trials=30))
    while (claim := study.claim()) is not None:
        finish(claim)
        found.put(claim.number)


def test_processes_that_race_share_the_trials(place: Path, tmp_path: Path) -> None:
    """Each opens, makes tables and enqueues at the same time as the others."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=ask_all, args=(tmp_path, place, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    numbers = sorted(found.get(timeout=60) for _ in range(30))
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert numbers == list(range(30))
    study = Study(tmp_path, plan(place, trials=30))
    labels = [t.user_attrs.get("control") for t in study.trials()]
    assert labels[:CONTROLS] == [c.label for c in study.plan.controls]
    assert set(labels[CONTROLS:]) == {None} and study.counts() == {"complete": 30}


def test_a_dead_workers_trial_is_taken_up_as_it_was(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    past_controls(study)
    first = take(study)
    first.report(1, 0.4)
    first.close()  # what the system does when a process ends
    again = take(Study(tmp_path, plan(place)))
    assert (again.number, again.params) == (first.number, first.params)
    assert study.storage.get_trial(again.identity).user_attrs["attempts"] == 2
    assert take(study).number == first.number + 1


def silent(folder: Path) -> None:
    """The lease of a process of another host, of which nothing is heard."""
    folder.mkdir(parents=True, exist_ok=True)
    sign = {"process": 7, "host": "elsewhere", "boot": "x", "locked": True, "token": "t"}
    (folder / f"lease.{lease.newest(folder) + 1}").write_text(json.dumps(sign))


def test_what_another_host_holds_is_taken_up_after_a_silence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is of no meaning here: only whether it is heard from."""
    for name, value in (("BEAT", 0.05), ("STALE", 0.4), ("TURN", 0.01)):
        monkeypatch.setattr(lease, name, value)
    begun, leases = time.monotonic(), tmp_path / "leases"
    silent(leases / "study")  # killed while it asked
    study = Study(tmp_path, plan(place))
    assert time.monotonic() - begun >= lease.STALE
    theirs = study.study.ask()
    silent(leases / "0")
    begun, others = time.monotonic(), [take(study)]
    assert theirs.number == 0 and others[0].number == 1  # meanwhile there is enough to do
    while (claim := study.claim()) is None or claim.number:
        others += [claim] if claim else []
        time.sleep(0.01)
    assert time.monotonic() - begun >= lease.STALE
    assert claim.params == study.plan.controls[0].params
    assert [other.number for other in others] == list(range(1, 1 + len(others)))


def test_a_trial_that_ends_its_workers_fails_after_some_attempts(
    place: Path, tmp_path: Path
) -> None:
    study = Study(tmp_path, plan(place))
    past_controls(study)
    for _ in range(ATTEMPTS):
        claim = take(study)
        assert claim.number == CONTROLS
        claim.close()
    assert take(study).number == CONTROLS + 1
    failed = study.trials()[CONTROLS]
    assert failed.state.name == "FAIL"
    assert failed.user_attrs["reason"] == f"its worker ended {ATTEMPTS} times before it did"


def test_a_worker_that_was_stopped_is_no_attempt(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    for _ in range(ATTEMPTS + 2):
        claim = take(study)
        claim.excuse()
        claim.close()
    assert take(study).number == 0


def test_a_trial_told_since_the_list_was_read_is_not_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker tells it and lets go of it between the look and the lock."""
    one, two = Study(tmp_path, plan(place)), Study(tmp_path, plan(place))
    mine = take(one)
    lease = two.lease

    def late(number: int) -> Any:
        if number == mine.number:
            finish(mine)
        return lease(number)

    monkeypatch.setattr(two, "lease", late)
    assert take(two).number == mine.number + 1
    assert one.trials()[mine.number].state.name == "COMPLETE"


def test_a_worker_killed_while_it_drew(place: Path, tmp_path: Path) -> None:
    """What was drawn stays, the rest is drawn; a control stays the control."""
    study = Study(tmp_path, plan(place))
    half = study.study.ask()  # a control, of which nothing was written yet
    claim = take(study)
    assert claim.number == half.number and claim.params == study.plan.controls[0].params
    held = [claim, *(take(study) for _ in range(CONTROLS - 1))]
    assert len(held) == CONTROLS
    half = study.study.ask()
    drawn = half.suggest_float("rate", *study.plan.space.rate[:2], log=True)
    claim = take(study)
    assert claim.number == CONTROLS and claim.params["rate"] == drawn
    assert claim.params.keys() == study.plan.space.ranges.keys()


def test_what_is_drawn_does_not_hang_on_the_process(place: Path, tmp_path: Path) -> None:
    """Nor does a process that goes on draw the same trials again."""
    one = Study(tmp_path / "one", plan(place))
    whole = [take(one) for _ in range(11)]
    broken = [take(Study(tmp_path / "two", plan(place))) for _ in range(11)]
    assert [c.params for c in broken] == [c.params for c in whole]
    assert len({c.params["rate"] for c in broken[CONTROLS:]}) == 4


def test_a_trial_whose_worker_was_killed_while_it_drew_is_what_it_would_have_been(
    place: Path, tmp_path: Path
) -> None:
    one, two = Study(tmp_path / "one", plan(place)), Study(tmp_path / "two", plan(place))
    for study in (one, two):
        past_controls(study)
    wanted = take(one).params
    two._seed(CONTROLS)
    half = two.study.ask()
    for name in ("rate", "x.embeddings"):
        half.suggest_float(name, *two.plan.space.ranges[name][:2], log=True)
    assert take(Study(tmp_path / "two", plan(place))).params == wanted


def test_large_seeds_are_seeds_too(place: Path, tmp_path: Path) -> None:
    """NumPy's end at 2^32, ours at 2^20: it was refused after the controls had been trained."""
    study = Study(tmp_path, plan(place, seed=2**20 - 10))
    past_controls(study)
    assert take(study).number == CONTROLS


def test_the_other_studies_of_a_database_stay_apart(place: Path, tmp_path: Path) -> None:
    """A trial's number is no id there."""
    url = f"sqlite:///{tmp_path / 'all.db'}"
    one, two = (Study(tmp_path / name, plan(place), url) for name in ("one", "two"))
    first = take(one)
    second = take(two)
    assert first.identity != second.identity and first.number == second.number == 0
    finish(second, Scores(0.5, 0.5, 0.5))
    assert one.counts()["complete"] == 0 and two.trials()[0].value == 1.0


# --- the same search, or another ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sampler": "tpe"}, 'sampler: "random" → "tpe"'),
        ({"seed": 1}, "seed: 0 → 1"),
        ({"epochs": 2.0}, "settings.epochs: 1.0 → 2.0"),
        ({"tune": ["dps.drop"]}, "tune"),
        ({"learn_old": "once"}, 'learn_old: "each" → "once"'),
    ],
)
def test_another_search_is_refused_with_what_differs(
    more: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    finish(take(Study(tmp_path, plan(place))))
    with pytest.raises(Refused, match="holds another search") as refusal:
        Study(tmp_path, plan(place, **more))
    assert said in str(refusal.value) and "model" not in str(refusal.value)


def test_other_rows_are_another_search(place: Path, tmp_path: Path) -> None:
    Study(tmp_path, plan(place))
    with pytest.raises(Refused, match="tasks"):
        Study(tmp_path, plan(place, train_size=20))


def test_a_study_may_be_extended(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    for _ in range(12):
        finish(take(study))
    longer = Study(tmp_path, plan(place, trials=14, fresh=5))
    assert not longer.over and take(longer).number == 12


def test_a_setting_that_came_later_is_no_other_search(place: Path, tmp_path: Path) -> None:
    Study(tmp_path, plan(place))
    body = json.loads((tmp_path / plans.FILE).read_text())
    del body["config"]["settings"]["group_by_length"]
    (tmp_path / plans.FILE).write_text(json.dumps(body))
    Study(tmp_path, plan(place))
    with pytest.raises(Refused, match="group_by_length: false → true"):
        Study(tmp_path, plan(place, group_by_length=True))


def test_another_storage_is_refused(place: Path, tmp_path: Path) -> None:
    Study(tmp_path, plan(place))
    with pytest.raises(Refused, match="storage"):
        Study(tmp_path, plan(place), f"journal:{tmp_path / 'log'}")


def test_a_database_that_was_exchanged_is_refused(place: Path, tmp_path: Path) -> None:
    Study(tmp_path, plan(place))
    body = json.loads((tmp_path / plans.FILE).read_text())
    body["config"]["rungs"] = [1.0]
    (tmp_path / plans.FILE).write_text(json.dumps(body))
    with pytest.raises(Refused, match=r"study\.db.*rungs: .* → \[1\.0\]"):
        Study(tmp_path, plan(place, rungs=1))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}'])
def test_a_damaged_study_file_is_refused(content: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / plans.FILE).write_text(content)
    with pytest.raises(Refused, match=r"study\.json is damaged"):
        Study(tmp_path, plan(place))


def test_a_folder_of_trials_without_a_study_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "trials" / "0").mkdir(parents=True)
    with pytest.raises(Refused, match=r"no study\.json"):
        Study(tmp_path, plan(place))


# --- pruners ------------------------------------------------------------------------------------


def curves(study: Study, steps: dict[int, int]) -> None:
    """Every trial as good as its number is high, told at every rung; `steps` counts rungs."""
    while (claim := study.claim()) is not None:
        for rung in range(1, 2 * len(study.plan.rungs) + 1):
            steps[claim.number] = rung
            if claim.report(rung, -claim.number / 100) and rung < 2 * len(study.plan.rungs):
                claim.pruned("pruned", rung, 0.0)
                break
        else:
            claim.done(GOOD, [])
        claim.close()


@pytest.mark.parametrize(("pruner", "rungs"), [("halving", {1, 2, 4}), ("hyperband", {1, 2})])
def test_pruners_stop_what_is_worse_and_never_a_control(
    pruner: str, rungs: set[int], place: Path, tmp_path: Path
) -> None:
    study = Study(tmp_path, plan(place, pruner=pruner, trials=30))
    steps: dict[int, int] = {}
    curves(study, steps)
    full = 2 * len(study.plan.rungs)
    assert all(steps[n] == full for n in range(CONTROLS))
    states = study.counts()
    assert states["pruned"] >= 12 and states["pruned"] + states["complete"] == 30
    assert {s for s in steps.values() if s < full} <= rungs


def test_brackets_hang_on_the_seed_and_a_trials_number(place: Path, tmp_path: Path) -> None:
    """Optuna's hang on the study's name, which is another one in every folder."""
    ends: dict[str, list[str]] = {}
    for name in ("one", "two"):
        study = Study(tmp_path / name, plan(place, pruner="hyperband", trials=30))
        curves(study, {})
        ends[name] = [t.state.name for t in study.trials()]
    assert ends["one"] == ends["two"]


def test_the_papers_hyperband(place: Path) -> None:
    made = storage.pruner("hyperband")
    assert vars(made).items() >= {
        "_min_resource": 1, "_max_resource": 4, "_reduction_factor": 2
    }.items()  # fmt: skip
    assert 2 * len(plan(place, pruner="hyperband").rungs) == 4


def test_a_trial_made_again_is_judged_where_it_was_not(place: Path, tmp_path: Path) -> None:
    """Its first worker died after telling rung 1: the value stands, the judgement comes."""
    study = Study(tmp_path, plan(place, pruner="halving"))
    for _ in range(CONTROLS):
        claim = take(study)
        claim.report(1, 0.9)
        finish(claim)
    claim = take(study)
    study.storage.set_trial_intermediate_value(claim.identity, 1, 0.1)
    claim.close()
    again = take(study)
    assert again.number == claim.number
    assert again.report(1, 0.95)  # what is told anew does not replace what was told
    assert study.trials()[claim.number].intermediate_values == {1: 0.1}


def test_pareto_has_two_values_and_tells_no_rungs(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place, objective="pareto", pruner=None))
    claim = take(study)
    assert not claim.report(1, 0.5)
    finish(claim)
    claim = take(study)
    claim.pruned("collapsed", 30, 1.0)
    claim.close()
    first, second = study.trials()[:2]
    assert first.values == [0.8, 0.7] and not first.intermediate_values
    assert second.state.name == "PRUNED"


def test_the_gaussian_process_is_told_that_scores_are_noisy() -> None:
    assert vars(storage.sampler("gp", 0))["_deterministic"] is False


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random", "nsga2"])
def test_every_sampler_draws_within_the_space(sampler: str, place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place, sampler=sampler, trials=13))
    for i in range(13):
        claim = take(study)
        for name, r in study.plan.space.ranges.items():
            assert r.low <= claim.params[name] <= r.high
        finish(claim, Scores(0.9, 0.5 + i / 100, 0.7))
    assert study.over
