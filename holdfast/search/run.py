"""`search`: the whole of it, from what is asked to the files that say what was found."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments.processes import spread
from holdfast.search import result, storage
from holdfast.search.final import Evaluate, Evaluation, contenders, finish, jobs
from holdfast.search.plan import Plan
from holdfast.search.progress import Line
from holdfast.search.rows import rows
from holdfast.search.study import Study
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
    progress: bool = True,
    command: Sequence[str] | None = None,
    train: MakeTrain = training,
    evaluate: MakeEvaluate = Evaluation,
    **asked: Any,
) -> dict[str, Any]:
    """Search learning rates by part for two tasks; returns what `search.json` in `out` holds.

    asked: see `Plan.make`, and `holdfast.experiments.settings.Settings` for how each task is
    trained. url: where Optuna keeps the study (a SQLite file in `out`). workers: processes of one
    thread each; further calls with the same `out`, at the same time or later, join the study.
    train, evaluate: how a plan's trials and final runs are made.

    All input is checked, and `Refused` raised, before any training.

    Example:
        >>> body = search("minilm", ["data/trec6", "data/sst2"], trials=50, out="runs/s")  # doctest: +SKIP
        >>> body["gain"]["sentence"]  # doctest: +SKIP
    """  # noqa: E501
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise Refused(f"must be a whole number from 1 on, not {workers!r}", where="--workers")
    storage.check(str(asked.get("sampler", "tpe")))
    plan = Plan.make(model, tasks, **asked)
    folder = Path(out)
    if folder.is_file():
        raise Refused("is a file", where=str(folder), remedy="name a folder")
    for said in plan.warnings:
        logging.getLogger("holdfast").warning(said)
    study = Study(folder, plan, url)
    if workers == 1:
        labour(study, train, evaluate, progress=progress)
    else:
        together(study, workers, train, evaluate, progress=progress)
    return conclude(study, evaluate(plan), command or sys.argv)


def together(
    study: Study, workers: int, train: MakeTrain, evaluate: MakeEvaluate, *, progress: bool
) -> None:
    """`labour` in so many processes, each with a view of the study of its own."""
    line = Line(study, shown=progress)
    each = partial(_joined, study.folder, study.plan, study.url, train, evaluate)
    try:
        for _ in spread([each] * workers, workers, where=str(study.folder), look=line.look):
            pass
    finally:
        line.close()


def _joined(
    folder: Path, plan: Plan, url: str | None, train: MakeTrain, evaluate: MakeEvaluate
) -> None:
    labour(Study(folder, plan, url), train, evaluate)


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
            del made  # its weights; the final runs load their own
        found = rows(study.trials(), plan.space)
        finish(jobs(study.folder, plan, found), evaluate(plan), look=line.look)
    finally:
        line.close()


def conclude(study: Study, evaluate: Evaluate, command: Sequence[str]) -> dict[str, Any]:
    """Read all results and write the files; the same from whichever process."""
    plan = study.plan
    found = rows(study.trials(), plan.space)
    results = finish(jobs(study.folder, plan, found), evaluate)
    body = result.facts(
        plan, found, contenders(plan, found), results, name=study.name,
        storage=storage.kept(study.url, study.folder), command=command,
    )  # fmt: skip
    with study.lock():
        result.write(study.folder, plan, found, body)
    return body
