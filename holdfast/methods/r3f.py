"""R3F and R4F: outputs that noise on the embeddings does not move (arXiv 2008.03156).

    P = λ · mean over counted outputs of KL(p ‖ q) + KL(q ‖ p)
    p = f(x), the training pass itself,   q = f(sg[x] + z),   z ~ U(−ε, ε) or N(0, ε²)

x are the embeddings that the tokens enter as (an encoder-decoder's encoder alone; of pictures and
other numbers the input itself), sg: the embedding table learns from p only. What counts are the
rows of a classifier, and the tokens of a language model or tagger with a label; the code divides by
rows, we by what counts. R4F adds a bound on the head's Lipschitz constant: the last linear layer is
divided by its largest singular value, W ← W / σ(W). The code does so in the forward pass
(spectral_norm); we after every step and before the first, so that the saved weights are those that
were trained, and the gradient does not pass through σ.

Dropout: in the published code both passes drew dropout of their own, so that P holds the model
against that too (as R-Drop does). ε = 1e-5 moves p by so little that, where there is dropout, this
is nearly all of P, and without dropout P is of the order ε² and bfloat16 rounds the noise off.
`dropout="same"` gives both passes the masks of the training pass: P is then of the noise alone, and
wants an ε of the order of the embeddings.

Not for regression, as in the paper: no distribution moves there (take smart).
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


@dataclass(frozen=True, kw_only=True)
class R3F(Method):
    """Hold outputs against noise on the embeddings.

    strength: λ ≥ 0, relative to the task's own loss, in nats per nat.
    epsilon: ε > 0, in the unit of an embedding's entries: the bound of `uniform` noise, the
        standard deviation of `normal`.
    noise: `uniform` or `normal`.
    dropout: `own` of the second pass, as published, or the `same` as in the training pass.
    head: `free` (R3F), or `spectral` (R4F): the largest singular value of its last linear layer
        is 1.
    """

    name: ClassVar[str] = "r3f"
    summary: ClassVar[str] = "holds the outputs against noise on the embeddings"
    paper: ClassVar[str] = "Aghajanyan et al., ICLR 2021, arXiv 2008.03156"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "one forward and backward pass more"
    use: ClassVar[str] = "few rows of text; classes or tokens, no regression"
    bytes_per_weight: ClassVar[str] = "0 (activations of a second pass)"
    tunable: ClassVar[tuple[str, ...]] = ("strength", "epsilon", "noise", "dropout")
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(0.1, 5.0, log=True),
        "epsilon": Range(1e-6, 0.1, log=True),
    }

    strength: Annotated[float, Field(ge=0)] = 1.0
    epsilon: Annotated[float, Field(gt=0)] = 1e-5
    noise: Literal["uniform", "normal"] = "uniform"
    dropout: Literal["own", "same"] = "own"
    head: Literal["free", "spectral"] = "free"

    def begin_task(self, view: View) -> None:
        _no_numbers(noise.tried(view, "r3f"))
        if not view.resuming:  # what was saved is normalised, and again is not bit for bit the same
            self._normalise_(view)

    def watched(self, view: View) -> Collection[nn.Module]:
        return [view.bound.models[view.task]] if self.dropout == "same" else []

    def penalty(self, view: View) -> Tensor:
        clean = noise.counting(view, answers.of_step(view, "r3f", dropout=self.dropout))
        assert view.inputs is not None
        kind = told_kind(view.bound.models[view.task], clean, view.inputs)
        _no_numbers(kind)
        draw, seed = noise.normal if self.noise == "normal" else noise.uniform, noise.seed(view)

        def change(x: Tensor) -> Tensor:
            return x.detach() + (self.epsilon * draw(x, seed)).to(x.dtype)

        moved = noise.counting(view, noise.moved(view, change, self.dropout, "r3f"))
        found = self.strength * answers.symmetric(clean, moved, kind)
        return noise.mean_of(found, clean, moved)

    def after_step(self, view: View) -> None:
        self._normalise_(view)

    @torch.no_grad()
    def _normalise_(self, view: View) -> None:
        """W ← W / σ(W) of the head's last linear layer."""
        if self.head == "free":
            return
        own = [
            w for name, w in view.weights.items()
            if view.parts[name] == "head" and name not in view.shared
            and w.ndim == 2 and isinstance(view.modules[name][0], nn.Linear)
        ]  # fmt: skip
        if not own:
            raise Refused("the task has no linear layer of its own as its head", where="r3f.head",
                          remedy="use free")  # fmt: skip
        if own[-1].requires_grad:
            whole = distributed.full(own[-1].detach())
            largest = torch.linalg.matrix_norm(whole.to(wide(whole.dtype)), 2)
            distributed.local(own[-1].detach()).div_(largest.clamp(min=1e-12))


def _no_numbers(kind: Kind | None) -> None:
    if kind == "numbers":
        raise Refused("a regression has no distribution to hold", where="r3f", remedy="use smart")
