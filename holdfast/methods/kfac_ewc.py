"""One-sided K-FAC EWC: preserve layer outputs on old inputs (Ritter et al., NeurIPS 2018,
arXiv 1805.07810, with the identity for the curvature at a layer's outputs).

With W_t (outputs, inputs + 1) a layer's weight and bias when task t was learned, and G_t the Gram
matrix of its inputs (x, 1) on the task's rows (`holdfast.engine.grams`), later tasks add

    P = λ/2 · Σ_t Σ_layers tr((W − W_t) G_t (W − W_t)ᵀ),

half the mean squared change of the layer's outputs over a task's rows, summed over positions and
tasks. Its gradient needs no tensors per task. With G = Σ G_t and W* the weights after the last one,

    ∂P/∂W = λ [(W − W*) G + R],   R = Σ_t (W* − W_t) G_t,
    R ← R + (W*_new − W*) G   and then   G ← G + G_new,  W* ← W*_new      when a task ends

(λ (W G − Σ W_t G_t) is the same, but a small difference of large products, which would be lost in
low-precision matrix products such as TF32.) An embedding is a layer on one-hot inputs: G is the
count of each row. Norms, and a task's own head, are not penalised.

With `every` = k the gradient is added k-fold in every k-th step: its mean is the same, at one k-th
of the cost per step. Adam's second moment does notice that the pull comes in bursts.

Deviation from the paper: its other factor, the curvature at the outputs, is left out, so that the
layers' outputs themselves are preserved; λ therefore has another unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.grams import Grams
from holdfast.engine.method import Range, View
from holdfast.methods.common.anchor import remember
from holdfast.methods.common.measuring import Measuring
from holdfast.network.layers import Layer, layers_of
from holdfast.ops.distributed import beside, like, local, sharded


@dataclass(frozen=True, kw_only=True)
class KfacEWC(Measuring):
    """Pull weights to where every layer's outputs on old tasks' inputs are as they were.

    strength: λ ≥ 0.
    every: the gradient is added in every `every`-th step of a task, `every`-fold.
    rows: rows of the finished task that are measured.
    structure, width, rank: for inputs wider than `width`, see `Merge`; smaller blocks cost less.
    """

    name: ClassVar[str] = "kfac_ewc"
    summary: ClassVar[str] = "pulls weights to where layers answer old inputs as they did"
    paper: ClassVar[str] = "Ritter et al., NeurIPS 2018, arXiv 1805.07810"
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "two products a linear layer every n-th step"
    use: ClassVar[str] = "the next task, without old rows"
    head_first: ClassVar[bool] = True
    bytes_per_weight: ClassVar[str] = (
        "4, and 8 from the second remembered task on; beside it 4 d² an input of d: about 6 per "
        "linear weight of a BERT"
    )
    needs_old_task: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("strength", "every", "rows")
    ranges: ClassVar[Mapping[str, Range]] = {"strength": Range(1e-4, 1.0, log=True)}

    strength: Annotated[float, Field(ge=0)] = 1e-2
    rows: Annotated[int, Field(gt=0)] = 100
    every: Annotated[int, Field(gt=0)] = 10

    def begin_task(self, view: View) -> None:
        view.state.cache.clear()

    @torch.no_grad()
    def penalty_grad_(self, view: View) -> None:
        grams = self.remembered(view)
        if grams is None or (view.step + 1) % self.every:
            return
        residual, scale = view.state.slot("residual"), self.strength * self.every
        for name, rows, pull in _products(view, grams):
            grad = view.grads[name]
            if grad is None:
                continue
            if name in residual:
                rest = local(residual[name])
                pull = pull + (rest if rows is None else rest[rows])
            _add_(local(grad), rows, pull.to(grad.dtype), scale)

    @torch.no_grad()
    def end_task(self, view: View) -> None:
        state, new, old = view.state, self.measured(view), self.remembered(view)
        if old is not None:
            residual = state.slot("residual")
            for name, rows, product in _products(view, old):
                w = view.shared[name]
                new_one = torch.zeros_like(local(w), dtype=torch.float32)
                if name in residual:  # not written in place: the task may fail to end
                    new_one.copy_(local(residual[name]))
                residual[name] = like(new_one, w)
                _add_(local(residual[name]), rows, product, 1.0)
            old.add_(new)
        (old or new).save(state.tensors, state.numbers)
        state.cache.clear()
        linear, embeddings = _covered(view)
        names = [*(n for layer in linear for n in layer.names), *embeddings]
        state.weights["anchor"] = remember({n: view.shared[n] for n in names})


def _covered(view: View) -> tuple[list[Layer], dict[str, Tensor | None]]:
    """Layers with remembered inputs, and embeddings with those of their rows that occurred."""
    cache, state = view.state.cache, view.state
    if not cache:
        linear, _ = layers_of(view.shared, view.modules)
        cache["linear"] = [layer for layer in linear if layer.weight in state.numbers["readers"]]
        for layer in cache["linear"]:
            layer.require_rows(view.shared)
        cache["embeddings"] = {
            name: None if sharded(view.shared[name]) else count.nonzero()[:, 0]
            for name, count in state.tensors.get("counts", {}).items()
        }
    return cache["linear"], cache["embeddings"]


def _products(view: View, grams: Grams) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """(W − W*) G by name, for this rank's shards; for embeddings only the rows returned with it."""
    linear, embeddings = _covered(view)
    anchor = view.state.weights["anchor"]
    for layer in linear:
        now, then = ({n: local(w[n].detach()) for n in layer.names} for w in (view.shared, anchor))
        moved = layer.matrix(now) - layer.matrix(then)
        moment = grams.moments[grams.readers[layer.weight]]
        for name, product in layer.tensors(moment.product(moved)).items():
            yield name, None, product
    for name, rows in embeddings.items():
        w, count = view.shared[name].detach(), grams.counts[name][:, None]
        if rows is None:
            count = local(beside(count.expand(w.shape), w))
            yield name, None, (local(w).float() - local(anchor[name]).float()) * count
        else:
            yield name, rows, (w[rows].float() - anchor[name][rows].float()) * count[rows]


def _add_(target: Tensor, rows: Tensor | None, value: Tensor, scale: float) -> None:
    if rows is None:
        target.add_(value, alpha=scale)
    else:
        target.index_add_(0, rows, value, alpha=scale)
