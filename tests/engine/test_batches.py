"""Rows are told apart by all of their content, and by nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.engine.batches import identities
from holdfast.errors import Refused

ROWS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8)


def padded(rows: list[list[int]], *, left: bool = False, more: int = 0) -> dict[str, Tensor]:
    """Token lists as a tokenizer's collator makes a batch of them."""
    width = max(map(len, rows)) + more

    def fill(values: list[int], pad: int) -> list[int]:
        padding = [pad] * (width - len(values))
        return padding + values if left else values + padding

    return {
        "input_ids": torch.tensor([fill(r, 0) for r in rows]),
        "token_type_ids": torch.tensor([fill([t % 2 for t in r], 0) for r in rows]),
        "attention_mask": torch.tensor([fill([1] * len(r), 0) for r in rows]),
    }


@given(ROWS)
def test_two_rows_have_one_number_where_they_are_equal_and_only_there(
    rows: list[list[int]],
) -> None:
    """The pad token is a token as well: [3] and [3, 0] are two rows."""
    found = identities(padded(rows)).tolist()
    assert [found.index(n) for n in found] == [rows.index(r) for r in rows]


@given(ROWS, st.randoms(use_true_random=False))
def test_a_row_has_its_number_in_any_batch(rows: list[list[int]], random: Any) -> None:
    found = identities(padded(rows))
    order = random.sample(range(len(rows)), len(rows))
    assert torch.equal(identities(padded([rows[i] for i in order])), found[order])
    alone = torch.cat([identities(padded([r])) for r in rows])
    assert torch.equal(alone, found)  # without its neighbours' padding
    assert torch.equal(identities(padded(rows, left=True, more=3)), found)
    labelled = padded(rows) | {"labels": torch.arange(len(rows)), "text": rows}
    assert torch.equal(identities(labelled), found)
    batch = padded(rows)
    assert torch.equal(identities(dict(reversed(batch.items()))), found)
    batch["attention_mask"] = batch["attention_mask"].bool()
    assert torch.equal(identities(batch), found)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.data())
def test_any_changed_token_and_any_other_order_changes_it(row: list[int], data: Any) -> None:
    before = identities(padded([row])).item()
    place = data.draw(st.integers(0, len(row) - 1))
    changed = row.copy()
    changed[place] += data.draw(st.sampled_from([1, 2, 4, 2**31, 2**40]))
    assert identities(padded([changed])).item() != before
    other = data.draw(st.permutations(row))
    assert (identities(padded([other])).item() == before) == (other == row)


def test_no_two_of_many_short_rows_are_taken_for_one() -> None:
    """All words of two letters on 16 bits, and sparse rows of long texts."""
    pairs = torch.cartesian_prod(torch.arange(400), torch.arange(400))
    assert len(identities({"input_ids": pairs}).unique()) == len(pairs)
    long = torch.cat([torch.eye(2048, dtype=torch.long) * k for k in (1, 2**20, 2**62)])
    assert len(identities({"input_ids": long}).unique()) == len(long)


def test_every_input_counts_under_its_own_name() -> None:
    a, b = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
    mask = torch.ones(1, 2)
    alike = [
        {"input_ids": a, "token_type_ids": b, "attention_mask": mask},
        {"input_ids": b, "token_type_ids": a, "attention_mask": mask},
        {"input_ids": a, "attention_mask": mask},
        {"tpuni_ids": a, "attention_mask": mask},  # the same letters
        {"input_ids": torch.tensor([[1, 3]]), "attention_mask": mask},
    ]
    assert len({identities(batch).item() for batch in alike}) == len(alike)


def test_numbers_and_pictures_count_to_the_last_bit() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(3, 2, 4, 4)
    found = identities({"pixel_values": pixels})
    assert len(found.unique()) == 3
    changed = pixels.clone()
    changed[1, 1, 3, 3] = torch.nextafter(changed[1, 1, 3, 3], torch.tensor(9.0))
    assert (identities({"pixel_values": changed}) == found).tolist() == [True, False, True]
    assert torch.equal(identities({"pixel_values": pixels.bfloat16()}),
                       identities({"pixel_values": pixels.bfloat16().float()}))  # fmt: skip


def test_padding_is_left_out_of_vectors_a_token_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = identities({"inputs_embeds": x, "attention_mask": mask})
    alone = identities({"inputs_embeds": x[1:, :2], "attention_mask": mask[1:, :2]})
    assert found[1] == alone[0]
    x[1, 2] += 1  # padding
    assert torch.equal(identities({"inputs_embeds": x, "attention_mask": mask}), found)
    x[0, 2] += 1
    assert identities({"inputs_embeds": x, "attention_mask": mask})[0] != found[0]


def test_what_is_no_row_is_left_out() -> None:
    batch = padded([[1, 2], [3]])
    more = {"num_items": torch.tensor(7), "name": "x"}
    assert torch.equal(identities(more | batch), identities(batch))
    assert torch.equal(identities(batch | {"grid": torch.ones(5)}), identities(batch))
    with pytest.raises(Refused, match="no inputs by name"):
        identities({"labels": torch.tensor([1, 2])})
