"""DPS as its formulas stand, slow and obvious: one entry at a time in Python floats.

Written from the description of the published code, without a look at holdfast.methods.dps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Reference:
    """Trains given weights from given gradients; every other parameter is left to the caller.

    A stage is `us` steps; even stages (from 0) accumulate, odd ones mask.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        *,
        p: float,
        us: int,
        mix: bool = False,
        exact: bool = True,
        everywhere: bool = False,
        penalty: bool | None = None,
        lr: float,
        adamw: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.w = {n: np.array(w, dtype=np.float64) for n, w in weights.items()}
        self.p, self.us, self.mix, self.exact, self.everywhere = p, us, mix, exact, everywhere
        self.penalty = us >= 50 if penalty is None else penalty
        self.lr, self.adamw, self.weight_decay = lr, adamw, weight_decay
        self.t = 0
        self.first = {n: np.array(w) for n, w in self.w.items()}
        self.snapshot = self.first
        self.mask: dict[str, Array] = {}
        self.gam = {n: np.zeros_like(w) for n, w in self.w.items()}
        self.fam = {n: np.zeros_like(w) for n, w in self.w.items()}
        self.m = {n: np.zeros_like(w) for n, w in self.w.items()}
        self.v = {n: np.zeros_like(w) for n, w in self.w.items()}

    @property
    def masking(self) -> bool:
        return (self.t // self.us) % 2 == 1

    def begin_step(self) -> None:
        """Select at the first step of a masking stage, forget at the first of the other."""
        if self.t % self.us:
            return
        if self.masking:
            self.mask = self._masks()
            self.snapshot = {n: np.array(w) for n, w in self.w.items()}
        else:
            for n in self.w:
                self.gam[n][:] = 0
                self.fam[n][:] = 0

    def _masks(self) -> dict[str, Array]:
        scores = {n: np.zeros_like(w) for n, w in self.w.items()}
        for n, i in self._entries():
            scores[n][i] = self.gam[n][i]
            if self.mix:
                scores[n][i] /= max(self.fam[n][i], 1.0)
                if self.penalty:
                    scores[n][i] *= math.exp(-self.fam[n][i] / self.us)
        pools = {n: [scores[m] for m in scores] if self.everywhere else [scores[n]] for n in scores}
        masks = {n: np.zeros_like(w) for n, w in self.w.items()}
        for n, pool in pools.items():
            ranked = sorted((float(s) for a in pool for s in a.ravel()), reverse=True)
            tau = ranked[math.ceil(len(ranked) * (1 - Fraction(str(self.p)))) - 1]
            masks[n] = (scores[n] >= tau).astype(np.float64)
        return masks

    def keep(self, noise: Mapping[str, Array] | None) -> dict[str, Array]:
        """N of this step, entry by entry."""
        if self.masking:
            return self.mask
        if not self.mix or noise is None:
            return {n: np.ones_like(w) for n, w in self.w.items()}
        return {n: np.broadcast_to(noise[n], w.shape).astype(float) for n, w in self.w.items()}

    def seen(self, noise: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The weights that the forward pass sees: (N·W + (1 − N)·W* − p·W*) / (1 − p)."""
        if not self.mix:
            return {n: np.array(w) for n, w in self.w.items()}
        star, keep, p = self.snapshot if self.masking else self.first, self.keep(noise), self.p
        return {
            n: (keep[n] * w + (1 - keep[n]) * star[n] - p * star[n]) / (1 - p)
            for n, w in self.w.items()
        }

    def step(
        self, grads: Mapping[str, Array], noise: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """One optimizer step from the gradients of what was seen; returns those it used."""
        keep = self.keep(noise)
        used = {n: np.array(grads[n]) * keep[n] for n in self.w}
        for n, i in self._entries():
            if not self.masking:
                self.gam[n][i] += used[n][i] ** 2
                self.fam[n][i] += keep[n][i]
            frozen = self.exact and self.masking and keep[n][i] == 0
            before = self.w[n][i]
            self._update(n, i, used[n][i])
            if frozen:
                self.w[n][i] = before
        self.t += 1
        return used

    def _update(self, n: str, i: tuple[int, ...], g: float) -> None:
        if not self.adamw:
            self.w[n][i] -= self.lr * g
            return
        t = self.t + 1
        self.w[n][i] *= 1 - self.lr * self.weight_decay
        self.m[n][i] = 0.9 * self.m[n][i] + 0.1 * g
        self.v[n][i] = 0.999 * self.v[n][i] + 0.001 * g * g
        m, v = self.m[n][i] / (1 - 0.9**t), self.v[n][i] / (1 - 0.999**t)
        self.w[n][i] -= self.lr * m / (math.sqrt(v) + 1e-8)

    def _entries(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for n, w in self.w.items():
            for i in np.ndindex(w.shape):
                yield n, i
