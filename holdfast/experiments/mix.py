"""General rows beside a task's own, `FILE:SHARE`: rehearsal of what no task of the run teaches.

Of the rows that each task is trained on, the share s are FILE's: beside n rows of the task stand

    round(n · s / (1 − s))

drawn from the training rows of FILE by the seed, other ones for every task, without repetition
until all were drawn. A row is what the model is given: of running text a window. Nothing is drawn
while training, no state is kept, and any recipe may stand beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, Subset

from holdfast.config import exactly
from holdfast.errors import Refused
from holdfast.tasks import Task, load_task
from holdfast.tasks.kinds import Kind, kind_of
from holdfast.tasks.kinds.generation import Generation, check_running
from holdfast.tasks.spec import parse

if TYPE_CHECKING:
    from holdfast.experiments.learner import Learner


def parted(mix: str) -> tuple[str, float]:
    """FILE, and the share: 0 < share < 1."""
    file, _, said = mix.rpartition(":")
    try:
        share = float(said)
    except ValueError:
        share = 0.0
    if not file or not 0 < share < 1:
        raise Refused(f"{mix!r} is no file and share below 1", where="--mix",
                      remedy="as general.txt:0.05")  # fmt: skip
    return file, share


def general(mix: str) -> tuple[Task, float]:
    """The task in FILE, and the share."""
    file, share = parted(mix)
    if parse(file).kind == "module":  # which would be run; a setting may be a stranger's
        raise Refused(f"{file} is a Python file, and no task of text", where="--mix",
                      remedy="name running text, or prompts and answers")  # fmt: skip
    return load_task(file, selection=0), share


def check_mix(mix: str, kind: Kind, source: str) -> str:
    """A hash of FILE's rows; `Refused` where they cannot stand beside tasks of this kind."""
    if kind.HEADS:
        raise Refused("is for language models: a classifier has no head for general rows",
                      where="--mix",
                      remedy="take --recipe replay, which keeps rows of old tasks")  # fmt: skip
    task, _ = general(mix)
    theirs = kind_of([task])
    if not (isinstance(kind, Generation) and isinstance(theirs, Generation)):
        raise Refused(f"{task.name} is a {task.kind}, and no text from text", where="--mix",
                      remedy="name running text, or prompts and answers")  # fmt: skip
    theirs.check(source, max_length=1)
    check_running(source, task)
    return task.hash


def mixed(learner: Learner, index: int) -> Any:
    """A task's encoded training rows, with those that its run mixes in."""
    rows: Any = learner.rows(index, "train")
    mix = learner.plan.mix
    if mix is None:
        return rows
    if (mix, "mix") not in learner.encoded:  # read once, not for every task
        task, _ = general(mix)
        config = learner.kind.load_config(learner.source)
        made = kind_of([task]).encode(task.train, task, learner.processor,
                                      max_length=learner.plan.max_length,
                                      config=config)  # fmt: skip
        learner.encoded[mix, "mix"] = made, 0
    more: Any = learner.encoded[mix, "mix"][0]
    _, share = parted(mix)
    wanted = max(1, round(exactly(share, len(rows)) / (1 - exactly(share, 1))))
    drawn = torch.Generator().manual_seed(1000 * learner.seed + learner.place + index)
    order = torch.randperm(len(more), generator=drawn).tolist()
    return ConcatDataset([rows, Subset(more, [order[i % len(more)] for i in range(wanted)])])
