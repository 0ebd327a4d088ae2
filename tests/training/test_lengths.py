"""Batches of rows of like length: what an epoch is made of, and that a resumed one is the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import arguments, bert, collate, pieces, rows, same, tokenizer
from test_checkpoints import DROPOUT, everything
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithPadding

import holdfast
from holdfast import DPS, EWC, Recipe, Refused
from holdfast.testing.faults.place import StopAt
from holdfast.training.lengths import POOL, ByLength

GROUPED = {"train_sampling_strategy": "group_by_length"}


def order(lengths: list[int], batch: int, *, epoch: int = 0, seed: int = 0) -> list[int]:
    made = ByLength(lengths, batch, seed)
    made.set_epoch(epoch)
    assert len(made) == len(lengths)
    return list(made)


@pytest.mark.parametrize("count", [1, 3, 4, 22, 24, 4 * POOL * 2 + 7])
def test_every_row_comes_once_and_a_batch_holds_neighbours_by_length(count: int) -> None:
    """Within a pool the batches are the slices of its rows by length, in another order."""
    draw = random.Random(count)
    lengths = [draw.randrange(5, 60) for _ in range(count)]
    found = order(lengths, 4)
    assert sorted(found) == list(range(count))
    batches = [sorted(lengths[i] for i in few) for few in pieces(found, 4)]
    assert [len(few) for few in batches[:-1]] == [4] * (len(batches) - 1)  # that which is not last
    if count <= 4 * POOL:
        assert sorted(batches) == sorted(pieces(sorted(lengths), 4))
    else:  # a batch spans one of POOL parts of a sorted pool, give or take the draw
        spread = sum(few[-1] - few[0] for few in batches) / len(batches)
        assert spread < 55 / POOL * 4
    if count > 20:
        assert batches[:-1] != sorted(batches[:-1]) != sorted(batches[:-1], reverse=True)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = [random.Random(i).randrange(5, 60) for i in range(90)]
    torch.manual_seed(1)
    first, drawn = order(lengths, 4), torch.get_rng_state()
    torch.manual_seed(2)
    assert order(lengths, 4) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), drawn)  # no global draw
    others = [order(lengths, 4, epoch=1), order(lengths, 4, seed=1)]
    assert first not in others and others[0] != others[1]


# --- in a Trainer ---------------------------------------------------------------------------------


def uneven(count: int = 22) -> list[dict[str, Any]]:
    """Rows of 5 to 26 tokens, shuffled."""
    made = [rows(1, length=5 + i, seed=i)[0] for i in range(count)]
    random.Random(0).shuffle(made)
    return made


def trainer(out: Path, *, stop: int | None = None, **more: Any) -> Any:
    plan = {"num_train_epochs": 3, "per_device_train_batch_size": 2, **GROUPED}
    plan |= {"gradient_accumulation_steps": 2, "data_seed": 3}
    made = holdfast.Trainer(
        model=bert(**DROPOUT), args=arguments(out, **plan | more), train_dataset=uneven(),
        eval_dataset=uneven(), processing_class=tokenizer(),
        data_collator=DataCollatorWithPadding(tokenizer()),
        recipe=Recipe(methods=[EWC(rows=8), DPS(mix=True, stage=4)]),
        callbacks=[StopAt(stop)] if stop else None,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.mark.parametrize("stop", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 12))])
def test_stopped_within_an_epoch_it_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """Six steps an epoch of two micro-batches, the last a half; dropout draws as it would have."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", stop=stop).train()
    again = trainer(tmp_path / "cut")
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 18 and same(everything(again), everything(whole))


def test_another_sampling_is_refused_on_resume(tmp_path: Path) -> None:
    trainer(tmp_path, stop=4).train()
    again = trainer(tmp_path, train_sampling_strategy="random")
    with pytest.raises(Refused, match="train_sampling_strategy: "):
        again.train(resume_from_checkpoint=True)


def test_a_step_is_of_one_length_and_pads_little(tmp_path: Path) -> None:
    """Both micro-batches of a step come from four neighbours of 22 lengths."""
    made, steps = trainer(tmp_path, num_train_epochs=1), []
    theirs = made.get_batch_samples

    def seen(*args: Any, **kwargs: Any) -> Any:
        batches, items = theirs(*args, **kwargs)
        steps.append([n for b in batches for n in b["attention_mask"].sum(1).tolist()])
        return batches, items

    made.get_batch_samples = seen
    made.train()
    assert sorted(n for step in steps for n in step) == list(range(5, 27))
    assert all(max(step) - min(step) == len(step) - 1 for step in steps)
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 2]


def test_rows_for_scores_and_methods_come_in_their_own_order(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert isinstance(made._get_eval_sampler(made.eval_dataset), SequentialSampler)


def test_rows_without_a_length_are_refused(tmp_path: Path) -> None:
    made = holdfast.Trainer(
        model=bert(), args=arguments(tmp_path, **GROUPED), data_collator=collate,
        train_dataset=[{"inputs_embeds": [[0.0] * 16], "labels": 0}] * 8,
    )  # fmt: skip
    with pytest.raises(Refused, match=r"group_by_length: the rows have no length to be grouped by"):
        made.train()
