"""Checks of `with_recipe(transformers.Trainer)` on ranks; run by `ranks.py`."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from learning import everything, rank, ranks
from models import arguments, bert, collate, distance, gpt2, rows, weights
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PrinterCallback, TrainerCallback

import holdfast
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, L2SP, Replay
from holdfast.ops import distributed
from holdfast.recipe import Recipe
from holdfast.training.manifest import damage
from holdfast.training.stopping import Stopped


class Tagger(nn.Module):
    """Its loss, a mean over what has a label, ignores the number of items; it is 0 of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bert("TokenClassification", num_labels=2)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        logits, y = self.inner(input_ids=input_ids).logits.flatten(0, 1), labels.flatten()
        total = nn.functional.cross_entropy(logits, y, reduction="sum")
        return {"loss": total / (y != -100).sum().clamp(min=1), "logits": logits}


RECIPES: dict[str, list[Method]] = {
    "dense": [DPS(stage=1, drop=0.5), L2SP(strength=0.5)],
    "mix": [DPS(stage=1, drop=0.5, mix=True), EWC(strength=2.0), Replay(memory=8, share=0.5)],
    "retention": [DPS(stage=1, drop=0.5, score="retention")],
}


MASKED: dict[Callable[[], nn.Module], str] = {gpt2: "tokens", Tagger: "tags"}


class Watch(TrainerCallback):
    """What a bound holds after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(everything(self.trainer.bound))  # type: ignore[attr-defined]


def learned(methods: list[Method], *, accumulation: int = 1, **more: Any) -> list[dict[str, Any]]:
    """Two tasks over one encoder; eight rows a step, however they are divided."""
    for kind in (AcceleratorState, PartialState, GradientState):
        kind._reset_state()
    recipe, watch, bound = Recipe(methods=methods), Watch(), None
    encoder: nn.Module | None = None
    for place, task in enumerate(("one", "two")):
        model = bert(seed=place, num_labels=2).double()
        if encoder is not None:
            model.bert = encoder
        encoder = model.bert
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(
                folder,
                **{
                    "per_device_train_batch_size": 8 // ranks() // accumulation,
                    "gradient_accumulation_steps": accumulation,
                    "per_device_eval_batch_size": 5,  # 24 rows: Accelerate would fill up with six
                    "optim": "sgd",
                    "learning_rate": 0.1,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 0.5,
                    "seed": 3,
                }
                | ({"ddp_backend": "gloo"} if dist.is_initialized() else {})
                | more,
            )
            trainer = holdfast.Trainer(
                model=model, args=args, train_dataset=rows(24, seed=place), data_collator=collate,
                recipe=recipe, task=task, bound=bound, shared=encoder, callbacks=[watch],
            )  # fmt: skip
            watch.trainer = trainer  # type: ignore[attr-defined]
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.end_task()
        bound = trainer.bound
        watch.seen.append(everything(bound))
    assert len(watch.seen) == 2 * (3 + 1)
    return watch.seen


def close_throughout(alone: list[Mapping[str, Any]], found: list[Mapping[str, Any]]) -> None:
    """What may move is equal exactly (NaN, bits); random states too; sums to 1e-10 of float64.

    Rows are added up in another order, in matrices of another height: that is all that may differ.
    """
    for moment, (one, two) in enumerate(zip(alone, found, strict=True)):
        assert one.keys() == two.keys(), moment
        for name, t in one.items():
            if t.is_floating_point():
                assert torch.equal(t.isnan(), two[name].isnan()), (name, moment)
            exact = not t.is_floating_point()
            torch.testing.assert_close(
                two[name], t, rtol=0 if exact else 1e-8, atol=0 if exact else 1e-10,
                equal_nan=True, msg=lambda m, n=name, at=moment: f"{n} at moment {at}: {m}",
            )  # fmt: skip
        prints = distributed.fingerprint(two.values())
        distributed.require_equal({f"moment {moment}": prints}, torch.device("cpu"), remedy="")


def check_trainer_is_that_of_one_process() -> Iterator[None]:
    """Fails where Trainer's loss is multiplied by the number of ranks, where the rows of a finished
    task are a rank's own, or where those that fill up a last batch count twice."""
    alone = {name: learned(methods) for name, methods in RECIPES.items()}
    yield
    for name, methods in RECIPES.items():
        try:
            close_throughout(alone[name], learned(methods))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_trainer_accumulates() -> Iterator[None]:
    """Two micro-batches of two rows on each of two ranks are one batch of eight."""
    alone = learned(RECIPES["dense"])
    yield
    close_throughout(alone, learned(RECIPES["dense"], accumulation=2))


class InOrder(holdfast.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def masked(make: Callable[[], nn.Module], label: str, accumulation: int = 1) -> dict[str, Tensor]:
    """Weights after three steps of eight rows, of which the first rank's first have no label."""
    for kind in (AcceleratorState, PartialState, GradientState):
        kind._reset_state()
    size, data = 8 // ranks() // accumulation, rows(24, labels=label)
    for row in data[:2]:
        row["labels"] = [-100] * len(row["labels"])
    model = make().double()
    model.register_buffer("told_to_all", torch.zeros(1))  # by rank 0, in every forward pass
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, per_device_train_batch_size=size, optim="sgd", max_grad_norm=0,
                         gradient_accumulation_steps=accumulation, learning_rate=0.1,
                         **({"ddp_backend": "gloo"} if dist.is_initialized() else {}))  # fmt: skip
        trainer = InOrder(model=model, args=args, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert trainer.bound.step == 3
    return weights(model)


def check_rows_without_labels_on_one_rank() -> Iterator[None]:
    """Nothing tells there whether the loss ignores its items: no rank may ask more often than
    another, or they wait for each other for ever. (Prompts cut before their answer are such.)"""
    alone = {make: masked(make, label) for make, label in MASKED.items()}
    yield
    for make, label in MASKED.items():
        for accumulation in (1, 2):
            found = masked(make, label, accumulation)
            assert distance(alone[make], found) < 1e-12, (label, accumulation)


def check_loaders_of_trainer() -> Iterator[None]:
    """Rows of a finished task come undivided, also where Trainer keeps its loader of other rows."""
    yield
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, ddp_backend="gloo", per_device_eval_batch_size=5)
        data = rows(23)
        for place, row in enumerate(data):
            row["input_ids"][1] = place
        trainer = holdfast.Trainer(model=bert(), args=args, train_dataset=data,
                                   eval_dataset=rows(4), data_collator=collate)  # fmt: skip
        divided = [b["input_ids"][:, 1].tolist() for b in trainer.get_eval_dataloader(data)]
        assert sum(map(len, divided)) < 23, (rank(), divided)
        kept = {"eval": trainer.get_eval_dataloader()}
        trainer._eval_dataloaders = kept
        args.dataloader_persistent_workers, args.dataloader_num_workers = True, 1
        whole = [b["input_ids"][:, 1].tolist() for b in trainer._undivided(data)]
        assert [i for ids in whole for i in ids] == list(range(23))
        assert trainer._eval_dataloaders is kept
        assert "prepare" not in vars(trainer.accelerator)


def check_a_signal_on_one_rank_stops_all() -> Iterator[None]:
    """After the same step, which is saved: a rank that went on would wait for ever."""

    class Told(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank() == 1 and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    yield
    for kind in (AcceleratorState, PartialState, GradientState):
        kind._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, 0)
        args = arguments(shared[0], ddp_backend="gloo", save_total_limit=1)
        trainer = holdfast.Trainer(
            model=bert(), args=args, train_dataset=rows(24), data_collator=collate,
            callbacks=[Told()], stop_on_signals=True,
        )  # fmt: skip
        with pytest.raises(Stopped) as stopped:
            trainer.train()
        assert (stopped.value.code, trainer.state.global_step) == (143, 2)
        dist.barrier()
        assert damage(Path(shared[0]) / "checkpoint-2") is None
        dist.barrier()


def check_another_number_of_ranks_is_refused() -> Iterator[None]:
    """What one process saved has other rows in its next step than two ranks would take (R7)."""
    with tempfile.TemporaryDirectory() as folder:

        def made(**more: Any) -> Any:
            for kind in (AcceleratorState, PartialState, GradientState):
                kind._reset_state()
            args = arguments(folder, save_strategy="steps", save_steps=1, **more)
            return holdfast.Trainer(model=bert(), args=args, train_dataset=rows(24),
                                    data_collator=collate)  # fmt: skip

        made(max_steps=1).train()
        yield
        with pytest.raises(Refused, match="ranks: 1 → 2"):
            made(max_steps=1, ddp_backend="gloo").train(resume_from_checkpoint=True)
