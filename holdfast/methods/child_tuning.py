"""Child-Tuning: update a child network only (Xu et al., EMNLP 2021, arXiv 2109.05687).

    g ← g ⊙ M / p    M ~ Bernoulli(p), drawn anew every step          F, task-free
    g ← g ⊙ M        M = the ⌈p n⌉ entries of largest F, fixed         D, task-driven

F is the diagonal of the Fisher information of the covered weights on the task's rows, measured
before the first step; the n entries of all covered tensors are ranked together, and of ties the
first count. p is `share`. Weights that are not covered train whole.

Deviations from the published code: it only zeroes gradients, so that momentum and weight decay
move masked entries all the same (`freeze="gradient"`); and it estimates F from gradients of whole
batches, those of each tensor clipped to norm 1 before they are squared
(`estimate="batches", labels="true", rows=null`), where ours squares those of single rows. It
covers names that contain "layer" for D; F covers all weights, the head included
(`modules="all", head=False`; ‡ from memory).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.batches import loss_of
from holdfast.engine.method import Range, View
from holdfast.errors import Refused
from holdfast.methods.common.importance import Labels, diagonal_fisher, wide
from holdfast.methods.common.mixing import uniform
from holdfast.methods.common.subnetwork import (
    Freeze,
    Modules,
    Subnetwork,
    fix_,
    hold_frozen_,
    restore_,
    zero_frozen_,
)
from holdfast.ops.blocks import add_squares_
from holdfast.ops.distributed import beside, local, sharded
from holdfast.ops.selection import top


@dataclass(frozen=True, kw_only=True)
class ChildTuning(Subnetwork):
    """Update a child network: random in every step, or what the task needs by Fisher information.

    share: p, of the covered entries, that moves, 0 < share < 1.
    score: "fisher" (D) or "random" (F).
    modules: what is covered: weights of "linear" layers (HF Conv1D included), all "matrices", the
        network's "layers" whole, "all", or globs of parameter names, each of which must match.
    head: whether the task's own head trains whole; if not, it is covered as other weights are.
    freeze: "exact" keeps masked weights bit for bit; "gradient" zeroes their gradient only.
    estimate: F from gradients of single "rows", or of whole "batches", as published.
    clip: with "batches", the norm that each tensor's gradient is clipped to; null: not at all.
    labels, rows: how F is estimated from rows (null: all of them); see
        `holdfast.methods.common.importance`. "batches" takes the model's own loss.
    """

    name: ClassVar[str] = "child_tuning"
    summary: ClassVar[str] = "trains a part of the weights: random, or by Fisher information"
    paper: ClassVar[str] = "Xu et al., EMNLP 2021, arXiv 2109.05687"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "a pass over the covered weights; D one over the rows before the task"
    use: ClassVar[str] = "few rows"
    bytes_per_weight: ClassVar[str] = "D 4 (the values to keep); F 0, and 5 within a step"
    needs_previous: ClassVar[bool] = True  # of F alone
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"share": Range(0.05, 0.9)}

    share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    score: Literal["fisher", "random"] = "fisher"
    modules: Modules = "layers"
    freeze: Freeze = "exact"
    estimate: Literal["rows", "batches"] = "rows"
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    labels: Labels = "auto"
    rows: Annotated[int, Field(gt=0)] | None = 512

    def begin_task(self, view: View) -> None:
        super().begin_task(view)
        if self.score == "fisher" and not view.resuming:
            fisher = self._fisher(view)
            fix_(view, fisher, top(fisher, self.share, "global"))

    def _fisher(self, view: View) -> dict[str, Tensor]:
        weights = {n: view.weights[n] for n in view.state.numbers["covered"]}
        forward = functools.partial(view.forward, training=False)
        if self.estimate == "rows":
            return diagonal_fisher(forward, view.data(), weights, modules=view.modules,
                                   model=view.bound.models[view.task], labels=self.labels,
                                   rows=self.rows, generator=view.generator)  # fmt: skip
        if any(map(sharded, weights.values())):
            raise Refused("gradients of whole batches are not served in shards",
                          where="child_tuning.estimate", remedy="take rows")  # fmt: skip
        weights = {n: w for n, w in weights.items() if w.requires_grad}
        total = {n: torch.zeros_like(w, dtype=wide(w.dtype)) for n, w in weights.items()}
        read = False
        for batch in view.data():
            loss = loss_of(forward(batch))
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            grads = {n: g for n, g in zip(weights, found, strict=True) if g is not None}
            for g in grads.values() if self.clip else ():
                g.mul_((self.clip / (g.norm() + 1e-6)).clamp(max=1.0))
            add_squares_([total[n] for n in grads], list(grads.values()))
            read = True
        if not read:
            raise Refused("no rows to estimate the Fisher information from", remedy="pass data")
        return total

    def previous_of(self, view: View) -> Collection[str]:
        moves = self.score == "random" and self.freeze == "exact"
        return view.state.numbers["covered"] if moves else ()

    def before_step(self, view: View) -> None:
        if self.score == "fisher":
            return zero_frozen_(view)
        masks = view.scratch["masks"] = {}
        for name in view.state.numbers["covered"]:
            drawn = uniform(view, name, view.weights[name].shape)  # also where nothing is learned
            if (grad := view.grads[name]) is not None:
                masks[name] = beside(drawn < self.share, view.weights[name])
                local(grad).mul_(local(masks[name])).div_(self.share)

    def after_step(self, view: View) -> None:
        if self.freeze == "gradient":
            return
        if self.score == "fisher":
            return hold_frozen_(view)
        for name, mask in view.scratch["masks"].items():
            restore_(view, name, view.previous[name], mask)
