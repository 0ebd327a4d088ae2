"""Merging in function space: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849) in a sequence.

After a task, every linear layer becomes the one whose outputs differ least from those of the new
weights W₁ on the new task's inputs and those of the start weights W₀ on the old tasks' inputs:

    argmin_W  Σ_new ‖(W − W₁) x̃‖² + γ Σ_old ‖(W − W₀) x̃‖² + ε ‖W − W₀‖²
            = W₀ + (W₁ − W₀) G_new (G_new + γ G_old + ε I)⁻¹

with x̃ the input with a 1 appended (weight and bias are one matrix) and G the Gram matrices of
`holdfast.engine.grams`, means over rows. An embedding's row moves by its share of counts
n_new / (n_new + γ n_old), which is the same equation for one-hot inputs, without ε. A norm
y_i = g_i x̂_i + b_i is solved on the inputs (x̂_i, 1) per feature i (`norms="solve"`), or moves by
the share `others`, as do the weights of all other modules. A layer that the new task never called
keeps its start weights, one that no old task called its new ones. Afterwards G_old ← G_old + G_new.

No row of an old task is kept, and training steps cost no extra. Deviations from the paper: it
merges models that were trained separately, and multiplies the off-diagonals of G by .9 where we add
ε; it takes sums over rows where we take means, so that tasks count alike, however large.

LoRA: the product B A is merged, and the factors are refitted to it by truncated SVD (the merged
product has rank 2r; its nearest rank-r approximation is kept).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.grams import Grams
from holdfast.engine.method import Range, View
from holdfast.errors import Refused, tell_once
from holdfast.methods.common.anchor import keep_start, remember, start_of
from holdfast.methods.common.measuring import Measuring
from holdfast.network.layers import Layer, layers_of, norms_of
from holdfast.network.lora import factors_of
from holdfast.ops import distributed

TOLD = 0.1  # above this share of weights in layers of other kinds, a line says so


@dataclass(frozen=True, kw_only=True)
class Merge(Measuring):
    """Merge each task's weights with those it began with, layer by layer, in closed form.

    strength: γ ≥ 0, the weight of each old task relative to the new one; 0 keeps the new weights
        wherever the new task has inputs, ∞ the start weights on old inputs.
    ridge: ε as a share of the mean diagonal; it keeps directions that no task's inputs use at W₀.
    rows: rows of the finished task that are measured.
    again: measure again on the merged network, whose layer inputs differ, before adding up.
    norms: `share`, or `solve` the same equation for each feature's scale and shift.
    others: share of its change that a norm (unless solved for) or any weight outside linear layers
        and embeddings keeps.
    structure, width, rank: for Gram matrices wider than `width`: `full`, `block` (diagonal blocks
        of at most `width`) or `low_rank` (`rank` directions and a diagonal).
    choose: how much of the new task's selection score may be lost: of γ · 10, 3, 1 and .3 the
        largest that loses no more is taken, or else the smallest. None: `strength` as it is.
    """

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "merges old and new weights so that each task's outputs stay"
    paper: ClassVar[str] = "Jin et al., ICLR 2023, arXiv 2212.09849"
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "nothing; a pass over some rows at a task's end"
    use: ClassVar[str] = "the next task, without old rows"
    head_first: ClassVar[bool] = True
    bytes_per_weight: ClassVar[str] = (
        "4 d² an input of d: about 6 per linear weight of a BERT, up to `width`; "
        "4 more while a task is learned, where no checkpoint holds the start weights"
    )
    needs_old_task: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("strength", "ridge", "others", "choose", "rows", "again")
    ranges: ClassVar[Mapping[str, Range]] = {"strength": Range(0.3, 10.0, log=True)}

    strength: Annotated[float, Field(ge=0)] = 1.0
    ridge: Annotated[float, Field(gt=0)] = 1e-4
    rows: Annotated[int, Field(gt=0)] = 100
    again: bool = False
    norms: Literal["share", "solve"] = "share"
    others: Annotated[float, Field(ge=0, le=1)] = 0.5
    choose: Annotated[float, Field(ge=0)] | None = None

    @property
    def reads_whole(self) -> Literal["gradients", "inputs"] | None:
        return "inputs"

    def begin_task(self, view: View) -> None:
        view.state.weights.pop("start", None)
        if "readers" in view.state.numbers:
            keep_start(view)

    @torch.no_grad()
    def end_task(self, view: View) -> None:
        state, old = view.state, self.remembered(view)
        # No `norms` unless needed: methods that ask for the same share one pass.
        how = {"norms": True} if self.norms == "solve" else {}
        new = self.measured(view, **how)
        start = start_of(view) if old is not None else None
        if old is not None and start is None and view.step:
            raise Refused("the weights that the task began with were not kept", where="merge",
                          remedy="pass start= to begin_task, as before")  # fmt: skip
        if old is not None:
            old.require_like(new)
            if start is not None:
                merger = _Merger(view, old, new, start, self)
                state.numbers["strength"] = self._merge(view, merger)
                if self.again:
                    new = self.measured(view, **how, merged=True)
            state.tensors.clear()  # frees each old sum as the new one is made
            old.add_(new)
        (old or new).save(state.tensors, state.numbers)

    def _merge(self, view: View, merger: _Merger) -> float:
        """Merge with `strength`, or the largest γ that loses no more than `choose`; returns γ."""
        if self.choose is None:
            merger.merge_(self.strength)
            return self.strength
        before, strength = view.score(), self.strength
        for factor in (10.0, 3.0, 1.0, 0.3):
            strength = self.strength * factor
            merger.merge_(strength)
            if view.score() >= before - self.choose:
                break
        return strength


class _Merger:
    """Merges the weights before and after a task, by the old and the new Gram matrices.

    The learned weights are copied if several strengths are tried (`choose`); otherwise layers are
    overwritten as they are merged.
    """

    def __init__(
        self, view: View, old: Grams, new: Grams, start: Mapping[str, Tensor], how: Merge
    ) -> None:
        self.view, self.old, self.new, self.start, self.how = view, old, new, start, how
        self.learned: Mapping[str, Tensor] = view.shared
        distributed.reshard_(view.bound.models[view.task])
        layers, _ = layers_of(view.shared, view.modules)
        norms = norms_of(view.shared, view.modules)
        # Layers with the same input are solved together; those only old tasks called stay still.
        self.groups: dict[tuple[str, bool], list[Layer]] = {}
        self.still: set[str] = {n for n in old.counts if n not in new.counts}
        self.fresh: set[str] = {n for n in new.counts if n not in old.counts}
        for layer in [*layers, *norms]:
            if layer.weight in new.readers.keys() & old.readers.keys() and not layer.lora:
                key = new.readers[layer.weight], layer.has_one
                self.groups.setdefault(key, []).append(layer)
            elif layer.weight in old.readers:
                self.still.update(layer.names)
            elif layer.weight in new.readers:
                self.fresh.update(layer.names)
        if how.choose is not None:
            self.learned = remember(view.shared)
        known = {n for layer in [*layers, *norms] for n in layer.names} | {*old.counts, *new.counts}
        known |= {n for pair in factors_of(view.shared) for n in (pair.a, pair.b)}
        sizes = {name: w.numel() for name, w in view.shared.items()}
        share = sum(n for name, n in sizes.items() if name not in known) / sum(sizes.values())
        if share > TOLD:
            tell_once(
                f"merge: {share:.0%} of the weights are in layers whose inputs it cannot measure "
                f"(recurrent ones, adapters but LoRA): they keep {how.others:g} of their change"
            )

    def merge_(self, strength: float) -> None:
        """Write the merged weights into the network, one input's layers at a time."""
        distributed.reshard_(self.view.bound.models[self.view.task])
        left, ridge = dict.fromkeys(self.view.shared), self.how.ridge
        for pair in factors_of(self.view.shared):
            if pair.a in self.old.readers and pair.a in self.new.readers:
                moments = [g.moments[g.readers[pair.a]] for g in (self.old, self.new)]
                self._write(pair.refitted(self.start, self.learned, moments, strength, ridge))
                del left[pair.a], left[pair.b]
        for (key, one), layers in self.groups.items():
            mine, theirs = cast(Any, self.new.moments[key]), self.old.moments[key]
            changes = [layer.matrix(self.learned) - layer.matrix(self.start) for layer in layers]
            kept = mine.shrunk(torch.cat(changes), theirs, strength, ridge, bias=one)
            for layer, part in zip(layers, kept.split([len(c) for c in changes]), strict=True):
                for name, change in layer.tensors(part).items():
                    self._write({name: change.add_(distributed.full(self.start[name]))})
                    del left[name]
        for name in left:
            before, after = (distributed.full(w[name]) for w in (self.start, self.learned))
            share = self._share(name, strength)
            if not isinstance(share, Tensor):
                self._write({name: torch.lerp(before.float(), after.float(), share)})
                continue
            seen = share.nonzero()[:, 0]  # few of an embedding's rows; the others go back
            moved = torch.lerp(before[seen].float(), after[seen].float(), share[seen, None])
            self._write({name: before.index_copy(0, seen, moved.to(before.dtype))})

    def _share(self, name: str, strength: float) -> Tensor | float:
        """The share of its change a weight keeps: by counts for embedding rows, else fixed."""
        if name in self.still or name in self.fresh:
            return float(name in self.fresh)
        if name not in self.new.counts or name not in self.old.counts:
            return self.how.others
        mine, theirs = self.new.counts[name], strength * self.old.counts[name]
        return torch.where(mine > 0, mine / (mine + theirs).clamp(min=1e-30), 0.0)

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            w = self.view.shared[name].detach()
            distributed.local(w).copy_(distributed.local(distributed.beside(value.to(w.dtype), w)))
