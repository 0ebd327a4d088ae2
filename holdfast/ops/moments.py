"""Second moments of a layer's inputs: sums Σ x xᵀ of (n, d) inputs, and solves with them.

Three structures:

    full       G itself, 4 d² bytes
    block      its diagonal blocks of about `width` inputs at most; the rest is taken as 0
    low_rank   G ≈ FᵀF + diag(r), F of (rank, d): 4 d (rank + 1) bytes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

STRIP = 128  # rows that are mirrored at a time
SMALL = 256  # matrices up to this size are solved in double


@dataclass
class Blocks:
    """Diagonal blocks of a Gram matrix: `matrix` (blocks, b, b); one block is all of it."""

    matrix: Tensor
    d: int  # inputs + 1; the last block is padded with zeros

    @classmethod
    def empty(cls, d: int, width: int | None, device: torch.device) -> Blocks:
        """For d − 1 inputs and the appended 1, in ⌈(d − 1) / width⌉ blocks (width None: one)."""
        blocks = 1 if width is None else max(1, math.ceil((d - 1) / width))
        b = math.ceil(d / blocks)
        # Products are faster into rows that start at multiples of 64 bytes; `close_` packs them.
        return cls(torch.zeros(blocks, b, b + -b % 16, device=device)[..., :b], d)

    def cut(self, x: Tensor) -> Tensor:
        """(n, d) as (blocks, n, b)."""
        blocks, _, b = self.matrix.shape
        if blocks * b > self.d:
            x = functional.pad(x, (0, blocks * b - self.d))
        return x.reshape(len(x), blocks, b).transpose(0, 1)

    def joined(self, x: Tensor) -> Tensor:
        """(blocks, n, b) as (n, d)."""
        return x.transpose(0, 1).flatten(1)[:, : self.d]

    def see_(self, x: Tensor) -> None:
        """Add Σ x xᵀ of inputs (n, d), the upper triangle only, in strips; `close_` mirrors it."""
        pieces, b = self.cut(x), self.matrix.shape[-1]
        strip = max(64, math.ceil(b / 8))
        for i in range(0, b, strip):
            mine = pieces[:, :, i : i + strip].mT
            self.matrix[:, i : i + strip, i:].baddbmm_(mine, pieces[:, :, i:])

    def close_(self) -> None:
        """All inputs were seen: mirror the upper triangle."""
        self.matrix = self.matrix.contiguous()
        for i in range(0, self.matrix.shape[-1], STRIP):
            j = i + STRIP
            self.matrix[:, j:, i:j] = self.matrix[:, i:j, j:].mT
            corner = self.matrix[:, i:j, i:j]
            corner.copy_(corner.triu() + corner.triu(1).mT)

    def add_(self, other: Blocks) -> None:
        """Add another's, not in place: other methods may hold the tensors."""
        self.matrix = self.matrix + other.matrix

    def scale_(self, factor: float) -> None:
        self.matrix.mul_(factor)

    def shrunk(
        self, delta: Tensor, old: Blocks, strength: float, ridge: float, *, bias: bool = True
    ) -> Tensor:
        """Δ G (G + γ G_old + εI)⁻¹ of Δ (n, d): the part of a change that is kept.

        ε is `ridge` times the mean diagonal of G + γ G_old. bias=False ignores the appended 1.
        """
        new = self.matrix if bias else self._without_one()
        both = torch.add(new, old.matrix if bias else old._without_one(), alpha=strength)
        diagonal = both.diagonal(dim1=1, dim2=2)
        # If both matrices are 0 nothing is kept; ε = 1 keeps the solve regular.
        mean = diagonal.sum() / max(self.d - (not bias), 1)
        diagonal.add_(torch.where(mean > 0, mean * ridge, 1.0))
        pieces = self.cut(delta.to(new.dtype))
        if len(delta) > new.shape[-1]:  # fewer rows in G than in Δ: solve for G
            kept = torch.bmm(pieces, _divided(new, both))
        else:
            kept = _divided(torch.bmm(pieces, new), both)
        return self.joined(kept).to(delta.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x G for x (n, d)."""
        return self.joined(torch.bmm(self.cut(x), self.matrix))

    def _without_one(self) -> Tensor:
        matrix, b = self.matrix.clone(), self.matrix.shape[1]
        block, place = divmod(self.d - 1, b)
        matrix[block, place] = matrix[block, :, place] = 0
        return matrix

    def tensors(self) -> dict[str, Tensor]:
        return {"gram": self.matrix}


@dataclass
class LowRank:
    """FᵀF + diag(rest): `factor` (at most rank, d), `rest` (d,)."""

    factor: Tensor
    rest: Tensor
    rank: int

    @property
    def d(self) -> int:
        return len(self.rest)

    @classmethod
    def empty(cls, d: int, rank: int, device: torch.device) -> LowRank:
        return cls(torch.zeros(0, d, device=device), torch.zeros(d, device=device), rank)

    def see_(self, x: Tensor) -> None:
        """Add Σ x xᵀ of inputs (n, d).

        With X the rows of F and x together, F becomes the best approximation of its rank, Uᵀ X with
        U the leading eigenvectors of X Xᵀ; the diagonal of the remainder goes to `rest`.
        """
        for piece in x.split(max(2 * self.rank, 64)):
            rows = torch.cat([self.factor, piece.to(self.factor.dtype)])
            if not bool(rows.isfinite().all()):
                self.rest = self.rest + torch.nan  # refused after the pass, on every rank
                return
            if len(rows) > self.d:
                rows = torch.linalg.qr(rows, mode="r")[1]  # fewer rows, the same XᵀX
            if len(rows) > self.rank:
                _, vectors = torch.linalg.eigh(rows @ rows.T)
                leading = vectors[:, -self.rank :].T @ rows
                left = rows.square().sum(0) - leading.square().sum(0)
                self.rest = self.rest + left.clamp_(min=0)
                rows = leading
            self.factor = rows

    def close_(self) -> None:
        """All inputs were seen."""

    def add_(self, other: LowRank) -> None:
        """Add another's, not in place."""
        self.rest = self.rest + other.rest
        self.see_(other.factor)

    def scale_(self, factor: float) -> None:
        self.factor, self.rest = self.factor * math.sqrt(factor), self.rest * factor

    def shrunk(
        self, delta: Tensor, old: LowRank, strength: float, ridge: float, *, bias: bool = True
    ) -> Tensor:
        """As `Blocks.shrunk`, by the Woodbury identity, without any d × d matrix.

        With M = D + CᵀC, C = (F, √γ F_old):  M⁻¹ = D⁻¹ − D⁻¹Cᵀ (I + C D⁻¹ Cᵀ)⁻¹ C D⁻¹
        """
        wide, dtype = _exact(delta.device), delta.dtype
        delta, mine, theirs = (t.to(wide) for t in (delta, self.factor, old.factor))
        rest, other = self.rest.to(wide), old.rest.to(wide)
        if not bias:
            mine, theirs, rest, other = (
                functional.pad(t[..., :-1], (0, 1)) for t in (mine, theirs, rest, other)
            )
        c = torch.cat([mine, math.sqrt(strength) * theirs])
        diagonal = rest + strength * other
        mean = (diagonal.sum() + c.square().sum()) / max(self.d - (not bias), 1)
        diagonal = diagonal + torch.where(mean > 0, mean * ridge, 1.0)
        changed = (delta @ mine.T) @ mine + delta * rest  # Δ G
        scaled = c / diagonal
        inner = torch.eye(len(c), dtype=wide, device=c.device) + scaled @ c.T
        first = changed / diagonal
        correction = torch.cholesky_solve((first @ c.T).T, torch.linalg.cholesky(inner)).T
        return (first - correction @ scaled).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """x G of x (n, d)."""
        return torch.addcmul((x @ self.factor.T) @ self.factor, x, self.rest)

    def tensors(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "rest": self.rest}


Moment = Blocks | LowRank


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _divided(left: Tensor, matrix: Tensor) -> Tensor:
    """left · matrix⁻¹ of positive definite matrices (k, b, b), in double where that is cheap.

    Rounding may outweigh a small ridge, and Cholesky fail: then it is repeated in double, and if
    that fails too, eigenvalues are raised to at least 1e-7 of the largest.
    """
    wide = _exact(matrix.device)
    for dtype in (wide,) if matrix.shape[-1] <= SMALL else (matrix.dtype, wide):
        factor, failed = torch.linalg.cholesky_ex(matrix.to(dtype))
        if not bool(failed.any()):
            # Solving from the right needs no transposed copy of either side.
            half = _triangular(factor.mT, left.to(dtype), upper=True, left=False)
            return _triangular(factor, half, upper=False, left=False).to(left.dtype)
    values, vectors = torch.linalg.eigh(matrix.to(wide))
    values = values.maximum(1e-7 * values[..., -1:])
    return ((left.to(wide) @ vectors / values[:, None]) @ vectors.mT).to(left.dtype)


_triangular = torch.linalg.solve_triangular
