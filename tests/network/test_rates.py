"""Multipliers: the published mapping, interpolation in closed form, and the optimizer's groups."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.errors import Refused
from holdfast.files import read_yaml
from holdfast.network.groups import param_groups
from holdfast.network.parts import Parts, parts
from holdfast.network.rates import PRESETS, Piece, Rates, plot

TEN = [2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 23.0, 29.0]


def stack(n: int) -> Parts:
    """Parts of a network of n layers, without the network."""
    depth = {"embeddings": 0.0, **{f"layer.{i}": (i + 0.5) / n for i in range(n)}, "head": 1.0}
    return Parts({part: part for part in depth}, tuple(depth), depth)


def over(rates: Rates, n: int) -> list[float]:
    """The multipliers of n layers."""
    return list(rates.of(stack(n)).values())[1:-1]


# --- the mapping -----------------------------------------------------------------------------


def test_published_grouping_of_twelve_layers() -> None:
    found = Rates.from_list(TEN, layers=12).of(stack(12))
    assert list(found.values()) == [2, 3, 3, 5, 7, 7, 11, 13, 13, 17, 19, 19, 23, 29]
    assert list(Rates.bertcl().of(stack(12)).values()) == [
        1, 1, 1, 0.3, 0.7, 0.7, 1, 1, 1, 1, 1, 1, 1, 3,
    ]  # fmt: skip


def test_six_layers_lie_half_way_between_pairs_of_twelve() -> None:
    # Layer i of 6 is at (i + ½)/6, midway between layers 2i and 2i + 1 of 12.
    twelve = over(Rates.from_list(TEN, layers=12), 12)
    six = over(Rates.from_list(TEN, layers=12), 6)
    expected = [math.sqrt(twelve[2 * i] * twelve[2 * i + 1]) for i in range(6)]
    assert six == pytest.approx(expected, rel=1e-12)
    assert six[1] == pytest.approx(math.sqrt(35))


def test_interpolation_in_closed_form() -> None:
    two = Rates.from_list([9, 1, 16, 9])  # points at ¼ and ¾
    assert two.at(0.0) == two.at(0.25) == 1
    assert two.at(1.0) == two.at(0.75) == 16
    assert two.at(0.5) == pytest.approx(4)
    assert two.at(0.375) == pytest.approx(2)
    assert over(two, 4) == pytest.approx([1, 2, 8, 16])


def test_curve_without_a_depth_and_curve_of_few_layers_interpolate_directly() -> None:
    free, few = Rates.from_list(TEN), Rates.from_list(TEN, layers=6)
    assert over(free, 8) == over(few, 8) == TEN[1:-1]
    assert over(free, 13) == over(few, 13)
    assert over(Rates.from_list(TEN, layers=8), 8) == TEN[1:-1]


def test_zero_points_take_the_nearer_value() -> None:
    rates = Rates.from_list([1, 0, 4, 1])
    assert [rates.at(d) for d in (0.25, 0.49, 0.5, 0.75)] == [0, 0, 4, 4]
    assert over(Rates.from_list([1, 0, 0, 1]), 5) == [0] * 5


def test_layer_decay() -> None:
    found = Rates.layer_decay(0.5, layers=3).of(stack(3))
    assert list(found.values()) == [0.5**4, 0.5**3, 0.5**2, 0.5, 1]
    twelve = Rates.layer_decay().of(stack(12))
    assert twelve["embeddings"] == pytest.approx(0.9**13)
    assert twelve["layer.11"] == pytest.approx(0.9)
    # On another depth the same curve: the slope in log m over relative depth stays 12·log 0.9.
    six = over(Rates.layer_decay(), 6)
    assert six[3] / six[2] == pytest.approx(0.9**-2)


def test_freeze_below() -> None:
    found = Rates.bertcl().freeze(below=0.5).of(stack(12))
    assert [found[f"layer.{i}"] for i in range(12)] == [0] * 6 + [1] * 6
    assert found["embeddings"] == 0 and found["head"] == 3
    probe = Rates.flat().freeze(below=1.0).of(stack(4))
    assert [part for part, m in probe.items() if m] == ["head"]
    assert Rates.bertcl().freeze(below=0.0) == Rates.bertcl()


def test_encoder_decoder_is_one_curve() -> None:
    depth = {"embeddings": 0.0, "encoder.layer.0": 0.25, "decoder.layer.0": 0.75, "head": 1.0}
    both = Parts({part: part for part in depth}, tuple(depth), depth)
    assert list(Rates.from_list([2, 3, 5, 7]).of(both).values()) == [2, 3, 5, 7]


def test_published_averages_are_relative_to_their_geometric_mean() -> None:
    averaged = Rates.bertcl_averaged()
    assert averaged.geometric_mean == pytest.approx(1)
    assert averaged.geometric_mean_rate == pytest.approx(3.0e-6, rel=0.02)
    rates = [averaged.geometric_mean_rate * m for m in averaged.multipliers]
    assert rates[0] == pytest.approx(3.295e-6)
    assert rates[2] == pytest.approx(0.921e-6)
    assert rates[-1] == pytest.approx(11.188e-6)
    assert Rates.bertcl().geometric_mean == pytest.approx((0.3 * 0.7 * 3) ** 0.1)
    assert Rates.bertcl().geometric_mean_rate == pytest.approx(1.9e-5, rel=0.01)


def test_normalised_keeps_the_shape() -> None:
    rates = Rates.from_list([0, 2, 8, 4], layers=2, name="x").freeze(below=0.3)
    shape = rates.normalised()
    assert shape.multipliers == pytest.approx([0, 0.5, 2, 1])
    assert (shape.layers, shape.freeze_below, shape.name) == (2, 0.3, "x")
    with pytest.raises(Refused, match="all multipliers are 0"):
        Rates.from_list([0, 0, 0]).normalised()


multiplier = st.floats(1e-4, 1e4)
curves = st.builds(
    Rates.from_list,
    st.lists(multiplier, min_size=3, max_size=14),
    layers=st.none() | st.integers(1, 40),
)


@given(curves, st.integers(1, 40))
def test_between_neighbours(rates: Rates, n: int) -> None:
    for i, m in enumerate(over(rates, n)):
        values = rates._on_layers()
        place = (i + 0.5) / n * len(values) - 0.5
        last = len(values) - 1
        low = min(max(math.floor(place - 1e-9), 0), last)
        high = min(max(math.ceil(place + 1e-9), 0), last)
        assert min(values[low : high + 1]) <= m <= max(values[low : high + 1])


@given(st.lists(multiplier, min_size=3, max_size=14), st.integers(1, 40))
def test_exact_at_its_own_depth(multipliers: list[float], n: int) -> None:
    k = len(multipliers) - 2
    rates = Rates.from_list(multipliers, layers=n)
    if n >= k:
        assert over(rates, n) == [multipliers[1 + i * k // n] for i in range(n)]
    assert over(Rates.from_list(multipliers), k) == multipliers[1:-1]


@given(curves, st.floats(1e-3, 1e3), st.integers(1, 40))
def test_scaling_commutes_with_interpolation(rates: Rates, scale: float, n: int) -> None:
    scaled = Rates.from_list([scale * m for m in rates.multipliers], layers=rates.layers)
    assert over(scaled, n) == pytest.approx([scale * m for m in over(rates, n)], rel=1e-9)


@given(multiplier, st.integers(1, 12), st.none() | st.integers(1, 40), st.integers(1, 100))
def test_flat_stays_flat(m: float, k: int, layers: int | None, n: int) -> None:
    assert set(Rates.from_list([m] * (k + 2), layers=layers).of(stack(n)).values()) == {m}


# --- refusals and files ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, -1e-9, math.nan, math.inf, True, "1", None, [1], 1j, 10**400])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_multipliers_that_are_none_are_refused(bad: Any, place: int) -> None:
    values: list[Any] = [1.0, 1.0, 1.0]
    values[place] = bad
    with pytest.raises(Refused):
        Rates.from_list(values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rates(embeddings=1, points=(), head=1),
        lambda: Rates(embeddings=1, points="12", head=1),  # type: ignore[arg-type]
        lambda: Rates.from_list([1, 1]),
        lambda: Rates.from_list("123"),  # type: ignore[arg-type]
        lambda: Rates.from_list([1, 1, 1], layers=0),
        lambda: Rates.from_list([1, 1, 1], layers=True),
        lambda: Rates.from_list([1, 1, 1], layers=12.0),  # type: ignore[arg-type]
        lambda: Rates.from_list([1, 1, 1], geometric_mean_rate=-1),
        lambda: Rates.from_list([1, 1, 1], name=3),
        lambda: Rates.from_list([1, 1, 1], provenance=3),
        lambda: Rates.flat().freeze(below=1.1),
        lambda: Rates.flat().freeze(below=-0.1),
        lambda: Rates.layer_decay(-0.5),
        lambda: Rates.layer_decay(layers=0),
    ],
)
def test_bad_rates_are_refused(make: Any) -> None:
    with pytest.raises(Refused):
        make()


def test_numbers_of_numpy_become_floats(tmp_path: Path) -> None:
    rates = Rates.from_list([np.float32(0.5), np.float64(2), np.int64(3)])
    assert rates.multipliers == [0.5, 2, 3]
    assert {type(m) for m in rates.multipliers} == {float}
    rates.save(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_file(name: str, tmp_path: Path) -> None:
    rates = Rates.preset(name).freeze(below=0.25)
    assert rates.name == name
    rates.save(tmp_path / "r.yaml")
    assert Rates.load(tmp_path / "r.yaml") == rates
    assert hash(Rates.load(str(tmp_path / "r.yaml"))) == hash(rates)
    keys = "kind schema name multipliers layers freeze_below geometric_mean_rate provenance"
    assert list(read_yaml(tmp_path / "r.yaml")) == keys.split()


def test_unknown_preset() -> None:
    with pytest.raises(Refused, match="did you mean 'bertcl'"):
        Rates.preset("bertlc")


@settings(max_examples=50, deadline=None)
@given(curves)
def test_any_curve_survives_its_content(rates: Rates) -> None:
    assert Rates.from_dict(rates.to_dict()) == rates


HEADER = "kind: rates\nschema: 1\nmultipliers: [1, 1e-5, 3]\n"
PIECE = HEADER + "pieces:\n- {{task: {task}, at: {at}, multipliers: [1, 1, {last}]}}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: recipe\nschema: 1\nmultipliers: [1, 1, 1]", "holds 'recipe'"),
        ("kind: rates\nschema: 2\nmultipliers: [1, 1, 1]", "schema 2"),
        ("kind: rates\nschema: true\nmultipliers: [1, 1, 1]", "schema True"),
        ("kind: rates\nschema: 1", "missing key 'multipliers'"),
        (HEADER + "layer: 12", "did you mean 'layers'"),
        (HEADER + "kind: rates", "given twice"),
        (HEADER + "layers: '12'", "layers"),
        (HEADER + "freeze_below: 2", "freeze_below"),
        ("kind: rates\nschema: 1\nmultipliers: [1, -1, 1]", "point 0"),
        ("kind: rates\nschema: 1\nmultipliers: [1, '1e-5', 1]", "not a number"),
        ("kind: rates\nschema: 1\nmultipliers: {a: 1}", "expected a list"),
        (HEADER + "pieces: 3", "3 is no list"),
        (HEADER + "pieces: [1]", "1 is no piece"),
        (PIECE.format(task=0, at=0, last=1), "task 0"),
        (PIECE.format(task=1, at=1.0, last=1), "no share below 1"),
        (PIECE.format(task=1, at=-1, last=1), "at least 0"),
        (PIECE.format(task=1, at=0, last=0), "a multiplier of 0 would freeze"),
        (PIECE.format(task=1, at=0, last="1, 1"), "4 multipliers, the curve has 3"),
        (PIECE.format(task=1, at=0, last=1).replace("at:", "att:"), "did you mean 'at'"),
        (
            HEADER + "pieces:\n- {task: 1, at: 0.5, multipliers: [1, 1, 1]}\n"
            "- {task: 1, at: 0.5, multipliers: [1, 1, 1]}",
            "list them in order",
        ),
        (
            HEADER + "pieces:\n- {task: 2, at: 3, multipliers: [1, 1, 1]}\n"
            "- {task: 1, at: 0.5, multipliers: [1, 1, 1]}",
            "list them in order",
        ),
    ],
)
def test_bad_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(Refused, match=r"mine\.yaml") as error:
        Rates.load(path)
    assert says in str(error.value)


def test_a_file_somebody_typed(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HEADER)
    assert Rates.load(tmp_path / "r.yaml") == Rates.from_list([1, 1e-5, 3])


# --- pieces ------------------------------------------------------------------------------------

PIECES = (
    Piece(task=1, at=0.25, multipliers=(2.0, 3.0, 4.0)),
    Piece(task=1, at=5, multipliers=(5.0, 6.0, 7.0)),
    Piece(task=3, at=0.0, multipliers=(8.0, 9.0, 10.0)),
)


def test_the_piece_in_force_is_the_last_that_has_begun() -> None:
    curve = Rates.from_list([1.0, 1.0, 1.0], pieces=PIECES)

    def first(task: int, step: int, total: int = 10) -> float:
        now = curve.in_force(task, step, total)
        assert now.pieces == () and now.of(stack(3)).keys() == stack(3).depth.keys()
        return now.embeddings

    # a quarter of ten steps is rounded up: it holds from the fourth step on
    assert [first(1, step) for step in range(7)] == [1, 1, 1, 2, 2, 5, 5]
    assert first(1, 4, total=16) == 2 and first(1, 3, total=16) == 1
    assert [first(2, 0), first(2, 9), first(3, 0), first(4, 0)] == [5, 5, 8, 8]
    assert curve.in_force(1, 3, 10).multipliers == [2, 3, 4]


def test_pieces_survive_their_file_and_share_the_scale(tmp_path: Path) -> None:
    curve = Rates.from_list([2.0, 4.0, 8.0], layers=6, pieces=PIECES)
    curve.save(tmp_path / "r.yaml")
    assert Rates.load(tmp_path / "r.yaml") == curve
    assert isinstance(read_yaml(tmp_path / "r.yaml")["pieces"][1]["at"], int)
    half = curve.normalised()  # the geometric mean is 4: rates stay as they were at 4 times the lr
    assert half.multipliers == [0.5, 1.0, 2.0]
    assert half.pieces[0].multipliers == (0.5, 0.75, 1.0)


def test_rates_in_pieces_have_a_group_for_each_part() -> None:
    """Parts that are equal now may differ later: moments are saved by position in the groups."""
    net = Net()
    flat = Rates.from_list([1.0, 1.0, 1.0])
    plain = param_groups(net, flat, lr=0.1)
    pieces = param_groups(net, replace(flat, pieces=PIECES), lr=0.1)
    assert len(plain) < len(pieces)
    assert all(len(group["part_names"]) == 1 for group in pieces)


# --- groups ------------------------------------------------------------------------------------


class Net(nn.Module):
    """Embedding, two blocks, norm, and an output matrix tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.table.weight


def test_groups_by_name() -> None:
    net = Net()
    groups = param_groups(net, Rates.from_list([1, 2, 3, 4]), lr=0.1, weight_decay=0.01)
    found = {
        name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]
    }  # fmt: skip
    assert found == {
        "table.weight": (0.1, 0.01),
        "layers.0.0.weight": (0.2, 0.01), "layers.0.0.bias": (0.2, 0),
        "layers.0.1.weight": (0.2, 0), "layers.0.1.bias": (0.2, 0),
        "layers.1.0.weight": (pytest.approx(0.3), 0.01), "layers.1.0.bias": (pytest.approx(0.3), 0),
        "layers.1.1.weight": (pytest.approx(0.3), 0), "layers.1.1.bias": (pytest.approx(0.3), 0),
        "norm.weight": (0.4, 0), "norm.bias": (0.4, 0), "out.bias": (0.4, 0),
    }  # fmt: skip
    assert len(groups) == 6  # embeddings decayed, two layers twice, head not decayed
    named = dict(net.named_parameters())
    for group in groups:
        pairs = zip(group["param_names"], group["params"], strict=True)
        assert all(named[name] is parameter for name, parameter in pairs)
    assert [g["part_names"] for g in groups] == [
        ("embeddings",), ("layer.0",), ("layer.0",), ("layer.1",), ("layer.1",), ("head",),
    ]  # fmt: skip


def test_as_few_groups_as_rates() -> None:
    flat = param_groups(Net(), Rates.flat(), lr=0.1, weight_decay=0.01)
    assert [(len(g["params"]), g["weight_decay"]) for g in flat] == [(3, 0.01), (9, 0)]
    assert flat[1]["part_names"] == ("layer.0", "layer.1", "head")
    assert len(param_groups(Net(), Rates.flat(), lr=0.1)) == 1
    assert len(param_groups(Net(), Rates.bertcl(), lr=0.1)) == len(
        set(Rates.bertcl().of(parts(Net())).values())
    )


def test_frozen_parts_are_in_no_group_and_untouched() -> None:
    net = Net()
    groups = param_groups(net, Rates.flat().freeze(below=0.5), lr=0.1, weight_decay=0.1)
    names = [name for g in groups for name in g["param_names"]]
    upper = ("layers.1", "norm", "out")
    assert names == [n for n, _ in net.named_parameters() if n.startswith(upper)]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    still = {n for n, p in net.named_parameters() if torch.equal(p, before[n])}
    assert still == set(before) - set(names)


def test_frozen_parts_get_no_gradient_until_rates_train_them() -> None:
    """Or they would hold gradients that no zero_grad() of the optimizer ever clears."""
    net = Net()
    net.norm.requires_grad_(False)  # by hand: not ours to turn on
    net.layers[0](net.table(torch.arange(3))).sum().backward()
    groups = param_groups(net, Rates.flat().freeze(below=0.5), lr=0.1)
    held = {id(p) for g in groups for p in g["params"]}
    assert all(p.requires_grad is (id(p) in held) for p in net.parameters())
    optimizer = torch.optim.SGD(groups)
    net.out(net.layers[1](net.layers[0](net.table(torch.arange(3))))).sum().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(Refused, match="no parameter is left"):
        param_groups(net, Rates.from_list([0, 0, 0]), lr=0.1)
    assert all(p.requires_grad is (id(p) in held) for p in net.parameters())
    again = param_groups(net, Rates.flat(), lr=0.1)
    trained = {id(p) for g in again for p in g["params"]}
    assert trained == {id(p) for n, p in net.named_parameters() if not n.startswith("norm")}
    assert all(p.requires_grad is (id(p) in trained) for p in net.parameters())


def test_a_copy_of_a_frozen_network_is_freed_as_the_network_is() -> None:
    net = Net()
    param_groups(net, Rates.flat().freeze(below=0.5), lr=0.1)
    for one in (copy.deepcopy(net), net):
        groups = param_groups(one, Rates.flat(), lr=0.1)
        assert sum(len(g["params"]) for g in groups) == len(list(one.parameters()))
        assert all(p.requires_grad for p in one.parameters())


def test_parameters_without_gradient_are_left_out() -> None:
    net = Net()
    net.layers[0].requires_grad_(False)
    names = {n for g in param_groups(net, Rates.flat(), lr=0.1) for n in g["param_names"]}
    assert names == {n for n, p in net.named_parameters() if p.requires_grad}


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(Refused, match="no parameter is left"):
        param_groups(Net(), Rates.from_list([0, 0, 0]), lr=0.1)
    with pytest.raises(Refused, match="no parameter is left"):
        param_groups(nn.ReLU(), Rates.flat(), lr=0.1)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, True, "1e-5", None])
def test_bad_rates_of_the_optimizer_are_refused(bad: Any) -> None:
    with pytest.raises(Refused, match="lr"):
        param_groups(Net(), Rates.flat(), lr=bad)
    with pytest.raises(Refused, match="weight_decay"):
        param_groups(Net(), Rates.flat(), lr=1, weight_decay=bad)


def test_which_parameters_are_not_decayed() -> None:
    class RMS(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    class MyNorm(RMS): ...

    class NormedBlock(nn.Module):  # called a norm, but the matrix below it is not one
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.square = nn.Parameter(torch.ones(4, 4))

    net = nn.ModuleDict({
        "plain": RMS(), "norm": MyNorm(), "block": NormedBlock(), "rnn": nn.GRU(4, 4),
        "relative_attention_bias": nn.Embedding(4, 2), "batch": nn.BatchNorm1d(4),
        "attention": nn.MultiheadAttention(4, 2),
    })  # fmt: skip
    groups = param_groups(net, Rates.flat(), lr=1, weight_decay=0.5)
    spared = {n for g in groups if g["weight_decay"] == 0 for n in g["param_names"]}
    assert spared == {
        "norm.scale", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "batch.weight", "batch.bias",
        "attention.in_proj_bias", "attention.out_proj.bias",
    }  # fmt: skip
    groups = param_groups(net, Rates.flat(), lr=1, weight_decay=0.5, no_decay=["rnn.*"])
    spared = {n for g in groups if g["weight_decay"] == 0 for n in g["param_names"]}
    assert spared == {n for n, _ in net.named_parameters() if n.startswith("rnn.")}
    assert len(param_groups(net, Rates.flat(), lr=1, weight_decay=0.5, no_decay=[])) == 1
    with pytest.raises(Refused, match="no parameter matches"):
        param_groups(net, Rates.flat(), lr=1, no_decay=["*.bias_"])
    with pytest.raises(Refused, match="one text"):
        param_groups(net, Rates.flat(), lr=1, no_decay="*.bias")


def test_parts_of_another_model_are_refused() -> None:
    with pytest.raises(Refused, match="in no part"):
        param_groups(Net(), Rates.flat(), lr=1, parts=parts(nn.Linear(2, 2)))


def test_order_of_registration_does_not_change_a_rate() -> None:
    class Shuffled(nn.Module):
        def __init__(self, order: list[int]) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.layers = nn.ModuleList()
            self.blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)]
            for block in self.blocks:  # the same block, its modules registered in another order
                pieces = dict(zip("ab", block, strict=True))
                inner = nn.Module()
                for i in order:
                    inner.add_module("ab"[i], pieces["ab"[i]])
                self.layers.append(inner)

    found = []
    for order in ([0, 1], [1, 0]):
        groups = param_groups(Shuffled(order), Rates.bertcl(), lr=1e-3, weight_decay=0.1)
        found.append({
            n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]
        })  # fmt: skip
    assert found[0] == found[1]


def test_an_optimizer_takes_the_groups() -> None:
    optimizer = torch.optim.AdamW(param_groups(Net(), Rates.bertcl(), lr=2e-5), fused=True)
    head = next(g for g in optimizer.param_groups if "out.bias" in g["param_names"])
    assert head["lr"] == pytest.approx(6e-5)
    assert optimizer.state_dict()["param_groups"][0]["part_names"]


def test_plot(tmp_path: Path) -> None:
    plot(Rates.bertcl(), tmp_path / "a.png")
    plot(Rates.bertcl().freeze(below=0.5), tmp_path / "b.png", stack(12))
    plot(Rates.from_list([0, 0, 0]), tmp_path / "c.svg")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert "frozen" not in (tmp_path / "a.png").name and (tmp_path / "c.svg").stat().st_size
    with pytest.raises(Refused, match="nonsense"):
        plot(Rates.flat(), tmp_path / "a.nonsense")
