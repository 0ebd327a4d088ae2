"""One run on several processes, as `torchrun` starts them: the first writes, the others follow.

All of them read the same rows, take the same steps on their shares of each batch, and measure the
same; so all hold the same record, which the first alone writes.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable

from holdfast.errors import Refused

# What Accelerate reads from the environment and a run's settings say otherwise, or not at all; it
# sets most of them itself, to one of the values that change nothing.
OTHERS = ("MIXED_PRECISION", "DYNAMO_BACKEND", "GRADIENT_ACCUMULATION_STEPS", "TORCH_DEVICE",
          "DOWNCAST_BF16", "USE_")  # fmt: skip
NEUTRAL = ("", "no", "false", "0")
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def ranks() -> int:
    """How many processes share a run: 1 but under `torchrun`."""
    told = os.environ.get("WORLD_SIZE", "")
    return max(1, int(told) if told.isdecimal() else 1)


def follows() -> bool:
    """Whether this process writes nothing, because the first does."""
    return ranks() > 1 and os.environ.get("RANK", "0") != "0"


def check_environment() -> None:
    """Refuse variables that would train otherwise than the record says, or that fail later on."""
    for name, value in os.environ.items():
        ours = name.startswith(tuple(f"ACCELERATE_{other}" for other in OTHERS))
        if ours and value.lower() not in NEUTRAL and not (value == "1" and name.endswith("STEPS")):
            raise Refused(f"is {value!r} in the environment, which the run's settings do not say",
                          where=name, remedy=f"unset {name}")  # fmt: skip
    if ranks() == 1 and os.environ.get("WORLD_SIZE", "1") == "1" and "LOCAL_RANK" not in os.environ:
        return
    given = [name for name in GROUP if os.environ.get(name)]
    numbers = all(os.environ.get(n, "0").isdecimal() for n in GROUP if n != "MASTER_ADDR")
    if len(given) < len(GROUP) or not numbers:
        raise Refused(f"only part of what torchrun sets is in the environment ({', '.join(given)})",
                      where="torchrun", remedy="start it with torchrun, or unset them")  # fmt: skip


def check_alone() -> None:
    """Refuse, in one of several processes, what is of one."""
    if ranks() > 1:
        raise Refused("is of one process", where="torchrun",
                      remedy="train one model on several by train or sequence, or make several "
                      "runs at once by --workers or --engine")  # fmt: skip
    check_environment()


def join() -> None:
    """Make the group of all processes; only the first goes on to speak."""
    check_environment()
    if ranks() > 1:
        import torch
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            # while Python still lives: gloo's threads may hold tensors, and to let go of one after
            # it aborts a process whose run is done (pytorch/pytorch#190489)
            atexit.register(_leave)
        PartialState(cpu=not torch.accelerator.is_available())
        if follows():
            logging.getLogger("holdfast").setLevel(logging.ERROR)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
