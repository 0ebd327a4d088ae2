"""Gram matrices of what layers are given: which directions of its input a task uses, and how much.

For a layer y = W x + b with x̃ = (x, 1), over the positions of a task's rows,

    G = 1/rows · Σ x̃ x̃ᵀ                                   shape (d, d), d = inputs + 1

Everything that keeps a layer's *function* rather than its weights needs no more than G: with G of
the old task, tr((W−W₀) G (W−W₀)ᵀ) is the mean squared change of the layer's outputs on its rows.
Layers that read the same tensor (query, key, value) share one matrix. A convolution is the linear
layer of its unfolded inputs; an embedding the one of one-hot inputs, whose G is the count of each
row. Padding does not count.

Three structures:

    full       G itself, 4 d² bytes
    block      its diagonal blocks of about `width`: what blocks have in common is left out
    low_rank   G ≈ FᵀF + diag(r), F of (rank, d): 4 d (rank + 1) bytes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast import distributed
from holdfast.batches import Batch, Seen, first_rows, rows_in
from holdfast.errors import Refused

if TYPE_CHECKING:
    from holdfast.bound import Bound

Structure = Literal["full", "block", "low_rank"]
_CHUNK = 2048  # positions that a low-rank sum takes up at once


# --- one input ------------------------------------------------------------------------------------


@dataclass
class Blocks:
    """Diagonal blocks of a Gram matrix: `matrix` (blocks, b, b); one block is the whole of it."""

    matrix: Tensor
    d: int  # inputs + 1; the last block is filled up with zeros

    @classmethod
    def empty(cls, d: int, width: int | None, device: torch.device) -> Blocks:
        blocks = 1 if width is None else math.ceil(d / width)
        b = math.ceil(d / blocks)
        return cls(torch.zeros(blocks, b, b, device=device), d)

    def cut(self, x: Tensor) -> Tensor:
        """(n, d) as (blocks, n, b)."""
        blocks, b = self.matrix.shape[:2]
        x = functional.pad(x, (0, blocks * b - self.d))
        return x.reshape(len(x), blocks, b).transpose(0, 1)

    def joined(self, x: Tensor) -> Tensor:
        """(blocks, n, b) as (n, d)."""
        return x.transpose(0, 1).flatten(1)[:, : self.d]

    def see_(self, x: Tensor) -> None:
        """Add Σ x xᵀ of inputs (n, d)."""
        pieces = self.cut(x)
        self.matrix.baddbmm_(pieces.transpose(1, 2), pieces)

    def add_(self, other: Blocks) -> None:
        self.matrix.add_(other.matrix)

    def scale_(self, factor: float) -> None:
        self.matrix.mul_(factor)

    def shrunk(
        self, delta: Tensor, old: Blocks, strength: float, ridge: float, *, bias: bool = True
    ) -> Tensor:
        """Δ G (G + γ G_old + εI)⁻¹ of Δ (n, d): what of a change is kept.

        ε is `ridge` times the mean diagonal of the sum. bias=False leaves the appended 1 out.
        """
        new = self.matrix if bias else self._without_one()
        both = new + strength * (old.matrix if bias else old._without_one())
        diagonal = both.diagonal(dim1=1, dim2=2)
        # Where neither task has any input there is nothing to solve, nor to change.
        mean = diagonal.sum() / max(self.d, 1)
        diagonal.add_(mean * ridge if mean > 0 else 1.0)
        right = torch.bmm(self.cut(delta.to(new.dtype)), new).transpose(1, 2)
        return self.joined(_solve(both, right).transpose(1, 2)).to(delta.dtype)

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
        """Add Σ x xᵀ of inputs (n, d); what the leading directions leave goes to the diagonal."""
        for piece in x.split(_CHUNK):
            rows = torch.cat([self.factor, piece.to(self.factor.dtype)])
            if len(rows) <= self.rank:
                self.factor = rows
                continue
            # The leading right singular vectors, by the smaller of the two Gram matrices.
            _, _, vt = torch.linalg.svd(rows, full_matrices=False)
            leading = vt[: self.rank]
            projected = rows @ leading.T  # (n, rank)
            _, triangle = torch.linalg.qr(projected)
            factor = triangle @ leading
            self.rest += (rows.square().sum(0) - factor.square().sum(0)).clamp_(min=0)
            self.factor = factor

    def add_(self, other: LowRank) -> None:
        self.rest += other.rest
        self.see_(other.factor)

    def scale_(self, factor: float) -> None:
        self.factor *= math.sqrt(factor)
        self.rest *= factor

    def shrunk(
        self, delta: Tensor, old: LowRank, strength: float, ridge: float, *, bias: bool = True
    ) -> Tensor:
        """As `Blocks.shrunk`, by the Woodbury identity: nothing of d × d is made.

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
        mean = (diagonal.sum() + c.square().sum()) / self.d
        diagonal = diagonal + (mean * ridge if mean > 0 else 1.0)
        changed = (delta @ mine.T) @ mine + delta * rest  # Δ G
        scaled = c / diagonal
        inner = torch.eye(len(c), dtype=wide, device=c.device) + scaled @ c.T
        first = changed / diagonal
        correction = torch.cholesky_solve((first @ c.T).T, torch.linalg.cholesky(inner)).T
        return (first - correction @ scaled).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "rest": self.rest}


Moment = Blocks | LowRank


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix⁻¹ right of positive definite matrices (k, b, b), in double where that is cheap."""
    dtype, small = right.dtype, matrix.shape[-1] <= 2048
    if not small:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed.any()):
            return torch.cholesky_solve(right, factor)
    wide = _exact(matrix.device)
    return torch.cholesky_solve(right.to(wide), torch.linalg.cholesky(matrix.to(wide))).to(dtype)


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer y = W x + b, and its weights as one matrix (outputs, inputs + 1)."""

    module: nn.Module
    weight: str
    bias: str | None

    @property
    def lora(self) -> bool:
        """Whether it is the first of PEFT's pair of factors (`Factors` merges both)."""
        return ".lora_A." in self.weight or ".lora_B." in self.weight

    @property
    def transposed(self) -> bool:
        """Transformers' Conv1D keeps its weight as (inputs, outputs)."""
        return type(self.module).__name__.removeprefix("Mixed") == "Conv1D" and not isinstance(
            self.module, nn.Conv1d
        )

    @property
    def convolution(self) -> bool:
        return isinstance(self.module, nn.Conv1d | nn.Conv2d)

    @property
    def d(self) -> int:
        w = cast(Tensor, self.module.weight)
        return (w.shape[0] if self.transposed else math.prod(w.shape[1:])) + 1

    def matrix(self, weights: Mapping[str, Tensor]) -> Tensor:
        """W and b of some weights by name, as (outputs, inputs + 1); a missing bias is 0."""
        w = distributed.full(weights[self.weight]).float()
        w = w.T if self.transposed else w.flatten(1)
        if self.bias is None:
            return functional.pad(w, (0, 1))
        return torch.cat([w, distributed.full(weights[self.bias]).float()[:, None]], 1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The reverse of `matrix`: weights by name, in their shapes."""
        w, b = matrix[:, :-1], matrix[:, -1]
        shape = tuple(cast(Tensor, self.module.weight).shape)
        found = {self.weight: w.T if self.transposed else w.reshape(shape)}
        return found if self.bias is None else {**found, self.bias: b}

    def inputs(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the layer was given, a row a position, with a 1 appended: (n, inputs + 1)."""
        if self.convolution:
            x = _unfolded(cast(Any, self.module), x.detach().float())
        elif mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask]
        elif mask is not None and x.ndim == 2 and len(x) == mask.numel():
            x = x[mask.flatten()]
        x = x.detach().float().reshape(-1, x.shape[-1])
        return functional.pad(x, (0, 1), value=1.0)


def _unfolded(layer: Any, x: Tensor) -> Tensor:
    """(rows, channels, …) as (rows · positions, channels · kernel)."""
    two = isinstance(layer, nn.Conv2d)
    padding: Any = 0
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    else:
        padding = layer.padding if two else (0, *layer.padding)
    x = x if two else x[:, :, None]
    one: tuple[int, ...] = () if two else (1,)
    return functional.unfold(
        x,
        (*one, *layer.kernel_size),
        dilation=(*one, *layer.dilation),
        padding=padding,
        stride=(*one, *layer.stride),
    ).transpose(1, 2).flatten(0, 1)  # fmt: skip


def layers_of(
    weights: Mapping[str, nn.Parameter], owners: Mapping[str, tuple[nn.Module, ...]]
) -> tuple[list[Layer], dict[str, nn.Embedding]]:
    """The linear layers of some weights, and their embeddings by the weight's name.

    A weight that an embedding and a layer share (tied output) is the embedding's. Grouped
    convolutions and weights of other modules are in neither.
    """
    linear: list[Layer] = []
    embeddings: dict[str, nn.Embedding] = {}
    for name, w in weights.items():
        for module in owners[name]:
            if getattr(module, "weight", None) is not w:
                continue
            if isinstance(module, nn.Embedding):
                embeddings[name] = module
            elif _linear(module) and name not in embeddings:
                own = cast(Tensor | None, module.bias)
                bias = next((n for n, p in weights.items() if p is own), None)
                linear.append(Layer(module, name, bias))
            break
    return linear, embeddings


def _linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear) or any(
        k.__name__ == "Conv1D" for k in type(module).__mro__
    )


# --- a task's rows --------------------------------------------------------------------------------


@dataclass
class Grams:
    """What a task's rows give each layer: moments, who reads them, and counts for embeddings."""

    moments: dict[str, Moment] = field(default_factory=dict)  # by the first weight that reads it
    readers: dict[str, str] = field(default_factory=dict)  # each layer's weight -> its moment
    counts: dict[str, Tensor] = field(default_factory=dict)  # embedding -> (rows of it,)

    def add_(self, other: Grams) -> None:
        """Add another task's, measured on the same network."""
        if self.readers != other.readers:
            raise Refused("layers read other inputs than in the task before", where="grams",
                          remedy="keep the network's structure for a whole sequence")  # fmt: skip
        for key, moment in self.moments.items():
            moment.add_(cast(Any, other.moments[key]))
        for name, count in self.counts.items():
            count.add_(other.counts[name])

    def save(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Put all of it into a method's state."""
        for key, moment in self.moments.items():
            for slot, tensor in moment.tensors().items():
                tensors.setdefault(slot, {})[key] = tensor
        tensors["counts"] = self.counts
        numbers["readers"] = self.readers
        numbers["inputs"] = {key: m.d for key, m in self.moments.items()}

    @classmethod
    def load(
        cls, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any], rank: int
    ) -> Grams | None:
        """The reverse of `save`, sharing its tensors; None before a task was measured."""
        if "readers" not in numbers:
            return None
        moments: dict[str, Moment] = {}
        for key, d in numbers["inputs"].items():
            if key in tensors.get("gram", {}):
                moments[key] = Blocks(tensors["gram"][key], d)
            else:
                moments[key] = LowRank(tensors["factor"][key], tensors["rest"][key], rank)
        return cls(moments, dict(numbers["readers"]), dict(tensors.get("counts", {})))


@torch.no_grad()
def measure(
    bound: Bound,
    *,
    rows: int = 400,
    structure: Structure = "full",
    width: int = 4096,
    rank: int = 256,
) -> Grams:
    """The Gram matrices of the shared layers on the first `rows` rows of `bound.data`.

    structure: of inputs wider than `width`; narrower ones are always whole. Ranks of a process
    group take every W-th batch and add up; with weights in shards each goes through every batch.
    Raises `Refused` without rows, and for inputs that are not finite.
    """
    linear, embeddings = layers_of(bound.shared, bound.owners)
    found, device = Grams(), next(iter(bound.weights.values())).device
    eye = _Eye(found, linear, structure, width, rank)
    shards = any(distributed.sharded(w) for w in bound.shared.values())
    ranks = 1 if shards else distributed.world()
    seen, state, total = Seen(), bound.generator.get_state(), 0
    handles = [layer.module.register_forward_pre_hook(eye.at(layer)) for layer in linear]
    handles += [
        module.register_forward_pre_hook(eye.counting(name)) for name, module in embeddings.items()
    ]
    try:
        for turn, batch in enumerate(seen.through(first_rows(bound.data(), rows))):
            total += rows_in(batch)
            if turn % ranks != distributed.rank() % ranks and turn >= ranks:
                continue
            # Every rank goes through its first batch to know the layers; it may be another's.
            eye.begin(batch, counts=turn % ranks == distributed.rank() % ranks)
            bound.forward(batch, training=False)
            eye.end()
    finally:
        for handle in handles:
            handle.remove()
    bound.generator.set_state(state)  # ranks differ in how often they called
    seen.require_equal(device)
    if not total:
        raise Refused(
            "no rows to measure", where="end_task", remedy="pass the task's rows as data="
        )
    for key, moment in found.moments.items():
        if ranks > 1:
            _sum_over_ranks(moment)
        moment.scale_(1.0 / total)
        if not all(bool(t.isfinite().all()) for t in moment.tensors().values()):
            raise Refused("the inputs of this layer are not finite", where=key,
                          remedy="look for rows or weights that are not")  # fmt: skip
    for count in found.counts.values():
        distributed.reduce_([count] if ranks > 1 else [])
        count.div_(total)
    return found


def _sum_over_ranks(moment: Moment) -> None:
    if isinstance(moment, Blocks):
        distributed.reduce_([moment.matrix])
        return
    distributed.reduce_([moment.rest])
    mine, moment.factor = moment.factor, moment.factor[:0]
    whole = torch.zeros(moment.rank, moment.d, device=mine.device)
    for other in range(distributed.world()):
        whole.zero_()
        if other == distributed.rank():
            whole[: len(mine)] = mine
        distributed.reduce_([whole])
        moment.see_(whole[whole.any(1)])


class _Eye:
    """Sees what layers are given, and which of them are given the same tensor."""

    def __init__(
        self, found: Grams, layers: Sequence[Layer], structure: Structure, width: int, rank: int
    ) -> None:
        self.found, self.layers = found, layers
        self.structure, self.width, self.rank = structure, width, rank
        self.mask: Tensor | None = None
        self.counts = True
        self._given: dict[tuple[int, int], str] = {}
        self._kept: list[Tensor] = []  # so that no other tensor takes the place of one, and its id

    def begin(self, batch: Batch, *, counts: bool) -> None:
        mask = batch.get("attention_mask")
        masked = isinstance(mask, Tensor) and mask.ndim == 2
        self.mask = cast(Tensor, mask).bool() if masked else None
        self.counts = counts

    def end(self) -> None:
        self._given, self._kept = {}, []

    def at(self, layer: Layer) -> Callable[..., None]:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x, readers = given[0], self.found.readers
            key = readers.get(layer.weight)
            if key is None:
                self._kept.append(x)
                key = self._given.setdefault((id(x), x._version), layer.weight)
                same = key == layer.weight or self._like(key, layer)
                key = readers[layer.weight] = key if same else layer.weight
            if key != layer.weight:
                return
            if key not in self.found.moments:
                self.found.moments[key] = self._empty(layer.d, x.device)
            if self.counts:
                self.found.moments[key].see_(layer.inputs(x, self.mask))

        return see

    def _like(self, key: str, layer: Layer) -> bool:
        """Whether two layers take the same tensor apart alike: convolutions may not."""
        return (
            not layer.convolution
            and key in self.found.moments
            and (self.found.moments[key].d == layer.d)
        )

    def _empty(self, d: int, device: torch.device) -> Moment:
        if self.structure == "low_rank" and d > self.width:
            return LowRank.empty(d, self.rank, device)
        whole = self.structure == "full" or d <= self.width
        return Blocks.empty(d, None if whole else self.width, device)

    def counting(self, name: str) -> Callable[..., None]:
        def see(module: Any, given: tuple[Tensor, ...]) -> None:
            ids, size = given[0], module.num_embeddings
            if name not in self.found.counts:
                self.found.counts[name] = torch.zeros(size, device=ids.device)
            if not self.counts:
                return
            if self.mask is not None:
                if ids.ndim == 2 and len(ids) == 1:  # positions, the same for every row
                    ids = ids.expand(len(self.mask), -1)
                ids = ids[self.mask] if ids.shape == self.mask.shape else ids
            self.found.counts[name] += torch.bincount(ids.flatten(), minlength=size)[:size]

        return see


# --- LoRA -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """A low-rank pair W + s·B A of PEFT: its input is that of A."""

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
        """Factors of the merged B A: of rank r the nearest one, by singular values.

        The merged product is  B₀A₀ + (B₁A₁ − B₀A₀) P,  P = G (G + γ G_old + εI)⁻¹,  of rank 2r.
        """
        a0, b0, a1, b1 = (
            distributed.full(w[n]).float() for w in (old, new) for n in (self.a, self.b)
        )
        theirs, mine = cast(Any, moments)
        both = torch.cat([a0, a1])
        kept = mine.shrunk(functional.pad(both, (0, 1)), theirs, strength, ridge, bias=False)
        kept = kept[:, :-1]
        right = torch.cat([a0 - kept[: len(a0)], kept[len(a0) :]])
        left = torch.cat([b0, b1], 1)
        (q1, r1), (q2, r2) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(r1 @ r2.T)
        u, s, vt = q1 @ u[:, : len(a0)], s[: len(a0)].sqrt(), vt[: len(a0)] @ q2.T
        return {self.a: s[:, None] * vt, self.b: u * s}


def factors_of(weights: Mapping[str, Tensor]) -> Iterator[Factors]:
    """The pairs of PEFT's LoRA among some weights, by their names."""
    for a in weights:
        if ".lora_A." in a and (b := a.replace(".lora_A.", ".lora_B.")) in weights:
            yield Factors(a, b)
