"""Encoded rows in flat arrays: about 4 bytes a token, far below Python's lists of numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

CHUNK = 1000  # rows tokenized at once: what a tokenizer returns is much larger
Column = tuple[
    Any, Any
]  # all values one after another, and where each row's begin; None: one a row


class Packed(Sequence[dict[str, Any]]):
    """Rows as mappings by name of lists of integers, one number or an array; made when read.

    A slice shares the arrays.
    """

    def __init__(self, columns: dict[str, Column], places: range) -> None:
        self._columns, self._places = columns, places

    @classmethod
    def of(
        cls, rows: Sequence[Any], encode: Callable[[Sequence[Any]], list[dict[str, Any]]]
    ) -> Packed:
        """`encode` applied to `rows`, a chunk at a time; it may make several of one, or none."""
        parts: dict[str, list[Any]] = {}
        lengths: dict[str, list[Any]] = {}
        count = 0
        for at in range(0, len(rows), CHUNK):
            made = encode(rows[at : at + CHUNK])
            count += len(made)
            for name, value in made[0].items() if made else ():
                values = [row[name] for row in made]
                if isinstance(value, list):
                    lengths.setdefault(name, []).append([len(v) for v in values])
                    values = [token for row in values for token in row]
                parts.setdefault(name, []).append(_small(values))
        columns = {
            name: (np.concatenate(each), _begins(lengths.get(name))) for name, each in parts.items()
        }
        return cls(columns, range(count))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Packed: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Packed(self._columns, self._places[index])
        place = self._places[index]
        return {
            name: _one(values[place]) if begins is None
            else values[begins[place] : begins[place + 1]].tolist()
            for name, (values, begins) in self._columns.items()
        }  # fmt: skip

    def lengths(self, name: str) -> list[int]:
        """How many values each row has in a column of lists; 1 if there is no such column."""
        if not self._places or name not in self._columns:
            return [1] * len(self)
        sizes = np.diff(self._columns[name][1])
        return sizes[np.array(self._places)].tolist()

    def values(self, name: str) -> Any:
        """A column of numbers, (rows,), or of lists of one length, (rows, length)."""
        found, begins = self._columns[name]
        if begins is None:
            return found[np.array(self._places, dtype=int)]
        return np.stack([found[begins[p] : begins[p + 1]] for p in self._places])

    def largest(self, name: str) -> int:
        """The largest number in a column of whole numbers, or 0."""
        found = self._columns[name][0] if name in self._columns else None
        return 0 if found is None or not found.size else int(found.max())

    def content_hash(self) -> str:
        """A hash of all rows in their order."""
        digest = hashlib.sha256(f"{[*self._columns]} {self._places}".encode())
        for column in self._columns.values():
            for array in column:
                if array is not None:
                    digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for column in self._columns.values() for a in column if a is not None)


def _one(value: Any) -> Any:
    return value if value.ndim else value.item()


def lengths(rows: Sequence[dict[str, Any]], name: str = "input_ids") -> list[int]:
    """How many values each row has in a column of lists."""
    return rows.lengths(name) if isinstance(rows, Packed) else [len(row[name]) for row in rows]


def values(rows: Sequence[dict[str, Any]], name: str) -> Any:
    """A column of numbers: (rows,)."""
    return rows.values(name) if isinstance(rows, Packed) else np.array([row[name] for row in rows])


def alike(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of up to `most` rows of similar length each time, which saves padding."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for start in range(0, len(order), most):
        yield order[start : start + most]


def _small(values: list[Any]) -> Any:
    """Numbers in a small type that holds them all exactly."""
    found = np.array(values)
    if found.dtype.kind == "f" and (found == (half := found.astype(np.float32))).all():
        return half
    if found.dtype.kind not in "iu" or not found.size:
        return found
    return found.astype(
        np.result_type(np.min_scalar_type(found.min()), np.min_scalar_type(found.max()))
    )


def _begins(lengths: Iterable[list[int]] | None) -> Any:
    if lengths is None:
        return None
    return np.concatenate([[0], np.cumsum([n for part in lengths for n in part])])
