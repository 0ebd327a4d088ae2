"""One run on several processes, as `torchrun` starts them: the first writes, the others follow.

All of them read the same rows, take the same steps on their shares of each batch, and measure the
same; so all hold the same record, which the first alone writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from holdfast.errors import Refused


def ranks() -> int:
    """How many processes share a run: 1 but under `torchrun`."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def follows() -> bool:
    """Whether this process writes nothing, because the first does."""
    return ranks() > 1 and os.environ.get("RANK", "0") != "0"


def check_alone() -> None:
    """Refuse, in one of several processes, what is of one."""
    if ranks() > 1:
        raise Refused("is of one process", where="torchrun",
                      remedy="train one model on several by train or sequence, or make several "
                      "runs at once by --workers or --engine")  # fmt: skip


def join() -> None:
    """Make the group of all processes; only the first goes on to speak."""
    if ranks() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())
        if follows():
            logging.getLogger("holdfast").setLevel(logging.ERROR)


def wait() -> None:
    """Return when all processes have come here: what one has written, all can read."""
    if ranks() > 1:
        from holdfast.ops import distributed

        distributed.wait()


def first(work: Callable[[], object]) -> None:
    """Do this in the first process alone, when all have come here and before any goes on; what it
    refuses, all refuse."""
    if ranks() == 1:
        work()
        return
    import torch

    wait()
    told: list[Refused | None] = [None]
    if not follows():
        try:
            work()
        except Refused as refusal:
            told = [refusal]
    torch.distributed.broadcast_object_list(told)
    if told[0] is not None:
        raise told[0]
