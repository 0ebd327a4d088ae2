"""SIFT: sparse increment fine-tuning (Song et al., 2023, arXiv 2312.11875).

A fixed share of the entries of each covered tensor moves, those with the largest gradients at the
start of the task:

    G = |Σ_t g_t|   over its first `batches` gradients     M = the ⌈share · n⌉ largest entries of G
    W = W₀ + M ⊙ Δ

Until its M is known a tensor does not move, so that G is the gradient of one larger batch. Of ties
the first entries count. `score="random"` is the control: a mask of equal size, drawn at the same
step. The rest of the encoder is frozen, and the task's own head trains whole.

Deviations from the published code, which takes one micro-batch (`batches=1`) of attention matrices
and the classifier (globs in `modules`, `head=False`): it adds Δ to W and sets it to 0 every
step, so that weight decay never reaches W (`decay="none"`). What it saves in memory, gradients and
moments of the entries that move alone, is not reproduced here: only the update is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from holdfast.engine.method import Range, View
from holdfast.errors import Refused
from holdfast.methods.common.importance import wide
from holdfast.methods.common.mixing import uniform
from holdfast.methods.common.order import refuse_after_holding
from holdfast.methods.common.subnetwork import (
    Freeze,
    LeavesOut,
    Subnetwork,
    decay_of,
    fix_,
    hold_frozen_,
    zero_frozen_,
)
from holdfast.ops.distributed import beside, local
from holdfast.ops.selection import top


@dataclass(frozen=True, kw_only=True)
class SIFT(Subnetwork, LeavesOut):
    """Train a fixed share of the weights, those with the largest gradients at first.

    share: of the entries of each covered tensor, that moves, 0 < share < 1.
    batches: steps whose gradients choose them; no covered weight moves in these.
    score: "gradient", or "random" for the control.
    modules: what is covered: weights of "linear" layers (HF Conv1D included), all "matrices", the
        network's "layers" whole, "all", or globs of parameter names, each of which must match.
    others: whether shared weights that are not covered are frozen ("freeze") or "train".
    head: whether the task's own head trains whole; if not, it is treated as other weights are.
    freeze: "exact" keeps the entries that are not chosen bit for bit; "gradient" zeroes their
        gradient only.
    decay: whether weight decay takes from the entries that move ("moving") or from "none".
    """

    name: ClassVar[str] = "sift"
    summary: ClassVar[str] = "trains the few weights that the first gradients point at"
    paper: ClassVar[str] = "Song et al., 2023, arXiv 2312.11875"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "a pass over the covered gradients and weights"
    use: ClassVar[str] = "a small change to a large model, saved as few entries"
    bytes_per_weight: ClassVar[str] = "4 (the sum of gradients turns into the values to keep)"
    needs_previous: ClassVar[bool] = True  # of decay="none" alone
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"share": Range(0.001, 0.2, log=True)}
    excludes: ClassVar[Mapping[str, str]] = {
        "bitfit": "each freezes what the other one trains",
    }

    share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    batches: Annotated[int, Field(gt=0)] = 1
    score: Literal["gradient", "random"] = "gradient"
    others: Literal["freeze", "train"] = "freeze"
    freeze: Freeze = "exact"
    decay: Literal["moving", "none"] = "moving"

    def begin_task(self, view: View) -> None:
        super().begin_task(view)
        names, weights = view.state.numbers["covered"], view.weights
        if self.batches >= view.total_steps and not view.resuming:
            raise Refused(f"in a task of {view.total_steps} steps nothing would move: the first "
                          f"{self.batches} choose what does", where="sift.batches",
                          remedy="take fewer batches, or more steps")  # fmt: skip
        if self.decay == "none":
            refuse_after_holding(view, self)
            for name in names:
                decay_of(view, name)
        rest = [n for n in (view.shared if self.head else weights) if n not in names]
        self.leave_out(view, rest if self.others == "freeze" else [])
        view.state.numbers["seen"] = {}  # name -> how many gradients its sum is of

    def previous_of(self, view: View) -> Collection[str]:
        return view.state.slot("held") if self.decay == "none" else ()

    def before_step(self, view: View) -> None:
        super().before_step(view)
        zero_frozen_(view)
        held, sums = view.state.slot("held"), view.state.slot("sum")
        seen = view.state.numbers["seen"]
        for name in view.state.numbers["covered"]:
            grad = view.grads[name]
            if name in held or grad is None:
                continue
            if name not in sums:
                sums[name] = torch.zeros_like(grad, dtype=wide(grad.dtype))
            local(sums[name]).add_(local(grad))
            seen[name] = seen.get(name, 0) + 1
            view.grads[name] = None

    def after_step(self, view: View) -> None:
        for name in self.previous_of(view):  # W + ηλW: what decay took
            if view.grads[name] is not None:
                w, before = view.weights[name].detach(), view.previous[name]
                local(w).add_(local(before), alpha=decay_of(view, name))
        if self.freeze == "exact":
            hold_frozen_(view)
        sums, seen = view.state.slot("sum"), view.state.numbers["seen"]
        for name in view.state.numbers["covered"]:  # in an order that loading does not change
            if name in sums and seen[name] >= self.batches:
                total = sums.pop(name)
                if self.score == "random":
                    total.copy_(beside(uniform(view, name, total.shape), total))
                fix_(view, {name: total}, top({name: total.abs_()}, self.share))
