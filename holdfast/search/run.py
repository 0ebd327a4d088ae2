"""`search`: a whole search, from its arguments to the files with its results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from holdfast.errors import Busy, Refused
from holdfast.experiments import engines
from holdfast.experiments.engines.local import Local
from holdfast.experiments.processes import EVERY
from holdfast.experiments.ranks import check_alone
from holdfast.experiments.record import Record
from holdfast.experiments.runs import ended
from holdfast.search import pbt, result, storage
from holdfast.search.final import Evaluate, Evaluation, FinalJob, contenders, finish, jobs
from holdfast.search.plan import Plan
from holdfast.search.rows import TrialRow, best, rows
from holdfast.search.study import ATTEMPTS, FINISHED, Study
from holdfast.search.worker import Train, work

MakeTrain = Callable[[Plan], Train]
MakeEvaluate = Callable[[Plan], Evaluate]


def training(plan: Plan) -> Train:
    """How trials are trained, unless a test says otherwise."""
    from holdfast.search.trial import Training

    return Training(plan)


def search(
    model: str,
    tasks: Sequence[str | Path],
    *,
    out: str | Path,
    url: str | None = None,
    workers: int = 1,
    engine: engines.Engine | None = None,
    progress: bool = True,
    command: Sequence[str] | None = None,
    train: MakeTrain = training,
    evaluate: MakeEvaluate = Evaluation,
    **asked: Any,
) -> dict[str, Any]:
    """Search learning rates by part for two tasks; returns what `search.json` in `out` holds.

    asked: see `Plan.make`, and `holdfast.experiments.settings.Settings` for how each task is
    trained. url: where Optuna keeps the study (a SQLite file in `out`). workers: processes of one
    thread each; another engine starts them elsewhere, see `holdfast.experiments.engines`. Further
    calls with the same `out`, at the same time or later, join the study.
    train, evaluate: how a plan's trials and final runs are made.

    All input is checked, and `Refused` raised, before any training.

    Example:
        >>> body = search("minilm", ["data/trec6", "data/sst2"], trials=50, out="runs/s")  # doctest: +SKIP
        >>> body["gain"]["sentence"]  # doctest: +SKIP
    """  # noqa: E501
    check_alone()
    chosen: engines.Engine = engine or Local(workers)
    if asked.get("sampler") == "pbt" and chosen.far:
        raise Refused("a population lives on one machine", where="--engine",
                      remedy="--workers N, or --engine ray without --address")  # fmt: skip
    storage.check_engine(url, chosen)
    storage.check(str(asked.get("sampler", "tpe")))
    plan = Plan.make(model, tasks, **asked)
    if plan.population and url is not None:
        raise Refused("a population lies in --out", where="--storage", remedy="leave it out")
    folder = Path(out)
    if folder.is_file():
        raise Refused("is a file", where=str(folder), remedy="name a folder")
    for said in plan.warnings:
        logging.getLogger("holdfast").warning(said)
    study = Study(folder, plan, url)
    if chosen.drawn:
        together(study, chosen, train, evaluate, progress=progress)
    else:
        labour(study, train, evaluate, progress=progress)
    return conclude(study, evaluate(plan), command or sys.argv)


def together(
    study: Study, engine: engines.Engine, train: MakeTrain, evaluate: MakeEvaluate, *,
    progress: bool,
) -> None:  # fmt: skip
    """`labour` in as many processes as the engine runs, each with its own view of the study."""
    line, folder = Line(study, shown=progress), study.folder
    each = partial(_joined, folder, study.plan, study.url, train, evaluate)
    workers = min(engine.at_once or study.plan.trials, study.plan.trials)
    jobs = [engines.Job(folder, f"worker {i}", each) for i in range(workers)]
    # A trial that kills its processes fails after ATTEMPTS of them, maybe all of one job.
    most, stopped = workers * ATTEMPTS + 1, True
    try:
        while stopped:  # all of them, by whoever manages their nodes
            with closing(engine(jobs, where=str(folder), look=line.look, attempts=most)) as coming:
                # The first that is through leaves nothing to do for those that wait for a place.
                stopped = all(isinstance(result, Busy) for _, result in coming)
    finally:
        line.close()


def _joined(
    folder: Path, plan: Plan, url: str | None, train: MakeTrain, evaluate: MakeEvaluate
) -> None:
    from holdfast.tasks.kinds.pretrained import locate

    here = replace(plan, source=locate(plan.model))  # which may lie elsewhere on another machine
    labour(Study(folder, here, url), train, evaluate)


def labour(
    study: Study, train: MakeTrain, evaluate: MakeEvaluate, *, progress: bool = False
) -> None:
    """What one process does: trials until all are finished, then final runs until all are done."""
    plan = study.plan
    line = Line(study, shown=progress)
    try:
        if not study.over:
            made = train(plan)
            work(study, made, look=line.look)
            del made  # frees its weights; the final runs load their own
        if plan.population:
            pbt.evolve(study.folder, plan, members(plan), look=line.look)
        found = tried(study)
        study.check_unchanged()
        finish(jobs(study.folder, plan, found), evaluate(plan), look=line.look)
    finally:
        line.close()


def members(plan: Plan) -> Callable[[pbt.Segment], pbt.Outcome]:
    """How the members of a population are trained."""
    from holdfast.search.segment import Segments

    return Segments(plan)


def tried(study: Study) -> list[TrialRow]:
    """All trials by number; a population's members come last."""
    found, plan = rows(study.trials(), study.plan.space), study.plan
    return [*found, *pbt.rows(study.folder, plan)] if plan.population else found


def conclude(study: Study, evaluate: Evaluate, command: Sequence[str]) -> dict[str, Any]:
    """Read all results and write the files; the same whichever process does it."""
    plan, found = study.plan, tried(study)
    results = finish(jobs(study.folder, plan, found), evaluate)
    study.check_unchanged()
    body = result.facts(
        plan, found, contenders(plan, found), results, name=study.name,
        storage=storage.kept(study.url, study.folder), command=command,
        first=[Record.load(path) for path in sorted(study.folder.glob("first/*/record.json"))],
    )  # fmt: skip
    with study.lock():
        result.write(study.folder, plan, found, body)
    return body


class Line:
    """One line of progress for a whole study, whichever processes work on it."""

    def __init__(self, study: Study, *, shown: bool) -> None:
        self.study, self.shown, self._looked = study, shown, 0.0
        self.open: list[FinalJob] | None = None  # final runs not over; None while trials run
        counts = study.counts()
        done = sum(counts[s] for s in FINISHED)
        self.bar = self._bar("search", "trial", max(study.plan.trials, done), done)

    def _bar(self, about: str, unit: str, total: int, done: int) -> Any:
        # Workers end their trials in bursts: only the mean over all of them predicts the time left.
        return tqdm(total=total, initial=done, unit=unit, desc=about, disable=not self.shown,
                    dynamic_ncols=True, smoothing=0)  # fmt: skip

    def look(self, *, now: bool = False) -> None:
        """Draw the state of the storage and the folder, at most once a second."""
        if not self.shown or (not now and time.monotonic() - self._looked < EVERY):
            return
        self._looked = time.monotonic()
        if self.open is None:
            self._trials()
        else:
            self.open = [job for job in self.open if not ended(job.folder)]
            self._draw(self.bar.total - len(self.open))

    def _trials(self) -> None:
        study = self.study
        found = tried(study)
        self.bar.set_postfix_str(words(found), refresh=False)
        states = [r.state for r in found] + [c["state"] for r in found for c in r.confirming]
        self._draw(sum(state in FINISHED for state in states))
        if study.over and all(r.state in FINISHED for r in found if r.lineage):
            self.bar.close()
            todo = jobs(study.folder, study.plan, found)
            self.open = [job for job in todo if not ended(job.folder)]
            self.bar = self._bar("fresh seeds", "run", len(todo), len(todo) - len(self.open))

    def _draw(self, done: int) -> None:
        self.bar.n = done
        self.bar.refresh()

    def close(self) -> None:
        self.look(now=True)
        self.bar.close()


def words(found: Any) -> str:
    """`best 1.652 (trial 17), 2 running, 9 pruned, 1 failed`."""
    top = best(found)
    said = ["best –" if top is None else f"best {top.rank[1]:.3f} (trial {top.number})"]
    for state, word in (("running", "running"), ("pruned", "pruned"), ("fail", "failed")):
        said.append(f"{sum(r.state == state for r in found)} {word}")
    return ", ".join(said)
