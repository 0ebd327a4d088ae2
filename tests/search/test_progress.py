"""The live line: trials, then final runs, by whichever processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import curve, plan

from holdfast.experiments.record import Record
from holdfast.experiments.runs import DIVERGED
from holdfast.experiments.sequence import describe
from holdfast.search.final import jobs
from holdfast.search.rows import rows
from holdfast.search.run import Line
from holdfast.search.study import Study
from holdfast.search.worker import run, work


def test_trials_are_followed_by_final_runs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path, plan(place))
    line = Line(study, shown=True)
    claim = study.claim()
    assert claim is not None
    run(claim, curve)
    claim.close()
    line.look(now=True)
    assert (line.bar.n, line.bar.total, line.bar.desc) == (1, study.plan.trials, "search")
    work(study, curve)
    line.look(now=True)
    todo = jobs(tmp_path, study.plan, rows(study.trials(), study.plan.space))
    assert (line.bar.n, line.bar.total, line.bar.desc) == (0, len(todo), "fresh seeds")
    tasks = [describe(task) for task in study.plan.tasks]
    for job, status in zip(todo, ("done", "running"), strict=False):
        record = Record(tasks=tasks, settings={}, recipe={}, seed=job.seed, status=status)
        record.save(job.folder / "record.json")
    (todo[2].folder / "record.json").parent.mkdir(parents=True)
    (todo[2].folder / "record.json").write_text("{")
    todo[-1].folder.mkdir(parents=True)
    (todo[-1].folder / DIVERGED).write_text("diverged")
    line.look(now=True)
    assert line.bar.n == 2
    line.close()
    said = capsys.readouterr().err
    assert f"{study.plan.trials}/{study.plan.trials}" in said and f"2/{len(todo)}" in said


def test_a_search_that_is_over_begins_with_its_final_runs(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    work(study, curve)
    line = Line(study, shown=True)
    line.look(now=True)
    assert line.bar.desc == "fresh seeds"
    line.close()


def test_a_hidden_line_asks_nothing(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    line = Line(study, shown=False)
    study.trials = None  # type: ignore[method-assign, assignment]
    line.look(now=True)
    line.close()
