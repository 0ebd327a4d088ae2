"""The last stage of a search: the winner and the controls on evaluation rows, with fresh seeds.

This is the only time that evaluation rows are scored, with seeds that the search itself never used.
The best flat rate was chosen on selection rows, like the winner; the shapes that need no search run
at that rate. The ablation is the winner without its shape: flat, at the winner's own rate and
settings, so that their effect is not credited to the curve. Runs are shared among the processes of
a search: each takes runs that no other is working on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from holdfast.errors import Busy, TrainingDiverged
from holdfast.experiments import lease
from holdfast.experiments.runs import drop_weights, how_diverged, note_diverged
from holdfast.experiments.sequence import Arm, Job
from holdfast.search.plan import Plan
from holdfast.search.rows import TrialRow, best
from holdfast.search.space import RATE, Ancestor
from holdfast.search.study import wait
from holdfast.tasks.task import slug
from holdfast.training import stopping

FOLDER = "final"
POLL = 0.5


@dataclass(frozen=True)
class Contender:
    """A configuration to run again: a label for tables, its kind, the trial it stems from."""

    label: str
    kind: str  # searched, flat, ablation, layer_decay, bertcl
    trial: int
    params: dict[str, float]
    lineage: tuple[Ancestor, ...] = ()  # of a population's member: its rates change on the way

    @property
    def rate(self) -> float:
        return self.params[RATE]


@dataclass(frozen=True)
class FinalJob:
    """One contender with one seed."""

    contender: Contender
    seed: int
    folder: Path
    first: Path | None = None  # the run of task one from which it goes on; None: it learns it

    @property
    def key(self) -> tuple[str, int]:
        return self.contender.label, self.seed


@dataclass(frozen=True)
class Result:
    """Scores of a final run on evaluation rows; None if it diverged, for which see `reason`."""

    new: float | None
    old: float | None
    old_after: float | None
    steps: int
    reason: str | None = None

    @property
    def new_plus_old(self) -> float | None:
        return None if self.new is None or self.old_after is None else self.new + self.old_after


Evaluate = Callable[[FinalJob], Result]


class Keyed(Protocol):
    """Something to do once, by whichever process."""

    @property
    def key(self) -> Any: ...

    @property
    def folder(self) -> Path: ...


J = TypeVar("J", bound=Keyed)
R = TypeVar("R")


def contenders(plan: Plan, found: Sequence[TrialRow]) -> list[Contender]:
    """The winner, its ablation, the best flat rate, and the shapes at that rate.

    A winner that is a flat rate, or a shape at that very rate, is listed once. Empty if no trial
    was finished.
    """
    winner, flat = best(found), best(found, kind="flat")
    made: list[Contender] = []
    if winner is not None and winner.kind != "flat":
        shape = winner.control  # None: it was searched
        label = f"{shape}@{winner.rate:g}" if shape else f"trial {winner.number}"
        made.append(Contender(label, "searched", winner.number, dict(winner.params),
                              winner.lineage))  # fmt: skip
        params = {**winner.params, **dict.fromkeys(plan.space.shape, 1.0)}
        if flat is None or params != flat.params:
            made.append(Contender(f"flat as {label}", "ablation", winner.number, params))
    if flat is None or flat.rate is None:
        return made
    made.append(Contender(f"flat@{flat.rate:g}", "flat", flat.number, dict(flat.params)))
    by_kind = {r.kind: r for r in found if r.kind not in (None, "flat")}
    for control in plan.controls:
        label = f"{control.label}@{flat.rate:g}"
        # A shape that won at this very rate is listed already, as the winner.
        if control.kind != "flat" and all(label != c.label for c in made):
            params = {**control.params, RATE: flat.rate}
            made.append(Contender(label, control.kind, by_kind[control.kind].number, params))
    return made


def jobs(folder: Path, plan: Plan, found: Sequence[TrialRow]) -> list[FinalJob]:
    """Every contender with every fresh seed; all of them with one seed before the next."""
    return [
        FinalJob(
            c, seed, folder / FOLDER / slug(c.label) / f"seed-{seed}", plan.first(folder, seed)
        )
        for seed in plan.fresh_seeds
        for c in contenders(plan, found)
    ]


def finish(
    work: Sequence[J], evaluate: Callable[[J], R], *, look: Callable[[], None] = lambda: None
) -> dict[Any, R]:
    """Run, or read, every job; returns key → result once all are done."""
    found: dict[Any, R] = {}
    watch = lease.Watch()
    while True:
        before = len(found)
        for job in work:
            if job.key in found:
                continue
            stopping.check()
            if not watch.free(job.folder):
                continue
            try:
                found[job.key] = evaluate(job)
            except Busy:
                continue
            look()
        if len(found) == len(work):
            return found
        if len(found) == before:
            look()
            wait(POLL, stopping.check)


class Evaluation:
    """Makes a final run: an ordinary sequence, in the one store of runs."""

    def __init__(self, plan: Plan, command: Sequence[str] | None = None) -> None:
        self.plan, self.command = plan, list(command or sys.argv)
        self._pairs: dict[int, Any] = {}

    def __call__(self, job: FinalJob) -> Result:
        plan, c = self.plan, job.contender
        if job.seed not in self._pairs:
            self._pairs[job.seed] = plan.pair(job.seed)
        if (said := how_diverged(job.folder)) is not None:
            return Result(None, None, None, 0, said)
        recipe = plan.space.recipe(plan.base, c.params, name=c.label, lineage=c.lineage)
        lr = c.lineage[0].rate if c.lineage else c.rate
        tasks, origin = list(self._pairs[job.seed]), None
        if job.first is not None:
            from holdfast.search.trial import learned_first  # it loads transformers: late

            origin = learned_first(plan, tasks[0], job.seed, job.first)
        run = Job(model=plan.model, recipe=recipe, seed=job.seed, command=self.command, bar=None,
                  origin=origin, arm=Arm(notes={"learn_old": plan.learn_old}))  # fmt: skip
        try:
            record = run.run(tasks, replace(plan.settings, lr=lr), job.folder)
        except TrainingDiverged as refusal:
            note_diverged(job.folder, refusal)
            return Result(None, None, None, 0, str(refusal))
        drop_weights(job.folder)
        scores = record.scores
        steps = sum(n or 0 for n in record.steps[1 if origin else 0 :])
        return Result(scores[1][1], scores[0][0], scores[1][0], steps)
