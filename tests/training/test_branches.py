"""Where a run went back to an earlier checkpoint, or began anew in a folder that holds another:
training goes on from what was saved last, not from the highest step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Plain, arguments, bert, collate, rows, same, weights
from test_damage import HARMS

import holdfast
from holdfast import DPS, Recipe
from holdfast.files import write_text_atomic
from holdfast.testing.faults.place import StopAt
from holdfast.training import manifest
from holdfast.training.loop import load_checkpoint, save_checkpoint
from holdfast.training.manifest import commit, damage, newest_complete, rotate, spot


def made(out: Path, *, stop: int | None = None, seed: int = 0, **more: Any) -> Any:
    """Eight steps, saved after every second one."""
    exact = more.pop("exact_resume", True)
    args = arguments(out, max_steps=8, save_strategy="steps", save_steps=2, **more)
    trainer = holdfast.Trainer(
        model=bert(seed=seed), args=args, train_dataset=rows(16), data_collator=collate,
        recipe=Recipe(methods=[DPS(stage=2)]), exact_resume=exact,
        callbacks=[StopAt(stop)] if stop else None,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_was_rolled_back_goes_on_with_the_new_run(tmp_path: Path) -> None:
    """By the highest step it would end at once, with the weights of the run that was left."""
    first = made(tmp_path)
    first.train()
    lower: dict[str, Any] = {"learning_rate": 1e-4, "exact_resume": False}
    back = str(tmp_path / "checkpoint-4")
    made(tmp_path, stop=6, **lower).train(resume_from_checkpoint=back)
    assert damage(tmp_path / "checkpoint-8") is None  # what was left is kept as it was
    again = made(tmp_path, **lower)
    again.train(resume_from_checkpoint=True)
    undisturbed = made(tmp_path / "other", **lower)
    undisturbed.train(resume_from_checkpoint=back)
    assert same(weights(again.model), weights(undisturbed.model))
    assert not same(weights(again.model), weights(first.model))


def test_a_run_begun_anew_in_the_folder_of_another_goes_on_as_itself(tmp_path: Path) -> None:
    """The settings agree, so that nothing but the numbers tells one from the other."""
    made(tmp_path).train()
    made(tmp_path, seed=7, stop=4).train()
    again, whole = made(tmp_path, seed=7), made(tmp_path / "whole", seed=7)
    again.train(resume_from_checkpoint=True)
    whole.train()
    assert same(weights(again.model), weights(whole.model))


# --- a loop -------------------------------------------------------------------------------------


def looped(at: Path | None = None) -> Any:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe().bind(model, optimizer, total_steps=8)
    if at is not None:
        load_checkpoint(at, bound)
    return bound


def save(bound: Any, folder: Path, *steps: int, **more: Any) -> None:
    for step in steps:
        save_checkpoint(folder / f"checkpoint-{step}", bound, position={}, **more)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_loop_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    save(looped(), tmp_path, 2, 4, 6, 8)
    live = looped(tmp_path / "checkpoint-4")
    save(live, tmp_path, 5)
    told = list[str]()
    assert newest_complete(tmp_path, told.append) == tmp_path / "checkpoint-5"
    assert told == [f"checkpoint-{n} is passed over: the run that wrote it was left for another"
                    for n in (8, 6)]  # fmt: skip
    load_checkpoint(tmp_path / "checkpoint-2", live)  # and once more, in the same process
    save(live, tmp_path, 3)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"


def test_a_limit_takes_those_that_were_left_first(tmp_path: Path) -> None:
    save(looped(), tmp_path, 2, 4, 6, 8)
    save(looped(tmp_path / "checkpoint-4"), tmp_path, 6, keep=2)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("harm", ["flipped", "deleted"])
def test_damage_leads_back_to_what_the_run_came_from(harm: str, tmp_path: Path) -> None:
    """Not to a checkpoint that was committed in between by the run that was left."""
    save(looped(), tmp_path, 2, 4, 6, 8)
    save(looped(tmp_path / "checkpoint-4"), tmp_path, 6)
    HARMS[harm](tmp_path / "checkpoint-6" / "weights.safetensors")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"
    save(looped(), tmp_path / "two", 2, 4)
    save(looped(), tmp_path / "two", 3)  # begun anew: nothing before it is its own
    HARMS[harm](tmp_path / "two" / "checkpoint-3" / "weights.safetensors")
    assert newest_complete(tmp_path / "two") is None


def test_killed_at_any_moment_one_of_both_runs_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the new run's first checkpoint is whole, the one that was left is the last saved."""
    save(looped(), tmp_path, 2, 4, 6, 8)
    new = looped(tmp_path / "checkpoint-4")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "write_text_atomic", killed)
        save(new, tmp_path, 6)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-8"
    save(new, tmp_path, 6)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-6"


def test_no_clock_is_asked(tmp_path: Path) -> None:
    """One that was set back, or a folder that was copied without its times."""
    save(looped(), tmp_path, 2, 4, 6)
    save(looped(tmp_path / "checkpoint-4"), tmp_path, 5)
    for age, step in enumerate((5, 4, 2, 6)):
        os.utime(tmp_path / f"checkpoint-{step}" / manifest.MANIFEST, (age, age))
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-5"
    rotate(tmp_path / "checkpoint-5", 2)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-5"}


def test_checkpoints_from_before_they_were_numbered_count_by_step(tmp_path: Path) -> None:
    save(looped(), tmp_path, 2, 4, 6)
    for step in (2, 4, 6):
        path = tmp_path / f"checkpoint-{step}" / manifest.MANIFEST
        files = {name: list(told) for name, told in manifest.listed(path.parent).items()}
        write_text_atomic(path, manifest._manifest(files))
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-6"
    save(looped(tmp_path / "checkpoint-4"), tmp_path, 5)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-5"


def test_a_spot_in_another_folder_is_none_in_this_one(tmp_path: Path) -> None:
    """Were its number taken for one here, damage would lead to a stranger's checkpoint."""
    save(looped(), tmp_path / "a", 2, 4)
    save(looped(), tmp_path / "b", 2, 4)
    save(looped(tmp_path / "b" / "checkpoint-4"), tmp_path / "a", 5)
    HARMS["flipped"](tmp_path / "a" / "checkpoint-5" / "weights.safetensors")
    assert newest_complete(tmp_path / "a") is None


def test_every_byte_of_the_numbers_counts(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-5").mkdir()
    commit(tmp_path / "checkpoint-3")
    commit(tmp_path / "checkpoint-5", after=spot(tmp_path / "checkpoint-3"))
    path = tmp_path / "checkpoint-5" / manifest.MANIFEST
    text = path.read_text()
    assert '"saved": [\n  2,\n  1\n ]' in text and damage(path.parent) is None
    path.write_text(text.replace("  2,\n  1\n", "  2,\n  0\n"))
    assert damage(path.parent) == "manifest.json is not as it was written"
