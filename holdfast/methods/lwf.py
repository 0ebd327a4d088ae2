"""LwF: learning without forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282, eq. 2-3).

Before a task every old head answers the new task's rows; while it is learned, each old head on the
changing encoder is held to these answers:

    P = λ Σ_old T² · mean over rows of KL(softmax(z⁰/T) ‖ softmax(z/T))

z⁰ are the logits before the task, z those of now. Of one output (regression) ½ (z⁰ − z)² stands in
place of the divergence: that of two normal distributions of variance 1. No row of an old task is
kept, and the answers (a number a class and row) are told by the content of a row, so that the order
of batches does not matter. The old heads read what the encoder returned for the task's own loss:
a step has no second pass. They are themselves not trained. Deviation: the paper's loss is a cross
entropy, which differs by the constant entropy of the answers.

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
        answers = view.state.cache.setdefault("answers", {})
        for task, outputs in view.old_outputs().items():
            answers.setdefault(task, []).append(_logits(outputs, task))
        answers.setdefault("rows", []).append(view.rows)

    def begin_task(self, view: View) -> None:
        if view.resuming:
            return
        answers = view.state.cache.pop("answers", {})
        view.state.tensors["answers"] = {}
        if answers:
            rows = torch.cat(answers.pop("rows"))
            _, order = torch.sort(rows, stable=True)
            kept = {task: torch.cat(found)[order] for task, found in answers.items()}
            view.state.tensors["answers"] = {"rows": rows[order], **kept}

    def penalty(self, view: View) -> Tensor:
        answers = view.state.tensors.get("answers", {})
        device = next(iter(view.weights.values())).device
        total = torch.zeros((), device=device)
        if not answers:
            return total
        known = answers["rows"]
        place = torch.searchsorted(known, view.rows).clamp_(max=len(known) - 1)
        if not torch.equal(known[place], view.rows):
            raise Refused(
                "a row was not among those read before the task",
                where="lwf",
                remedy="pass the rows as training sees them, not changed at random",
            )
        for task, outputs in view.old_outputs().items():
            now, before = _logits(outputs, task), answers[task][place]
            total = total + divergence(before, now, self.temperature)
        return self.strength * total

    def end_task(self, view: View) -> None:
        view.state.tensors.pop("answers", None)


def divergence(before: Tensor, now: Tensor, temperature: float) -> Tensor:
    """T² · mean over rows of KL(softmax(before/T) ‖ softmax(now/T)), logits (rows, classes).

    Of one output, ½ (before − now)².
    """
    if now.shape[-1] == 1:
        return 0.5 * (before - now).square().mean()
    p = (before / temperature).log_softmax(-1)
    q = (now / temperature).log_softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)


def _logits(outputs: Any, task: str) -> Tensor:
    """Logits of a row each, in float32: (rows, classes)."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise Refused(
            f"the head of {task!r} does not return logits of (rows, classes)",
            where="lwf",
            remedy="kl_anchor holds the outputs of other models",
        )
    return logits.float()
