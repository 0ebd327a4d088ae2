"""A trial as a run: two tasks one after another, in a folder of its own, scored on selection rows.

What all trials of a worker share is loaded once: the tokenizer, the tokenised rows, and the
pre-trained encoder with untrained heads, which each trial copies. A trial is the run that
`run_sequence` would make of its recipe, bit for bit, without the scores on evaluation rows.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from holdfast.errors import TrainingDiverged
from holdfast.experiments.heads import load_tokenizer, share_encoder
from holdfast.experiments.learner import Learner
from holdfast.experiments.record import Record, commit, versions
from holdfast.experiments.runs import RECORD, open_run
from holdfast.experiments.sequence import describe
from holdfast.search.objective import Diverged, Scores, Stop, Watch, constant_score, rung_steps
from holdfast.search.plan import Plan
from holdfast.search.worker import Replicate
from holdfast.tasks import Task
from holdfast.training.manifest import damage

RUNG_ROWS = 128  # selection rows of each task that are scored at a rung within a task, at most
WORTH_KEEPING = 60.0  # seconds: a task one of less is not saved at its end (saving takes about one)


@dataclass
class Loaded:
    """What the trials of one worker share."""

    plan: Plan
    tasks: dict[int, tuple[Task, ...]] = field(default_factory=dict)  # by seed
    rows: dict[int, dict[Any, Any]] = field(default_factory=dict)  # tokenised, by seed
    untrained: dict[tuple[int, int], nn.Module] = field(default_factory=dict)  # by task and seed

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.plan.source)

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The provenance in every record."""
        return {"commit": commit(Path(__file__).parent), "versions": versions(),
                "command": list(sys.argv)}  # fmt: skip

    def pair(self, seed: int) -> tuple[Task, ...]:
        if seed not in self.tasks:
            self.tasks[seed] = self.plan.pair(seed)
        return self.tasks[seed]


class TrialLearner(Learner):
    """A `Learner` that uses `Loaded`, reports rungs, and keeps only what a restart needs."""

    def __init__(self, loaded: Loaded, watch: Watch, *args: Any) -> None:
        self.loaded, self.watch = loaded, watch
        self.made = 0  # steps of all tasks so far, those of killed processes included
        super().__init__(*args, bar=None)
        self._encoded = loaded.rows.setdefault(self.seed, {})

    def _tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def _untrained(self, index: int, seed: int) -> nn.Module:
        """A copy of the model made for the first trial; a head's draws depend only on its seed."""
        kept = self.loaded.untrained
        if (index, seed) not in kept:
            fresh: Any = super()._untrained(index, seed)
            if index:  # the encoder is this trial's, and not part of what is kept
                setattr(fresh, fresh.base_model_prefix, nn.Identity())
            kept[index, seed] = fresh
        model: Any = copy.deepcopy(kept[index, seed])
        if index:
            share_encoder(self.models[-1], model)
        return model

    def _callbacks(self, index: int) -> list[TrainerCallback]:
        return [_Rungs(self, index)]

    def _scores(self, index: int, split: str) -> list[Any]:
        """Evaluation rows decide nothing here, and are not scored."""
        return [None] * len(self.tasks) if split == "evaluation" else super()._scores(index, split)

    def _keep(self, index: int, model: Any) -> None:
        """Nothing needs the last task's model, and a short first task is as fast to learn again."""
        self.note_time()
        worth = self.plan.save_steps or self.record.elapsed >= WORTH_KEEPING
        if index + 1 < len(self.tasks) and worth:
            super()._keep(index, model)
        else:
            shutil.rmtree(self.training(index), ignore_errors=True)

    def learn(self, index: int) -> None:
        super().learn(index)
        if index + 1 == len(self.tasks):
            self.record.status = "done"
        self.record.save(self.folder / RECORD)
        row = self._selection()[index]
        self.watch.at((index + 1) * len(self.watch.rungs), steps=self.steps_before(index + 1),
                      old=row[0], new=row[1])  # fmt: skip

    def rung(self, index: int, step: int, total: int) -> None:
        """Score what is learned so far, if a rung of this task comes at this step."""
        inner = rung_steps(total, self.watch.rungs)[:-1]
        if step not in inner or step == total:
            return
        scores = [self.score(j, "selection", most=self._some(j)) for j in range(index + 1)]
        number = index * len(self.watch.rungs) + sum(at <= step for at in inner)
        row = [*scores, *[None] * (1 - index)]
        self.record.history.append({"learning": index, "step": self.made, "epoch": None,
                                    "loss": None, "scores": row})  # fmt: skip
        self.watch.at(number, steps=self.made, old=scores[0], new=scores[1] if index else None)

    def _some(self, index: int) -> int:
        """How many rows to score: every k-th, for the least k that gives at most `RUNG_ROWS`."""
        size = len(self.rows(index, "selection"))
        return size // math.ceil(size / RUNG_ROWS)


class _Rungs(TrainerCallback):
    """Checks after every step whether a rung is reached."""

    def __init__(self, learner: TrialLearner, index: int) -> None:
        self.learner, self.index = learner, index

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learner.made = self.learner.steps_before(self.index) + state.global_step
        self.learner.rung(self.index, state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learner.note_time()
        self.learner.record.save(self.learner.folder / RECORD)


class Training:
    """How a worker trains trials: `train(job, watch)`."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.loaded = plan, Loaded(plan)

    def __call__(self, job: Replicate, watch: Watch) -> Scores:
        plan, tasks = replace(self.plan.settings, lr=job.lr), list(self.loaded.pair(job.seed))
        one = tasks[0]
        watch.floor = constant_score(
            one.metric, [row.label for row in one.selection],
            None if one.labels is None else len(one.labels),
        )  # fmt: skip
        config = {
            "model": self.plan.model,
            "tasks": [[t.name, t.hash] for t in tasks],
            "recipe": job.recipe.to_dict(),
            "seed": job.seed,
            "settings": plan.to_dict(),
            "scored": "selection",  # so that `run_sequence` does not resume such a run
        }
        with open_run(job.folder, config):
            path = job.folder / RECORD
            record = Record.load(path) if path.is_file() else self._record(job, tasks, plan)
            try:
                if record.status != "done":
                    self._learn(job, tasks, plan, record, watch)
            finally:
                gc.collect()  # a Trainer forms reference cycles with its model and moments
            self._clear(job.folder)
        return _scores(record)

    def _learn(
        self, job: Replicate, tasks: list[Task], plan: Any, record: Record, watch: Watch
    ) -> None:
        _drop_damaged(job.folder)
        learner = TrialLearner(self.loaded, watch, job.folder, self.plan.source, tasks, job.recipe,
                               plan, job.seed, record)  # fmt: skip
        try:
            for index in range(len(record.seconds), len(tasks)):
                learner.learn(index)
        except (Stop, TrainingDiverged) as end:
            stop = end if isinstance(end, Stop) else Diverged(str(end), learner.made)
            record.warn(stop.reason)
            record.save(job.folder / RECORD)
            self._clear(job.folder)
            raise stop from None

    def _record(self, job: Replicate, tasks: list[Task], plan: Any) -> Record:
        return Record(
            tasks=[describe(task) for task in tasks],
            settings={**plan.to_dict(), "model": self.plan.model,
                      "optimizer": "adamw_torch_fused", "out": str(job.folder)},
            recipe=job.recipe.to_dict(), seed=job.seed, status="running",
            **copy.deepcopy(self.loaded.origin),
        )  # fmt: skip

    @staticmethod
    def _clear(folder: Path) -> None:
        """Delete the weights of a trial that is over: those of fifty would fill a disk."""
        shutil.rmtree(folder / "tasks", ignore_errors=True)


def _drop_damaged(folder: Path) -> None:
    """Delete a first task that was not saved whole: the trial learns it again without asking."""
    for home in (folder / "tasks").glob("1-*"):
        if not home.name.endswith(".training") and damage(home) is not None:
            shutil.rmtree(home)


def _scores(record: Record) -> Scores:
    matrix = record.selection_scores or []
    return Scores(
        old=_number(matrix[0][0]), new=_number(matrix[1][1]), old_after=_number(matrix[1][0]),
        steps=sum(n or 0 for n in record.steps), seconds=sum(s or 0.0 for s in record.seconds),
    )  # fmt: skip


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
