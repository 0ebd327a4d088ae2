"""Memory that does not suffice: a run is tried once more with half the rows at a time.

A step is made of the same rows, by twice the accumulation. What was learned before stays; the task
at hand begins anew, and later ones are learned in the same way.
"""

from __future__ import annotations

import gc
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from holdfast.errors import OutOfMemory
from holdfast.experiments.ranks import ranks
from holdfast.experiments.record import Record
from holdfast.experiments.runs import RECORD, check_held
from holdfast.experiments.settings import Settings

HALVED = "halved"  # in a record's `extra`: what it was asked for, and learned with instead


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of a device or of this machine.

    torch.OutOfMemoryError is a RuntimeError, as is what its allocator on the CPU raises.
    """
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = str(error).strip().partition("\n")[0]
    return short or bool(re.search("out of memory|can't allocate memory", said, re.I))


def too_large(plan: Settings, folder: Path) -> OutOfMemory:
    """What is raised where memory does not suffice for a micro-batch, nor for half of one."""
    return OutOfMemory(f"out of memory with {plan.batch_size} rows at a time", where=str(folder),
                       remedy="a smaller --batch-size with more --accumulation makes the same "
                       "steps")  # fmt: skip


def learned_with(asked: Settings, record: Record) -> Settings:
    """The settings that a run is learned with: those asked for, or with half the rows at a time."""
    return replace(asked, **record.extra.get(HALVED, {}))


def within_memory(
    learn: Callable[[Settings], None], asked: Settings, record: Record, folder: Path
) -> None:
    """`learn(settings)`, and once more with half the micro-batch if memory does not suffice.

    The record says so, and keeps it for a process that goes on. Raises `OutOfMemory` if it does
    not suffice then either, a micro-batch is of an odd number of rows, or processes share it.
    """
    while True:
        plan = learned_with(asked, record)
        try:
            return learn(plan)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Not in the handler: the error holds all that its frames hold.
        _release()
        check_held(folder)
        line = too_large(plan, folder).what
        if HALVED in record.extra or plan.batch_size % 2 or ranks() > 1:
            record.warn(line)
            record.save(folder / RECORD)
            raise too_large(plan, folder)
        _halve(plan, line, record, folder)


def _release() -> None:
    import torch  # here: what reads runs needs none

    gc.collect()
    torch.cuda.empty_cache()


def _halve(plan: Settings, line: str, record: Record, folder: Path) -> None:
    rows, pieces = plan.batch_size // 2, 2 * plan.accumulation
    line += f": the task is learned anew with {rows} and an accumulation of {pieces}"
    logging.getLogger("holdfast").warning(f"{folder}: {line}")
    # Before the record tells of it: checkpoints of other micro-batches are none to go on from.
    for home in (folder / "tasks").glob("*.training"):
        shutil.rmtree(home)
    record.warn(line)
    record.extra[HALVED] = {"batch_size": rows, "accumulation": pieces}
    record.save(folder / RECORD)
