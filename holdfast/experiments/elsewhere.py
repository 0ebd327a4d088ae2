"""Tests on rows of tasks that are not learned, by the head of one that is.

Each label of the learned task has an answer among the labels of the other, by its own name unless
a map says another: who tells entailment, neutral and contradiction apart answers a task of yes and
no too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.errors import Refused
from holdfast.tasks import Task, load_task
from holdfast.tasks.kinds import Encoded, kind_named

if TYPE_CHECKING:
    from torch import nn

    from holdfast.experiments.learner import Learner

KEY = "elsewhere"  # in a record: task learned -> other task -> score just after


def answer_ids(learned: Task, other: Task, answers: Mapping[str, str]) -> list[int]:
    """What each label of `learned`, in id order, is among those of `other`; `Refused` if nothing.

    answers: a label of `learned` -> one of `other`, where the two are not called the same.
    """
    where = f"{learned.name}, tested on {other.name}"
    if not (learned.kind == other.kind == "classification" and learned.labels and other.labels):
        raise Refused("only tasks of one class a row are tested on others", where=where)
    ids = []
    for label in learned.labels:
        said = answers.get(label, label)
        if said not in other.labels:
            raise Refused(f"no answer for the label {label!r}", where=where,
                          remedy=f"map it to a label there: {', '.join(other.labels)}")  # fmt: skip
        ids.append(other.labels.index(said))
    return ids


def score_elsewhere(
    model: nn.Module, rows: Sequence[Encoded], other: Task, ids: Sequence[int], collate: Any
) -> float:
    """The score of `other` on its encoded rows, when output i of the model means label ids[i]."""
    kind: Any = kind_named(other.kind)
    found = kind.measure(model, rows, other, collate)  # (rows, 2): label, answer
    found[:, 1] = np.asarray(ids)[found[:, 1].astype(int)]
    return float(kind.total(other, found))


class Elsewhere:
    """Tests after each task: their rows are read, and all labels checked, when it is made.

    tests: spec of a task -> its `answers`, see `answer_ids`.
    """

    def __init__(
        self, tests: Mapping[str, Mapping[str, str]], tasks: Sequence[Task], *, head: str,
        evaluation_size: int | None = None,
    ) -> None:  # fmt: skip
        self.others = [
            (load_task(spec, evaluation_size=evaluation_size), answers)
            for spec, answers in tests.items()
        ]
        names = [other.name for other, _ in self.others]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Refused(f"two tests are called {twice[0]!r}", where="tests")
        if len(tasks) > 1 and head != "task":
            raise Refused("tests on other tasks need a head for each task", where=f"--head {head}",
                          remedy="--head task")  # fmt: skip
        for other, answers in self.others:
            for task in tasks:
                answer_ids(task, other, answers)
        self._rows: dict[str, Any] = {}

    def __call__(self, learner: Learner, index: int) -> None:
        """Score the model of a task just learned."""
        task = learner.tasks[index]
        for other, answers in self.others:
            if other.name not in self._rows:
                kind: Any = kind_named(other.kind)
                self._rows[other.name] = kind.encode(
                    other.evaluation, other, learner.processor, max_length=learner.plan.max_length
                )
            ids = answer_ids(task, other, answers)
            scores = learner.record.extra.setdefault(KEY, {}).setdefault(task.name, {})
            scores[other.name] = score_elsewhere(
                learner.models[index], self._rows[other.name], other, ids, learner.collate
            )
