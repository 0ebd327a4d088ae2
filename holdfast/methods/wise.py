"""WiSE-FT: interpolates weights before and after (Wortsman et al., CVPR 2022, arXiv 2109.01903).

After a task, every shared weight goes part of the way back:

    w ← w₀ + α (w₁ − w₀)

with w₀ the weights as the task began and w₁ the learned ones. α is fixed, or the smallest of
.1, .2, … .9 whose selection score of the task stays within a tolerance of the learned weights'
(1 if none does: the learned weights stay). No row is kept and training steps cost no extra.

For LoRA the product B A is interpolated, not its factors, and the factors are refitted to it by
truncated SVD (the product has rank 2r; its nearest rank-r approximation is kept). Buffers, such
as the running means of a batch norm, are unchanged. Deviation: the paper starts from a zero-shot
model, whose head is interpolated too; a fresh head has no weights worth going back to unless it
was fitted first, so it is interpolated only with `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common.anchor import keep_start, remember, start_of
from holdfast.methods.common.importance import wide
from holdfast.network.lora import factors_of
from holdfast.ops import distributed

ALPHAS = tuple(tenths / 10 for tenths in range(1, 10))  # tried in this order


@dataclass(frozen=True, kw_only=True)
class WiSE(Method):
    """Interpolate between the weights as a task began and as it ended.

    alpha: α, the share of each weight's change that is kept, 0 ≤ α ≤ 1.
    choose: how much of the task's selection score may be lost, in its units: the smallest of
        .1, .2, … .9 that loses no more is taken, or else 1. None: `alpha` as it is.
    first: also interpolate the first task, with the pre-trained weights (otherwise left as it is).
    head: also interpolate the task's own head, which should have been fitted first.
    """

    name: ClassVar[str] = "wise"
    summary: ClassVar[str] = "goes back part of the way to the weights before the task"
    paper: ClassVar[str] = "Wortsman et al., CVPR 2022, arXiv 2109.01903"
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "nothing"
    use: ClassVar[str] = "the next task, without old rows"
    head_first: ClassVar[bool] = True
    bytes_per_weight: ClassVar[str] = (
        "4 while a task is learned, where no checkpoint holds the start weights"
    )
    changes_weights: ClassVar[bool] = True
    excludes: ClassVar[Mapping[str, str]] = {
        "merge": "both go back from the learned weights to those before the task"
    }
    tunable: ClassVar[tuple[str, ...]] = ("alpha", "choose", "first", "head")
    ranges: ClassVar[Mapping[str, Range]] = {"alpha": Range(0.1, 0.9)}

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    choose: Annotated[float, Field(ge=0)] | None = None
    first: bool = False
    head: bool = False

    @property
    def idle_at_first(self) -> bool:
        return not self.first

    def begin_task(self, view: View) -> None:
        for slot in ("start", "head"):
            view.state.weights.pop(slot, None)
        if self._acts(view):
            keep_start(view)
            if self.head and not view.resuming:
                view.state.weights["head"] = remember(_own(view))

    @torch.no_grad()
    def end_task(self, view: View) -> None:
        head = view.state.weights.pop("head", {})
        if not self._acts(view) or view.step == 0:  # nothing moved: a task learned elsewhere
            view.state.weights.pop("start", None)
            return
        shared = start_of(view)
        if shared is None:
            raise Refused("nobody kept the weights that the task began with", where="wise",
                          remedy="pass start= to begin_task, as before")  # fmt: skip
        start = {**shared, **head}
        view.state.numbers["alpha"] = self._interpolate(view, start)

    def _acts(self, view: View) -> bool:
        return self.first or bool(view.finished)

    def _interpolate(self, view: View, start: Mapping[str, Tensor]) -> float:
        """Write the interpolated weights into the network; returns α."""
        weights = {n: w.detach() for n, w in view.weights.items() if n in start}
        if self.choose is None:
            _write(weights, start, weights, self.alpha)
            return self.alpha
        learned, least = remember(weights), view.score() - self.choose
        for alpha in ALPHAS:
            _write(weights, start, learned, alpha)
            if view.score() >= least:
                return alpha
        _write(weights, start, learned, 1.0)
        return 1.0


def _own(view: View) -> dict[str, Tensor]:
    return {name: w for name, w in view.weights.items() if name not in view.shared}


def _write(
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    learned: Mapping[str, Tensor],
    alpha: float,
) -> None:
    """weights ← start + α (learned − start), in place; LoRA pairs by their product."""
    share: Any = _Share(alpha)
    refitted: dict[str, Tensor] = {}
    for pair in factors_of(weights) if 0 < alpha < 1 else ():
        refitted |= pair.refitted(start, learned, (share, share), 0.0, 0.0)
    for name, w in weights.items():
        if name in refitted:
            value = distributed.local(distributed.beside(refitted[name], w))
        else:
            before = distributed.local(distributed.beside(start[name], w)).to(wide(w.dtype))
            value = torch.lerp(before, distributed.local(learned[name]).to(before.dtype), alpha)
        distributed.local(w).copy_(value)


class _Share:
    """Stands in for a Gram matrix: keeps the same share of every change."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def shrunk(self, change: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.alpha * change
