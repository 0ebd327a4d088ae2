"""The work of a sequence: one task at a time through a Trainer, with what a restart needs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from holdfast.bound import Bound
from holdfast.experiments.heads import (
    add_head,
    encode,
    evaluate,
    load_model,
    load_tokenizer,
    quiet,
    share_encoder,
    source_hash,
)
from holdfast.experiments.record import Record
from holdfast.experiments.runs import RECORD
from holdfast.experiments.sequence import HISTORY_ROWS, Settings
from holdfast.parts import parts
from holdfast.recipe import Recipe
from holdfast.tasks import Task
from holdfast.training.checkpoints import load_state, newest_complete, save_state
from holdfast.training.trainer import Trainer

BAR_LINE = 0  # where this process draws its bar, below those of other processes


class Learner:
    """The models of a sequence, one encoder between them, and the record they fill.

    Made anew after a kill, it takes up the finished tasks from their checkpoints.
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
        bar: str | None,
    ) -> None:
        quiet()
        self.folder, self.source, self.tasks, self.recipe = folder, source, tasks, recipe
        self.plan, self.seed, self.record, self.bar = plan, seed, record, bar
        self.tokenizer = load_tokenizer(source)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.models: list[nn.Module] = []
        self.bound: Bound | None = None
        self._encoded: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._restore(len(record.seconds))

    def home(self, index: int) -> Path:
        """A task's folder: the checkpoint of its model as it was when the task was learned."""
        return self.folder / "tasks" / f"{index + 1}-{self.tasks[index].name}"

    def rows(self, index: int, split: str) -> list[dict[str, Any]]:
        """A task's encoded rows."""
        task = self.tasks[index]
        if (task.name, split) not in self._encoded:
            self._encoded[task.name, split] = encode(
                getattr(task, split), task, self.tokenizer, max_length=self.plan.max_length
            )
        return self._encoded[task.name, split]

    def _restore(self, finished: int) -> None:
        for index in range(finished):
            model = AutoModelForSequenceClassification.from_pretrained(self.home(index))
            self.models.append(model)
        if finished:
            for model in self.models[:-1]:
                share_encoder(self.models[-1], model)
            self.bound = self.recipe.unbound(seed=self.seed)
            load_state(self.bound, self.home(finished - 1))
            for task, model in zip(self.tasks, self.models, strict=False):
                self.bound.models[task.name] = model

    def learn(self, index: int) -> None:
        """Train on one task, close it, test every task learned so far, keep a checkpoint."""
        task, seed = self.tasks[index], 1000 * self.seed + index
        model = (
            add_head(self.models[-1], task, seed=seed)
            if self.models
            else load_model(self.source, task, seed=seed)
        )
        if index == 0:
            self._describe(model)
        self.models.append(model)
        training = self.home(index) / "training"
        trainer = Trainer(
            model=model,
            args=self._arguments(training, seed, len(self.rows(index, "train"))),
            train_dataset=self.rows(index, "train"),
            data_collator=self.collate,
            processing_class=self.tokenizer,
            recipe=self.recipe,
            bound=self.bound,
            task=task.name,
            shared=model.base_model,
            callbacks=[_History(self, index), *(self._bars(task.name))],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = newest_complete(training)
        self._forget_after(index, checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.bound = trainer.bound
        skipped = self.bound.skipped - sum(n or 0 for n in self.record.skipped_steps)
        if index + 1 < len(self.tasks):
            trainer.end_task()
        for row, split in ((self.record.scores, "evaluation"), (self._selection(), "selection")):
            for j in range(index + 1):
                if self.rows(j, split):
                    row[index][j] = self.score(j, split)
        self._keep(index, model)
        self.record.steps.append(trainer.state.global_step)
        self.record.skipped_steps.append(skipped)

    def _bars(self, task: str) -> list[TrainerCallback]:
        return [] if self.bar is None else [_Bar(self.bar, task)]

    def steps_before(self, index: int) -> int:
        """Steps made in the tasks before this one."""
        return sum(n or 0 for n in self.record.steps[:index])

    def score(self, index: int, split: str, *, most: int | None = None) -> float:
        """A task's metric on one of its splits, on the first `most` rows."""
        rows = self.rows(index, split)[:most]
        return evaluate(self.models[index], rows, self.tasks[index], self.collate)

    def _selection(self) -> list[list[Any]]:
        if self.record.selection_scores is None:
            size = len(self.tasks)
            self.record.selection_scores = [[None] * size for _ in range(size)]
        return self.record.selection_scores

    def _keep(self, index: int, model: Any) -> None:
        assert self.bound is not None
        home = self.home(index)
        model.save_pretrained(home)
        self.tokenizer.save_pretrained(home)
        save_state(self.bound, home)
        if (home / "training").exists():
            # By another name first: half a checkpoint must not be taken for a whole one.
            shutil.rmtree(home / "finished", ignore_errors=True)
            (home / "training").rename(home / "finished")
            shutil.rmtree(home / "finished", ignore_errors=True)

    def _forget_after(self, index: int, checkpoint: Path | None) -> None:
        """Drop what the record says of steps that will be made again."""
        within = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        step = self.steps_before(index) + within
        self.record.history = [
            h for h in self.record.history if h["learning"] != index or h["step"] <= step
        ]

    def _describe(self, model: nn.Module) -> None:
        named = parts(model)
        rates = self.recipe.rates.of(named)
        self.record.model = {
            "name": self.record.settings["model"],
            "architecture": type(model.base_model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": getattr(model.config, "num_hidden_layers", None),
            "hash": source_hash(self.source),
        }
        self.record.rates = {
            "order": list(named.order),
            "multiplier": [rates[p] for p in named.order],
            "depth": [named.depth[p] for p in named.order],
            "parameters": [named.sizes[p] for p in named.order],
        }

    def _arguments(self, out: Path, seed: int, rows: int) -> TrainingArguments:
        plan = self.plan
        steps = math.ceil(rows / (plan.batch_size * plan.accumulation))
        saving = {None: "epoch", 0: "no"}.get(plan.save_steps, "steps")
        return TrainingArguments(
            output_dir=str(out),
            num_train_epochs=plan.epochs,
            per_device_train_batch_size=plan.batch_size,
            gradient_accumulation_steps=plan.accumulation,
            learning_rate=plan.lr,
            weight_decay=plan.weight_decay,
            warmup_steps=plan.warmup,
            lr_scheduler_type=plan.schedule,
            bf16=plan.bf16,
            optim="adamw_torch_fused",
            seed=seed,
            data_seed=seed,
            save_strategy=saving,
            save_steps=plan.save_steps or 500,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=min(10, steps),  # at least once an epoch
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )


class _History(TrainerCallback):
    """Scores of every task learned so far on selection rows, at each epoch's end."""

    def __init__(self, learner: Learner, index: int) -> None:
        self.learner, self.index, self.loss = learner, index, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:  # of the run that is resumed
            self.loss = logs.get("loss", self.loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        learner, size = self.learner, len(self.learner.tasks)
        scores = [
            learner.score(j, "selection", most=HISTORY_ROWS)
            if j <= self.index and learner.rows(j, "selection")
            else None
            for j in range(size)
        ]
        learner.record.history.append(
            {
                "learning": self.index,
                "step": learner.steps_before(self.index) + state.global_step,
                "epoch": state.epoch,
                "loss": self.loss,
                "scores": scores,
            }
        )
        learner.record.save(learner.folder / RECORD)


class _Bar(TrainerCallback):
    """One line of progress a task."""

    def __init__(self, label: str, task: str) -> None:
        self.label = f"{label} · {task}" if label else task

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.label, unit="step",
            leave=False, dynamic_ncols=True, position=BAR_LINE,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
