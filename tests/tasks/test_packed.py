"""Encoded rows in flat arrays: what was put in comes out, in little memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.tasks.kinds import packed
from holdfast.tasks.kinds.packed import Packed

IDS = st.lists(st.integers(-100, 2**31 - 1), max_size=5)
ROWS = st.lists(st.fixed_dictionaries({"input_ids": IDS, "labels": st.integers(-100, 300)}))


@given(ROWS, st.integers(1, 4), st.slices(7))
def test_what_went_in_comes_out(rows: Any, chunk: int, part: slice) -> None:
    """Whatever the chunks, the types and the slice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "CHUNK", chunk)
        made = Packed.of(rows, list)
    assert list(made) == rows and len(made) == len(rows)
    assert list(made[part]) == rows[part]
    assert [type(r["labels"]) for r in made] == [int] * len(rows)
    assert made[part].lengths("input_ids") == [len(r["input_ids"]) for r in rows[part]]
    assert list(copy.deepcopy(made)) == rows
    if rows:
        assert made[-1] == rows[-1]
    with pytest.raises(IndexError):
        made[len(rows)]


def test_numbers_stay_numbers_and_masks_take_a_byte() -> None:
    rows = [{"input_ids": [30521] * 128, "attention_mask": [1] * 128, "labels": i / 4}
            for i in range(50)]  # fmt: skip
    made = Packed.of(rows, list)
    assert [row["labels"] for row in made] == [i / 4 for i in range(50)]
    tokens = 50 * 128
    assert made.nbytes <= 3 * tokens + 50 * 8 + 2 * 51 * 8
    assert made[::2].nbytes == made.nbytes and made[::2]._columns is made._columns  # shared
