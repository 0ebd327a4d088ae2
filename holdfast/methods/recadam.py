"""RecAdam: from holding the start to learning the task, annealed (Chen et al., arXiv 2004.12651).

    λ(t) = σ(k (t − t₀))         t = 1 in the first step
    L(t) = λ(t) · L_task + (1 − λ(t)) · γ/2 · ‖w_S − w⁰_S‖²

w_S are the weights that tasks share, w⁰_S their values when the task begins. A task's own head
trains as without the method. The published optimizer keeps both factors out of Adam's scaling
(`pull="decoupled"`): with u the step that the optimizer would make, of rate lr,

    w ← w + λ u − min(1, lr (1 − λ) γ) · (w + λ u − w⁰)

The minimum is ours: beyond it the pull would pass w⁰. u is any optimizer's, its decoupled weight
decay included, which the published code leaves unscaled. With `pull="gradient"` the gradient of
L(t) goes through the optimizer. From memory, not read again: that the published pull is taken at
w + λ u, not at w; λ(t) and γ/2 ‖·‖² too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.config import Share, count
from holdfast.engine.method import Method, Range, View
from holdfast.methods.common.anchor import pull_, remember
from holdfast.methods.common.order import refuse_after_holding
from holdfast.ops.blocks import blocks
from holdfast.ops.distributed import local


@dataclass(frozen=True, kw_only=True)
class RecAdam(Method):
    """Anneal from recalling the weights at the start to learning the task.

    strength: γ ≥ 0, in loss / weight².
    slope: k > 0, per step: λ goes from 0.1 to 0.9 in 4.4 / k steps.
    middle: t₀, where λ = ½: a share of the task's steps or a number of steps.
    pull: "decoupled" from the optimizer, as published, or in the "gradient".
    """

    name: ClassVar[str] = "recadam"
    summary: ClassVar[str] = "anneals from holding the start to learning the task"
    paper: ClassVar[str] = "Chen et al., EMNLP 2020, arXiv 2004.12651"
    bytes_per_weight: ClassVar[str] = (
        "4 (the anchor, in the weight's own type); decoupled 4 more within a step, while λ < 1"
    )
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "a copy of the weights, and one pass over weights and anchor"
    use: ClassVar[str] = "few rows"
    shares: ClassVar[tuple[str, ...]] = ("middle",)
    needs_previous: ClassVar[bool] = True
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(100.0, 10_000.0, log=True),
        "slope": Range(0.05, 1.0, log=True),
        "middle": Range(0.05, 0.5),
    }

    strength: Annotated[float, Field(ge=0)] = 5000.0
    slope: Annotated[float, Field(gt=0)] = 0.1
    middle: Share = 0.25
    pull: Literal["decoupled", "gradient"] = "decoupled"

    def previous_of(self, view: View) -> Collection[str]:
        return self._moved(view) if self.pull == "decoupled" and self.share(view) < 1 else ()

    def share(self, view: View) -> float:
        """λ of the current step."""
        x = self.slope * (view.step + 1 - count(self.middle, view.total_steps))
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    def begin_task(self, view: View) -> None:
        if self.pull == "decoupled":
            refuse_after_holding(view, self)
        view.state.weights["start"] = remember(view.shared)

    def _moved(self, view: View) -> list[str]:
        """The anchored names that this step trains."""
        return [n for n in view.state.slot("start") if view.grads[n] is not None]

    def before_step(self, view: View) -> None:
        share = self.share(view)
        names, start = self._moved(view), view.state.slot("start")
        if self.pull == "decoupled" or share == 1 or not names:
            return
        grads = {n: view.grads[n] for n in names}
        torch._foreach_mul_([local(g) for g in grads.values() if g is not None], share)
        anchor = {n: start[n] for n in names}
        pull_(grads, view.weights, anchor, (1 - share) * self.strength)

    def after_step(self, view: View) -> None:
        share, start = self.share(view), view.state.slot("start")
        if self.pull == "gradient" or share == 1:
            return
        for name in view.previous:
            if name in start and view.grads[name] is not None:
                back = min(1.0, view.lr(name) * (1 - share) * self.strength)
                self._recall_(view.weights[name], view.previous[name], start[name], share, back)

    @staticmethod
    @torch.no_grad()
    def _recall_(weight: Tensor, before: Tensor, start: Tensor, share: float, back: float) -> None:
        for w, b, s in blocks(weight.detach(), before, start):
            torch.lerp(b, w, share, out=w)
            w.lerp_(s, back)
