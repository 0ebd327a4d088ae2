"""DPS: fine-tune by dynamic parameter selection (Zhang et al., NeurIPS 2022, arXiv 2211.01642).

Training alternates between stages of equal length. An accumulating stage sums squared gradients;
a masking stage moves only the subnetwork they point at:

    GAM ← Σ_t g_t²                                         over the accumulating stage
    M   = GAM ≥ τ,   τ the value of rank ⌈n(1 − drop)⌉     fixed for the masking stage

**Dense** (`mix=False`) trains every weight while accumulating. **Mix** swaps weights in the
forward pass for an anchor W*, with N ~ Bernoulli(1 − drop) and W* the weights at the start of the
task; while masking, N = M and W* are the weights at the start of the stage:

    W̃ = W* + N (W − W*) / (1 − drop)          ∂L/∂W := N ∂L/∂W̃   (published: without 1/(1−drop))
    FAM ← Σ_t N_t,   score = GAM / max(FAM, 1) · exp(−FAM / stage)   the exp from `stage` ≥ 50 on

**Retention** (`score="retention"`, our own) protects earlier tasks: with F the Fisher information
of the finished tasks, every stage moves the entries with the highest

    score = Σ_t g_t² / (F + mean F)            mean per tensor, g from the stage before

and in the first stage of a new task no covered weight moves. Weights that tasks share are covered,
never a task's own head. The very first task trains as if the method were not there. No row of an
old task is kept. g is the gradient of the step, including the pull of EWC or L2-SP if the recipe
has one.

What is remembered, by slot (of the size of the weight, but for `count` with column noise):

    sum    Σ g² of the current stage        start  W* of Mix while it accumulates
    held   the values that a masking stage keeps; for Mix all values at its start
    mask   M of Mix, packed in bits; otherwise NaN in `held` marks what may move
    count  FAM of Mix                       fisher F of retention, kept after the task

Deviations from the published code: a stage counts optimizer steps, not forward passes (equal
without accumulation), and Mix draws its noise once a step, so that accumulation equals a large
batch; stages are at least one step long; `freeze="exact"` restores masked weights after the step,
because a zeroed gradient does not stop momentum and weight decay (`"gradient"` is as published);
the head is initialised by its own model, and Mix may leave it out through `modules`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.config import Share, count
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common.importance import Labels, diagonal_fisher, wide
from holdfast.methods.common.mixing import (
    Noise,
    draw,
    drawn,
    mixed,
    noise_shape,
    refuse_unseen,
    widened,
)
from holdfast.methods.common.order import earlier
from holdfast.methods.common.subnetwork import (
    Freeze,
    Modules,
    covered,
    fix_,
    hold_frozen_,
    zero_frozen_,
)
from holdfast.network.parts import HEAD
from holdfast.ops.blocks import add_squares_
from holdfast.ops.distributed import like, local, mean
from holdfast.ops.masks import pack, unpack
from holdfast.ops.selection import Scope, select

PENALTY_FROM = 50  # the published code applies the frequency penalty from this stage length on


@dataclass(frozen=True, kw_only=True)
class DPS(Method):
    """Dynamic parameter selection: Dense, Mix, or by retention.

    drop: share of the covered weights that a masking stage freezes, 0 < drop < 1.
    stage: length of a stage, a share of the task's steps or a number of steps.
    mix: DPS Mix rather than Dense.
    freeze: "exact" keeps masked weights bit for bit; "gradient" zeroes their gradient only.
    select: the threshold is found per "tensor" or over all covered tensors ("global").
    score: "gradient" (published) or "retention".
    modules: what is covered: weights of "linear" layers (HF Conv1D included), all "matrices", the
        network's "layers" whole, "all", or globs of parameter names, each of which must match.
    noise: Mix draws it per input "column" (published) or per "weight".
    frequency_penalty: whether Mix applies it; null: from stages of 50 steps on, as published.
    fisher_labels, fisher_rows: how retention estimates F; see `holdfast.methods.common.importance`.
    """

    name: ClassVar[str] = "dps"
    summary: ClassVar[str] = "trains the subnetwork that recent gradients point at"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2022, arXiv 2211.01642"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "a pass over the covered gradients"
    use: ClassVar[str] = "few rows"
    bytes_per_weight: ClassVar[str] = (
        "Dense 4 (the sum of squares turns into the values to keep); Mix 8.125 with column noise, "
        "9 with weight noise (12 where a stage is longer than 255 steps); retention 12"
    )
    holds: ClassVar[bool] = True
    shares: ClassVar[tuple[str, ...]] = ("stage",)
    ranges: ClassVar[Mapping[str, Range]] = {
        "drop": Range(0.1, 0.9),
        "stage": Range(0.01, 0.25, log=True),
    }

    drop: Annotated[float, Field(gt=0, lt=1)] = 0.3
    stage: Share = 0.05
    mix: bool = False
    freeze: Freeze = "exact"
    select: Scope = "tensor"
    score: Literal["gradient", "retention"] = "gradient"
    modules: Modules = "linear"
    noise: Noise = "column"
    frequency_penalty: bool | None = None
    fisher_labels: Labels = "auto"
    fisher_rows: Annotated[int, Field(gt=0)] = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "retention" and (self.mix or self.freeze != "exact"):
            raise Refused("retention works with mix=False and freeze='exact'", where="dps.score")

    @property
    def needs_data(self) -> bool:
        """Retention estimates the Fisher information of the task it has learned."""
        return self.score == "retention"

    @property
    def reads_whole(self) -> Literal["gradients", "inputs"] | None:
        return "gradients" if self.fisher_labels in ("auto", "true") else None

    @property
    def idle_at_first(self) -> bool:
        """Retention has nothing to retain in the first task."""
        return self.score == "retention"

    # --- what takes part ----------------------------------------------------------------------

    def covered(self, view: View) -> list[str]:
        """The names that take part, in the model's order."""
        if self.score != "retention":
            return covered(view, self, self.modules, view.weights)
        # If tasks have heads of their own, the head part of the shared weights is covered too.
        own = len(view.weights) > len(view.shared)
        among = [n for n in view.shared if own or view.parts[n] != HEAD]
        return covered(view, self, self.modules, among)

    # --- stages -------------------------------------------------------------------------------

    def begin_task(self, view: View) -> None:
        names, slots = self.covered(view), view.state.weights
        for slot in ("sum", "held", "start", "count"):
            slots.pop(slot, None)
        view.state.tensors.pop("mask", None)
        stage = count(self.stage, view.total_steps)
        view.state.numbers |= {"covered": names, "stage": stage}
        if self.mix:
            slots["start"] = {n: widened(view.weights[n]) for n in names}
        elif self.score == "retention" and "fisher" in slots:
            if stage >= view.total_steps and not view.resuming:
                raise Refused(f"in a task of {view.total_steps} steps nothing would move: the "
                              f"first {stage} hold what old tasks need", where="dps.stage",
                              remedy="take a shorter stage, or more steps")  # fmt: skip
            slots["held"] = {n: widened(view.weights[n]) for n in names}

    def masking(self, view: View) -> bool:
        """Whether the current step belongs to a masking stage."""
        if self.score == "retention":
            return "held" in view.state.weights
        return view.step // int(view.state.numbers["stage"]) % 2 == 1

    def _idle(self, view: View) -> bool:
        """Retention has nothing to retain in the first task, nor once a task has ended."""
        return self.score == "retention" and "held" not in view.state.weights

    def before_step(self, view: View) -> None:
        if self._idle(view):
            return
        if self.mix:
            refuse_unseen(view, view.state.numbers["covered"], where="dps.mix",
                          what="Mix draws no noise")  # fmt: skip
        masking = self.masking(view)
        if not masking or self.score == "retention":
            self._accumulate(view)
        if masking:
            # Everything is held in retention's first stage: leave the tensors out.
            out = self.score == "retention" and view.step < int(view.state.numbers["stage"])
            if out:
                for name in view.state.slot("held"):
                    view.grads[name] = None
            else:
                zero_frozen_(view)

    def after_step(self, view: View) -> None:
        if self._idle(view):
            return
        if self.masking(view) and self.freeze == "exact":
            hold_frozen_(view)
        if (view.step + 1) % int(view.state.numbers["stage"]) == 0:
            self._turn(view)

    def _accumulate(self, view: View) -> None:
        """GAM += g², FAM += N."""
        sums, noise = view.state.slot("sum"), view.scratch.get("noise", {})
        covered = view.state.numbers["covered"]
        grads = {n: g for n in covered if (g := view.grads.get(n)) is not None}
        for name, grad in grads.items():
            if name not in sums:
                sums[name] = torch.zeros_like(grad, dtype=wide(grad.dtype))
            if name in noise:
                self._counts(view, name).add_(noise[name].view(torch.uint8))
        add_squares_([sums[n] for n in grads], list(grads.values()))

    def _counts(self, view: View, name: str) -> Tensor:
        counts = view.state.slot("count")
        if name not in counts:
            dtype = torch.uint8 if view.state.numbers["stage"] <= 255 else torch.int32
            shape = noise_shape(view, name, self.noise)
            counts[name] = torch.zeros(shape, dtype=dtype, device=view.weights[name].device)
        return counts[name]

    def _turn(self, view: View) -> None:
        """The end of a stage: select a subnetwork from the sums, or start summing anew."""
        slots = view.state.weights
        if self.masking(view) and self.score != "retention":
            # The buffer of held values becomes the next stage's sum, to save memory.
            slots["sum"] = {n: t.zero_() for n, t in slots.pop("held", {}).items()}
            view.state.tensors.pop("mask", None)
            return
        sums = slots.pop("sum", {})
        masks = select(
            {n: self._score(view, n, s) for n, s in sums.items()}, self.drop, self.select
        )
        if self.score == "retention":
            slots["sum"] = sums
            for name, mask in masks.items():
                # Entries without any gradient stay, even if the threshold is zero.
                mask &= sums[name] > 0
            fix_(view, slots["held"], masks)
            for total in sums.values():
                total.zero_()
            return
        slots.pop("count", None)
        fix_(view, sums, {} if self.mix else masks)
        if self.mix:
            view.state.tensors["mask"] = {n: pack(mask) for n, mask in masks.items()}

    def _score(self, view: View, name: str, total: Tensor) -> Tensor:
        slots = view.state.weights
        if self.score == "retention":
            fisher = slots["fisher"].get(name)
            if fisher is None:
                return total
            below = (local(fisher) + mean(fisher)).clamp_min_(1e-30)
            return like(torch.div(local(total), below, out=below), total)
        if not self.mix or name not in slots.get("count", {}):
            return total
        seen = slots["count"][name].to(total.dtype)
        score = total / seen.clamp(min=1)
        length = int(view.state.numbers["stage"])
        penalised = self.frequency_penalty
        if penalised if penalised is not None else length >= PENALTY_FROM:
            score = score * torch.exp(-seen / length)
        return score

    def frozen(self, view: View) -> dict[str, Tensor]:
        """True for the entries of each covered tensor that a masking stage freezes."""
        held, bits = view.state.slot("held"), view.state.tensors.get("mask")
        if bits is not None:
            return {n: ~unpack(bits[n], h.shape) for n, h in held.items()}
        return {n: h == h for n, h in held.items()}

    # --- Mix ----------------------------------------------------------------------------------

    def mixed(self, view: View) -> Collection[str]:
        return view.state.numbers["covered"] if self.mix else ()

    def weights(self, view: View, name: str, w: Tensor) -> Tensor:
        slots = view.state.weights
        keep, view.scratch["mixed"] = None, True
        if self.masking(view):
            if name not in slots.get("held", {}):
                return w
            base = slots["held"][name]
            # With "exact" W = W* where M = 0, unless another method has mixed it before.
            if self.freeze != "exact" or not self._first_to_mix(view):
                keep = unpack(view.state.tensors["mask"][name], w.shape)
        else:
            noise = drawn(view, view.state.numbers["covered"], self.draw)
            base, keep = slots["start"][name], noise[name]
        # While masking, `before_step` multiplies the gradient by N.
        return mixed(w, base, keep, self.drop, gain=None if self.masking(view) else 1.0)

    def _first_to_mix(self, view: View) -> bool:
        cache = view.state.cache  # asked for every weight in every forward pass
        if "first" not in cache:
            cache["first"] = not any(m.defines("weights") for m in earlier(view, self))
        return bool(cache["first"])

    def draw(self, view: View, name: str) -> Tensor:
        """N ~ Bernoulli(1 − drop), True where the trained weight is used."""
        return draw(view, name, self.drop, self.noise)

    # --- retention ----------------------------------------------------------------------------

    def end_task(self, view: View) -> None:
        if self.score != "retention":
            return
        fisher = diagonal_fisher(
            view.forward,
            view.data(),
            {n: view.weights[n] for n in view.state.numbers["covered"]},
            modules=view.modules,
            model=view.bound.models[view.task],
            labels=self.fisher_labels,
            rows=self.fisher_rows,
            generator=view.generator,
        )
        old = view.state.slot("fisher")
        for name, f in fisher.items():
            old[name] = old[name] + f if name in old else f
