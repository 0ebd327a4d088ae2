"""Gram matrices of layer inputs: which directions of a layer's input a task uses, and how much.

For a layer y = W x + b with x̃ = (x, 1), over the positions of a task's rows,

    G = 1/rows · Σ x̃ x̃ᵀ                                   shape (d, d), d = inputs + 1

A method that preserves a layer's *function* rather than its weights needs only G: with the old
task's G, tr((W−W₀) G (W−W₀)ᵀ) is the mean squared change of the layer's outputs on its rows.
Layers that read the same tensor (query, key, value) share one matrix. A convolution is a linear
layer on its unfolded inputs; an embedding is one on one-hot inputs, whose G is the count of each
row; a norm is, for each feature, one on two inputs (x̂_i, 1). Padding does not count. An input
shared by all rows of a batch, such as positions of shape (1, tokens), counts once per row.

`holdfast.ops.moments` gives the memory that G takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from holdfast.engine.batches import Batch, Seen, Whole, first_rows, rows_in, rows_of
from holdfast.errors import NotFinite, Refused
from holdfast.network.layers import Layer, Norm, layers_of, norms_of
from holdfast.ops import distributed
from holdfast.ops.moments import Blocks, LowRank, Moment

if TYPE_CHECKING:
    from holdfast.engine.passes import Passes

Structure = Literal["full", "block", "low_rank"]


@dataclass
class Grams:
    """Statistics of layer inputs on a task's rows: moments, their readers, embedding counts."""

    moments: dict[str, Moment] = field(default_factory=dict)  # by the first weight that reads it
    readers: dict[str, str] = field(default_factory=dict)  # each layer's weight -> its moment
    counts: dict[str, Tensor] = field(default_factory=dict)  # embedding -> (rows of it,)

    def of(self, layer: Layer) -> Moment | None:
        """The moment of a layer's inputs; None if the layer was never called."""
        key = self.readers.get(layer.weight)
        return None if key is None else self.moments[key]

    def require_like(self, other: Grams) -> None:
        """`Refused` if layers do not share their inputs as they do in `other`."""
        if any(self.readers.get(name, key) != key for name, key in other.readers.items()):
            raise Refused("layers read other inputs than in the task before", where="grams",
                          remedy="keep the network's structure for a whole sequence")  # fmt: skip

    def add_(self, other: Grams) -> None:
        """Add those of another task on the same network; no tensor is modified in place."""
        self.require_like(other)
        self.readers |= other.readers
        for key, moment in other.moments.items():
            if key in self.moments:
                self.moments[key].add_(cast(Any, moment))
            else:  # never called before
                self.moments[key] = moment
        for name, count in other.counts.items():
            self.counts[name] = self.counts[name] + count if name in self.counts else count

    def save(self, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Put all of it into a method's state."""
        for key, moment in self.moments.items():
            for slot, tensor in moment.tensors().items():
                tensors.setdefault(slot, {})[key] = tensor
        tensors["counts"] = dict(self.counts)
        numbers["readers"] = dict(self.readers)
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
    bound: Passes,
    *,
    rows: int = 400,
    structure: Structure = "full",
    width: int = 4096,
    rank: int = 256,
    norms: bool = False,
) -> Grams:
    """The Gram matrices of the shared layers on the first `rows` rows of `bound.data`.

    structure: for layers of more than `width` inputs; others get the full matrix. norms: measure
    norms too. Each of W ranks takes every W-th batch and the sums are added; with sharded weights
    each rank goes through every batch. Raises `Refused` without rows, and for inputs that are not
    finite.
    """
    model, device = bound.models[bound.task], next(iter(bound.weights.values())).device
    distributed.reshard_(model)
    linear, embeddings = layers_of(bound.shared, bound.owners)
    layers = [*linear, *(norms_of(bound.shared, bound.owners) if norms else [])]
    eye = _Eye(layers, structure, width, rank)
    found, seen, total = eye.found, Seen(), 0
    state = bound.generator.get_state()
    shards = any(map(distributed.sharded, bound.shared.values()))
    ranks, mine = (1, 0) if shards else (distributed.world(), distributed.rank())
    with eye.watching(model, embeddings):
        for turn, batch in enumerate(seen.through(first_rows(bound.data(), rows))):
            if not total:
                bound.forward(next(rows_of([batch])), training=False)
                eye.learned()
            total += rows_in(batch)
            if turn % ranks == mine:
                eye.begin(batch)
                bound.forward(batch, training=False)
    distributed.reshard_(model)
    bound.generator.set_state(state)  # ranks differ in how often they drew
    seen.require_equal(device)
    if not total:
        raise Refused(
            "no rows to measure", where="end_task", remedy="pass the task's rows as data="
        )
    if ranks > 1:
        _sum_over_ranks(eye, embeddings, device)
    for key, moment in found.moments.items():
        moment.close_()
        moment.scale_(1.0 / total)
        if not all(bool(t.sum().isfinite()) for t in moment.tensors().values()):
            raise NotFinite("the inputs of this layer are not finite", where=key,
                          remedy="look for rows or weights that are not")  # fmt: skip
    found.counts = {name: count / total for name, count in found.counts.items()}
    return found


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _sum_over_ranks(
    eye: _Eye, embeddings: Mapping[str, nn.Embedding], device: torch.device
) -> None:
    """Sum over ranks; a layer that only some ranks called is then known to all."""
    found = eye.found
    names = [*(layer.weight for layer in eye.layers), *embeddings]
    called = distributed.gather([n in found.readers or n in found.counts for n in names], device)
    on_any = dict(zip(names, map(any, zip(*called, strict=True)), strict=True))
    for layer in eye.layers:
        if on_any[layer.weight]:
            eye.moment(layer, device)
    for name, module in embeddings.items():
        if on_any[name]:
            eye.count(name, module, device)
            distributed.reduce_([found.counts[name]])
    for layer in eye.layers:
        moment = found.moments.get(layer.weight)
        if isinstance(moment, Blocks):
            moment.close_()
            distributed.reduce_([moment.matrix])
        elif moment is not None:
            _sum_of_low_ranks(moment)


def _sum_of_low_ranks(moment: LowRank) -> None:
    distributed.reduce_([moment.rest])
    mine, moment.factor = moment.factor, moment.factor[:0]
    for other in range(distributed.world()):
        whole = torch.zeros(moment.rank, moment.d, device=mine.device)
        if other == distributed.rank():
            whole[: len(mine)] = mine
        distributed.reduce_([whole])
        moment.see_(whole[whole.any(1)])


class _Eye:
    """Watches layer inputs: first, on one row, which layers share a tensor; then sums over rows."""

    def __init__(
        self, layers: Sequence[Layer], structure: Structure, width: int, rank: int
    ) -> None:
        self.found, self.layers = Grams(), layers
        self.structure, self.width, self.rank = structure, width, rank
        self.mask: Tensor | None = None
        self.rows, self.whole = 0, False
        # The calls of each layer on that row: the tensor, kept alive so that its id is not reused,
        # and its version, the count of in-place writes.
        self._calls: dict[str, list[tuple[Tensor, int]]] = {}

    @contextmanager
    def watching(self, model: nn.Module, embeddings: Mapping[str, nn.Embedding]) -> Iterator[None]:
        """Observe every call of a layer within the block."""
        with ExitStack() as stack:
            for module, see in (
                (model, self._called),
                *((layer.module, self._at(layer)) for layer in self.layers),
                *((module, self._counting(name)) for name, module in embeddings.items()),
            ):
                handle = module.register_forward_pre_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def learned(self) -> None:
        """The one row is done: layers with the same calls share a moment."""
        first: dict[Any, str] = {}
        alike = {layer.weight: layer.alike for layer in self.layers}
        for name, calls in self._calls.items():
            given = tuple((id(x), version) for x, version in calls)
            self.found.readers[name] = first.setdefault((alike[name], given), name)
        self._calls = {}

    def begin(self, batch: Batch) -> None:
        """Start a batch whose inputs are to be summed."""
        self.whole = isinstance(batch, Whole)
        self._take(batch)

    def _take(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        masked = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
        self.mask, self.rows = cast(Tensor, mask).bool() if masked else None, rows_in(batch)

    def moment(self, layer: Layer, device: torch.device) -> Moment:
        """The moment of a layer's inputs, created empty on first use."""
        key = self.found.readers.setdefault(layer.weight, layer.weight)
        if key not in self.found.moments:
            self.found.moments[key] = self._empty(layer, device)
        return self.found.moments[key]

    def count(self, name: str, module: nn.Embedding, device: torch.device) -> Tensor:
        """The counts of an embedding, 0 on first use."""
        if name not in self.found.counts:
            self.found.counts[name] = torch.zeros(module.num_embeddings, device=device)
        return self.found.counts[name]

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A trainer's loss calls the model with what it made of a `Whole` batch."""
        if not self.rows or not self.whole:
            return
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        inner = (value for value in given.values() if isinstance(value, Mapping))
        batch = {k: v for each in (given, *inner) for k, v in each.items() if _is_batch(v)}
        if batch:
            self._take(batch)

    def _at(self, layer: Layer) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            x = next(iter((*args, *kwargs.values())))
            if not self.rows:
                self._calls.setdefault(layer.weight, []).append((x, x._version))
                return
            moment = self.moment(layer, x.device)
            if self.found.readers[layer.weight] == layer.weight:
                if len(x) == 1 and x.ndim > 2:
                    x = x.expand(self.rows, *x.shape[1:])
                moment.see_(layer.inputs(x, self.mask))

        return see

    def _empty(self, layer: Layer, device: torch.device) -> Moment:
        d = layer.d
        if isinstance(layer, Norm):
            size = len(layer.names)
            return Blocks(torch.zeros(d // size, size, size, device=device), d)
        if self.structure == "low_rank" and d - 1 > self.width:
            return LowRank.empty(d, self.rank, device)
        whole = self.structure == "full" or d - 1 <= self.width
        return Blocks.empty(d, None if whole else self.width, device)

    def _counting(self, name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            ids = next(iter((*args, *kwargs.values())))
            if not self.rows:
                return
            if len(ids) == 1 and ids.ndim == 2:
                ids = ids.expand(self.rows, -1)
            if self.mask is not None and ids.shape == self.mask.shape:
                ids = ids[self.mask]
            size = module.num_embeddings
            counts = torch.bincount(ids.flatten(), minlength=size)[:size]
            self.count(name, module, ids.device).add_(counts)

        return see
