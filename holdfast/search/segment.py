"""A segment of population-based training: one member, one sixth of a task, in a folder of its own.

It begins with what its parent left: the models and states of learned tasks, and the checkpoint at
the end of the parent's segment. Where the parent is another member, the weights, moments and
methods' state are that one's bit for bit, while random states, seeds and rates are the member's
own. Files are hard links to the parent's where the system has them. A member that takes nothing
over is one run, however often it is interrupted.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from holdfast.errors import Refused, TrainingDiverged
from holdfast.experiments.learner import Learner
from holdfast.experiments.memory import out_of_memory, too_large
from holdfast.experiments.record import Record
from holdfast.experiments.runs import RECORD, open_run
from holdfast.files import write_text_atomic
from holdfast.recipe import Recipe
from holdfast.search.objective import evenly, rung_steps
from holdfast.search.pbt import OUTCOME, Outcome, Segment, read
from holdfast.search.plan import Plan
from holdfast.search.space import INTERVALS
from holdfast.search.trial import Training, some_rows
from holdfast.search.worker import Replicate
from holdfast.training.checkpoints import META, TENSORS
from holdfast.training.manifest import checkpoints_in, commit, damage, newest_complete
from holdfast.training.tensors import write_tensors


class Reached(Exception):
    """A segment that is not its task's last one has ended, and is saved and scored."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__("a segment has ended")
        self.scores = scores


class _Until(TrainerCallback):
    """Saves at a segment's end, scores and ends it."""

    begun = made = 0  # steps of the task before the segment, and so far

    def __init__(self, learner: Learner, segment: Segment) -> None:
        self.learner, self.segment = learner, segment

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun, self.end = bounds(self.segment, state.max_steps)
        self.made = state.global_step
        self._score(state)  # its process may have been killed before it could

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.made = state.global_step
        control.should_save |= self.made == self.end < state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._score(state)

    def _score(self, state: Any) -> None:
        if state.global_step == self.end < state.max_steps:
            learner, learned = self.learner, range(self.segment.task + 1)
            raise Reached([learner.score(j, "selection", most=some_rows(learner, j))
                           for j in learned])  # fmt: skip


def bounds(segment: Segment, total: int) -> tuple[int, int]:
    """The steps of a task before a segment, and those at its end."""
    steps = [0, *rung_steps(total, evenly(INTERVALS))]
    return steps[segment.within], steps[segment.within + 1]


class Segments:
    """How a process trains segments: `train(segment)`; `Busy` where another one does."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.training = plan, Training(plan)

    def __call__(self, segment: Segment) -> Outcome:
        if (known := segment.outcome) is not None:
            return known
        ended = read(segment.source) if segment.generation else None
        plan, lr = self.plan, segment.lineage[0].rate
        recipe = plan.space.recipe(plan.base, {}, name=f"member {segment.member}",
                                   lineage=segment.lineage)  # fmt: skip
        job = Replicate(segment.member, 0, plan.seed, recipe, lr, segment.folder)
        config = self.training.config(job) | {"member": segment.member}
        with open_run(segment.folder, config):
            if (known := segment.outcome) is not None:
                return known
            if ended is not None and ended.value is None:  # as has every member
                found = Outcome(reason=ended.reason)
            else:
                found = self._train(segment, job)
            for training in (segment.folder / "tasks").glob("*.training"):
                for old in checkpoints_in(training)[:-1]:
                    shutil.rmtree(old)
            write_text_atomic(segment.folder / OUTCOME, json.dumps(vars(found)))
        return found

    def _train(self, segment: Segment, job: Replicate) -> Outcome:
        plan, index, began = self.plan, segment.task, time.monotonic()
        tasks, settings = list(self.training.pair(job.seed)), self.training.settings(job)
        if segment.generation and not self._placed(segment):
            self._place(segment, job.recipe)
            if not self._placed(segment):
                raise Refused("what a member goes on from is damaged", where=str(segment.source),
                              remedy="choose another --out")  # fmt: skip
        path = segment.folder / RECORD
        record = Record.load(path) if path.is_file() else self.training.record(job)
        watched: list[_Until] = []

        def watch(learner: Learner, _: int) -> list[TrainerCallback]:
            watched.append(_Until(learner, segment))
            return [*watched]

        try:
            if len(record.seconds) <= index:
                learner = Learner(
                    job.folder, plan.source, tasks, job.recipe, settings, job.seed, record,
                    place=place(segment.member), loaded=self.training.loaded.anew(),
                    callbacks=watch, scored=("selection",), keeps=lambda _, i: i == 0,
                )  # fmt: skip
                learner.learn(index)
                record.status = "done" if index else "running"
                record.save(path)
            total = record.steps[index] or 0
            steps, row = total - bounds(segment, total)[0], (record.selection_scores or [])[index]
            scores = [float("nan") if score is None else float(score) for score in row[: index + 1]]
        except Reached as end:
            record.save(path)
            steps, scores = watched[0].end - watched[0].begun, end.scores
        except TrainingDiverged as end:
            steps = sum(w.made - w.begun for w in watched)
            return Outcome(steps=steps, seconds=_since(began), reason=str(end))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise too_large(settings, job.folder) from None
        finally:
            gc.collect()  # a Trainer forms reference cycles with its model and moments
        if not all(map(math.isfinite, scores)):
            return Outcome(steps=steps, seconds=_since(began), reason="diverged: a score is not "
                           "finite")  # fmt: skip
        before = (record.selection_scores or [])[0][0] if index else scores[0]
        new, after = (scores[1], scores[0]) if index else (None, None)
        return Outcome(sum(scores), before, new, after, steps, _since(began))

    def _placed(self, segment: Segment) -> bool:
        """Whether the folder holds a state to go on from, of this segment."""
        home = segment.folder / "tasks"
        if not segment.within:
            return home.is_dir()
        return any(newest_complete(training) for training in home.glob("*.training"))

    def _place(self, segment: Segment, recipe: Recipe) -> None:
        """Put what the parent left into the folder, made the member's own: all of it or nothing."""
        home, part = segment.folder / "tasks", segment.folder / "tasks.part"
        for stale in (home, part):
            shutil.rmtree(stale, ignore_errors=True)
        shutil.copytree(segment.source / "tasks", part, copy_function=_link)
        state = state_in(part)
        if state is None or damage(state) is not None:
            return
        if segment.parent != segment.member:
            seed = 1000 * self.plan.seed + place(segment.member) + segment.task
            make_own(state, state_in(segment.before / "tasks"), recipe, seed)
        shutil.copyfile(segment.source / RECORD, segment.folder / RECORD)
        part.rename(home)


def place(member: int) -> int:
    """What makes the seeds of a member its own; those of the first are a sequence's."""
    return 2 * member


def state_in(tasks: Path) -> Path | None:
    """The state that a segment left: its last checkpoint, or the folder of the task it ended."""
    trained = [c for training in tasks.glob("*.training") for c in checkpoints_in(training)]
    homes = [p for p in sorted(tasks.glob("*")) if p.suffix != ".training"]
    return next(reversed(trained or homes), None)


def make_own(state: Path, mine: Path | None, recipe: Recipe, seed: int) -> None:
    """Give another member's state the random states of `mine`, and the plan of this recipe.

    A member that diverged before it had a state begins its random generators anew. seed: of its
    Trainer, which gives its data order.
    """
    for theirs in state.glob("rng_state*"):  # without one a Trainer seeds itself
        theirs.unlink()
        if mine is not None and (mine / theirs.name).is_file():
            _link(mine / theirs.name, theirs)
    drawn = recipe.unbound(seed=seed).randomness if mine is None else _drawn(mine)
    write_tensors(state / TENSORS, load_file(state / TENSORS) | {"generator": drawn})
    meta = json.loads((state / META).read_text(encoding="utf-8"))
    if plan := meta.get("plan"):
        plan["pieces"] = [piece.to_dict() for piece in recipe.rates.pieces]
        if "arguments" in plan:
            plan["arguments"] |= {"seed": seed, "data_seed": seed}
    write_text_atomic(state / META, json.dumps(meta, indent=1))
    commit(state)


def _drawn(state: Path) -> Any:
    return load_file(state / TENSORS)["generator"]


def _link(source: str | Path, path: str | Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, path)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
