"""What a worker makes of a trial, whatever comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import STEPS, curve, plan

from holdfast.errors import Busy, Refused
from holdfast.search import worker
from holdfast.search.objective import Diverged, Pruned, Scores, Watch
from holdfast.search.study import Study
from holdfast.search.worker import Replicate, run, work
from holdfast.training import stopping


def study(place: Path, out: Path, **more: Any) -> Study:
    return Study(out, plan(place, **more))


def one(of: Study, train: Any) -> Any:
    """The first trial, run; as Optuna keeps it."""
    claim = of.claim()
    assert claim is not None
    try:
        run(claim, train)
    finally:
        claim.close()
    return of.trials()[claim.number]


def test_all_trials_are_made_and_told(place: Path, tmp_path: Path) -> None:
    of = study(place, tmp_path)
    seen: list[Replicate] = []

    def train(job: Replicate, watch: Watch) -> Scores:
        seen.append(job)
        return curve(job, watch)

    assert work(of, train) == 12 and of.over
    assert [job.number for job in seen] == list(range(12))
    assert [job.folder for job in seen] == [tmp_path / "trials" / str(n) for n in range(12)]
    assert [t.value for t in of.trials()] == [
        pytest.approx(t.user_attrs["new"] + t.user_attrs["old_after"]) for t in of.trials()
    ]
    first = of.trials()[0]
    assert len(first.intermediate_values) == 6 and first.user_attrs["steps"] == STEPS
    assert seen[0].recipe.name == of.plan.controls[0].label and seen[0].lr == of.plan.flat[0]


def test_a_trials_curve_and_rate_reach_its_training(place: Path, tmp_path: Path) -> None:
    of = study(place, tmp_path, tune=["ewc.strength"])
    jobs: dict[int, Replicate] = {}
    work(of, lambda job, watch: jobs.setdefault(job.number, job) and curve(job, watch))
    params = of.trials()[9].params
    assert jobs[9].lr == params["rate"]
    assert jobs[9].recipe.rates.multipliers == of.plan.space.multipliers(params)
    assert jobs[9].recipe.methods[0].strength == params["ewc.strength"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stop", "state"),
    [(Pruned("collapsed: …", 20), "PRUNED"), (Diverged("diverged: …", 20), "FAIL")],
)
def test_what_stops_is_told_with_its_reason_and_steps(
    stop: Exception, state: str, place: Path, tmp_path: Path
) -> None:
    def train(job: Replicate, watch: Watch) -> Scores:
        watch.at(1, steps=10, old=0.3)
        raise stop

    told = one(study(place, tmp_path), train)
    assert told.state.name == state
    assert told.user_attrs["reason"] == str(stop) and told.user_attrs["steps"] == 20
    assert told.value == (0.3 if state == "PRUNED" else None)


def test_a_score_that_is_no_number_fails(place: Path, tmp_path: Path) -> None:
    """A value of inf would be the best of the study for ever."""
    for bad in (float("nan"), float("inf")):
        told = one(study(place, tmp_path), lambda *_, bad=bad: Scores(0.9, bad, 0.5, STEPS))
        assert told.state.name == "FAIL" and told.user_attrs["steps"] == STEPS


def test_replicates_are_averaged_and_only_the_first_tells(place: Path, tmp_path: Path) -> None:
    jobs: list[Replicate] = []

    def train(job: Replicate, watch: Watch) -> Scores:
        jobs.append(job)
        watch.at(1, steps=5, old=0.1 + job.replicate)
        return Scores(0.5, 0.6 + 0.1 * job.replicate, 0.4, STEPS, 2.0)

    told = one(study(place, tmp_path, replicates=3, seed=4), train)
    assert told.intermediate_values == {1: 0.1}
    assert told.value == pytest.approx(1.1) and told.user_attrs["new"] == pytest.approx(0.7)
    assert told.user_attrs["steps"] == 3 * STEPS
    assert [job.seed for job in jobs] == [4, 5, 6]
    assert [job.folder.name for job in jobs] == ["0", "0-1", "0-2"]
    assert [r["new"] for r in told.user_attrs["replicates"]] == pytest.approx([0.6, 0.7, 0.8])


def test_an_error_of_ours_leaves_the_trial_to_be_made_again(place: Path, tmp_path: Path) -> None:
    of = study(place, tmp_path)
    with pytest.raises(ZeroDivisionError):
        one(of, lambda *_: 1 / 0)
    assert of.counts()["running"] == 1
    assert one(of, curve).number == 0 and of.counts()["complete"] == 1


def test_what_ended_a_trials_workers_is_its_reason(place: Path, tmp_path: Path) -> None:
    of = study(place, tmp_path)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            one(of, lambda *_: 1 / 0)
    one(of, curve)
    (failed,) = (t for t in of.trials() if t.state.name == "FAIL")
    assert failed.user_attrs["reason"].endswith("by ZeroDivisionError: division by zero")


CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU)]
)
def test_a_trial_that_does_not_fit_has_failed_and_the_search_goes_on(
    error: Exception, place: Path, tmp_path: Path
) -> None:
    """Faults P12."""
    of = study(place, tmp_path)

    def train(*_: Any) -> Scores:
        raise error

    told = one(of, train)
    assert told.state.name == "FAIL"
    assert told.user_attrs["reason"].startswith("out of memory: half --batch-size")
    assert one(of, curve).number == 1


def test_who_ends_a_trial_second_goes_on_with_the_next(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lease was lost, and another worker finished it meanwhile: that result stands (P9)."""
    of = study(place, tmp_path)

    def train(job: Replicate, watch: Watch) -> Scores:
        if job.number == 3:
            of.study.tell(3, 1.25)
        return curve(job, watch)

    assert work(of, train) == 11 and of.counts() == {"complete": 12}
    assert of.trials()[3].value == 1.25 and "trial 3 was finished by another" in caplog.text


def test_a_trial_that_was_taken_over_is_not_its_workers_end(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was paused until it was taken for dead: it goes on with others, and tells nothing."""
    of, waits = study(place, tmp_path), []
    monkeypatch.setattr(worker, "wait", lambda *_: waits.append(1))

    def train(job: Replicate, watch: Watch) -> Scores:
        if job.number == 3 and not waits:
            raise Busy("was taken over by process 7 on elsewhere", where=str(job.folder))
        return curve(job, watch)

    assert work(of, train) == 12 and of.counts() == {"complete": 12} and len(waits) == 1
    assert of.trials()[3].user_attrs["attempts"] == 1
    assert "trials/3: was taken over" in caplog.text


@pytest.mark.parametrize(
    "end", [stopping.Stopped(15), KeyboardInterrupt(), Refused("disk full"), OSError(28, "full")]
)
def test_what_stops_a_worker_is_no_attempt(end: BaseException, place: Path, tmp_path: Path) -> None:
    """However often the disk was full, the trial has not failed."""
    of = study(place, tmp_path)

    def stopped(*_: Any) -> Scores:
        raise end

    for _ in range(5):
        with pytest.raises(type(end)):
            one(of, stopped)
    told = one(of, curve)
    assert told.number == 0 and told.state.name == "COMPLETE" and told.user_attrs["attempts"] == 1


def test_a_worker_waits_for_a_trial_that_another_one_has(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may die; then this one takes it up, and no one ends before all are told."""
    of, other = study(place, tmp_path), study(place, tmp_path)
    theirs = other.claim()
    assert theirs is not None
    waits: list[float] = []

    def wait(seconds: float, look: Any) -> None:
        waits.append(seconds)
        assert of.counts()["complete"] == 11  # all that is free is done first
        theirs.close()

    monkeypatch.setattr(worker, "wait", wait)
    assert work(of, curve) == 12 and len(waits) == 1
    assert of.counts() == {"complete": 12}


def test_halving_spends_fewer_steps_and_keeps_what_is_best(place: Path, tmp_path: Path) -> None:
    of = study(place, tmp_path, pruner="halving", trials=30)
    work(of, curve)
    told = [t for t in of.trials() if t.user_attrs.get("control") is None]
    assert sum(t.user_attrs["steps"] for t in told) < 0.5 * STEPS * len(told)
    assert all(t.user_attrs["steps"] == STEPS for t in of.trials()[:7])
    assert all(t.user_attrs["reason"].startswith("pruned at rung") for t in told
               if t.state.name == "PRUNED")  # fmt: skip
