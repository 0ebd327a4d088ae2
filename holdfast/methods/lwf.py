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

**rows="near"** is ours. What an old head answers to rows unlike any of its own task is of no use to
anybody, and holding it costs the new task much. Each row then counts by how near it lies to the old
task's, in the inputs x̃ = (x, 1) of that task's last layer before the new task:

    share = min(1, d / h),   h = x̃ᵀ (M+εI)⁻¹ x̃,   M = E_old[x̃ x̃ᵀ],   d = E_old[h] = tr M(M+εI)⁻¹

so that a row as near as the old ones are on average counts whole (but for ε, a tenth of M's mean
diagonal, h is 1 plus the squared Mahalanobis distance). M is all that is kept of the old rows:
4 (inputs + 1)² bytes a task. A head of several layers holds every row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from holdfast.batches import first_rows
from holdfast.errors import Refused
from holdfast.head_first import only_layer
from holdfast.method import Method, Range, View
from holdfast.methods import answers
from holdfast.methods.answers import divergence, kind_of

MEASURED = 400  # rows of a finished task that its moment is measured on
RIDGE = 0.1  # of the moment's mean diagonal


@dataclass(frozen=True, kw_only=True)
class LwF(Method):
    """Hold the old heads' answers on the new task's rows.

    strength: λ ≥ 0, of each old head beside the task's own loss.
    temperature: T > 0; the larger, the more the small probabilities count.
    rows: `all` of the new task's, as published, or each by its share, how `near` it is.
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
    rows: Literal["all", "near"] = "all"

    @property
    def needs_data(self) -> bool:
        return self.rows == "near"

    def wants_rows(self, view: View) -> bool:
        return bool(view.finished)

    def read_rows(self, view: View) -> None:
        found = view.state.cache.setdefault("answers", {"rows": [], "by task": {}})
        inputs = self._inputs(view)
        with contextlib.ExitStack() as stack:
            given = {task: stack.enter_context(layer.seen()) for task, layer in inputs.items()}
            outputs = view.old_outputs()
        for task, output in outputs.items():
            found["by task"].setdefault(task, []).append(_logits(output, task))
            if task in given:
                shares = inputs[task].shares(given[task][0])
                found["by task"].setdefault(f"{task}/shares", []).append(shares)
        found["rows"].append(view.rows)

    def _inputs(self, view: View) -> dict[str, _Inputs]:
        """What is known of the rows of each finished task, where its head is one layer."""
        moments = view.state.tensors.get("moments", {}) if self.rows == "near" else {}
        found = {task: _Inputs.of(view, task, moments[task]) for task in moments}
        return {task: each for task, each in found.items() if each is not None}

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
            shares = before.get(f"{task}/shares")
            total = total + divergence(
                before[task], now, kind, temperature=self.temperature, shares=shares
            )
        return self.strength * total

    @torch.no_grad()
    def end_task(self, view: View) -> None:
        answers.forget(view.state)
        inputs = _Inputs.of(view, view.task, torch.zeros(0)) if self.rows == "near" else None
        if inputs is None:
            return
        seen, state, total = 0, view.generator.get_state(), torch.zeros(())
        for batch in first_rows(view.data(), MEASURED):
            with inputs.seen() as given:
                view.forward(batch, training=False)
            total = total + given[0].T @ given[0]
            seen += len(given[0])
        view.generator.set_state(state)
        view.state.tensors.setdefault("moments", {})[view.task] = total / max(seen, 1)


class _Inputs:
    """The inputs of a head's last layer, with a 1 appended, and how near they lie to old ones."""

    def __init__(self, layer: nn.Linear, moment: Tensor) -> None:
        self.layer, self.moment = layer, moment

    @classmethod
    def of(cls, view: View, task: str, moment: Tensor) -> _Inputs | None:
        """None where the head is not one linear layer."""
        model, encoder = view.bound.models[task], view.encoder
        below = {id(p) for p in encoder.parameters()} if encoder is not None else set()
        layer = only_layer(model, [p for p in model.parameters() if id(p) not in below])
        return None if layer is None else cls(layer, moment)

    @contextlib.contextmanager
    def seen(self) -> Iterator[list[Tensor]]:
        """Within the block, what the layer is given: (rows, inputs + 1) a call."""
        given: list[Tensor] = []

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given.append(functional.pad(inputs[0].detach().float(), (0, 1), value=1.0))

        handle = self.layer.register_forward_pre_hook(see)
        try:
            yield given
        finally:
            handle.remove()

    def shares(self, x: Tensor) -> Tensor:
        """How much each row (rows, inputs + 1) counts, from 0 to 1: (rows,)."""
        moment = self.moment.to(x.device)
        ridge = RIDGE * moment.diagonal().mean() + torch.finfo(x.dtype).tiny
        factor = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), device=x.device))
        near = torch.cholesky_solve(moment, factor).trace()
        distance = (x * torch.cholesky_solve(x.T, factor).T).sum(1)
        return (near / distance.clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1.0)


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
