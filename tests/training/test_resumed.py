"""What goes on, once resumed, beside the weights: sums of losses, patience, the rate of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from models import arguments, bert, collate, rows
from transformers import EarlyStoppingCallback

import holdfast
from holdfast import DPS, Rates, Recipe, Refused
from holdfast.testing.faults.place import StopAt


def made(
    out: Path, *, stop: int | None = None, exact: bool = True, cls: Any = holdfast.Trainer,
    model: Any = None, patience: list[int] | None = None, **more: Any,
) -> Any:  # fmt: skip
    """Eight steps, saved after every second one."""
    plan: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    recipe = {"recipe": more.pop("recipe", None) or Recipe(methods=[DPS(stage=2)]),
              "exact_resume": exact}  # fmt: skip
    trainer = cls(
        model=model or bert(), args=arguments(out, **plan | more), train_dataset=rows(16),
        eval_dataset=rows(4), data_collator=collate, **(recipe if cls is holdfast.Trainer else {}),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    for epochs in patience or []:
        trainer.add_callback(EarlyStoppingCallback(epochs))
    if stop:
        trainer.add_callback(StopAt(stop))
    return trainer


# --- the mean of the losses -----------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_mean_loss_is_of_all_steps(every: int, tmp_path: Path) -> None:
    """Divided by the steps since the last resume it was twice as large, or 1000 times at the end;
    in the log, in the metrics and in what `train` returns."""
    whole = made(tmp_path / "whole", logging_steps=every).train()
    assert 0.1 < whole.training_loss < 2
    for stop in (3, 6, 8):
        made(tmp_path / str(stop), stop=stop, logging_steps=every).train()
        again = made(tmp_path / str(stop), logging_steps=every)
        found = again.train(resume_from_checkpoint=True)
        assert found.training_loss == pytest.approx(whole.training_loss, abs=1e-9)
        assert found.metrics["train_loss"] == found.training_loss
        assert again.state.log_history[-1]["train_loss"] == found.training_loss


def test_resumed_twice_and_after_a_bare_trainer(tmp_path: Path) -> None:
    """The sums begin where the methods did: Transformers does not save those of before."""
    made(tmp_path, cls=transformers.Trainer, stop=2).train()
    bare = made(tmp_path, exact=False, stop=4)
    with pytest.warns(UserWarning, match="without a recipe"):
        bare.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one = made(tmp_path / "one", exact=False)
    with pytest.warns(UserWarning, match="without a recipe"):
        whole = one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    made(tmp_path, stop=6).train(resume_from_checkpoint=True)
    last = made(tmp_path).train(resume_from_checkpoint=True)
    assert last.training_loss == pytest.approx(whole.training_loss, abs=1e-9)


def test_a_loss_that_is_logged_under_that_name_on_the_way_is_left_alone(tmp_path: Path) -> None:
    class Logging(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer.log({"train_loss": 17.0})

    trainer = made(tmp_path, cls=holdfast.Trainer)
    trainer.add_callback(Logging())
    trainer.train()
    assert trainer.state.log_history[0]["train_loss"] == 17.0


# --- patience -------------------------------------------------------------------------------------

STILL: dict[str, Any] = {
    "max_steps": 32, "learning_rate": 1e-30, "eval_strategy": "steps", "eval_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip


@pytest.mark.parametrize("patience", [[3], [3, 20]])
def test_patience_goes_on(patience: list[int], tmp_path: Path) -> None:
    """Of two of a kind each has its own. Nothing improves after the first evaluation, at step 2."""
    whole = made(tmp_path / "whole", patience=patience, **STILL)
    whole.train()
    assert whole.state.global_step == 8
    made(tmp_path / "cut", patience=patience, stop=6, **STILL).train()
    again = made(tmp_path / "cut", patience=patience, **STILL)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


def test_more_patience_than_before_is_taken(tmp_path: Path) -> None:
    """Transformers' own way puts the old patience back with the count."""
    made(tmp_path, patience=[3], stop=6, **STILL).train()
    again = made(tmp_path, patience=[5], **STILL)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12


# --- the rate of now ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy", "constant", "linear"])
def test_another_rate_is_the_one_that_goes_on(kind: str, tmp_path: Path) -> None:
    """Schedules that keep no base rates went on at the old rate, and said they did not."""
    plan = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 2}
    made(tmp_path, stop=4, **plan).train()
    again = made(tmp_path, exact=False, learning_rate=1e-5, logging_steps=1, **plan)
    with pytest.warns(UserWarning, match="lr: 0.01 → 1e-05"):
        again.train(resume_from_checkpoint=True)
    assert "step 4: lr: 0.01 → 1e-05" in again.bound.changes
    made_at = {log["step"]: log["learning_rate"] for log in again.state.log_history
               if "learning_rate" in log}  # fmt: skip
    assert all(made_at[step] <= 1.1e-5 for step in range(6, 9))


def test_a_rate_that_was_lowered_on_the_way_stays_lowered(tmp_path: Path) -> None:
    """By the share that the schedule had come to, for each group its own."""
    plan: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
        "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5, "threshold": 1e9},
    }  # fmt: skip
    rated = Recipe(rates=Rates.bertcl(), methods=[DPS(stage=2)])
    trainers = []
    for rate, resume in ((1e-2, None), (1e-3, str(tmp_path / "checkpoint-4"))):
        trainer = made(tmp_path, stop=None if resume else 4, exact=False, recipe=rated,
                       learning_rate=rate, **plan)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    old, new = ([group["lr"] for group in t.optimizer.param_groups] for t in trainers)
    assert len({*old}) > 1
    further = [n / o for n, o in zip(new, old, strict=True)]
    assert further == pytest.approx([further[0]] * len(further))
    assert further[0] == pytest.approx(0.1 * 0.5**2)  # steps 4 to 8 lower it twice more


@pytest.mark.parametrize(("one", "two"), [("adamw_torch", "sgd"), ("sgd", "adamw_torch")])
@pytest.mark.parametrize("exact", [True, False])
def test_moments_of_another_optimizer_are_refused(
    one: str, two: str, exact: bool, tmp_path: Path
) -> None:
    """It was said to be accepted, and then failed at a moment that it lacks."""
    made(tmp_path, stop=2, optim=one).train()
    again = made(tmp_path, exact=exact, optim=two)
    with pytest.raises(Refused, match=r"with another optimizer: .*; set it back, or begin a new"):
        again.train(resume_from_checkpoint=True)


# --- refused before a step ------------------------------------------------------------------------


def test_a_batch_size_that_is_found_by_trying_is_refused(tmp_path: Path) -> None:
    """Once memory fails, Transformers begins again with the weights as they are then: what methods
    hold as the start of the task would be its middle. A plain recipe holds nothing."""
    with pytest.raises(Refused, match=r"auto_find_batch_size: .*set per_device_train_batch"):
        made(tmp_path, auto_find_batch_size=True)
    made(tmp_path, recipe=Recipe(), auto_find_batch_size=True, save_strategy="no").train()


@pytest.mark.parametrize("resume", [None, True])
def test_no_rows_are_refused_in_one_line(resume: Any, tmp_path: Path) -> None:
    """Torch's sampler would raise an error of its own."""
    trainer = made(tmp_path)
    trainer.train_dataset = []
    with pytest.raises(Refused, match="train_dataset: there are no rows to train on"):
        trainer.train(resume_from_checkpoint=resume)
