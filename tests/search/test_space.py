"""The space of a search: shape apart from scale, and settings that join."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fakes import plan
from hypothesis import given
from hypothesis import strategies as st

from holdfast import DPS, EWC, Rates, Recipe
from holdfast.engine.method import Method, Range
from holdfast.errors import Refused
from holdfast.methods import METHODS
from holdfast.search.space import RATE, Space, at_points, controls, flat_rates

FLAT = (1e-5, 1e-4, 1e-3)


def space(**more: Any) -> Space:
    return Space.of(**{"parts": 10, "layers": 12, "flat": FLAT, **more})


def drawn(of: Space, raw: list[float], rate: float = 1e-4, **tuned: float) -> dict[str, float]:
    return {RATE: rate, **dict(zip(of.shape, raw, strict=True)), **tuned}


RAW = [0.5, 1.0, 2.0, 4.0, 8.0, 0.25, 1.0, 1.0, 3.0, 0.1]


def test_the_dimensions_and_where_they_are_searched() -> None:
    found = space(tune=["dps.drop"]).ranges
    assert list(found) == ["rate", "x.embeddings", *(f"x.point.{j}" for j in range(1, 9)), "x.head",
                           "dps.drop"]  # fmt: skip
    assert found["rate"] == Range(0.5e-5, 2e-3, log=True)
    assert found["x.head"] == Range(0.1, 10.0, log=True)
    assert found["dps.drop"] == DPS.ranges["drop"]
    assert len(space(parts=3).ranges) == 4


@given(st.lists(st.floats(0.1, 10), min_size=10, max_size=10), st.floats(0.1, 10))
def test_a_common_factor_is_no_other_trial(raw: list[float], factor: float) -> None:
    """A curve may not win by a smaller overall step."""
    of = space()
    one, two = of.lr(drawn(of, raw)), of.lr(drawn(of, [factor * x for x in raw]))
    assert one == pytest.approx(two, rel=1e-9)
    assert math.exp(sum(map(math.log, one)) / 10) == pytest.approx(1e-4)


def test_the_base_rate_is_the_geometric_mean_and_the_shape_is_kept() -> None:
    of = space()
    params = drawn(of, RAW, rate=3e-4)
    rates = of.rates(params)
    assert rates.geometric_mean_rate == 3e-4
    assert [m / rates.multipliers[1] for m in rates.multipliers] == pytest.approx(RAW)
    assert rates.embeddings / rates.head == pytest.approx(5)
    assert of.lr(params) == pytest.approx([3e-4 * m for m in rates.multipliers])
    assert rates.layers == 12


def test_a_tuned_method_joins_with_its_value_and_keeps_its_other_settings() -> None:
    of = space(tune=["ewc.strength", "dps.drop"])
    base = Recipe(methods=[EWC(strength=7.0, decay=0.6)], max_grad_norm=2.0)
    made = of.recipe(base, drawn(of, RAW, **{"ewc.strength": 50.0, "dps.drop": 0.2}), name="t")
    methods = {m.name: m for m in made.methods}
    assert methods["ewc"] == EWC(strength=50.0, decay=0.6)
    assert methods["dps"] == DPS(drop=0.2)
    assert made.max_grad_norm == 2.0 and made.name == "t" and base.methods[0].strength == 7.0


def test_whole_numbers_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counting(Method):
        name: ClassVar[str] = "counting"
        ranges: ClassVar[dict[str, Range]] = {"rows": Range(2, 9)}
        rows: int = 4

    monkeypatch.setitem(METHODS, "counting", Counting)
    of = space(tune=["counting.rows"])
    assert of.whole == {"counting.rows"}
    made = of.recipe(Recipe(), drawn(of, RAW, **{"counting.rows": 5.0}), name="t")
    assert made.methods[0] == Counting(rows=5) and isinstance(made.methods[0].rows, int)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("tune", "said"),
    [(["dps.dorp"], "did you mean 'dps.drop'"), (["ewc.strength"] * 2, "stands twice"),
     (["dps.mix"], "--tune")],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused(tune: list[str], said: str) -> None:
    with pytest.raises(Refused, match=said):
        space(tune=tune)


@pytest.mark.parametrize("parts", [2, 0, 103, True, 4.0])
def test_odd_numbers_of_parts_are_refused(parts: Any) -> None:
    with pytest.raises(Refused, match="--parts"):
        space(parts=parts)


def test_flat_rates_scale_with_the_width() -> None:
    assert flat_rates(768) == (1e-5, 2.1e-5, 4.5e-5, 9.5e-5, 2e-4)
    assert flat_rates(384) == (2e-5, 4.2e-5, 9e-5, 1.9e-4, 4e-4)


# --- controls -----------------------------------------------------------------------------------


def test_the_controls_in_their_order() -> None:
    of = space()
    made = controls(of, Recipe(), [1e-3, 1e-5, 1e-4])
    assert [c.label for c in made] == ["flat@1e-05", "flat@0.0001", "flat@0.001", "layer_decay",
                                       "bertcl"]  # fmt: skip
    for control, rate in zip(made, [1e-5, 1e-4, 1e-3, 1e-4, 1e-4], strict=True):
        assert control.params[RATE] == rate
    for flat in made[:3]:
        assert of.multipliers(flat.params) == [1.0] * 10
    for control in made:  # Optuna warns of, and samplers ignore, what lies outside of the space
        assert all(r.low <= control.params[name] <= r.high for name, r in of.ranges.items())


def test_the_published_curve_is_a_control_point_for_point() -> None:
    of = space()
    bertcl = controls(of, Recipe(), FLAT)[-1]
    assert of.rates(bertcl.params).points == pytest.approx(Rates.bertcl().normalised().points)
    assert of.rates(bertcl.params).head == pytest.approx(Rates.bertcl().normalised().head)


def test_a_curve_of_other_points_is_read_by_depth() -> None:
    """Layer decay on 12 layers, at 4 points: log-linear in depth, so halves of 12 are met."""
    points = at_points(Rates.layer_decay(0.9, layers=12), 6, 12)
    steps = [math.log(b / a) for a, b in itertools.pairwise(points[1:5])]
    assert steps == pytest.approx([3 * math.log(1 / 0.9)] * 3)
    assert math.prod(points) == pytest.approx(1)


@pytest.mark.parametrize("layers", [12, 24, None])
def test_a_control_is_its_curve_on_every_layer(layers: int | None) -> None:
    """What the control's points give a network of as many layers is what the curve itself gives."""
    curve = Rates.bertcl()
    points = at_points(curve, 10, layers)
    mine = Rates.from_list(points, layers=layers)
    n = layers or 8
    scale = points[0] / curve.embeddings
    found = [mine.at((i + 0.5) / n) for i in range(n)]
    exact = [scale * curve.at((i + 0.5) / n) for i in range(n)]
    assert sum(map(math.log, found)) == pytest.approx(sum(map(math.log, exact)))
    if layers != 24:  # there one point is three layers
        assert found == pytest.approx(exact)


def test_where_layers_are_fewer_than_points_a_control_is_read_by_depth() -> None:
    points = at_points(Rates.bertcl(), 10, 6)
    scale = points[-1] / Rates.bertcl().head
    assert points[1:-1] == pytest.approx(
        [scale * Rates.bertcl().at((j + 0.5) / 8) for j in range(8)]
    )
    assert points[2] / points[1] > 0.4  # the curve's own values, one after another, would be 0.3


def test_controls_keep_tuned_settings_at_the_recipes_values() -> None:
    of = space(tune=["ewc.strength"])
    made = controls(of, Recipe(methods=[EWC(strength=33.0)]), FLAT)
    assert {c.params["ewc.strength"] for c in made} == {33.0}


@pytest.mark.parametrize(("parts", "told"), [(6, 0), (7, 1), (10, 1)])
def test_points_that_reach_no_layer_are_told_of(parts: int, told: int, place: Path) -> None:
    """Two layers, each between two points: four points at most do something."""
    made = plan(place, parts=parts)
    assert sum("--parts 4" in line for line in made.warnings) == told
    curve = made.space.rates(made.space.neutral(made.base, 1e-3, [1.0] * parts))
    moved = 0
    for j in range(parts - 2):
        points = [3.0 if i == j else 1.0 for i in range(parts - 2)]
        bent = replace(curve, points=tuple(points))
        moved += any(bent.at(depth) != curve.at(depth) for depth in (0.25, 0.75))
    assert (moved < parts - 2) is bool(told)
