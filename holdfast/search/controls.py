"""What every search is measured against: flat rates, layer decay, the published curve.

Controls are trials like all others, of the same budget; they come first, so that samplers learn
from them, and neither a pruner nor a collapse stops them. The shapes run at the middle flat rate,
and once more, at the end, at the best one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.search.space import Space


@dataclass(frozen=True)
class Control:
    """One control: what tables call it, its kind, and the parameters of its trial."""

    label: str
    kind: str  # flat, layer_decay, bertcl
    params: dict[str, float]


def controls(space: Space, base: Recipe, flat: Sequence[float]) -> list[Control]:
    """Flat at each rate, from the lowest; then the shapes at the middle one."""
    ones = [1.0] * space.parts
    ordered = sorted(flat)
    made = [Control(f"flat@{rate:g}", "flat", space.neutral(base, rate, ones)) for rate in ordered]
    middle = ordered[len(ordered) // 2]
    for curve in shapes(space.layers):
        points = space.neutral(base, middle, at_points(curve, space.parts, space.layers))
        made.append(Control(curve.name, curve.name, points))
    return made


def shapes(layers: int | None) -> list[Rates]:
    """The curves that need no search."""
    return [Rates.layer_decay(layers=layers or 12), Rates.bertcl()]


def at_points(curve: Rates, parts: int, layers: int | None) -> list[float]:
    """A curve at the K = parts − 2 points of a space, scaled to geometric mean 1: (parts,).

    A point has the geometric mean of the curve over the layers that it governs, those i of L with
    ⌊iK/L⌋ = j; where layers are fewer than points, the curve's value at depth (j + ½) / K.
    """
    k = parts - 2
    n = max(layers or k, k)
    governed: list[list[float]] = [[] for _ in range(k)]
    for i in range(n):
        governed[i * k // n].append(curve.at((i + 0.5) / n))
    points = [math.prod(v) ** (1 / len(v)) for v in governed]
    return Rates.from_list([curve.embeddings, *points, curve.head]).normalised().multipliers
