"""Trains on two ranks with a checkpoint every second step; one of them may die: see `test_killed`.

torchrun victim.py FOLDER step|save|finish|hang
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models import arguments, bert, collate, rows
from transformers import TrainerCallback

import holdfast
from holdfast.methods import DPS, EWC, L2SP
from holdfast.recipe import Recipe
from holdfast.training.manifest import newest_complete

RANK = int(os.environ["RANK"])


def die() -> None:
    (Path(sys.argv[1]) / f"died-{sys.argv[2]}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


class AtStep(TrainerCallback):
    """Rank 1 dies in the middle of step 4, while rank 0 waits for its gradients."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and RANK == 1:
            die()


class Stopping(TrainerCallback):
    """Rank 1 stands still in the middle of step 4, and lives."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and RANK == 1:
            (Path(sys.argv[1]) / "died-hang").touch()
            os.kill(os.getpid(), signal.SIGSTOP)


class WhileSaving(holdfast.Trainer):  # type: ignore[misc]
    """Rank 1 dies once rank 0 has written weights and state of step 4, before any manifest."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4 and RANK == 1:
            state = Path(output_dir) / "holdfast.json"
            while not state.exists():
                time.sleep(0.01)
            die()
        super()._save_rng_state(output_dir)


def trained(
    folder: Path, cls: type = holdfast.Trainer, callbacks: Any = (), seconds: int = 30
) -> dict[str, Any]:
    """Weights and state after six steps, taken up from the newest whole checkpoint."""
    args = arguments(folder, ddp_backend="gloo", save_strategy="steps", save_steps=2, max_steps=6,
                     per_device_train_batch_size=2, ddp_timeout=seconds)  # fmt: skip
    recipe = Recipe(methods=[DPS(stage=2, drop=0.5), L2SP(), EWC()], max_grad_norm=0.5)
    model = bert(hidden_dropout_prob=0.1)  # random states of both ranks are taken up too
    trainer = cls(model=model, args=args, train_dataset=rows(24), data_collator=collate,
                  recipe=recipe, callbacks=list(callbacks))  # fmt: skip
    trainer.train(resume_from_checkpoint=newest_complete(folder) is not None or None)
    trainer.end_task()
    state = trainer.bound.state_dict()["tensors"]
    return {f"state {k}": t for k, t in state.items()} | dict(model.named_parameters())


def main(folder: Path, how: str) -> None:
    if how == "step":
        trained(folder / "run", callbacks=[AtStep()])
    elif how == "hang":
        try:
            trained(folder / "run", callbacks=[Stopping()], seconds=8)
        except RuntimeError:  # of gloo: the other rank did not answer in time
            (folder / "noticed").write_text(str(time.time()))
            raise
    elif how == "save":
        trained(folder / "run", WhileSaving)
    else:
        again, undisturbed = trained(folder / "run"), trained(folder / "undisturbed")
        for name, t in undisturbed.items():
            assert torch.equal(again[name].nan_to_num(7), t.nan_to_num(7)), name
        (folder / f"equal-{RANK}").touch()
        # Left to the interpreter's end, threads of the group may abort the process (torch).
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
