"""Trainer classes of other makers: abstract, with an optimizer, schedule or loop of their own."""

from __future__ import annotations

import abc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import arguments, bert, collate, rows, same, weights

import holdfast
from holdfast import DPS, EWC, Merge, Rates, Recipe, Refused, with_recipe

MASKED = Recipe(methods=[DPS(drop=0.5, stage=2)])


class Abstract(transformers.Trainer, abc.ABC):  # type: ignore[misc]
    """As the trainers of sentence encoders are."""


class Sgd(transformers.Trainer):  # type: ignore[misc]
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        return self.optimizer


class Unbinding(holdfast.Trainer):  # type: ignore[misc]
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        one = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda _: 1.0)
        self.lr_scheduler = one
        return one


class Uncounting(transformers.Trainer):  # type: ignore[misc]
    """Its loss is divided by itself, and it counts no items."""

    loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        return None


def made(cls: Any, out: Path, recipe: Recipe = MASKED, **args: Any) -> Any:
    trainer = cls(
        model=bert(), args=arguments(out, **{"max_steps": 4, **args}), train_dataset=rows(16),
        eval_dataset=rows(8), data_collator=collate, recipe=recipe,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test_an_abstract_class_is_served_and_pickles(tmp_path: Path) -> None:
    cls = with_recipe(Abstract)
    assert issubclass(cls, Abstract) and pickle.loads(pickle.dumps(cls)) is cls  # noqa: S301
    one, two = made(cls, tmp_path / "a"), made(holdfast.Trainer, tmp_path / "b")
    one.train()
    two.train()
    assert same(weights(one.model), weights(two.model))


def test_an_optimizer_that_a_class_makes_is_the_one_that_trains(tmp_path: Path) -> None:
    """Ours in its place trained at another rate, and said nothing."""
    trainer = made(with_recipe(Sgd), tmp_path)
    trainer.train()
    assert isinstance(trainer.bound.optimizer, torch.optim.SGD)
    assert trainer.bound.states["dps"].weights  # and the recipe is at work on it
    with pytest.raises(Refused, match=r"rates: SgdWithRecipe makes an optimizer of its own"):
        made(with_recipe(Sgd), tmp_path, Recipe(rates=Rates.bertcl())).train()


def test_a_schedule_that_leaves_the_recipe_out_is_refused(tmp_path: Path) -> None:
    """Without clipping nothing else would have told that no method is at work."""
    trainer = made(Unbinding, tmp_path, max_grad_norm=0.0)
    before = weights(trainer.model)
    with pytest.raises(Refused, match=r"Unbinding: create_scheduler .*call super\(\)"):
        trainer.train()
    assert same(weights(trainer.model), before)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_without_an_initial_rate_are_saved_and_go_on(kind: str, tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2,
             "lr_scheduler_type": kind}  # fmt: skip
    whole = made(holdfast.Trainer, tmp_path / "whole", **every)
    whole.train()
    again = made(holdfast.Trainer, tmp_path / "again", **every)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))


def test_a_loss_without_a_count_of_items_accumulates(tmp_path: Path) -> None:
    made(with_recipe(Uncounting), tmp_path, gradient_accumulation_steps=2).train()


def test_batches_that_are_lists_weigh_nothing(tmp_path: Path) -> None:
    """TRL's online trainers are handed lists of prompts, and make rows of them later."""
    trainer = made(holdfast.Trainer, tmp_path)
    trainer.get_batch_samples(iter([[{"prompt": "a"}], [{"prompt": "b"}]]), 2, torch.device("cpu"))
    assert trainer._window is None


class Columns(Abstract):
    """As trainers of sentence encoders: batches by column, groups that hold the loss's weights."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **how: Any) -> Any:
        mine = {k.removeprefix("anchor_"): v for k, v in inputs.items()}
        return super().compute_loss(model, mine, *args, **how)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        cls, how = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, how | {"optimizer_dict": [{"params": list(self.model.parameters())}]}


def by_column(made_rows: list[Any]) -> dict[str, Any]:
    return {f"anchor_{k}": v for k, v in collate(made_rows).items()}


def test_batches_by_column_are_trained_on_and_refused_where_methods_would_run_them(
    tmp_path: Path,
) -> None:
    """Refused before the first step, not when a task that took hours ends."""
    trainer = made(with_recipe(Columns), tmp_path)
    trainer.data_collator = by_column
    trainer.train()
    assert len(trainer.bound.optimizer.param_groups) == 1  # theirs
    assert trainer.bound.states["dps"].weights
    for recipe in (Recipe(methods=[EWC()]), Recipe(methods=[Merge()])):
        trainer = made(with_recipe(Columns), tmp_path, recipe)
        trainer.data_collator, before = by_column, weights(trainer.model)
        with pytest.raises(Refused, match=r"(ewc|merge) runs the model on rows.* of Columns"):
            trainer.train()
        assert same(weights(trainer.model), before)
    with pytest.raises(Refused, match="makes an optimizer of its own"):
        made(with_recipe(Columns), tmp_path, Recipe(rates=Rates.bertcl())).train()
