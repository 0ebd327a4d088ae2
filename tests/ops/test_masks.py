"""Masks in bits and as NaN, against the plain way of applying them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdfast.ops import blocks
from holdfast.ops.masks import hold_, mark_, pack, unpack, zero_

SHAPES = [(), (5,), (1, 8), (3, 7), (4, 8), (5, 17), (2, 3, 9), (0, 4), (700, 900)]
TYPES = [torch.float32, torch.float64, torch.bfloat16]


def bits_of(t: Tensor) -> Tensor:
    """The bit patterns: −0 is not 0, NaN is itself."""
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights that left the values to hold, which are those, and what may move."""
    torch.manual_seed(0)
    held = torch.randn(shape)
    held = torch.where(torch.rand(shape) < 0.1, -torch.zeros(()), held).to(dtype)
    w = torch.where(torch.rand(shape) < 0.1, torch.zeros(()), held.float() + 1e-3).to(dtype)
    return w, held, torch.rand(shape) < 0.6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_unpacked_to_what_was_packed(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    bits = pack(mask)
    assert bits.dtype is torch.uint8 and torch.equal(unpack(bits, mask.shape), mask)
    if len(shape) > 1:
        assert bits.shape == (*shape[:-1], -(-shape[-1] // 8))


def test_order_of_bits() -> None:
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 9] = True
    assert pack(mask).tolist() == [[1 + 8, 0], [0, 2]]


def test_rows_of_the_bits_are_the_bits_of_the_rows() -> None:
    """Blocks and shards cut both alike, also where a row is no whole number of bytes."""
    mask = torch.rand(6, 13) < 0.5
    assert torch.equal(pack(mask)[2:5], pack(mask[2:5]))
    assert torch.equal(unpack(pack(mask)[2:5], mask[2:5].shape), mask[2:5])
    assert torch.equal(pack(mask.t().contiguous().t()), pack(mask))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_held_entries_come_back_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, packed: bool
) -> None:
    w, start, moves = case(shape, dtype)
    expected = torch.where(moves, bits_of(w), bits_of(start))
    held = start.to(torch.promote_types(dtype, torch.float32))
    if not packed:
        mark_(held, moves)
        assert torch.equal(held.isnan(), moves)
        assert torch.equal(bits_of(held.to(dtype))[~moves], bits_of(start)[~moves])
    hold_({"w": w}, {"w": held}, {"w": pack(moves)} if packed else None)
    assert torch.equal(bits_of(w), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_held_entries_are_zeroed(
    shape: tuple[int, ...], dtype: torch.dtype, packed: bool
) -> None:
    _, start, moves = case(shape, dtype)
    grad = torch.randn(shape).to(dtype)
    expected = torch.where(moves, grad, torch.zeros((), dtype=dtype))
    held = start.to(torch.promote_types(dtype, torch.float32))
    if not packed:
        mark_(held, moves)
    zero_({"w": grad}, {"w": held}, {"w": pack(moves)} if packed else None)
    assert torch.equal(grad, expected) and grad.dtype is dtype


def test_any_nan_marks_and_a_weight_gone_astray_is_still_held() -> None:
    held = torch.tensor([2.0, float("nan"), -float("nan"), 3.0])
    w = torch.tensor([float("nan"), 5.0, 6.0, float("inf")])
    hold_({"w": w}, {"w": held})
    assert w.tolist() == [2, 5, 6, 3]


def test_transposed_weights_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 10)
    w, held, moves = case((9, 16), torch.float32)
    expected = torch.where(moves, w, held)
    turned = w.t().contiguous().t()
    hold_({"w": turned}, {"w": held}, {"w": pack(moves)})
    assert torch.equal(turned, expected)


def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 10)
    for rows, columns in ((50, 3), (7, 40), (100, 1)):
        one, two = torch.zeros(rows, columns), torch.arange(rows)
        seen = []
        for a, b in blocks.blocks(one, two):
            assert len(a) == len(b) and (a.numel() <= 10 or len(a) == 1)
            a += 1
            seen += b.tolist()
        assert one.eq(1).all() and seen == list(range(rows))
    scalar = torch.zeros(())
    assert [t.shape for (t,) in blocks.blocks(scalar)] == [()]


def test_rooms_serve_training_wherever_they_were_asked_for_first() -> None:
    blocks._kept.__dict__.clear()
    with torch.inference_mode(), torch.device("meta"):
        blocks.workspace(0, [6], torch.float32, torch.device("cpu"))
    blocks.workspace(0, [6], torch.float32, torch.device("cpu")).fill_(1)


def test_rooms_are_kept_apart_by_place_and_type() -> None:
    def ask(place: int, dtype: torch.dtype, count: int = 6) -> Tensor:
        return blocks.workspace(place, [count], dtype, torch.device("cpu"))

    first = ask(0, torch.float32).fill_(1)
    ask(1, torch.float32).fill_(2)
    ask(0, torch.int32).fill_(3)
    assert first.eq(1).all()
    assert ask(0, torch.float32, 4).data_ptr() == first.data_ptr()
    assert ask(0, torch.float32, 4 * blocks.SIZE + 1).data_ptr() != first.data_ptr()
