"""A trial as a run: two tasks one after another, in a folder of its own, scored on selection rows.

What all trials of a worker share is loaded once: the tokenizer, the tokenised rows, and the
pre-trained encoder with untrained heads, which each trial copies. A trial is the run that
`run_sequence` would make of its recipe, bit for bit, without the scores on evaluation rows. Where
task one is learned once for all trials of a seed, it is the run that goes on from that one.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from holdfast.errors import Busy, TrainingDiverged
from holdfast.experiments import lease
from holdfast.experiments.learner import Learner
from holdfast.experiments.loaded import Loaded
from holdfast.experiments.memory import within_memory
from holdfast.experiments.origin import FromRun
from holdfast.experiments.record import Record, commit, now, versions
from holdfast.experiments.runs import RECORD, ended, open_run
from holdfast.experiments.sequence import Arm, Job, describe
from holdfast.experiments.settings import Settings
from holdfast.search.objective import Diverged, Scores, Stop, Watch, rung_steps
from holdfast.search.plan import Plan
from holdfast.search.study import wait
from holdfast.search.worker import POLL, Replicate
from holdfast.tasks import Task
from holdfast.tasks.kinds import kind_of
from holdfast.tasks.scores import constant_score
from holdfast.training import stopping
from holdfast.training.manifest import damage

RUNG_ROWS = 128  # selection rows of each task that are scored at a rung within a task, at most
WORTH_KEEPING = 60.0  # seconds: a task one of less is not saved at its end (saving takes about one)


class _Rungs(TrainerCallback):
    """Scores what is learned so far, where a rung comes within a task."""

    def __init__(self, learner: Learner, index: int, watch: Watch) -> None:
        self.learner, self.index, self.watch = learner, index, watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        learner, index, rungs = self.learner, self.index, self.watch.rungs
        self.watch.made = learner.steps_before(index) + state.global_step
        inner = rung_steps(state.max_steps, rungs)[:-1]
        if state.global_step not in inner or state.global_step == state.max_steps:
            return
        scores = [learner.score(j, "selection", most=some_rows(learner, j))
                  for j in range(index + 1)]  # fmt: skip
        number = self.watch.rung(index, sum(at <= state.global_step for at in inner))
        row = [*scores, *[None] * (1 - index)]
        learner.record.history.append({"learning": index, "step": self.watch.made, "epoch": None,
                                       "loss": None, "scores": row})  # fmt: skip
        self.watch.at(number, steps=self.watch.made, old=scores[0],
                      new=scores[1] if index else None)  # fmt: skip

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learner.note_time()
        self.learner.record.save(self.learner.folder / RECORD)


def some_rows(learner: Learner, index: int) -> int:
    """How many rows to score: every k-th, for the least k that gives at most `RUNG_ROWS`."""
    size = len(learner.rows(index, "selection"))
    return size // math.ceil(size / RUNG_ROWS)


def _keeps(learner: Learner, index: int) -> bool:
    """Nothing needs the last task's model, and a short first task is as fast to learn again."""
    learner.note_time()
    worth = learner.plan.save_steps or learner.record.elapsed >= WORTH_KEEPING
    return index + 1 < len(learner.tasks) and bool(worth)


class Training:
    """How a worker trains trials: `train(job, watch)`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._pairs: dict[int, tuple[Task, ...]] = {}  # by seed

    @functools.cached_property
    def loaded(self) -> Loaded:
        return Loaded(self.plan.source, kind_of(self.plan.tasks))

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The provenance in every record."""
        return {"commit": commit(Path(__file__).parent), "versions": versions(),
                "command": list(sys.argv)}  # fmt: skip

    def pair(self, seed: int) -> tuple[Task, ...]:
        """The two tasks of a seed."""
        if seed not in self._pairs:
            self._pairs[seed] = self.plan.pair(seed)
        return self._pairs[seed]

    def __call__(self, job: Replicate, watch: Watch) -> Scores:
        tasks = list(self.pair(job.seed))
        one = tasks[0]
        watch.floor = constant_score(
            one.metric, [row.label for row in one.selection],
            None if one.labels is None else len(one.labels),
        )  # fmt: skip
        config, first = self.config(job), None
        if job.first is not None:
            first = learned_first(self.plan, one, job.seed, job.first, scored=("selection",))
            config["from"] = first.mark
            watch.begun, watch.shared = 1, sum(n or 0 for n in first.record.steps)
        with open_run(job.folder, config):
            path = job.folder / RECORD
            record = Record.load(path) if path.is_file() else self.record(job, first)
            try:
                if record.status != "done":
                    self._learn(job, tasks, self.settings(job), record, watch, first)
            finally:
                gc.collect()  # a Trainer forms reference cycles with its model and moments
            self._clear(job.folder)
        return _scores(record, watch.begun)

    def settings(self, job: Replicate) -> Settings:
        return replace(self.plan.settings, lr=job.lr)

    def config(self, job: Replicate) -> dict[str, Any]:
        """What makes a job's run what it is."""
        return {
            "model": self.plan.model,
            "tasks": [[t.name, t.hash] for t in self.pair(job.seed)],
            "recipe": job.recipe.to_dict(),
            "seed": job.seed,
            "settings": self.settings(job).to_dict(),
            "scored": "selection",  # so that `run_sequence` does not resume such a run
        }

    def _learn(
        self, job: Replicate, tasks: list[Task], plan: Settings, record: Record, watch: Watch,
        first: FromRun | None,
    ) -> None:  # fmt: skip
        _drop_damaged(job.folder)

        def learn(plan: Settings) -> None:
            watch.made = watch.shared
            learner = Learner(
                job.folder, self.plan.source, tasks, job.recipe, plan, job.seed, record,
                loaded=self.loaded, callbacks=lambda learner, task: [_Rungs(learner, task, watch)],
                scored=("selection",),  # evaluation rows decide nothing here
                keeps=_keeps,
                begin=first.begin if first else None,
            )  # fmt: skip
            for index in range(len(record.seconds), len(tasks)):
                learner.learn(index)
                if index + 1 == len(tasks):
                    record.status = "done"
                record.save(job.folder / RECORD)
                row = cast(Any, record.selection_scores)[index]
                watch.at(watch.rung(index, len(watch.rungs)), old=row[0], new=row[1],
                         steps=learner.steps_before(index + 1))  # fmt: skip

        try:
            within_memory(learn, plan, record, job.folder)
        except (Stop, TrainingDiverged) as end:
            stop = end if isinstance(end, Stop) else Diverged(str(end), watch.spent)
            record.warn(stop.reason)
            record.save(job.folder / RECORD)
            self._clear(job.folder)
            raise stop from None

    def record(self, job: Replicate, first: FromRun | None = None) -> Record:
        """The record of a job that nobody has begun."""
        told = [describe(task) for task in self.pair(job.seed)]
        record = first.record if first else Record(tasks=told, seed=job.seed)
        record.set_tasks(told)
        record.status, record.created, record.rates = "running", now(), None
        record.settings = {**self.settings(job).to_dict(), "model": self.plan.model,
                           "optimizer": "adamw_torch_fused", "out": str(job.folder)}  # fmt: skip
        record.recipe = job.recipe.to_dict()
        record.extra = {"learn_old": self.plan.learn_old}
        if first:
            record.extra["from"] = str(first.folder)
        for key, value in copy.deepcopy(self.origin).items():
            setattr(record, key, value)
        return record

    @staticmethod
    def _clear(folder: Path) -> None:
        """Delete the weights of a trial that is over: those of fifty would fill a disk."""
        shutil.rmtree(folder / "tasks", ignore_errors=True)


def _drop_damaged(folder: Path) -> None:
    """Delete a first task that was not saved whole: the trial learns it again without asking."""
    for home in (folder / "tasks").glob("1-*"):
        if not home.name.endswith(".training") and damage(home) is not None:
            shutil.rmtree(home)


def learned_first(
    plan: Plan, task: Task, seed: int, folder: Path, *, scored: Sequence[str] = Arm.scored
) -> FromRun:
    """The run of task one at the control rate, flat and plain, by whichever process.

    Every trial of the seed goes on from it. Refused: it diverged.
    """
    recipe = replace(plan.base, methods=(), name="first task")
    first = Job(model=plan.model, recipe=recipe, seed=seed, command=list(sys.argv), bar=None,
                arm=Arm(scored=scored, notes={"serves": "first"}))  # fmt: skip
    watch = lease.Watch()
    while not ended(folder):
        with suppress(Busy):
            if watch.free(folder):
                first.run([task], replace(plan.settings, lr=plan.old_rate), folder)
                break
        wait(POLL, stopping.check)
    return FromRun(folder)


def _scores(record: Record, begun: int) -> Scores:
    """begun: tasks whose steps were not its own."""
    matrix = record.selection_scores or []
    return Scores(
        old=_number(matrix[0][0]), new=_number(matrix[1][1]), old_after=_number(matrix[1][0]),
        steps=sum(n or 0 for n in record.steps[begun:]),
        seconds=sum(s or 0.0 for s in record.seconds[begun:]),
    )  # fmt: skip


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
