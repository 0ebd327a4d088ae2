"""Thresholds and masks by rank."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data, floats, integers, lists, one_of, sampled_from
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.ops import selection
from holdfast.ops.selection import select, threshold, top


def test_threshold_is_of_rank_n_times_one_minus_p_rounded_up() -> None:
    scores = torch.tensor([7.0, 1.0, 5.0, 3.0, 9.0])
    # n(1 − p) = 5·0.7 = 3.5 → 4th from the top; 5·0.5 = 2.5 → 3rd; 5·0.9 = 4.5 → 5th
    assert threshold(scores, 0.3) == 3.0
    assert threshold(scores, 0.5) == 5.0
    assert threshold(scores, 0.1) == 1.0
    assert threshold(scores, 0.99) == 9.0
    assert threshold(scores[:1], 0.5) == 7.0


@pytest.mark.parametrize(("drop", "kept"), [(0.7, 3), (0.9, 1), (0.6, 4), (0.3, 7)])
def test_a_decimal_share_is_meant_as_it_is_written(drop: float, kept: int) -> None:
    """In binary 10 · (1 − .7) is a little more than 3, and a fourth entry would be kept."""
    assert select({"a": torch.arange(10.0)}, drop)["a"].sum() == kept


def test_ties_and_zeros_are_all_kept() -> None:
    assert select({"a": torch.zeros(4, 3)}, 0.9)["a"].all()
    mask = select({"a": torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])}, 0.6)["a"]
    assert mask.tolist() == [True, True, True, True, False]


def test_global_selection_ranks_all_tensors_together() -> None:
    scores = {"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    each, all_ = select(scores, 0.5), select(scores, 0.5, "global")
    assert [m.tolist() for m in each.values()] == [[True, False], [False, False, True, True]]
    assert [m.tolist() for m in all_.values()] == [[True, True], [False, False, False, True]]


# --- against a sort -------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, 1.0, -1.0]


@pytest.fixture(params=["partition", "sample", "digits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to a threshold: all scores; those around it by samples so small that many fail;
    digits in pieces that do not divide the scores evenly."""
    if request.param == "digits":
        monkeypatch.setattr(selection, "COPIED", 0)
    if request.param == "sample":
        monkeypatch.setattr(selection, "SAMPLE", 2)
    monkeypatch.setattr(selection, "CHUNK", 7)


def by_sort(scores: Tensor, drop: float) -> Tensor:
    """The entry of rank ⌈n (1 − drop)⌉ of a descending sort."""
    rank = min(max(math.ceil(len(scores) * (1 - Fraction(str(drop)))), 1), len(scores))
    return scores.sort(descending=True).values[rank - 1]


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data())
def test_thresholds_are_those_of_a_sort(draw: Any) -> None:
    """Ties, zeros of both signs, denormals, infinities, any sign; float32 and float64."""
    dtype = draw.draw(sampled_from([torch.float32, torch.float64]))
    width = 32 if dtype == torch.float32 else 64
    number = one_of(sampled_from(SPECIAL), floats(allow_nan=False, width=width))
    values = draw.draw(lists(number, min_size=1, max_size=40))
    scores = torch.tensor(values, dtype=dtype)
    drop = draw.draw(floats(0, 1, exclude_min=True, exclude_max=True))
    assert threshold(scores, drop) == by_sort(scores, drop)
    assert torch.equal(select({"a": scores}, drop)["a"], scores >= by_sort(scores, drop))
    cut = draw.draw(integers(0, len(values)))
    parts = {"a": scores[:cut], "b": scores[cut:].double()}  # one may be empty, the other wider
    masks = select(parts, drop, "global")
    joined = torch.cat([masks["a"], masks["b"]])
    assert torch.equal(joined, scores >= by_sort(scores, drop))


@pytest.mark.parametrize("drop", [0.001, 0.3, 0.999])
def test_a_sample_encloses_the_threshold_and_leaves_the_scores_as_they_are(drop: float) -> None:
    """Also where columns differ and their number divides the sample's step: a sample of some of
    them would miss. Few scores are near the threshold, so that few are looked at twice."""
    torch.manual_seed(0)
    scores = torch.rand(1024, 64) * torch.arange(1, 65)
    given, rank = scores.clone(), math.floor(drop * scores.numel()) + 1
    near, place = selection._around(scores.flatten().numpy(), rank, row=64)
    assert len(near) < 0.1 * scores.numel() and 0 < place <= len(near)
    assert threshold(scores, drop) == scores.flatten().sort().values[rank - 1]
    assert torch.equal(scores, given)


def test_where_a_sample_does_not_enclose_the_threshold_all_scores_are_looked_at() -> None:
    scores = torch.zeros(1 << 16)
    scores[:: (1 << 16) // selection.SAMPLE] = 1.0  # what is sampled is alike, and the rest not
    scores[1] = -1.0
    assert threshold(scores, 0.5) == 0.0 and threshold(scores, 1e-5) == -1.0
    with_none = {"none": scores[:0], "all": scores}
    assert torch.equal(select(with_none, 0.5, "global")["all"], scores >= 0)


def firsts(scores: list[Tensor], share: float) -> list[Tensor]:
    """The first ⌈n · share⌉ entries of a stable sort from the largest, as one mask per tensor."""
    values = torch.cat([s.flatten() for s in scores]).tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[: math.ceil(len(values) * Fraction(str(share)))]] = True
    pieces = mask.split([s.numel() for s in scores])
    return [m.view(s.shape) for m, s in zip(pieces, scores, strict=True)]


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data())
def test_the_top_is_exactly_the_share_of_a_stable_sort(draw: Any) -> None:
    """⌈n · share⌉ of them, whatever ties; in one tensor, and in several ranked together."""
    number = one_of(sampled_from(SPECIAL), floats(allow_nan=False, width=32))
    values = draw.draw(lists(number, min_size=2, max_size=40))
    share = draw.draw(one_of(sampled_from([0.1, 0.29, 0.5, 0.9, 1.0]),
                             floats(0.001, 1.0)))  # fmt: skip
    cut = draw.draw(integers(1, len(values) - 1))
    parts = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])[:, None]}
    for name, mask in top(parts, share).items():
        assert torch.equal(mask, firsts([parts[name]], share)[0])
    together = top(parts, share, "global").values()
    expected = firsts([*parts.values()], share)
    assert all(torch.equal(m, e) for m, e in zip(together, expected, strict=True))


def test_the_top_of_a_scalar_and_of_a_transposed_tensor() -> None:
    scalar = {"a": torch.tensor(2.0), "b": torch.tensor(2.0)}
    assert [m.item() for m in top(scalar, 0.5, "global").values()] == [True, False]
    ones = torch.ones(2, 3).T
    assert top({"a": ones}, 0.5)["a"].tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_tensor_without_entries_keeps_none_and_hinders_none(scope: Any) -> None:
    scores = {"none": torch.empty(0, 4), "some": torch.tensor([1.0, 3.0, 2.0])}
    for way in (select, top):
        masks = way(scores, 0.5, scope)
        assert masks["none"].shape == (0, 4) and masks["some"].tolist() == [False, True, True]
        assert way({"none": scores["none"]}, 0.5, scope)["none"].shape == (0, 4)


@pytest.mark.usefixtures("way")
def test_scores_keep_their_shape_and_layout() -> None:
    scores = torch.arange(24.0).reshape(4, 6).T  # not contiguous
    assert torch.equal(select({"a": scores}, 0.5)["a"], scores >= 12)
    assert threshold(scores, 0.5) == 12
    assert torch.equal(scores, torch.arange(24.0).reshape(4, 6).T)  # and their order
    narrow = scores[:, :3].bfloat16()  # of which numpy knows nothing
    assert threshold(narrow, 0.5) == by_sort(narrow.flatten(), 0.5)


def test_digits_take_memory_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 4 MB of scores no tensor of more than one piece is made."""
    monkeypatch.setattr(selection, "COPIED", 0)
    monkeypatch.setattr(selection, "CHUNK", 1 << 14)
    scores = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != scores.data_ptr():
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Sizes():
        found = threshold(scores, 0.3)
    assert found == by_sort(scores, 0.3)
    assert 0 < largest <= 8 << 16  # the 65,536 counts, and pieces of 16,384
