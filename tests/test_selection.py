"""Thresholds and masks by rank."""

from __future__ import annotations

import torch

from holdfast.selection import select, threshold


def test_threshold_is_of_rank_n_times_one_minus_p_rounded_up() -> None:
    scores = torch.tensor([7.0, 1.0, 5.0, 3.0, 9.0])
    # n(1 − p) = 5·0.7 = 3.5 → 4th from the top; 5·0.5 = 2.5 → 3rd; 5·0.9 = 4.5 → 5th
    assert threshold(scores, 0.3) == 3.0
    assert threshold(scores, 0.5) == 5.0
    assert threshold(scores, 0.1) == 1.0
    assert threshold(scores, 0.99) == 9.0
    assert threshold(scores[:1], 0.5) == 7.0


def test_ties_and_zeros_are_all_kept() -> None:
    assert select({"a": torch.zeros(4, 3)}, 0.9)["a"].all()
    mask = select({"a": torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])}, 0.6)["a"]
    assert mask.tolist() == [True, True, True, True, False]


def test_global_selection_ranks_all_tensors_together() -> None:
    scores = {"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    each, all_ = select(scores, 0.5), select(scores, 0.5, "global")
    assert [m.tolist() for m in each.values()] == [[True, False], [False, False, True, True]]
    assert [m.tolist() for m in all_.values()] == [[True, True], [False, False, False, True]]
