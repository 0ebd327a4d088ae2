"""`RecipeCallback`: a recipe at work in a Trainer that knows nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import transformers
from models import arguments, bert, collate, rows, same, weights

import holdfast
from holdfast import DPS, EWC, Method, Rates, Recipe, RecipeCallback, Refused, Replay

DENSE = Recipe(methods=[DPS(drop=0.5, stage=2)])


def made(
    out: Path, *, callback: Any = None, cls: Any = None, model: Any = None, **more: Any
) -> Any:
    args = arguments(out, max_steps=8, max_grad_norm=0.0, **more.pop("args", {}))
    trainer = (cls or transformers.Trainer)(
        model=model or bert(), args=args, train_dataset=rows(16), data_collator=collate,
        callbacks=[callback] if callback else None, **more,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test_a_callback_trains_as_the_class_does(tmp_path: Path) -> None:
    ours = made(tmp_path / "a", callback=RecipeCallback(DENSE))
    theirs = made(tmp_path / "b", cls=holdfast.Trainer, recipe=DENSE)
    plain = made(tmp_path / "c")
    for trainer in (ours, theirs, plain):
        trainer.train()
    assert same(weights(ours.model), weights(theirs.model))
    assert not same(weights(ours.model), weights(plain.model))


def test_training_goes_on_from_its_checkpoints_exactly(tmp_path: Path) -> None:
    every = {"args": {"save_strategy": "steps", "save_steps": 3}}
    whole = made(tmp_path, callback=RecipeCallback(DENSE), **every)
    whole.train()
    again = made(tmp_path, callback=RecipeCallback(DENSE), **every)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole.model), weights(again.model))


def test_the_next_task_goes_on_with_what_the_first_left(tmp_path: Path) -> None:
    """EWC's pull is there in the second task and holds the weights nearer to the first's."""
    recipe, data = Recipe(methods=[EWC(strength=1e4, rows=4)]), lambda: [collate(rows(4))]
    first = RecipeCallback(recipe, task="one", data=data)
    one = made(tmp_path / "one", callback=first)
    one.train()
    first.end_task()
    held, free = bert(), bert()
    for model in (held, free):
        model.load_state_dict(one.model.state_dict())
    second = RecipeCallback(recipe, task="two", bound=first.bound, data=data)
    made(tmp_path / "two", callback=second, model=held).train()
    made(tmp_path / "free", model=free).train()
    start = weights(one.model)

    def moved(model: Any) -> float:
        now = weights(model)
        return sum(float((now[k] - start[k]).square().sum()) for k in start if "bert." in k)

    assert moved(held) < moved(free)


@dataclass(frozen=True, kw_only=True)
class Preparing(Method):
    name: ClassVar[str] = "preparing"

    def prepare(self, model: Any) -> Any:
        return model


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(rates=Rates.bertcl()), "rates of their own"),
        (Recipe(methods=[Replay()]), "loss: replay"),
        (Recipe(methods=[Preparing()]), "prepare it: preparing"),
    ],
)
def test_what_a_callback_cannot_do_is_refused(recipe: Recipe, says: str) -> None:
    with pytest.raises(Refused, match=rf"{says}.*with_recipe"):
        RecipeCallback(recipe)


def test_the_bound_of_another_recipe_is_refused() -> None:
    """Its methods would go on, not those of the recipe that is passed."""
    with pytest.raises(Refused, match="recipe of other methods"):
        RecipeCallback(DENSE, bound=Recipe(methods=[EWC()]).unbound())
