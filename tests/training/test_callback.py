"""`RecipeCallback`: a recipe at work in a Trainer that knows nothing of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from models import arguments, bert, collate, rows, same, weights
from test_damage import flip
from torch import nn

import holdfast
from holdfast import (
    DPS,
    EWC,
    HeadLast,
    Merge,
    Method,
    Rates,
    Recipe,
    RecipeCallback,
    Refused,
    Replay,
)
from holdfast.testing.faults.place import StopAt
from holdfast.training import callback as callbacks
from holdfast.training.manifest import newest_complete

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


def test_training_that_goes_on_for_more_steps_has_so_many(tmp_path: Path) -> None:
    """Methods would anneal to, or end at, the last of the steps that were planned before."""
    made(tmp_path, callback=RecipeCallback(DENSE), args=SAVING).train()
    callback = RecipeCallback(DENSE)
    again = made(tmp_path, callback=callback, args=SAVING)
    again.args.max_steps = 12
    again.train(resume_from_checkpoint=True)
    assert (callback.bound.step, callback.bound.total_steps) == (12, 12)


# --- its checkpoints ----------------------------------------------------------------------------

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}


def stopped(out: Path, **more: Any) -> Any:
    """At step 6 of 8, with checkpoints at 3 and 6."""
    trainer = made(out, callback=RecipeCallback(DENSE), args=SAVING | more)
    trainer.add_callback(StopAt(6))
    trainer.train()
    return trainer


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_one_of_its_files_is_refused(file: str, tmp_path: Path) -> None:
    """Fault P2: Trainer goes on without it, and ends with other weights."""
    stopped(tmp_path)
    (tmp_path / "checkpoint-6" / file).unlink()
    again = made(tmp_path, callback=RecipeCallback(DENSE), args=SAVING)
    with pytest.raises(Refused, match=rf"{file} is missing; resume from .*checkpoint-3"):
        again.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_flipped_bit_is_refused_or_with_a_warning_gone_on_from(tmp_path: Path) -> None:
    """Fault P3."""
    stopped(tmp_path)
    flip(tmp_path / "checkpoint-6" / "model.safetensors")
    again = made(tmp_path, callback=RecipeCallback(DENSE), args=SAVING)
    with pytest.raises(Refused, match=r"model\.safetensors is not as it was written"):
        again.train(resume_from_checkpoint=True)
    loose = made(tmp_path, callback=RecipeCallback(DENSE, exact_resume=False), args=SAVING)
    with pytest.warns(UserWarning, match=r"model\.safetensors is not as it was written"):
        loose.train(resume_from_checkpoint=True)


class Turned(nn.Module):
    """A model whose layers may stand in the other order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(8, 8))
        self.a.requires_grad_(True)

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> Any:
        logits = self.b(self.a(input_ids[:, :8].float()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    """Torch would give each the moments of the other."""
    own: dict[str, Any] = {"args": SAVING | {"save_steps": 4}}
    made(tmp_path, model=Turned("ab"), callback=RecipeCallback(DENSE), **own).train()
    again = made(tmp_path, model=Turned("ba"), callback=RecipeCallback(DENSE), **own)
    with pytest.raises(Refused, match=r"order changed: 'b\.weight' stands where 'a\.w"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("exact", [True, False])
def test_moments_of_another_optimizer_are_refused(exact: bool, tmp_path: Path) -> None:
    stopped(tmp_path, optim="sgd")
    callback = RecipeCallback(DENSE, exact_resume=exact)
    again = made(tmp_path, callback=callback, args=SAVING | {"optim": "adamw_torch"})
    with pytest.raises(Refused, match='another optimizer: "SGD" → "AdamW"; set it back'):
        again.train(resume_from_checkpoint=True)


def test_a_batch_size_that_is_found_by_trying_is_refused(tmp_path: Path) -> None:
    trainer = made(tmp_path, callback=RecipeCallback(DENSE), args={"auto_find_batch_size": True})
    with pytest.raises(Refused, match=r"auto_find_batch_size: .*set per_device_train_batch"):
        trainer.train()


def test_what_lies_below_adapters_must_be_the_same(tmp_path: Path) -> None:
    """It is not in the checkpoint: another base under the same adapters is another model."""

    def adapted(seed: int) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(bert(seed=seed), peft.LoraConfig(target_modules=["query"]))

    own: dict[str, Any] = {"args": SAVING}
    made(tmp_path, model=adapted(0), callback=RecipeCallback(Recipe()), **own).train()
    for seed, says in ((0, ""), (1, "frozen: ")):
        again = made(tmp_path, model=adapted(seed), callback=RecipeCallback(Recipe()), **own)
        with pytest.raises(Refused, match=says) if says else nullcontext():
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_last_whole_checkpoint_stays_until_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer deletes it before a callback hears of the new one: a kill between loses both."""
    own: dict[str, Any] = {"args": SAVING | {"save_total_limit": 1}}
    calls = list[int]()

    def second_dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = callbacks.save_state
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks, "save_state", second_dies)
        made(tmp_path, callback=RecipeCallback(DENSE), **own).train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"
    again = made(tmp_path, callback=RecipeCallback(DENSE), **own)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]  # no more than asked
    assert again.args.save_total_limit == 1
    whole = made(tmp_path / "whole", callback=RecipeCallback(DENSE))
    whole.train()
    assert same(weights(again.model), weights(whole.model))


def test_trainers_own_choice_of_a_run_that_was_left_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer goes on from the highest step, whichever run saved it."""
    made(tmp_path, callback=RecipeCallback(DENSE), args=SAVING).train()
    stopped(tmp_path)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-6"
    again = made(tmp_path, callback=RecipeCallback(DENSE), args=SAVING)
    again.train(resume_from_checkpoint=True)
    assert "goes on from checkpoint-8, but" in caplog.text
    assert "checkpoint-6 was saved last" in caplog.text


# --- tasks --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        (Recipe(methods=[EWC(), DPS(stage=2)]), "ewc"),
        (Recipe(methods=[Merge()], head_last=HeadLast()), "merge, recipe.head_last"),
    ],
)
def test_rows_that_the_tasks_end_will_read_are_asked_for_at_once(
    recipe: Recipe, where: str
) -> None:
    """Not after hours of training."""
    with pytest.raises(Refused, match=f"^{where}: reads the rows at the task's end; pass data="):
        RecipeCallback(recipe)


def test_the_bound_of_another_recipe_is_refused() -> None:
    """Its methods would go on, not those of the recipe that is passed."""
    with pytest.raises(Refused, match="recipe of other methods"):
        RecipeCallback(DENSE, bound=Recipe(methods=[EWC()]).unbound())
