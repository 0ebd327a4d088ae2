"""Callbacks of a run's Trainer: for its record and its progress bar."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from holdfast.experiments.record import Record
from holdfast.experiments.runs import RECORD, check_held
from holdfast.experiments.settings import HISTORY_ROWS
from holdfast.training.saving import epoch_is_over

if TYPE_CHECKING:
    from holdfast.experiments.learner import Learner

BAR_LINE = 0  # where this process draws its bar, below those of other processes


class HeadNoted(TrainerCallback):
    """Records what fitting the head took; if a task is resumed, an earlier process has done so."""

    def __init__(self, record: Record, trainer: Any) -> None:
        self.record, self.trainer = record, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.bound.fitted is not None:
            self.record.head_first[self.trainer.task] = self.trainer.bound.fitted


class History(TrainerCallback):
    """Scores of every task learned so far on selection rows, at each epoch's end."""

    def __init__(self, learner: Learner, index: int) -> None:
        self.learner, self.index, self.loss = learner, index, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:  # of the run that is resumed
            self.loss = logs.get("loss", self.loss)
        step = self.learner.steps_before(self.index) + state.global_step
        if state.global_step and not any(
            h["learning"] == self.index and h["step"] == step for h in self.learner.record.history
        ):
            # The run ended between the checkpoint of an epoch's last step and the epoch's end.
            self.on_epoch_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not epoch_is_over(state):
            return  # training was stopped within the epoch, and will resume there
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
        self.on_save(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learner.note_time()
        check_held(self.learner.folder)
        self.learner.record.save(self.learner.folder / RECORD)


class Bar(TrainerCallback):
    """One progress bar a task; without a terminal it is written once a minute."""

    def __init__(self, label: str, task: str, place: int = 0, size: int = 1) -> None:
        name = f"{task} ({place + 1} of {size})" if size > 1 else task
        self.label = f"{label} · {name}" if label else name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.label, unit="step",
            leave=False, dynamic_ncols=True, position=BAR_LINE,
            mininterval=0.1 if sys.stderr.isatty() else 60.0,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
