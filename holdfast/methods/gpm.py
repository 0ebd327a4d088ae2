"""GPM: gradient projection memory (Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762).

A layer y = W x̃, x̃ = (x, 1), keeps its outputs on old inputs if its change is orthogonal to them.
With U (k, d) orthonormal rows that span them,

    g ← g (I − UᵀU)                            ΔW ← ΔW (I − UᵀU),   so that ΔW x̃ = 0 in the span

U holds eigenvectors of the Gram matrices G of old inputs (`engine.grams`). A task adds the fewest
leading eigenvectors v of what U does not span yet that bring the share of tr G captured to ε:

    Ĝ = (I − UᵀU) G (I − UᵀU)                  tr(U G Uᵀ) + Σ vᵀ Ĝ v ≥ ε tr G

Layers that read the same tensor share one U. LoRA's factors are linear layers like any other: A
keeps A x of old inputs, B keeps B (A x). Embeddings, norms and other layers that are not linear
have no such span: `others` freezes them, or lets them train and change the inputs of later layers.
The very first task trains as if the method were not there. No row of an old task is kept.

Deviations from the paper: a projected gradient is not a projected update, because momentum from
other steps and weight decay move weights within the span. So `project="update"` projects the
gradient and then the optimizer's update, which is exact up to rounding (coarse for bfloat16
weights); `"gradient"` is as published. The paper has no biases; they are a column of W here.
Directions with less than a millionth of tr G are rounding, and never in U.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from holdfast.engine.grams import Grams
from holdfast.engine.method import Range, View
from holdfast.methods.common.measuring import Measuring
from holdfast.network.layers import Layer, layers_of
from holdfast.ops.distributed import local
from holdfast.ops.moments import SMALL, Blocks, Moment

ROUNDING = 1e-6  # of the trace


@dataclass(frozen=True, kw_only=True)
class GPM(Measuring):
    """Learn only in directions that old tasks' inputs of a layer do not use.

    threshold: ε, the share of each old task's inputs that is protected, 0 < ε ≤ 1; 1 leaves
        nothing to a layer whose inputs use all directions.
    project: "update" is exact; "gradient", as published, is not under momentum or weight decay.
    others: whether shared weights outside linear layers are frozen ("freeze") or "train" once a
        task is remembered.
    rows: rows of the finished task that are measured.
    structure, width, rank: for inputs wider than `width`, see `Merge`; with `low_rank` a task can
        protect `rank` directions at most.
    """

    name: ClassVar[str] = "gpm"
    summary: ClassVar[str] = "learns only in directions that old inputs do not use"
    paper: ClassVar[str] = "Saha et al., ICLR 2021, arXiv 2103.09762"
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "a projection of every linear layer"
    use: ClassVar[str] = "the next task, without old rows"
    head_first: ClassVar[bool] = True
    bytes_per_weight: ClassVar[str] = (
        "4 k d an input of d with k protected directions: at most about 6 per linear weight of a "
        "BERT; during a step 4 more per linear weight, unless project=gradient"
    )
    needs_previous: ClassVar[bool] = True
    needs_old_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"threshold": Range(0.8, 0.99)}
    excludes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("child_tuning", "dps", "dynamic_subset", "mofo", "sift"),
        "entries that are held still and a projected step undo each other",
    )

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    project: Literal["update", "gradient"] = "update"
    others: Literal["train", "freeze"] = "freeze"

    @property
    def reads_whole(self) -> Literal["gradients", "inputs"] | None:
        return "inputs"

    def begin_task(self, view: View) -> None:
        view.state.cache.clear()

    def previous_of(self, view: View) -> Collection[str]:
        if self.project == "gradient":
            return ()
        return [n for layer in _covered(view) for n in layer.names]

    def before_step(self, view: View) -> None:
        covered = _covered(view)
        if covered and self.others == "freeze":
            for name in view.shared.keys() - {n for layer in covered for n in layer.names}:
                view.grads[name] = None
        for layer in covered:
            grads = {n: local(g) for n in layer.names if (g := view.grads[n]) is not None}
            for name, free in _projected(view, layer, grads).items():
                grads[name].copy_(free)

    def after_step(self, view: View) -> None:
        if self.project == "gradient":
            return
        for layer in _covered(view):
            # A weight without a gradient has not moved.
            moved = [n for n in layer.names if view.grads[n] is not None]
            before = {n: local(view.previous[n]) for n in moved}
            now = {n: local(view.weights[n].detach()) for n in moved}
            change = {n: now[n].float() - before[n].float() for n in moved}
            for name, free in _projected(view, layer, change).items():
                now[name].copy_(before[name].float() + free)

    @torch.no_grad()
    def end_task(self, view: View) -> None:
        state = view.state
        new = self.measured(view)
        readers, inputs = (state.numbers.setdefault(k, {}) for k in ("readers", "inputs"))
        Grams(readers=readers).require_like(new)
        bases = state.tensors.setdefault("basis", {})
        for key, moment in new.moments.items():
            bases[key] = widened(moment, bases.get(key), self.threshold)
            inputs[key] = moment.d
        readers.update(new.readers)
        state.cache.clear()


# --- which directions -----------------------------------------------------------------------------


def widened(moment: Moment, old: Tensor | None, threshold: float) -> Tensor:
    """U extended by the leading directions of a task's inputs that it did not span.

    (blocks, k, b): orthonormal rows per block, padded with rows of zeros, since the eigenvectors
    of a block-diagonal Gram matrix lie in single blocks. One block is the whole input.
    """
    values, vectors, held, total = _leading(moment, old)
    value, order = values.flatten().sort(descending=True)
    before = held + value.cumsum(0) - value  # captured without this one
    chosen = (before < (threshold - ROUNDING) * total) & (value > ROUNDING * total)
    marks = torch.zeros_like(value, dtype=torch.bool)
    marks[order] = chosen
    found = []
    for block, (mine, mark) in enumerate(zip(vectors, marks.view_as(values), strict=True)):
        kept = old[block].to(mine) if old is not None else mine[:0]
        rows = torch.cat([kept[kept.any(1)], mine[mark]])
        found.append(_orthonormal(rows, moment.d - block * rows.shape[1]))
    longest = max(map(len, found))
    return torch.stack([functional.pad(u, (0, 0, 0, longest - len(u))) for u in found]).float()


def _orthonormal(rows: Tensor, width: int) -> Tensor:
    """Orthonormal rows of the same span; unit vectors if it is the whole space, so that a gradient
    projects to exactly 0: Adam would turn rounding into steps."""
    if len(rows) >= min(width, rows.shape[1]):
        return torch.eye(*rows.shape, dtype=rows.dtype, device=rows.device)
    return torch.linalg.qr(rows.T)[0].T


def _leading(moment: Moment, old: Tensor | None) -> tuple[Tensor, Tensor, float, float]:
    """vᵀ G v (blocks, m) and v (blocks, m, b) of the eigenvectors v of Ĝ; tr(U G Uᵀ) and tr G."""
    if isinstance(moment, Blocks):
        gram = _wide(moment.matrix)
        total, held, rest = float(gram.diagonal(dim1=1, dim2=2).sum()), 0.0, gram
        if old is not None:
            u = old.to(gram)
            inside = u @ gram
            held = float((inside * u).sum())
            half = gram - u.mT @ inside
            rest = half - (half @ u.mT) @ u
        values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)
        return values, vectors.mT, held, total
    factor, diagonal = _wide(moment.factor), _wide(moment.rest)
    total, held = float(factor.square().sum() + diagonal.sum()), 0.0
    if old is not None:
        u = old[0].to(factor)
        inside = factor @ u.T
        held = float(inside.square().sum() + (u.square() @ diagonal).sum())
        factor = factor - inside @ u
    _, s, vt = torch.linalg.svd(factor, full_matrices=False)
    values = torch.where(s > 0, s.square() + vt.square() @ diagonal, 0.0)
    return values[None], vt[None], held, total


def _wide(t: Tensor) -> Tensor:
    """In double where that is cheap and available."""
    return t if t.shape[-1] > SMALL or t.device.type == "mps" else t.double()


# --- projecting -----------------------------------------------------------------------------------


def _covered(view: View) -> list[Layer]:
    """The layers with remembered inputs: none in the first task."""
    if "covered" not in view.state.cache:
        readers = view.state.numbers.get("readers", {})
        linear, _ = layers_of(view.shared, view.modules)
        view.state.cache["covered"] = [layer for layer in linear if layer.weight in readers]
        for layer in view.state.cache["covered"]:
            layer.require_rows(view.shared)
    covered: list[Layer] = view.state.cache["covered"]
    return covered


def _projected(view: View, layer: Layer, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a layer's change that leaves its outputs on old inputs as they are.

    If `change` lacks the bias or the weight, the other one's part alone must do so.
    """
    if layer.weight not in change:  # a bias alone changes the output of every input
        return {name: torch.zeros_like(c) for name, c in change.items()}
    if layer.bias not in change:
        layer = replace(layer, bias=None)
    key = view.state.numbers["readers"][layer.weight]
    u, d = view.state.tensors["basis"][key], view.state.numbers["inputs"][key]
    if layer.bias is None:
        u = _of_inputs(view.state.cache.setdefault("of inputs", {}), key, u, d)
    cutter = Blocks(u, d)
    pieces = cutter.cut(layer.matrix(change))
    pieces = torch.baddbmm(pieces, pieces @ u.mT, u, alpha=-1)
    return layer.tensors(cutter.joined(pieces))


def _of_inputs(cache: dict[str, Tensor], key: str, u: Tensor, d: int) -> Tensor:
    """U without the appended 1: orthonormal rows that span what remains."""
    if key not in cache:
        block, place = divmod(d - 1, u.shape[-1])
        u = u.clone()
        u[block, :, place] = 0
        _, s, vt = torch.linalg.svd(u[block], full_matrices=False)
        rows = _orthonormal(vt[s > 1e-4], place)
        u[block] = functional.pad(rows, (0, 0, 0, u.shape[1] - len(rows)))
        cache[key] = u
    return cache[key]
