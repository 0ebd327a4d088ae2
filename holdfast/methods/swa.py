"""SWA: a task ends at the mean of the weights of its last steps (Izmailov et al., UAI 2018,
arXiv 1803.05407).

    w̄ ← w̄ + (w − w̄) / n        n = 1, 2, …: every k-th step from a start on, the last one included
    w ← w̄                       after the last step

The steps themselves are plain. Noise of single batches averages out, and what is left lies nearer
to where the task began. Only parameters are averaged: running statistics, such as a batch norm's,
are those of the last step (the paper measures them once more).

Deviation: the paper goes on at a constant or cyclic rate after training, for which the schedule
would have to be ours. Here it is the trainer's, mostly one that decays; the mean of the latest
weights of ordinary training is also known as LAWA (Kaddour 2022, arXiv 2209.14981).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from holdfast.config import Share, count
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused, tell_once
from holdfast.methods.common.importance import wide
from holdfast.methods.common.order import later
from holdfast.ops.distributed import local


@dataclass(frozen=True, kw_only=True)
class SWA(Method):
    """End a task at the mean of the weights of its last steps.

    start: how much of the task passes before the first weights are taken: a share of its steps, or
        a number of steps.
    every: k > 0, steps between two that are taken.
    """

    name: ClassVar[str] = "swa"
    summary: ClassVar[str] = "ends at the mean of the weights of the last steps"
    paper: ClassVar[str] = "Izmailov et al., UAI 2018, arXiv 1803.05407"
    bytes_per_weight: ClassVar[str] = "4 while a task is learned (the mean)"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "one pass over the weights every k-th step"
    use: ClassVar[str] = "few rows, or noisy ones"
    per_task: ClassVar[bool] = True
    excludes: ClassVar[Mapping[str, str]] = {
        "dynamic_subset": "more entries differ in a mean than in any step",
    }
    shares: ClassVar[tuple[str, ...]] = ("start",)
    tunable: ClassVar[tuple[str, ...]] = ("start", "every")
    ranges: ClassVar[Mapping[str, Range]] = {"start": Range(0.1, 0.9)}

    start: Share = 0.5
    every: Annotated[int, Field(gt=0)] = 5

    def begin_task(self, view: View) -> None:
        for method in later(view, self):
            # It takes back what a step did, in `after_step`.
            if method.needs_previous or method.holds:
                raise Refused(f"{method.name} changes weights after swa took them",
                              where="recipe.methods", remedy="name swa after it")  # fmt: skip
        view.state.weights.clear()
        view.state.numbers.clear()
        first = count(self.start, view.total_steps, what="swa.start")
        # `skipped` counts over all tasks; `view.step` counts no step that was left out.
        view.state.numbers.update(first=first, taken=0, skipped=view.bound.skipped)

    @torch.no_grad()
    def after_step(self, view: View) -> None:
        numbers = view.state.numbers
        done = 1 + self._made(view)
        if (ended := numbers.pop("ended", None)) is not None:
            tell_once(f"{view.task}: swa: step {ended} was not the last: training goes on from the "
                      "mean that was taken there")  # fmt: skip
        left = view.total_steps - done
        if left < 0 or left % self.every or (left and done < numbers["first"]):
            return
        means = view.state.slot("mean")
        if not means:
            for name, w in view.weights.items():
                means[name] = torch.empty_like(w, dtype=wide(w.dtype), requires_grad=False)
        held = [local(means[name]) for name in view.weights]
        now = [local(w.detach()) for w in view.weights.values()]
        numbers["taken"] += 1
        if numbers["taken"] == 1:
            torch._foreach_copy_(held, now)
        else:
            same = [w.to(mean.dtype) for w, mean in zip(now, held, strict=True)]
            torch._foreach_lerp_(held, same, 1 / numbers["taken"])
        if not left:
            torch._foreach_copy_(now, held)
            view.state.weights.clear()
            numbers.update(taken=0, ended=done)

    def end_task(self, view: View) -> None:
        if view.state.weights.pop("mean", None):
            made, planned = self._made(view), view.total_steps
            why = "its last step was left out"
            if made < planned:
                why = f"step {made} was the last, not {planned}"
            tell_once(f"{view.task}: swa: {why}: the weights are not the mean")

    def _made(self, view: View) -> int:
        """Steps of the task before this one, with those that were left out."""
        return view.step + view.bound.skipped - int(view.state.numbers["skipped"])
