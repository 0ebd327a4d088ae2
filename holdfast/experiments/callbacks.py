"""Callbacks of a run's Trainer: for its record and its progress bar."""

from __future__ import annotations

import sys
import time
from pathlib import Path
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


class Held(TrainerCallback):
    """Ends training in a folder that another process took over, before anything is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Who was paused for long enough to be taken for dead asks at the end of that very step.
        if time.monotonic() - self.asked > 1:
            check_held(self.folder)
            self.asked = time.monotonic()


class Bar(TrainerCallback):
    """One progress bar a task; without a terminal it is written once a minute.

    later: steps of the tasks after this one; if there are some, the time left to all is told.
    """

    def __init__(
        self, label: str, task: str, place: int = 0, size: int = 1, *, later: int = 0
    ) -> None:
        name = f"{task} ({place + 1} of {size})" if size > 1 else task
        self.label, self.later = f"{label} · {name}" if label else name, later

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = drawn(state.max_steps, self.label, unit="step", initial=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            told, rate = {"loss": f"{logs['loss']:.3f}"}, self.bar.format_dict["rate"]
            if self.later and rate:
                steps = state.max_steps - state.global_step + self.later
                told["all tasks"] = f"{tqdm.format_interval(steps / rate)} left"
            self.bar.set_postfix(told, refresh=False)  # drawn when the bar is

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class Counting:
    """A collator that moves a bar by the rows of each batch; else it is `collate`."""

    def __init__(self, collate: Any, bar: Any) -> None:
        self.collate, self.bar = collate, bar

    def __call__(self, rows: Any, *more: Any) -> Any:
        self.bar.update(len(rows))
        return self.collate(rows, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collate, name)


def drawn(total: int, label: str, *, unit: str, initial: int = 0, late: bool = False) -> Any:
    """A bar, drawn ten times a second, or without a terminal once a minute; `late` ones not before
    a second, or that minute, is over."""
    shown = sys.stderr.isatty()
    often, first = (0.1, 1.0) if shown else (60.0, 60.0)
    return tqdm(
        total=total, initial=initial, desc=label, unit=unit, leave=False, dynamic_ncols=True,
        position=BAR_LINE, mininterval=often, delay=first if late else 0.0,
    )  # fmt: skip
