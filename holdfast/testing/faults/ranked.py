"""What one of two ranks does in a try of `ranks`, in a process of its own, and tells as JSON.

python -m holdfast.testing.faults.ranked NAME FOLDER
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from holdfast.errors import Refused
from holdfast.methods import DPS, L2SP
from holdfast.recipe import Recipe
from holdfast.testing.faults.place import Place, classifier, encoded, weights
from holdfast.training.loop import save_checkpoint
from holdfast.training.manifest import newest_complete

RECIPE = Recipe(methods=[DPS(stage=2, drop=0.5)])
RANK = int(os.environ.get("RANK", "0"))


def hashed(tensors: Mapping[str, Tensor]) -> str:
    """One hash for all bits."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(name.encode() + t.detach().contiguous().reshape(-1).view(torch.uint8)
                     .numpy().tobytes())  # fmt: skip
    return found.hexdigest()


# --- a plain loop ---------------------------------------------------------------------------------


def one_weight(method: Any = None) -> tuple[Any, Any, Any]:
    """y = w x of one weight, bound; the gradient of a sum over rows is x."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recipe = Recipe(methods=[method or DPS(stage=100, drop=0.5)])
    bound = recipe.bind(model, optimizer, total_steps=200)
    return DistributedDataParallel(model), optimizer, bound


def sums(pieces: int) -> dict[str, Any]:
    """What DPS has summed up after a step whose gradients are 1 on one rank and 11 on the other."""
    net, optimizer, bound = one_weight()
    for i in range(pieces):
        net.require_backward_grad_sync = i + 1 == pieces  # what no_sync() does
        (net(torch.tensor([[1.0 + 10 * RANK]])).sum() / pieces).backward()
    optimizer.step()
    state = bound.state_dict()["tensors"]
    return {"sums": [float(t) for t in state.values() if t.shape == (1, 1)]}


def nan_in_a_loop() -> dict[str, Any]:
    """Three steps, in the second of which rank 1 meets a NaN."""
    net, optimizer, bound = one_weight()
    found = []
    for at in range(3):
        optimizer.zero_grad()
        x = math.nan if at == 1 and RANK == 1 else 1.0
        net(torch.tensor([[x]])).sum().backward()
        optimizer.step()
        found.append(float(next(net.parameters())))
    return {"weights": found, "skipped": bound.skipped, "step": bound.step}


def saved(folder: Path, own: str = "") -> dict[str, Any]:
    """A checkpoint of two ranks, in one folder or in one each."""
    _, _, bound = one_weight(L2SP())
    try:
        save_checkpoint(folder / f"run{own}" / "checkpoint-1", bound, position={})
    except Refused as refusal:
        return {"refused": str(refusal)}
    return {"refused": None}


def shards() -> dict[str, Any]:
    """Entries that are kept of scores in two shards, beside those by a sort of the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from holdfast.ops.selection import select

    scores = torch.arange(40.0).reshape(10, 4)  # all that is large lies in the second shard
    part = distribute_tensor(scores, init_device_mesh("cpu", (2,)), [Shard(0)])
    found = {}
    for drop in (0.1, 0.5, 0.9):
        kept: Any = select({"w": part}, drop)["w"]
        full = kept.full_tensor()
        found[str(drop)] = [int(full.sum()), bool(full.flatten()[-int(full.sum()) :].all())]
    return found


# --- holdfast.Trainer -----------------------------------------------------------------------------


class AtStep(TrainerCallback):
    """Rank 1 is sent a signal in the middle of step 4, while rank 0 waits for its gradients."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder = number, folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and RANK == 1:
            (self.folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), self.number)


class Poisoned(nn.Module):
    """A classifier whose loss is NaN on rank 1 in its second micro-batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.config = inner.config

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        out = self.inner(input_ids=input_ids, labels=labels)
        if self.calls == 2 and RANK == 1:
            out.loss = out.loss * math.nan
        return out


def trained(
    folder: Path, *, model: nn.Module | None = None, seconds: int = 60, size: int = 2,
    callbacks: Any = (), while_saving: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Eight steps of a Trainer, gone on with from the newest whole checkpoint."""
    dropped: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ranks = {"ddp_backend": "gloo", "ddp_timeout": seconds} if "RANK" in os.environ else {}
    trainer = Place(folder, folder).trainer(
        encoded(16), model=model or classifier(**dropped), recipe=RECIPE, optim="sgd",
        per_device_train_batch_size=size, **{"save_steps": 2, **ranks, **more},
    )  # fmt: skip
    for each in callbacks:
        trainer.add_callback(each)
    if while_saving:
        _die_while_saving(trainer, folder)
    going_on = newest_complete(folder / "trainer") is not None
    trainer.train(resume_from_checkpoint=going_on or None)
    state = trainer.bound.state_dict()["tensors"]
    return {"weights": {n: w.tolist() for n, w in weights(trainer.model).items()},
            "hash": hashed(state | weights(trainer.model)), "steps": trainer.bound.step,
            "skipped": trainer.bound.skipped}  # fmt: skip


def _die_while_saving(trainer: Any, folder: Path) -> None:
    """Rank 1 dies once rank 0 has written weights and state of step 4, before any manifest."""
    save = trainer._save_rng_state

    def dying(output_dir: str) -> None:
        if trainer.state.global_step == 4 and RANK == 1:
            while not (Path(output_dir) / "holdfast.json").exists():
                time.sleep(0.01)
            (folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_rng_state = dying


STEPS: dict[str, Any] = {"save_strategy": "steps"}
WORK: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sums": lambda _: sums(1),
    "sums without sync": lambda _: sums(2),
    "nan in a loop": lambda _: nan_in_a_loop(),
    "saved": saved,
    "saved apart": lambda folder: saved(folder, f"-{RANK}"),
    "shards": lambda _: shards(),
    "trained": lambda folder: trained(folder),
    "in pieces": lambda folder: trained(folder, size=1, gradient_accumulation_steps=2),
    "poisoned": lambda folder: trained(folder, model=Poisoned(classifier())),
    "saving": lambda folder: trained(folder, **STEPS),
    "killed": lambda folder: trained(
        folder, callbacks=[AtStep(signal.SIGKILL, folder)], **STEPS),
    "hanging": lambda folder: trained(
        folder, callbacks=[AtStep(signal.SIGSTOP, folder)], seconds=8, **STEPS),
    "killed while saving": lambda folder: trained(folder, while_saving=True, **STEPS),
}  # fmt: skip


def main(name: str, place: str) -> None:
    torch.set_num_threads(1)
    folder = Path(place)
    if name in ("sums", "sums without sync", "nan in a loop", "saved", "saved apart", "shards"):
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    (folder / f"{RANK}.json").write_text(json.dumps(WORK[name](folder)))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
