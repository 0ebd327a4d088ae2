"""Any number of labels a row: a head with an output for each label, each a yes or a no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from holdfast.tasks.kinds.classification import Classification
from holdfast.tasks.scores import several_score
from holdfast.tasks.task import Prediction, Row, Task


class Multilabel(Classification):
    """Independent labels; a row has those whose probability is above a half."""

    def head_config(self, labels: Sequence[str] | None) -> dict[str, Any]:
        return {**super().head_config(labels), "problem_type": "multi_label_classification"}

    def target(self, row: Row, task: Task) -> list[float]:
        """1.0 for each label that the row has, 0.0 for the others: (labels,)."""
        assert task.labels is not None and isinstance(row.label, tuple)
        found = [0.0] * len(task.labels)
        for i in row.label:
            found[i] = 1.0
        return found

    def answers(self, logits: Tensor, task: Task) -> Tensor:
        return (logits > 0).float()

    def total(self, task: Task, measured: Any) -> float:
        """The task's metric; measured: the labels of each row, then those it was given."""
        truth, said = np.split(measured, 2, axis=1)
        return several_score(task.metric, truth, said)

    def aligned(self, measured: Any, labels: Sequence[str] | None, ours: Sequence[str]) -> Any:
        assert labels is not None
        order = [labels.index(name) for name in ours]
        return measured[:, [*order, *(len(order) + i for i in order)]]

    def prediction(self, logits: Tensor, labels: Sequence[str] | None) -> Prediction:
        assert labels is not None
        shares = dict(zip(labels, logits.cpu().double().sigmoid().tolist(), strict=True))
        return Prediction(tuple(name for name in labels if shares[name] > 0.5), shares)


KIND = Multilabel()
