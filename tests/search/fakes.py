"""Searches without a network: a plan over tiny tasks, and a `train` that computes its scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.search.final import FinalJob, Result
from holdfast.search.objective import Scores, Watch
from holdfast.search.plan import Plan
from holdfast.search.study import Claim, Study
from holdfast.search.worker import Replicate

STEPS = 60  # of a whole trial
BEST = 1e-3  # the base rate at which `curve` peaks
CONTROLS = 7  # of `plan`
GOOD = Scores(0.9, 0.8, 0.7, STEPS, 1.0)


def plan(place: Path, **more: Any) -> Plan:
    """Two tiny tasks, twelve trials of four parts by random draws, nothing pruned."""
    asked: dict[str, Any] = {
        "trials": 12, "sampler": "random", "pruner": "none", "epochs": 1.0, "max_length": 16,
        "selection": 12, "parts": 4,
    }  # fmt: skip
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    return Plan.make(str(place / "bert"), tasks, **{**asked, **more})


def scores(lr: float, head: float) -> tuple[float, float, float]:
    """old, new, old after: best at `BEST`, and the old task is kept by a slow head."""
    near = math.exp(-abs(math.log(lr / BEST)) / 3)
    return 0.5 + 0.4 * near, 0.5 + 0.4 * near, 0.5 + 0.3 * near / (1 + head)


def curve(job: Replicate, watch: Watch) -> Scores:
    """Tells every rung as training would; scores grow linearly with the steps of a task."""
    rates = job.recipe.rates
    old, new, after = scores(job.lr, rates.head)
    half = STEPS // 2
    for k, share in enumerate(watch.rungs, 1):
        watch.at(k, steps=int(half * share), old=old * share)
    for k, share in enumerate(watch.rungs, len(watch.rungs) + 1):
        watch.at(k, steps=half + int(half * share), old=after, new=new * share)
    return Scores(old, new, after, STEPS, 1.0)


def make_curve(_: Plan) -> Callable[[Replicate, Watch], Scores]:
    return curve


def result(job: FinalJob) -> Result:
    """On evaluation rows: as while searching, and a little by seed."""
    old, new, after = scores(job.contender.rate, job.contender.params["x.head"])
    off = 0.01 * (job.seed % 3)
    return Result(new + off, old, after, STEPS)


def make_result(_: Plan) -> Callable[[FinalJob], Result]:
    return result


def take(study: Study) -> Claim:
    claim = study.claim()
    assert claim is not None
    return claim


def finish(claim: Claim, scores: Scores = GOOD) -> None:
    claim.done(scores, [])
    claim.close()
