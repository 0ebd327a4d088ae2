"""Rates without a search: what moving each part gains and costs, measured by one short probe.

The probe trains the new task for at most a tenth of its steps, at one rate r₀ for all parts. With
u the weights after it minus those before, g the gradient of the new task's mean loss before it, and
F the diagonal of the old tasks' Fisher information (their mean; `methods.common.importance`, labels
sampled from the model where it returns class logits, else the rows' own), for each part k

    b_k = −g_k · u_k            benefit: how far the new loss falls, to first order, in nats
    h_k = ½ Σ_i F_i u_i²        harm: KL(answers before ‖ after) of an old row, to second order

Were part k moved m_k times as far, Σ m_k b_k − λ Σ m_k² h_k would be largest at m_k ∝ b_k / h_k.
These are the multipliers, as a search draws its own: within .1 to 10 of their geometric mean, then
scaled to geometric mean 1. A part without harm has nothing to balance: 1. One whose move raises the
new loss gets the lowest.

The base rate r follows from the harm τ that is tolerated at the end of the task, ρ times as long as
the probe. Steps add up as in a random walk, so that u grows with √ρ and harm with ρ (straight on it
would be ρ²):

    c · ρ (r / r₀)² Σ m_k² h_k = τ            c = KL that the probe did / Σ h_k

c is measured on selection rows. It is far above 1: weights that move together do more than the
diagonal knows. A confirming run, as short as the probe, measures the KL at these rates; the rate is
corrected by the root of what was aimed at over what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engine.batches import Batch, rows_in
from holdfast.errors import Refused
from holdfast.methods.common.answers import divergences, shifts
from holdfast.methods.common.importance import kind_of
from holdfast.network.parts import EMBEDDINGS, HEAD, Parts
from holdfast.search.space import MULTIPLIER
from holdfast.tasks.labels import IGNORED


@dataclass(frozen=True)
class Measured:
    """What a probe measured of one part, or of the layers of one point. None: no weight trains."""

    part: str
    benefit: float | None
    harm: float | None


def benefit_and_harm(
    update: Mapping[str, Tensor], gradient: Mapping[str, Tensor], fisher: Mapping[str, Tensor],
    group_of: Mapping[str, int], groups: Sequence[str],
) -> list[Measured]:  # fmt: skip
    """b and h of each of `groups`; all by parameter name. A weight without `fisher` does no harm.

    group_of: the place of a parameter's group; groups of which nothing is in `update` have none.
    """
    benefit, harm = ([0.0] * len(groups) for _ in range(2))
    for name, u in update.items():
        u, k = u.double(), group_of[name]
        if name in gradient:  # a method may have switched it off
            benefit[k] -= float((gradient[name].double() * u).sum())
        if name in fisher:
            harm[k] += float((fisher[name].double() * u * u).sum()) / 2
    moved = {group_of[name] for name in update}
    return [
        Measured(name, benefit[k], harm[k]) if k in moved else Measured(name, None, None)
        for k, name in enumerate(groups)
    ]


def multipliers(found: Sequence[Measured], *, weights: Container[str]) -> list[float]:
    """b/h of each part, within `MULTIPLIER` of their geometric mean, scaled to geometric mean 1.

    weights: the parts that have some. One of which none trains gets 0, and stays as it is.
    Refused: no part both gains and harms.
    """
    ratios = [_ratio(each) for each in found]
    known = [r for r in ratios if r]
    if not known:
        raise Refused("the probe gained nothing in any part that old tasks use",
                      where="--from-probe", remedy="probe at another --lr")  # fmt: skip
    centre, raw = geometric_mean(known), list[float]()
    for each, ratio in zip(found, ratios, strict=True):
        at = 1.0 if ratio is None else ratio / centre
        frozen = each.harm is None and each.part in weights
        raw.append(0.0 if frozen else min(max(at, MULTIPLIER.low), MULTIPLIER.high))
    mean = geometric_mean(m for m in raw if m)
    return [m / mean for m in raw]


def _ratio(found: Measured) -> float | None:
    """b/h; 0 where the move gains nothing; None where there is no harm to balance it with."""
    b, h = found.benefit or 0.0, found.harm or 0.0
    return None if h == 0 and b >= 0 else b / h if b > 0 else 0.0


def harm_of(found: Sequence[Measured], curve: Sequence[float]) -> float:
    """Σ m_k² h_k: the harm of the probe's move, had each part gone m_k times as far."""
    return math.fsum(m * m * (each.harm or 0.0) for m, each in zip(curve, found, strict=True))


def base_rate(
    found: Sequence[Measured], curve: Sequence[float], *, lr: float, times: float,
    tolerance: float, scale: float = 1.0,
) -> float:  # fmt: skip
    """r with scale · times · (r / lr)² Σ m_k² h_k = tolerance.

    lr: the probe's rate; times: ρ; scale: c, see the module.
    """
    return lr * math.sqrt(tolerance / (scale * times * harm_of(found, curve)))


def mean_gradient(
    forward: Callable[[Batch], Any],
    batches: Iterable[Batch],
    weights: Mapping[str, nn.Parameter],
    model: nn.Module,
) -> dict[str, Tensor]:
    """∂/∂w of the mean loss over all rows, of their labels where there are several a row."""
    learned = {n: w for n, w in weights.items() if w.requires_grad}
    total, rows = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in learned.items()}, 0
    for batch in batches:
        size = _counted(model, batch)
        grads = torch.autograd.grad(forward(batch).loss, [*learned.values()], allow_unused=True)
        for name, grad in zip(learned, grads, strict=True):
            if grad is not None:
                total[name] += size * grad.double()
        rows += size
    return {name: t / max(rows, 1) for name, t in total.items()}


def _counted(model: nn.Module, batch: Batch) -> int:
    """What a loss is the mean over: the labels that count, or rows."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return rows_in(batch)
    return int((labels[:, 1:] if shifts(model) else labels).ne(IGNORED).sum())


def moved(before: Tensor, now: Tensor, batch: Batch, model: nn.Module) -> Tensor:
    """How far each row's answer moved, in nats, or each label that counts: one dimension."""
    kind = kind_of(model, before)
    each = divergences(before.double(), now.double(), kind)
    if kind != "classes" or each.ndim == 1:
        return each.flatten()
    labels = batch["labels"]
    if shifts(model):
        each, labels = each[:, :-1], labels[:, 1:]
    return each[labels != IGNORED]


def places(found: Parts, most: int) -> tuple[dict[str, int], list[str], int | None]:
    """{part: place among the multipliers}, what each place is called, and the layers of the curve.

    A multiplier each for embeddings, head and up to `most` − 2 points: layer i of L takes point
    ⌊iK/L⌋, as `Rates` spreads them.
    """
    depth = {
        p: d for p, d in found.depth.items() if p not in (EMBEDDINGS, HEAD) and p in found.order
    }
    layers = round(0.5 / min(depth.values())) if depth else None
    k = min(most - 2, layers or 1)
    at = {p: 1 + min(int(d * (layers or 1)), (layers or 1) - 1) * k // (layers or 1)
          for p, d in depth.items()}  # fmt: skip
    names = [", ".join(p for p in depth if at[p] == 1 + j) or "–" for j in range(k)]
    return {EMBEDDINGS: 0, **at, HEAD: k + 1}, [EMBEDDINGS, *names, HEAD], layers
