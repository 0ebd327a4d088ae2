"""Batches as a model takes them: counting their rows, splitting and identifying them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import Refused
from holdfast.ops import distributed

Batch = Mapping[str, Any]
Batches = Iterable[Batch]
Data = Batches | Callable[[], Batches]  # re-iterable, or a function that returns them
LABELS = frozenset({"labels", "label", "label_ids"})


class Whole(dict[str, Any]):
    """A batch of `rows` examples that only its trainer's loss takes, and that is never split.

    `run(model, batch)` returns an object with that `loss`, a mean over the examples.
    """

    def __init__(self, batch: Batch, rows: int, run: Callable[[nn.Module, Batch], Any]) -> None:
        super().__init__(batch)
        self.rows, self.run = rows, run


def rows_in(batch: Batch) -> int:
    """How many rows a batch has."""
    if isinstance(batch, Whole):
        return batch.rows
    values: Iterable[Any] = getattr(batch, "values", list)()
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise Refused("a batch holds no tensors by name", remedy="pass what model(**batch) takes")
    return len(first)


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returned."""
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise Refused("the model returned no loss", remedy="pass batches with labels, and let the "
                      "model return an object that has it as .loss, no dict or tuple")  # fmt: skip
    return loss


def rows_of(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each row of each batch as a batch of one; a `Whole` one as it is."""
    for batch in batches:
        if isinstance(batch, Whole):
            yield batch
            continue
        for row in range(rows_in(batch)):
            yield {
                key: value[row : row + 1] if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }


def first_rows(batches: Iterable[Batch], rows: int | None) -> Iterator[Batch]:
    """The batches up to `rows` rows in all, the last one cut short."""
    left = rows
    for batch in batches:
        size = rows_in(batch)
        if left is not None:
            if left <= 0:
                return
            if size > left and not isinstance(batch, Whole):
                batch = {k: v[:left] if isinstance(v, Tensor) else v for k, v in batch.items()}
            left -= size
        yield batch


def without_labels(batch: Batch) -> dict[str, Any]:
    """A batch without labels, as another task's model is given it."""
    return {k: v for k, v in batch.items() if k not in LABELS}


def identities(batch: Batch) -> Tensor:
    """A hash of each row's content without labels and padding: int64, (rows,).

    It is the sum over a row's entries of a hash of input, position and value, modulo 2^64: two
    rows collide with probability 2^-64. `attention_mask` says what is padding, on either side, in
    every input whose shape begins with the mask's; without a mask every entry counts.
    """
    size, mask = rows_in(batch), batch.get("attention_mask")
    total: Tensor | None = None
    for key, values in without_labels(batch).items():
        ours = isinstance(values, Tensor) and values.ndim > 0 and len(values) == size
        if key == "attention_mask" or not ours:
            continue
        entries = _integers(values.detach()).reshape(size, -1)
        present = torch.ones_like(entries)
        if mask is not None and values.shape[: mask.ndim] == mask.shape:
            each = entries.shape[1] // max(1, mask[0].numel())  # values per token
            present = (mask != 0).to(entries.dtype).reshape(size, -1).repeat_interleave(each, 1)
        place = present.cumsum(1)
        mixed = _mixed(_mixed(entries + zlib.crc32(key.encode())) + place)
        mine = (mixed * present).sum(1)
        total = mine if total is None else total + mine
    if total is None:
        raise Refused("a batch holds no inputs by name", remedy="pass what model(**batch) takes")
    return total


def _integers(values: Tensor) -> Tensor:
    """Each value as an int64 of its own."""
    return values.double().view(torch.int64) if values.is_floating_point() else values.long()


def _mixed(x: Tensor) -> Tensor:
    """A hash finalizer: a bijection on int64 whose every output bit depends on all of x."""
    for shift, odd in ((32, -0x61C8864680B583EB), (29, -0x40A7B892E31B1A47), (32, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * odd  # >> alone would extend the sign
    return x


class Seen:
    """The rows that a rank was given: their number and fingerprint."""

    def __init__(self) -> None:
        self.count, self.prints = 0, 0

    def through(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, recording them."""
        for batch in batches:
            self.count += rows_in(batch)
            if distributed.world() > 1:
                tensors = (v for v in batch.values() if isinstance(v, Tensor))
                self.prints = distributed.number_of([self.prints, distributed.fingerprint(tensors)])
            yield batch

    def require_equal(self, device: torch.device) -> None:
        """Refuse unless every rank got all rows: slices would count some twice, others never."""
        if distributed.world() > 1:
            distributed.require_equal(
                {"the number of rows": self.count, "the rows": self.prints},
                device,
                remedy="pass all rows, in one order, on every rank: they are divided here",
            )
