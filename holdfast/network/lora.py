"""PEFT's LoRA: a pair of factors, of which only the product acts on the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from holdfast.ops import distributed
from holdfast.ops.moments import Moment


@dataclass(frozen=True)
class Factors:
    """PEFT's low-rank pair W + s·B A, whose input is that of A; also for convolutions."""

    a: str  # (r, inputs)
    b: str  # (outputs, r)

    def refitted(
        self,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        moments: Sequence[Moment],
        strength: float,
        ridge: float,
    ) -> dict[str, Tensor]:
        """Factors of the merged B A: its nearest rank-r approximation, by truncated SVD.

        moments: of the old inputs, then of the new. The merged product, of rank 2r, is

            B₀A₀ + (B₁A₁ − B₀A₀) P,  P = G (G + γ G_old + εI)⁻¹.
        """
        shapes = {name: new[name].shape for name in (self.a, self.b)}
        a0, b0, a1, b1 = (
            distributed.full(w[n]).float().flatten(1) for w in (old, new) for n in shapes
        )
        if torch.equal(a0, a1) and torch.equal(b0, b1):
            return {}  # unchanged factors are left as they are
        theirs, mine = cast(Any, moments)
        both = functional.pad(torch.cat([a0, a1]), (0, 1))
        kept = mine.shrunk(both, theirs, strength, ridge, bias=False)[:, :-1]
        r = len(a0)
        right = torch.cat([a0 - kept[:r], kept[r:]])
        left = torch.cat([b0, b1], 1)
        (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(r1 @ r2.T)
        u, s, vt = q1 @ u[:, :r], s[:r].sqrt(), vt[:r] @ q2.T
        made = {self.a: s[:, None] * vt, self.b: u * s}
        return {name: made[name].reshape(shape) for name, shape in shapes.items()}


def factors_of(weights: Mapping[str, Tensor]) -> Iterator[Factors]:
    """The pairs of PEFT's LoRA among some weights, by their names."""
    for a in weights:
        if ".lora_A." in a and (b := a.replace(".lora_A.", ".lora_B.")) in weights:
            yield Factors(a, b)
