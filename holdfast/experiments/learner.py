"""The work of a sequence: one task at a time through a Trainer, with what a restart needs."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, TrainerCallback

from holdfast.engine.bound import Bound
from holdfast.engine.forwarding import uncompiled
from holdfast.engine.peft import adapt, folded
from holdfast.errors import Refused, tell_once
from holdfast.experiments.callbacks import Bar, Counting, HeadNoted, Held, History, drawn
from holdfast.experiments.loaded import Loaded
from holdfast.experiments.mix import mixed
from holdfast.experiments.movement import movement
from holdfast.experiments.ranks import first
from holdfast.experiments.record import Record
from holdfast.experiments.runs import check_held
from holdfast.experiments.serving import finish, models_in, save, shared_weights
from holdfast.experiments.settings import Settings
from holdfast.network.parts import parts
from holdfast.recipe import Recipe
from holdfast.tasks import Task
from holdfast.tasks.kinds import evaluate, kind_of
from holdfast.tasks.kinds.heads import Prototypes, headed
from holdfast.tasks.kinds.packed import Packed
from holdfast.tasks.kinds.pretrained import device, quiet, reading, source_hash
from holdfast.training.checkpoints import load_adapters, load_state, save_adapters, save_state
from holdfast.training.manifest import MANIFEST, commit, damage, newest_complete, step_of
from holdfast.training.trainer import Trainer


class Learner:
    """The models of a sequence, which share one encoder, and the record they fill.

    Created again after a kill, it loads the finished tasks from their checkpoints. With bf16 every
    training pass is autocast, also on replayed rows of earlier tasks; what methods estimate at a
    task's end, and scores unless `bf16_eval` is set, use full precision, before and after a restart
    alike.

    bar: a name for its progress bars, or None. place: of the first task in its sequence, which
    gives its seeds. For a search: what runs share, a task's callbacks, what is scored and kept.
    begin: puts the last of the tasks that were learned elsewhere in its folder. probes: what is
    measured beside the tasks after each. also: callbacks of every task.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        tasks: Sequence[Task],
        recipe: Recipe,
        plan: Settings,
        seed: int,
        record: Record,
        *,
        bar: str | None = None,
        place: int = 0,
        loaded: Loaded | None = None,
        callbacks: Callable[[Learner, int], list[TrainerCallback]] | None = None,
        scored: Sequence[str] = ("evaluation", "selection"),
        keeps: Callable[[Learner, int], bool] = lambda *_: True,
        begin: Callable[[Learner], None] | None = None,
        probes: Sequence[Callable[[Learner, int], None]] = (),
        also: Sequence[TrainerCallback] = (),
    ) -> None:
        quiet()
        self.folder, self.source, self.tasks, self.recipe = folder, source, tasks, recipe
        self.plan, self.seed, self.record, self.bar = plan, seed, record, bar
        self.place, self.loaded, self.scored, self.keeps = place, loaded, scored, keeps
        self.probes = probes
        self._callbacks = callbacks or (lambda _, i: [History(self, i), *also, *self._bars(i)])
        self.kind = headed(kind_of(tasks), plan.head, tasks)
        self.processor = loaded.processor if loaded else self.kind.load_processor(source)
        self.collate = self.kind.collator(self.processor)
        self.models: list[nn.Module] = []
        self.bound: Bound | None = None
        self.encoded = {} if loaded is None else loaded.rows.setdefault(seed, {})
        self._began = 0.0
        self._note_machine()
        if begin and not any((self.home(i) / MANIFEST).is_file() for i in range(len(tasks))):
            _remove(folder / "tasks")  # of a process that was killed
            self._began = time.monotonic()
            begin(self)
        finished = self._finished()
        self._restore(finished)
        for index in range(finished, len(tasks)):
            self.rows(index, "train")  # what cannot be encoded is refused before any training

    def _bars(self, index: int) -> list[TrainerCallback]:
        later, place = self._steps_after(index), (self.tasks[index].name, index, len(self.tasks))
        return [] if self.bar is None else [Bar(self.bar, *place, later=later)]

    def home(self, index: int) -> Path:
        """A task's folder: the checkpoint of its model as it was when the task was learned."""
        return self.folder / "tasks" / f"{index + 1}-{self.tasks[index].name}"

    def training(self, index: int) -> Path:
        """Where Trainer keeps its checkpoints until the task is learned."""
        home = self.home(index)
        return home.with_name(f"{home.name}.training")

    def rows(self, index: int, split: str) -> Packed:
        """A task's encoded rows; if some were cut, the log and the record say so."""
        task, most = self.tasks[index], self.plan.max_length
        if (task.name, split) not in self.encoded:
            texts = getattr(task, split)
            config = self.kind.load_config(self.source)
            made = self.kind.encode(texts, task, self.processor, max_length=most, config=config)
            cut = self.kind.count_cut(texts, made, task, self.processor, max_length=most)
            self.encoded[task.name, split] = made, cut
        rows, cut = self.encoded[task.name, split]
        if cut and split != "selection":  # selection rows are like the training rows
            kind = {"train": "training"}.get(split, split)
            share = max(1, round(100 * cut / len(rows)))
            line = f"{task.name}: {share} % of the {kind} rows are cut at {most} tokens"
            tell_once(f"{line} (--max-length)")
            self.record.warn(f"{line}.")
        return rows

    def warn(self, line: str) -> None:
        """Log a line and put it into the record."""
        logging.getLogger("holdfast").warning(line)
        self.record.warn(line)

    def _note_machine(self) -> None:
        """Record what bit-equality depends on besides the packages; warn of a change."""
        noted = self.record.versions
        if "device" in noted:  # before the number of processes was noted, too
            noted.setdefault("processes", "1")
        for name, value in self.plan.machine(self.source).items():
            before = noted.setdefault(name, value)
            if before != value:
                self.warn(f"{name} was {before} and is {value} since the run went on")

    def _finished(self) -> int:
        """How many tasks are learned: up to the last that has a folder, which holds them all."""
        recorded = len(self.record.seconds)
        kept = next((i for i in range(recorded, 0, -1) if self.home(i - 1).exists()), 0)
        if kept and (wrong := damage(self.home(kept - 1))) is not None:
            raise Refused(wrong, where=str(self.home(kept - 1)),
                          remedy="delete this folder to learn its task and later ones again, "
                          "or the whole folder of the run")  # fmt: skip
        if kept < recorded:
            self.record.forget_from(kept)
            for index in range(kept, len(self.tasks)):
                _remove(self.training(index))
        return kept

    def _restore(self, finished: int) -> None:
        if not finished:
            return
        _, self.models = models_in(self.home(finished - 1))
        if self.recipe.peft:
            adapt(self.models[-1], self.recipe.peft)
            load_adapters(self.models[-1], self.home(finished - 1), base=True)
        self.bound = self.recipe.unbound(seed=self.seed)
        load_state(self.bound, self.home(finished - 1))
        for task, model in zip(self.tasks, self.models, strict=False):
            self.bound.models[task.name] = model

    def remember(self, models: Sequence[Any]) -> None:
        """Take up the first tasks' models, learned elsewhere around one encoder, untrained here.

        Methods read these tasks' training rows, with the draws of a run that learned them.
        """
        seed = 1000 * self.seed + self.place
        self.models, self.bound = list(models), self.recipe.unbound(seed=seed)
        self.bound.skipped = sum(n or 0 for n in self.record.skipped_steps)
        adapt(self.models[-1], self.recipe.peft)
        for index, model in enumerate(models):
            task, rows = self.tasks[index], self.rows(index, "train")
            if not rows and any(m.needs_data for m in self.recipe.methods):
                raise Refused("its rows are gone, and the recipe reads them", where=task.name,
                              remedy="take the recipe it was learned with")  # fmt: skip
            if task.name in self.record.head_first:
                torch.randint(2**62, (), generator=self.bound.generator)  # fitting it drew once
            # In a random order: a file sorted by label would show a method only one class.
            order = torch.randperm(len(rows), generator=self.bound.generator)
            batches: Any = DataLoader(
                Subset(rows, order.tolist()), 32,  # type: ignore[arg-type]
                collate_fn=lambda few: self.collate(few).to(device()),
            )  # fmt: skip
            model.to(device())
            self.bound.remember(task.name, model, batches, shared=self.kind.shared(model))

    def learn(self, index: int) -> None:
        """Train on one task, close it, test every task learned so far, keep a checkpoint."""
        self._began = time.monotonic() - (self.record.elapsed or 0.0)
        task, seed = self.tasks[index], 1000 * self.seed + self.place + index
        model, rows = self._untrained(index, seed), mixed(self, index)
        self.models.append(model)
        if isinstance(self.kind, Prototypes):
            self._describe(model)
            self.kind.fit(model.to(device()), self.rows(index, "train"), task, self.collate)
            self.bound = self.bound or self.recipe.unbound(seed=self.seed)
            self.bound.remember(task.name, model, [], shared=self.kind.shared(model))
            self.note(index, steps=0, skipped=0)
            return
        if self.plan.compile and self.kind.shared(model)._compiled_call_impl is None:
            # For rows of any length from the first on: one graph, which all tasks share.
            self.kind.shared(model).compile(dynamic=True)
        trainer = Trainer(
            model=model,
            args=self.plan.arguments(self.training(index), seed=seed, rows=len(rows)),
            train_dataset=rows,
            data_collator=self.collate,
            processing_class=self.processor,
            recipe=self.recipe,
            bound=self.bound,
            task=task.name,
            shared=self.kind.shared(model),
            start=self._start(index, model),
            callbacks=self._callbacks(self, index),
        )
        if not self.record.model or self.record.rates is None or not self.kind.HEADS:
            self._describe(model)  # with its adapters, and a head that may have grown
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(HeadNoted(self.record, trainer))
        trainer.add_callback(Held(self.folder))
        for old in (m for m in self.models[:-1] if m is not model):
            trainer.accelerator.prepare_model(old, evaluation_mode=True)
        checkpoint = newest_complete(
            self.training(index), lambda line: self.warn(f"{task.name}: {line}")
        )
        self._forget_after(index, checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        for prepared in self.models:
            unprepare(prepared)
        self.bound = trainer.bound
        self.bound.evaluate = lambda: {"score": self.score(index, "selection")}
        if index and any(m.changes_weights for m in self.recipe.methods):
            self.record.before_end[task.name] = self._scores(index, "evaluation")
        trainer.end_task()
        if self.loaded is None:  # a search keeps no weights
            self.record.movement[task.name] = movement(self, index)
        self.note(index, steps=trainer.state.global_step, skipped=self._skipped(task))

    def note(self, index: int, *, steps: int, skipped: int) -> None:
        """Score all tasks up to one that is closed, keep it and record it."""
        scores = self._scores(index, "evaluation"), self._scores(index, "selection")
        for measure in self.probes:
            measure(self, index)
        check_held(self.folder)
        if self.keeps(self, index):
            self.keep(index)
        _remove(self.training(index))
        self.record.scores[index], self._selection()[index] = scores
        self.record.steps.append(steps)
        self.record.skipped_steps.append(skipped)
        self.record.methods_state = self._memory()
        self.note_time()
        self.record.seconds.append(self.record.elapsed)
        self.record.elapsed = 0.0

    def _start(self, index: int, model: Any) -> Callable[[], dict[str, torch.Tensor]] | None:
        """A loader of the weights that the task begins with, so that no method need copy them."""
        before = self.home(index - 1)
        # With adapters the start weights are few, and the folder has them folded in.
        kept = index > 0 and not self.recipe.peft and (before / "config.json").is_file()
        shared = self.kind.shared(model)
        return functools.partial(shared_weights, before, model, shared) if kept else None

    def note_time(self) -> None:
        """Seconds spent on this task so far, those of killed processes included."""
        self.record.elapsed = round(time.monotonic() - self._began, 3)

    def _skipped(self, task: Task) -> int:
        assert self.bound is not None
        skipped = self.bound.skipped - sum(n or 0 for n in self.record.skipped_steps)
        if skipped:
            self.warn(f"{task.name}: {skipped} steps skipped for non-finite gradients.")
        return skipped

    def _memory(self) -> dict[str, Any]:
        """What each method holds: bytes, and bytes per weight that was trained."""
        assert self.bound is not None
        weights = sum(w.numel() for w in self.bound.weights.values())
        held = {name: state.bytes() for name, state in self.bound.states.items()}
        return {k: {"bytes": n, "bytes_per_weight": n / weights} for k, n in held.items()}

    def _untrained(self, index: int, seed: int) -> nn.Module:
        """A task's model before it is learned; the encoder is shared from the second task on."""
        task, before = self.tasks[index], self.models[-1] if self.models else None

        def make() -> Any:
            if before is not None:
                return self.kind.add_head(before, task, seed=seed)
            model = self.kind.load_model(self.source, task, seed=seed)
            # A task alone has the head that it has in its sequence.
            return self.kind.add_head(model, task, seed=seed) if self.place else model

        return self.loaded.untrained((index, seed), make, before) if self.loaded else make()

    def _steps_after(self, index: int) -> int:
        """About how many steps the tasks after this one will make."""
        rows = [len(task.train) for task in self.tasks[index + 1 :]]
        return round(sum(map(self.plan.steps, rows)) * self.plan.epochs)

    def steps_before(self, index: int) -> int:
        """Steps made in the tasks before this one."""
        return sum(n or 0 for n in self.record.steps[:index])

    def score(self, index: int, split: str, *, most: int | None = None) -> float:
        """A task's metric on one of its splits, or on about `most` rows of it."""
        model, rows = self.models[index], self.rows(index, split)
        # Evenly spaced: the first rows of a file sorted by label are all of one class.
        rows = rows[:: max(1, len(rows) // (most or len(rows) or 1))]
        autocast, bar, collate = model.__dict__.pop("forward", None), None, self.collate
        if self.bar is not None and most is None:
            label = f"{self.bar} · " if self.bar else ""
            label += f"{self.tasks[index].name}, scored"
            bar = drawn(len(rows), label, unit="row", late=True)
            collate = Counting(collate, bar)
        device = next(model.parameters()).device.type
        try:
            with uncompiled(), torch.autocast(device, torch.bfloat16, enabled=self.plan.bf16_eval):
                return evaluate(model, rows, self.tasks[index], collate, self.kind)
        finally:
            if bar is not None:
                bar.close()
            if autocast is not None:
                model.forward = autocast

    def _scores(self, index: int, split: str) -> list[Any]:
        """A row of the matrix: None where a task is not learned yet, or has no such rows."""
        shown = index + 1 if split in self.scored else 0
        return [
            self.score(j, split) if j < shown and self.rows(j, split) else None
            for j in range(len(self.tasks))
        ]

    def _selection(self) -> list[list[Any]]:
        if self.record.selection_scores is None:
            size = len(self.tasks)
            self.record.selection_scores = [[None] * size for _ in range(size)]
        return self.record.selection_scores

    def keep(self, index: int) -> None:
        """Write a task's folder: all models so far and what the methods remember."""
        first(lambda: self._write(self.home(index), self.tasks[: index + 1]))

    def _write(self, home: Path, tasks: Sequence[Task]) -> None:
        assert self.bound is not None
        with folded(self.models[-1]):
            save(home, tasks, self.models, self.processor, self.plan.max_length, kind=self.kind)
        adapters = save_adapters(self.models[-1], home, base=True)
        commit(home, save_state(self.bound, home) | adapters)

    def finish(self) -> None:
        """Leave in `final/` what serves all tasks."""
        first(lambda: finish(self.home(len(self.tasks) - 1), self.folder))

    def _forget_after(self, index: int, checkpoint: Path | None) -> None:
        """Drop what the record holds about steps that will be repeated."""
        within = (step_of(checkpoint) or 0) if checkpoint else 0
        step = self.steps_before(index) + within
        self.record.history = [
            h for h in self.record.history if h["learning"] != index or h["step"] <= step
        ]

    def _describe(self, model: nn.Module) -> None:
        if len(self.models) == 1 and (line := self.kind.dropped(self.source)):
            self.warn(line)
        named = parts(model, self.recipe.parts)
        rates = self.recipe.rates.of(named)
        self.record.model = self.record.model or {
            "name": self.record.settings["model"],
            "architecture": type(model.base_model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": getattr(getattr(model, "config", None), "num_hidden_layers", None),
            "hash": source_hash(self.source),
            "revision": reading(self.source)[1].get("revision"),
        }
        self.record.rates = {
            "order": list(named.order),
            "multiplier": [rates[p] for p in named.order],
            "depth": [named.depth[p] for p in named.order],
            "parameters": [named.sizes[p] for p in named.order],
        }


def _remove(folder: Path) -> None:
    first(lambda: shutil.rmtree(folder, ignore_errors=True))


def unprepare(model: nn.Module) -> None:
    """Remove Accelerate's wrapper of `forward`, which a model loaded from disk would not have."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)
