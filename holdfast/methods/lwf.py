"""LwF: learning without forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282, eq. 2-3).

Before a task every old head answers the new task's rows; while it is learned, each old head on the
changing encoder is held to these answers:

    P = λ Σ_old T² · mean over rows of KL(softmax(z⁰/T) ‖ softmax(z/T))

z⁰ are the logits before the task, z those of now. Of a regression ½ (z⁰ − z)² stands in place of
the divergence: that of two normal distributions of variance 1; of several labels a row the sum of
each label's. No row of an old task is kept, and the answers (a number a class and row) are told by
the content of a row, so that the order of batches does not matter. The old heads read what the
encoder returned for the task's own loss: a step has no second pass. They are themselves not
trained. Deviation: the paper's loss is a cross entropy, which differs by the constant entropy of
the answers.

Of use once the task's own head was fitted first: a random head sends the encoder away from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from holdfast.errors import Refused
from holdfast.method import Method, Range, View
from holdfast.methods import answers
from holdfast.methods.answers import divergence, kind_of


@dataclass(frozen=True, kw_only=True)
class LwF(Method):
    """Hold the old heads' answers on the new task's rows.

    strength: λ ≥ 0, of each old head beside the task's own loss.
    temperature: T > 0; the larger, the more the small probabilities count.
    """

    name: ClassVar[str] = "lwf"
    summary: ClassVar[str] = "holds the old heads' answers on the new task's rows"
    paper: ClassVar[str] = "Li & Hoiem, ECCV 2016, arXiv 1606.09282"
    bytes_per_weight: ClassVar[str] = "0 (the answers: 4 bytes a row and old class, 8 a row)"
    needs_features: ClassVar[bool] = True
    needs_old_task: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("strength", "temperature")
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(0.1, 10.0, log=True),
        "temperature": Range(1.0, 4.0),
    }

    strength: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0

    def wants_rows(self, view: View) -> bool:
        return bool(view.finished)

    def read_rows(self, view: View) -> None:
        found = view.state.cache.setdefault("answers", {"rows": [], "by task": {}})
        for task, outputs in view.old_outputs().items():
            found["by task"].setdefault(task, []).append(_logits(outputs, task))
        found["rows"].append(view.rows)

    def begin_task(self, view: View) -> None:
        if view.resuming:
            return
        answers.forget(view.state)
        found = view.state.cache.pop("answers", None)
        if found is not None:
            answers.keep(view.state, found["rows"], found["by task"])

    def penalty(self, view: View) -> Tensor:
        total = torch.zeros((), device=next(iter(view.weights.values())).device)
        if not answers.kept(view.state):
            return total
        before = answers.recall(view.state, view.rows, where="lwf",
                                remedy="pass the rows as training sees them, not changed at "
                                "random")  # fmt: skip
        for task, outputs in view.old_outputs().items():
            now = _logits(outputs, task)
            kind = kind_of(view.bound.models[task], now)
            total = total + divergence(before[task], now, kind, temperature=self.temperature)
        return self.strength * total

    def end_task(self, view: View) -> None:
        answers.forget(view.state)


def _logits(outputs: Any, task: str) -> Tensor:
    """Logits of a row each, in float32 at least: (rows, classes)."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise Refused(
            f"the head of {task!r} does not return logits of (rows, classes)",
            where="lwf",
            remedy="kl_anchor holds the outputs of other models",
        )
    return answers.exact(logits)
