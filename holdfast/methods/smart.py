"""SMART: outputs that an adversary at the embeddings does not move (arXiv 1911.03437).

    P = α · symKL(f(x), f(x + δ)) + μ · symKL(f(x), f_θ̄(x))

symKL(p, q) = KL(p ‖ q) + KL(q ‖ p), a mean over counted outputs; of a regression the squared
distance. x are the embeddings that the tokens enter as (an encoder-decoder's encoder alone; of
pictures and other numbers the input itself); f(x) is the training pass. δ starts at random, for at
0 there is no slope, and takes `ascents` steps uphill:

    δ ~ σ · N(0, 1)
    g = ∇_δ symKL(f(x + δ), sg[f(x)]),   δ ← clip(δ + η g / max|g|, −ε, ε)       δ="paper" ‡
    g = ∇_δ KL(sg[f(x)] ‖ f(x + δ)),     δ ← d / max|d|,   d = δ + η g           δ="code"

with the maximum over a token (where there are no tokens, a row). So the code's δ is of size 1
whatever σ and η are, and by far larger than ε = 1e-5, or than the entries of most embeddings. In
the code each KL of P moves only its second argument (`stop="targets"` here with the code's δ); in
the paper's both move.

The proximal part (Bregman; in the paper ‡, not in the code): θ̄ starts as the task does, in
evaluation mode, and follows the weights, θ̄ ← β θ̄ + (1 − β) θ after each step, β = .99 in the
first tenth ‡ of the steps and .999 later.

‡ could not be verified: η relative to the largest entry of g, the tenth, and that θ̄ has no dropout
are from memory or ours.

Dropout: every pass draws its own, as the code's do, so that P also holds the model against dropout,
which at ε = 1e-5 is most of it, and g is a slope of that. `dropout="same"` gives all passes the
masks of the training pass, so that P and g are of δ alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common import answers, noise
from holdfast.methods.common.importance import Kind, told_kind, wide
from holdfast.ops import distributed

EARLY, FOLLOWS = 0.1, (0.99, 0.999)  # β before and after this share of the steps


@dataclass(frozen=True, kw_only=True)
class SMART(Method):
    """Hold outputs against the worst small change of the embeddings.

    strength: α ≥ 0, relative to the task's own loss.
    delta: how an ascent step ends, see above: within ε (`paper`) or at size 1 (`code`).
    epsilon: ε > 0, the largest entry of the paper's δ, in the unit of an embedding's entries.
    rate: η > 0, the step uphill.
    start: σ > 0 of the random δ.
    ascents: steps uphill, 1 or more.
    proximal: μ ≥ 0, of the distance to the mean weights.
    dropout: `own` of each pass, as published, or the `same` as in the training pass.
    outputs: `classes`, `labels` (several a row), `numbers`, or `auto`, told by the model.
    """

    name: ClassVar[str] = "smart"
    summary: ClassVar[str] = "holds the outputs against the worst small change of the embeddings"
    paper: ClassVar[str] = "Jiang et al., ACL 2020, arXiv 1911.03437"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = (
        "one forward and backward pass more, and one of each for every ascent; one forward pass "
        "for the proximal part"
    )
    use: ClassVar[str] = "few rows of text; classes, tokens or numbers"
    bytes_per_weight: ClassVar[str] = "0; with the proximal part 4 (the mean weights, float32)"
    tunable: ClassVar[tuple[str, ...]] = (
        "strength", "delta", "epsilon", "rate", "start", "ascents", "dropout",
    )  # fmt: skip
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(0.1, 10.0, log=True),
        "epsilon": Range(1e-6, 0.1, log=True),
        "proximal": Range(0.01, 10.0, log=True),
    }

    strength: Annotated[float, Field(ge=0)] = 1.0
    delta: Literal["paper", "code"] = "paper"
    epsilon: Annotated[float, Field(gt=0)] = 1e-5
    rate: Annotated[float, Field(gt=0)] = 1e-5
    start: Annotated[float, Field(gt=0)] = 1e-5
    ascents: Annotated[int, Field(gt=0)] = 1
    proximal: Annotated[float, Field(ge=0)] = 0.0
    dropout: Literal["own", "same"] = "own"
    outputs: Literal["auto", "classes", "labels", "numbers"] = "auto"

    def begin_task(self, view: View) -> None:
        if any(map(distributed.sharded, view.weights.values())):
            raise Refused("smart cannot differentiate twice with weights in shards", where="smart",
                          remedy="train with DistributedDataParallel")  # fmt: skip
        if self.outputs == "auto":
            noise.tried(view, "smart")
        if self.proximal:
            learned = {n: w.detach() for n, w in view.weights.items() if w.requires_grad}
            mean = {n: w.to(wide(w.dtype), copy=True) for n, w in learned.items()}
            view.state.weights["mean"] = mean

    def watched(self, view: View) -> Collection[nn.Module]:
        return [view.bound.models[view.task]] if self.dropout == "same" else []

    def penalty(self, view: View) -> Tensor:
        logits = answers.of_step(view, "smart", dropout=self.dropout)
        kind = self._kind(view, logits)
        clean = noise.counting(view, logits, kind)
        total = torch.zeros((), dtype=clean.dtype, device=clean.device)
        if self.strength:
            delta = self._worst(view, clean.detach(), kind)
            moved = noise.moved(view, delta.add, self.dropout, "smart")
            after = noise.counting(view, moved, kind)
            stop: Literal["targets", "none"] = "targets" if self.delta == "code" else "none"
            found = answers.symmetric(clean, after, kind, stop=stop)
            total = total + noise.mean_of(self.strength * found, clean, after)
        if self.proximal:
            mean = {n: m.to(view.weights[n].dtype) for n, m in view.state.weights["mean"].items()}
            with torch.no_grad():
                outputs = view.forward(weights=mean, training=False)
                anchor = noise.counting(view, answers.logits_of(outputs, "smart"), kind)
            found = answers.symmetric(anchor, clean, kind)
            total = total + noise.mean_of(self.proximal * found, clean)
        return total

    def after_step(self, view: View) -> None:
        follow = FOLLOWS[view.step >= EARLY * view.total_steps]
        for name, mean in view.state.weights.get("mean", {}).items():
            mean.lerp_(view.weights[name].detach().to(mean.dtype), 1 - follow)

    def _kind(self, view: View, logits: Tensor) -> Kind:
        assert view.inputs is not None
        if self.outputs != "auto":
            return self.outputs
        return told_kind(view.bound.models[view.task], logits, view.inputs)

    # --- the adversary --------------------------------------------------------------------------

    def _worst(self, view: View, clean: Tensor, kind: Kind) -> _Delta:
        """δ after its steps uphill."""
        delta = _Delta(self.start, noise.seed(view))
        for _ in range(self.ascents):
            logits = noise.moved(view, delta.add, self.dropout, "smart")
            # ∂KL/∂logits is tiny, and float16 would flush it: what passes through the network has
            # its largest entry at 1.
            leaf = answers.exact(logits.detach()).requires_grad_()
            now = noise.counting(view, leaf, kind)
            if self.delta == "code":
                found = answers.divergence(clean, now, kind)
            else:
                found = answers.symmetric(clean, now, kind)
            (slope,) = torch.autograd.grad(noise.mean_of(found, now), leaf)
            size = slope.abs().amax().clamp(min=1e-30)
            delta.step_(_slope(logits, delta.value, slope / size) * size, self)
        return delta


def _slope(logits: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """∂ Σ weights · logits / ∂δ."""
    try:
        (g,) = torch.autograd.grad(logits, delta, weights.to(logits.dtype))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise Refused("a reentrant activation checkpoint gives no gradient of an embedding alone",
                      where="smart", remedy="use_reentrant=False") from None  # fmt: skip
    return g


class _Delta:
    """The change of what enters a model; drawn when that is first seen."""

    def __init__(self, start: float, seed: int) -> None:
        self.start, self.seed = start, seed
        self.value: Tensor = torch.empty(0)

    def add(self, x: Tensor) -> Tensor:
        """x + δ."""
        if not self.value.numel():
            self.value = (self.start * noise.normal(x, self.seed)).requires_grad_()
        return x + self.value.to(x.dtype)

    def step_(self, g: Tensor, how: SMART) -> None:
        """One step uphill, as the paper or as the code does."""
        delta = self.value.detach()
        if how.delta == "paper":
            now = (delta + how.rate * g / _largest(g)).clamp_(-how.epsilon, how.epsilon)
        else:
            now = delta + how.rate * g
            now = now / _largest(now)
        self.value = now.requires_grad_()


def _largest(x: Tensor) -> Tensor:
    """The largest entry of each place, by size."""
    return x.abs().amax(noise.places(x), keepdim=True).clamp(min=1e-30)
