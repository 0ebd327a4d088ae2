"""Tasks learned one after another by one encoder, each tested after every task learned."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.errors import Refused, tell_once
from holdfast.experiments.record import Record, commit
from holdfast.experiments.runs import RECORD, check_disk, check_held, digest, open_run
from holdfast.experiments.settings import Settings
from holdfast.recipe import Recipe
from holdfast.tasks import Task, load_task


def run_sequence(
    model: str,
    tasks: Sequence[str | Path],
    recipe: Recipe | str = "plain",
    *,
    seed: int = 0,
    out: str | Path | None = None,
    label: str | None = None,
    progress: bool = True,
    command: Sequence[str] | None = None,
    **settings: Any,
) -> Record:
    """Learn `tasks` in order and test every task learned so far after each.

    model: `minilm`, a saved model's folder or a Hub id. recipe: a `Recipe`, or the name of a
    preset or file. out: the run's folder (default: runs/ and a hash of the configuration); a
    killed run resumes there from its last finished task or checkpoint, and a finished one is only
    read. label: the run's name in a progress bar. settings: see `Settings`.

    All input is checked, and `Refused` raised, before any weights are loaded.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe)
    plan = Settings.from_dict(settings)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**20:
        raise Refused(f"must be a whole number from 0 to 2^20, not {seed!r}", where="--seed")
    loaded = load_tasks(tasks, seed=seed, plan=plan)
    for task in loaded:
        for line in task.warnings:
            tell_once(f"{task.name}: {line}")
    if len(loaded) == 1 and (idle := chosen.idle_alone()):
        tell_once(idle)
    job = Job(model=str(model), recipe=chosen, seed=seed, command=list(command or sys.argv),
              bar=(label or "") if progress else None)  # fmt: skip
    return job.run(loaded, plan, None if out is None else Path(out))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a sequence has in common with the runs of its tasks alone."""

    model: str
    recipe: Recipe
    seed: int
    command: list[str]
    bar: str | None
    place: int = 0  # of the first task in its sequence: seeds are those it has there

    def run(self, tasks: list[Task], plan: Settings, folder: Path | None) -> Record:
        """Learn what a folder's record does not hold yet."""
        from holdfast.experiments.heads import check_length, locate  # loads transformers: late

        config = {
            "model": self.model,
            "tasks": [[t.name, t.hash] for t in tasks],  # in order: a mapping would lose it
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "settings": plan.to_dict(),
        }
        if self.place:
            config["place"] = self.place
        folder = Path("runs") / digest(config) if folder is None else folder
        source = locate(self.model)
        check_length(source, plan.max_length)
        check_disk(folder, _bytes_needed(source, len(tasks)))
        with open_run(folder, config):
            path = folder / RECORD
            record = Record.load(path) if path.is_file() else self._fresh(tasks, plan)
            record.settings["out"] = str(folder)  # it may have been moved
            before = record.to_dict()
            record.recipe = self.recipe.to_dict()  # which may have been renamed
            record.settings["alone"] = plan.alone or record.settings.get("alone", False)
            if record.status != "done":
                self._learn(source, tasks, plan, folder, record)
            for place, task in enumerate(tasks[1:] if plan.alone else (), 1):
                if record.alone.get(task.name) is None:
                    home, alone = folder / "alone" / task.name, replace(self, place=place)
                    by_itself = alone.run([task], replace(plan, alone=False), home)
                    record.alone[task.name] = by_itself.scores[0][0]
            record.status = "done"
            if record.to_dict() != before:
                record.save(path)
            return record

    def _fresh(self, tasks: list[Task], plan: Settings) -> Record:
        from holdfast.experiments.heads import MINILM

        record = Record(
            tasks=[describe(t) for t in tasks],
            kind="sequence" if len(tasks) > 1 else "train",
            settings={**plan.to_dict(), "model": self.model, "optimizer": "adamw_torch_fused"},
            seed=self.seed,
            command=self.command,
            commit=commit(Path(__file__).parent),
            exposure=MINILM["exposure"] if self.model == "minilm" else None,
            status="running",
        )
        if len(tasks) == 1 and (idle := self.recipe.idle_alone()):
            record.warn(idle)
        return record

    def _learn(
        self, source: str, tasks: list[Task], plan: Settings, folder: Path, record: Record
    ) -> None:
        from holdfast.experiments.learner import Learner

        learner = Learner(folder, source, tasks, self.recipe, plan, self.seed, record, bar=self.bar,
                          place=self.place)  # fmt: skip
        for index in range(len(record.seconds), len(tasks)):
            try:
                learner.learn(index)
            except Refused as refusal:  # training diverged, or a disk is full
                record.warn(f"{tasks[index].name} was not learned: {refusal}")
                with suppress(Refused):
                    check_held(folder)
                    record.save(folder / RECORD)
                raise
            record.save(folder / RECORD)


def load_tasks(specs: Sequence[str | Path], *, seed: int, plan: Settings) -> list[Task]:
    """Every task, checked; two of one name are refused."""
    if not specs:
        raise Refused("no tasks", where="--tasks", remedy="name a folder, a file or builtin:NAME")
    loaded = [
        load_task(
            spec,
            seed=seed,
            train_size=plan.train_size,
            selection=plan.selection,
            evaluation_size=plan.evaluation_size,
        )
        for spec in specs
    ]
    names = [t.name for t in loaded]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"two tasks are called {name!r}", where="--tasks",
                          remedy="give one another name: FILE?name=other")  # fmt: skip
    return loaded


def describe(task: Task) -> dict[str, Any]:
    """What a record holds about a task."""
    return {
        "name": task.name,
        "metric": task.metric,
        "labels": None if task.labels is None else list(task.labels),
        "rows": task.rows,
        "hash": task.hash,
        "evaluation_hash": task.evaluation_hash,
        "source": task.source,
        "synthetic": task.synthetic,
        "warnings": list(task.warnings),
    }


def _bytes_needed(source: str, tasks: int) -> int:
    """A checkpoint per task with its method state, and three of training, with moments."""
    weights = Path(source) / "model.safetensors"
    size = weights.stat().st_size if weights.is_file() else 500_000_000
    return size * (3 * tasks + 3 * 3)
