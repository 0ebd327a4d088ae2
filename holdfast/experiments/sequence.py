"""Tasks learned one after another by one encoder, each tested after every task learned."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from holdfast.config import Checked, Share
from holdfast.errors import Refused
from holdfast.experiments.record import Record, commit
from holdfast.experiments.runs import RECORD, check_disk, digest, open_run
from holdfast.recipe import Recipe
from holdfast.tasks import Task, load_task

# Those of Transformers that need no settings of their own.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
]  # fmt: skip
HISTORY_ROWS = 128  # selection rows of each task that are scored while training


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """How every task of a sequence is trained; checked when it is made.

    warmup and selection are a share below 1 or a number (of steps, of rows).
    save_steps: steps between checkpoints within a task; 0 saves none, null at every epoch's end.
    alone: train each later task by itself as well, which forward transfer needs.
    """

    shares: ClassVar[tuple[str, ...]] = ("warmup", "selection")

    epochs: Annotated[float, Field(gt=0)] = 3.0
    batch_size: Annotated[int, Field(gt=0)] = 16
    accumulation: Annotated[int, Field(gt=0)] = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float | int, Field(ge=0)] = 0.1
    schedule: Schedule = "linear"
    max_length: Annotated[int, Field(gt=1)] = 128
    train_size: Annotated[int, Field(gt=0)] | None = None
    evaluation_size: Annotated[int, Field(gt=0)] | None = None
    selection: Share = 0.1
    bf16: bool = False
    save_steps: Annotated[int, Field(ge=0)] | None = None
    alone: bool = False

    @classmethod
    def where(cls, name: str) -> str:
        return "--" + name.replace("_", "-")


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
    preset or file. out: the run's folder (default: runs/ and a hash of the configuration); a run
    that was killed goes on there after its last finished task or checkpoint, and a finished one
    is only read. label: what names the run in a progress bar. settings: see `Settings`.

    All input is checked, and `Refused` raised, before any weights are loaded.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe)
    plan = Settings.from_dict(settings, where="run_sequence")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**20:
        raise Refused(f"must be a whole number from 0 to 2^20, not {seed!r}", where="--seed")
    loaded = load_tasks(tasks, seed=seed, plan=plan)
    config = {
        "model": str(model),
        "tasks": [[t.name, t.hash] for t in loaded],  # in order: a mapping would lose it
        "recipe": chosen.to_dict(),
        "seed": seed,
        "settings": plan.to_dict(),
    }
    folder = Path(out) if out is not None else Path("runs") / digest(config)

    from holdfast.experiments.heads import MINILM, locate  # transformers: only after the checks
    from holdfast.experiments.learner import Learner

    source = locate(str(model))
    check_disk(folder, _bytes_needed(source, len(loaded)))
    with open_run(folder, config):
        record = _resume(folder)
        if record is not None:
            record.settings["out"] = str(folder)  # it may have been moved
        if record is not None and record.status == "done":
            return record
        if record is None:
            record = Record(
                tasks=[describe(t) for t in loaded],
                kind="sequence" if len(loaded) > 1 else "train",
                recipe=chosen.to_dict(),
                settings={
                    **plan.to_dict(),
                    "model": str(model),
                    "optimizer": "adamw_torch_fused",
                    "out": str(folder),
                },
                seed=seed,
                command=list(command or sys.argv),
                commit=commit(Path(__file__).parent),
                exposure=MINILM["exposure"] if model == "minilm" else None,
                status="running",
            )
        learner = Learner(
            folder,
            source,
            loaded,
            chosen,
            plan,
            seed,
            record,
            bar=(label or "") if progress else None,
        )
        for index in range(len(record.seconds), len(loaded)):
            began = time.monotonic()
            learner.learn(index)
            record.seconds.append(round(time.monotonic() - began, 3))
            record.save(folder / RECORD)
        if plan.alone:
            for task, spec in list(zip(loaded, tasks, strict=True))[1:]:
                by_itself = run_sequence(
                    model, [spec], chosen, seed=seed, out=folder / "alone" / task.name,
                    progress=progress, **{**settings, "alone": False},
                )  # fmt: skip
                record.alone[task.name] = by_itself.scores[0][0]
        record.status = "done"
        record.save(folder / RECORD)
        return record


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
    """What a record says of a task."""
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


def _resume(folder: Path) -> Record | None:
    path = folder / RECORD
    return Record.load(path) if path.is_file() else None


def _bytes_needed(source: str, tasks: int) -> int:
    """A checkpoint per task, its method state, and one training checkpoint with moments."""
    weights = Path(source) / "model.safetensors"
    size = weights.stat().st_size if weights.is_file() else 500_000_000
    return size * (3 * tasks + 4)
