"""A worker: takes trials of a study one after another, trains them and reports the results.

How a trial is trained is a function passed in, so that the logic of searching can be tested without
a network: `train(job, watch) -> Scores`. At every rung it calls `watch.at`, which may raise `Stop`;
it may also raise `Stop` itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from holdfast.errors import Busy, Refused
from holdfast.experiments.memory import out_of_memory
from holdfast.recipe import Recipe
from holdfast.search import storage as stores
from holdfast.search.objective import Diverged, Scores, Stop, Watch
from holdfast.search.study import Claim, Study, wait
from holdfast.training import stopping

POLL = 0.5  # seconds between checks of trials that other workers hold


@dataclass(frozen=True)
class Replicate:
    """One replicate of a trial."""

    number: int
    replicate: int
    seed: int
    recipe: Recipe
    lr: float
    folder: Path
    first: Path | None = None  # the run of task one from which it goes on; None: it learns it


Train = Callable[[Replicate, Watch], Scores]


def work(study: Study, train: Train, *, look: Callable[[], None] = lambda: None) -> int:
    """Work until every trial of the plan is finished by some worker; returns how many ran here.

    `look` is called between trials and while waiting.
    """
    made = 0
    while True:
        stopping.check()
        look()
        claim = study.claim()
        if claim is not None:
            try:
                run(claim, train)
                made += 1
            except stores.optuna().exceptions.UpdateFinishedTrialError:
                # Leases end with a folder or a disk they lie on; what was told first stands.
                said = "trial %d was finished by another worker, whose result stands"
                logging.getLogger("holdfast").warning(said, claim.number)
            except Busy as busy:
                logging.getLogger("holdfast").warning("%s", busy)
                wait(POLL, stopping.check)
            finally:
                claim.close()
        elif study.over:
            return made
        else:
            wait(POLL, stopping.check)


def run(claim: Claim, train: Train) -> None:
    """Train a claimed trial and report its outcome to the study, whatever it is."""
    began, scores, plan = time.monotonic(), [], claim.study.plan
    steps = 0
    try:
        for replicate, seed in enumerate(claim.seeds):
            # The pruner sees the first replicate only; a trial that it lets through runs them all.
            tell = claim.report if replicate == 0 else _mute
            job = job_of(claim, replicate, seed)
            found = train(job, Watch(plan.rungs, tell, whole=claim.whole))
            if not found.finite:
                raise Diverged("diverged: a score is not finite", found.steps)
            scores.append(found)
            steps += found.steps
    except Stop as stop:
        seconds = time.monotonic() - began
        tell_end = claim.failed if isinstance(stop, Diverged) else claim.pruned
        tell_end(stop.reason, steps + stop.steps, round(seconds, 3))
        return
    except (KeyboardInterrupt, stopping.Stopped, Refused, OSError):  # such as a full disk
        claim.excuse()
        raise
    except Exception as error:
        if not out_of_memory(error):
            claim.blame(error)
            raise
        reason = "out of memory: half --batch-size and twice --accumulation make the same steps"
        claim.failed(reason, steps, round(time.monotonic() - began, 3))
        return
    mean = Scores(
        old=fmean(s.old for s in scores), new=fmean(s.new for s in scores),
        old_after=fmean(s.old_after for s in scores), steps=steps,
        seconds=round(sum(s.seconds for s in scores), 3),
    )  # fmt: skip
    rows = [{"seed": seed, "old": s.old, "new": s.new, "old_after": s.old_after}
            for seed, s in zip(claim.seeds, scores, strict=True)]  # fmt: skip
    claim.done(mean, rows)


def job_of(claim: Claim, replicate: int, seed: int) -> Replicate:
    """What to train: the trial's curve in the plan's recipe, in a folder of its own."""
    plan = claim.study.plan
    name = claim.control or f"trial {claim.number if claim.confirms is None else claim.confirms}"
    recipe = plan.space.recipe(plan.base, claim.params, name=name)
    leaf = f"{claim.number}" if replicate == 0 else f"{claim.number}-{replicate}"
    return Replicate(claim.number, replicate, seed, recipe, claim.params["rate"],
                     claim.study.folder / "trials" / leaf,
                     plan.first(claim.study.folder, seed))  # fmt: skip


def _mute(rung: int, value: float) -> bool:
    return False
