"""Rows in batches as a model takes them: counted, taken one by one, told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast import distributed
from holdfast.errors import Refused

Batch = Mapping[str, Any]
LABELS = frozenset({"labels", "label", "label_ids"})


def rows_in(batch: Batch) -> int:
    """How many rows a batch has."""
    values: Iterable[Any] = getattr(batch, "values", list)()
    first = next((v for v in values if isinstance(v, Tensor)), None)
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

    A polynomial of the mixed entries modulo 2^64: two rows share one by chance in 2^-64.
    """
    size, mask = rows_in(batch), batch.get("attention_mask")
    total: Tensor | None = None
    for key, values in sorted(without_labels(batch).items()):
        if key == "attention_mask" or not isinstance(values, Tensor) or len(values) != size:
            continue
        entries = _mixed(values.detach().reshape(size, -1), salt=sum(key.encode()))
        if mask is not None and values.shape == mask.shape:
            present = mask.to(torch.int64)
            place = present.cumsum(1) * present  # padding stands at place 0, of weight 0
        else:
            place = torch.arange(1, entries.shape[1] + 1, device=entries.device).expand_as(entries)
        powers = torch.full((entries.shape[1] + 1,), _ODD, device=entries.device).cumprod(0)
        powers = powers.masked_fill(torch.arange(len(powers), device=powers.device) == 0, 0)
        mine = (entries * powers[place]).sum(1)
        total = mine if total is None else total * _ODD + mine
    if total is None:
        raise Refused("a batch holds no inputs by name", remedy="pass what model(**batch) takes")
    return total


_ODD = 0x5851F42D4C957F2D  # the multiplier of Knuth's MMIX generator


def _mixed(values: Tensor, *, salt: int) -> Tensor:
    """Entries as int64 whose bits hang on all of the value's: (rows, n)."""
    if values.dtype is torch.bool:
        values = values.to(torch.uint8)
    if values.is_floating_point():
        values = values.double().view(torch.int64)
    mixed = (values.to(torch.int64) + salt + 1) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 32)


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
                self.prints = distributed.digest([self.prints, distributed.fingerprint(tensors)])
            yield batch

    def require_equal(self, device: torch.device) -> None:
        """Every rank must have been given all rows: slices would count some twice, others never."""
        if distributed.world() > 1:
            distributed.require_equal(
                {"the number of rows": self.count, "the rows": self.prints},
                device,
                remedy="pass all rows, in one order, on every rank: they are divided here",
            )
