"""Sums of inputs in each structure: what they keep, what they solve, what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layered import whole

from holdfast.ops.moments import Blocks, LowRank, Moment


def test_sums_in_strips_are_the_product() -> None:
    torch.manual_seed(0)
    pieces = torch.randn(90, 203).split(40)
    for width in (None, 101, 70):
        ours = Blocks.empty(203, width, torch.device("cpu"))
        for x in pieces:
            ours.see_(x)
        ours.close_()
        x = torch.cat(pieces).double()
        expected = x.T @ x
        size = ours.matrix.shape[-1]
        block = torch.arange(203) // size
        expected = expected * (block[:, None] == block)
        torch.testing.assert_close(whole(ours), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(ours.matrix, ours.matrix.mT)


def test_low_rank_is_the_best_of_its_rank_and_a_diagonal() -> None:
    torch.manual_seed(0)
    for n, d, rank in ((40, 12, 5), (9, 30, 4)):
        x = torch.randn(n, d).double() @ torch.diag(2.0 ** -torch.arange(d)).double()
        ours = LowRank.empty(d, rank, torch.device("cpu"))
        ours.see_(x)  # at once
        _, s, vt = torch.linalg.svd(x)
        best = vt[:rank].T @ torch.diag(s[:rank] ** 2) @ vt[:rank]
        kept = ours.factor.double()
        torch.testing.assert_close(kept.T @ kept, best, rtol=1e-4, atol=1e-4)
        assert ours.factor.shape == (rank, d)
        torch.testing.assert_close(whole(ours).diagonal(), (x.T @ x).diagonal(), rtol=1e-4,
                                   atol=1e-6)  # fmt: skip


def test_low_rank_of_many_pieces_keeps_the_diagonal_and_less_than_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(700, 90)
    ours = LowRank.empty(90, 16, torch.device("cpu"))
    for piece in x.split(100):
        ours.see_(piece)
    total = x.double().T @ x.double()
    torch.testing.assert_close(whole(ours).diagonal(), total.diagonal(), rtol=1e-4, atol=1e-3)
    factor = ours.factor.double()
    lowest = torch.linalg.eigvalsh(total - factor.T @ factor)[0]
    assert lowest > -1e-3 * total.diagonal().mean()  # FᵀF ≤ G


def test_low_rank_of_enough_rank_is_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    ours, theirs = LowRank.empty(6, 6, torch.device("cpu")), LowRank.empty(6, 9, x.device)
    for piece in x.split(7):
        ours.see_(piece)
        theirs.see_(piece)
    for moment in (ours, theirs):
        expected = x.double().T @ x.double()
        torch.testing.assert_close(whole(moment), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("d", [11, 600])  # solved in double, and in the sums' own precision
@pytest.mark.parametrize("outputs", [3, 700])  # fewer than inputs, and more
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_kept_solves_the_equation(d: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    new, old, delta = torch.randn(2 * d, d), torch.randn(2 * d, d), torch.randn(outputs, d)
    if not bias:
        delta[:, -1] = 0
    moments = []
    for x in (new, old):
        blocks = Blocks.empty(d, None, torch.device("cpu"))
        low = LowRank.empty(d, d, torch.device("cpu"))
        for m in (blocks, low):
            m.see_(x)
            m.close_()
        moments.append((blocks, low))
    g, h = (x.double().T @ x.double() for x in (new, old))
    end = d if bias else d - 1
    g, h, delta_ = g[:end, :end], h[:end, :end], delta.double()[:, :end]
    both = g + 3.0 * h
    both = both + 1e-3 * both.diagonal().mean() * torch.eye(end)
    expected = torch.linalg.solve(both, (delta_ @ g).T).T
    for mine, theirs in zip(*moments, strict=True):
        kept = mine.shrunk(delta, theirs, 3.0, 1e-3, bias=bias)
        torch.testing.assert_close(kept.double()[:, :end], expected, rtol=1e-3, atol=1e-4)
        if not bias:
            assert not kept[:, -1].any()


@pytest.mark.parametrize("kind", [Blocks, LowRank])
def test_where_no_task_has_inputs_nothing_is_kept(kind: Any) -> None:
    empty = [kind.empty(5, 2, torch.device("cpu")) for _ in range(2)]
    kept = empty[0].shrunk(torch.ones(2, 5), empty[1], 1.0, 1e-4)
    assert torch.equal(kept, torch.zeros(2, 5))


def test_a_sum_that_rounding_made_indefinite_is_solved_nevertheless() -> None:
    x = torch.ones(1, 6)
    moment, none = (Blocks.empty(6, None, torch.device("cpu")) for _ in range(2))
    moment.see_(x)
    moment.matrix[0, 0, 0] -= 1e-6  # an eigenvalue of about −1e-6 / 6
    kept = moment.shrunk(x, none, 1.0, 1e-12)
    torch.testing.assert_close(kept @ x.T, x @ x.T, rtol=1e-3, atol=0)
    assert kept.abs().max() < 10


# --- memory ---------------------------------------------------------------------------------------


def stored(moment: Moment) -> int:
    return sum(t.numel() * t.element_size() for t in moment.tensors().values())


def test_bytes_of_each_structure() -> None:
    meta = torch.device("meta")
    assert stored(Blocks.empty(4097, 4096, meta)) == 4 * 4097**2  # 4,096 inputs are not too wide
    wide = Blocks.empty(11009, 4096, meta)
    assert wide.matrix.shape == (3, 3670, 3670)
    assert stored(wide) / (4096 * 11008) < 3.6  # bytes per weight, and no matrix of 11,008²
    low = LowRank(torch.empty(256, 11009, device=meta), torch.empty(11009, device=meta), 256)
    assert stored(low) == 4 * 11009 * 257


def test_a_bert_costs_six_bytes_per_linear_weight() -> None:
    h = 384  # each layer: one input for query, key and value, of attention's output, up and down
    meta = torch.device("meta")
    sums = [Blocks.empty(d + 1, 4096, meta) for d in (h, h, h, 4 * h)]
    assert 6.2 < sum(map(stored, sums)) / (12 * h * h) < 6.5
