"""Rows in batches as a model takes them: counted, taken one by one, told apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import Refused
from holdfast.ops import distributed

Batch = Mapping[str, Any]
Batches = Iterable[Batch]
Data = Batches | Callable[[], Batches]  # re-iterable, or a function that returns them
LABELS = frozenset({"labels", "label", "label_ids"})


def rows_in(batch: Batch) -> int:
    """How many rows a batch has."""
    values: Iterable[Any] = getattr(batch, "values", list)()
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise Refused("a batch holds no tensors by name", remedy="pass what model(**batch) takes")
    return len(first)


def rows_of(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Each row of each batch as a batch of one."""
    for batch in batches:
        for row in range(rows_in(batch)):
            yield {
                key: value[row : row + 1] if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }


def first_rows(batches: Iterable[Batch], rows: int | None) -> Iterator[Batch]:
    """The batches up to `rows` rows, the last one cut."""
    left = rows
    for batch in batches:
        size = rows_in(batch)
        if left is not None:
            if left <= 0:
                return
            if size > left:
                batch = {k: v[:left] if isinstance(v, Tensor) else v for k, v in batch.items()}
            left -= size
        yield batch


def without_labels(batch: Batch) -> dict[str, Any]:
    """A batch as it is given to another task's model."""
    return {k: v for k, v in batch.items() if k not in LABELS}


def identities(batch: Batch) -> Tensor:
    """A number for each row, by its content without labels and padding: int64, (rows,).

    A row's number is the sum over its entries of a mixture of input, place and value, modulo 2^64:
    two rows share one by chance in 2^-64. Padding is what `attention_mask` says it is, before the
    row or after it, in every input that begins with the mask's shape; without a mask, all counts.
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
            each = entries.shape[1] // max(1, mask[0].numel())  # a vector a token, or a number
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
    """One to one on int64, each bit of the result hanging on all of x (a finalizer of hashes)."""
    for shift, odd in ((32, -0x61C8864680B583EB), (29, -0x40A7B892E31B1A47), (32, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * odd  # >> carries the sign down
    return x


class Seen:
    """The rows that a rank was given: how many, and what tells them from others."""

    def __init__(self) -> None:
        self.count, self.prints = 0, 0

    def through(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, taken note of."""
        for batch in batches:
            self.count += rows_in(batch)
            if distributed.world() > 1:
                tensors = (v for v in batch.values() if isinstance(v, Tensor))
                self.prints = distributed.number_of([self.prints, distributed.fingerprint(tensors)])
            yield batch

    def require_equal(self, device: torch.device) -> None:
        """Every rank must have been given all rows: slices would count some twice, others never."""
        if distributed.world() > 1:
            distributed.require_equal(
                {"the number of rows": self.count, "the rows": self.prints},
                device,
                remedy="pass all rows, in one order, on every rank: they are divided here",
            )
