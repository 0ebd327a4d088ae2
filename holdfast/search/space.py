"""What a search varies: a multiplier for each part, the base rate, and settings of methods.

A trial draws raw multipliers x over the parts (embeddings, K points over the layers, head) and a
rate r. Only the shape of x is used, so that a curve is never credited for a smaller overall step::

    m_i = x_i / exp(mean_j ln x_j)            geometric mean 1: the shape
    lr_i = r · m_i                            r is the geometric mean of the rates: the scale

x and c·x are the same trial: the space has one dimension more than the curves, which samplers cope
with, and shape and scale stay separate. Everything is searched on a log scale unless a method
declares otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from holdfast.engine.method import Method, Range
from holdfast.errors import Refused, nearest
from holdfast.methods import METHODS
from holdfast.network.rates import Piece, Rates
from holdfast.recipe import Recipe
from holdfast.search.trials import part_names

INTERVALS = 6  # of a task, after each of which a population's members are compared
RATE, SHAPE = "rate", "x."  # names of parameters in a study: the base rate, a part's multiplier
MULTIPLIER = Range(0.1, 10.0, log=True)
BEYOND = 2.0  # the base rate is searched from the lowest flat control / 2 to the highest x 2
FLAT = (1e-5, 2.1e-5, 4.5e-5, 9.5e-5, 2e-4)  # for a width of 768; evenly spaced on a log scale
WIDTH = 768


def flat_rates(width: int) -> tuple[float, ...]:
    """Five base rates for a network of this hidden width: 1e-5 … 2e-4 at 768.

    Adam's best rate for a matrix falls as 1 / width (Yang et al. 2022, arXiv 2203.03466), so that
    a network of width 384 is given twice the rates. Two digits each.
    """
    return tuple(float(f"{rate * WIDTH / width:.2g}") for rate in FLAT)


def check_flat(rates: Rates, done: str) -> None:
    """Refuse a recipe with a curve of its own, where rates are what is `done` (searched, found)."""
    if rates.multipliers != Rates.flat().multipliers or rates.freeze_below or rates.pieces:
        raise Refused(f"has rates of its own ({rates.name}), and rates are what is {done}",
                      where="--recipe", remedy="take one with flat rates")  # fmt: skip


@dataclass(frozen=True)
class Ancestor:
    """What trained one sixth of a task on the way to a population's member, and how."""

    member: int
    rate: float
    multipliers: tuple[float, ...]  # (parts,), geometric mean 1


@dataclass(frozen=True, kw_only=True)
class Space:
    """The dimensions of a search by name, each with its range."""

    parts: int
    """Multipliers of a curve: embeddings, parts − 2 points, head; at least 3."""
    layers: int | None
    """Of the searched network; None where its configuration does not say."""
    rate: Range
    tuned: Mapping[str, Range]
    """`method.setting` → where to look."""
    whole: frozenset[str] = frozenset()
    """Those of `tuned` that are whole numbers."""

    @classmethod
    def of(
        cls, *, parts: int, layers: int | None, flat: Sequence[float], tune: Sequence[str] = ()
    ) -> Space:
        """The space around flat rates; see `tunable` for what `tune` may name."""
        if isinstance(parts, bool) or not isinstance(parts, int) or not 3 <= parts <= 102:
            raise Refused(f"{parts!r} parts", where="--parts",
                          remedy="3 to 102: embeddings, points over the layers, head")  # fmt: skip
        known, tuned = tunable(), {}
        for word in tune:
            if word not in known:
                raise Refused(f"nothing to tune is called {word!r}", where="--tune",
                              remedy=nearest(word, list(known)))  # fmt: skip
            if word in tuned:
                raise Refused(f"{word} stands twice", where="--tune")
            tuned[word] = known[word]
        return cls(
            parts=parts, layers=layers, tuned=tuned,
            rate=Range(min(flat) / BEYOND, max(flat) * BEYOND, log=True),
            whole=frozenset(word for word in tuned if isinstance(_default(word), int)),
        )  # fmt: skip

    @property
    def shape(self) -> list[str]:
        """The parameters that hold the raw multipliers, in order."""
        return [SHAPE + part for part in part_names(self.parts)]

    @property
    def ranges(self) -> dict[str, Range]:
        """Every parameter's range, the rate first."""
        return {RATE: self.rate, **dict.fromkeys(self.shape, MULTIPLIER), **self.tuned}

    # --- parameters -> recipe -----------------------------------------------------------------

    def multipliers(self, params: Mapping[str, float]) -> list[float]:
        """m (parts,): the raw multipliers divided by their geometric mean."""
        logs = [math.log(params[name]) for name in self.shape]
        mean = math.fsum(logs) / len(logs)
        return [math.exp(value - mean) for value in logs]

    def lr(self, params: Mapping[str, float]) -> tuple[float, ...]:
        """(parts,) absolute learning rates."""
        return tuple(params[RATE] * m for m in self.multipliers(params))

    def rates(self, params: Mapping[str, float], *, name: str = "searched") -> Rates:
        """The curve of a trial."""
        return Rates.from_list(
            self.multipliers(params), layers=self.layers, name=name,
            geometric_mean_rate=params[RATE],
        )  # fmt: skip

    def in_pieces(self, lineage: Sequence[Ancestor], *, name: str) -> Rates:
        """The curve of a lineage, relative to its first rate; after its end the last one holds."""
        start, pieces = lineage[0], list[Piece]()
        for i in range(1, 2 * INTERVALS):
            now = lineage[min(i, len(lineage) - 1)]
            times = [m * (now.rate / start.rate) for m in now.multipliers]
            pieces.append(Piece(task=i // INTERVALS + 1, at=i % INTERVALS / INTERVALS,
                                multipliers=tuple(times)))  # fmt: skip
        return Rates.from_list(start.multipliers, layers=self.layers, name=name, pieces=pieces,
                               geometric_mean_rate=start.rate)  # fmt: skip

    def recipe(
        self,
        base: Recipe,
        params: Mapping[str, float],
        *,
        name: str,
        lineage: Sequence[Ancestor] = (),
    ) -> Recipe:
        """`base` with a trial's curve and method settings; adds a tuned method that it lacks.

        lineage: of a population's member, whose curve is in pieces over its first rate.
        """
        methods = {m.name: m for m in with_tuned(base, self.tuned).methods}
        for word in self.tuned:
            method, setting = word.split(".", 1)
            value = int(params[word]) if word in self.whole else params[word]
            methods[method] = replace(methods[method], **{setting: value})
        curve = self.in_pieces(lineage, name=name) if lineage else self.rates(params, name=name)
        return replace(base, rates=curve, methods=tuple(methods.values()), name=name)

    def neutral(self, base: Recipe, rate: float, curve: Sequence[float]) -> dict[str, float]:
        """A control's parameters: a curve at a rate, tuned settings as `base` has them."""
        own = {m.name: m for m in with_tuned(base, self.tuned).methods}
        found = {RATE: rate, **dict(zip(self.shape, curve, strict=True))}
        for word, where in self.tuned.items():
            method, setting = word.split(".", 1)
            found[word] = min(max(getattr(own[method], setting), where.low), where.high)
        return found


def tunable() -> dict[str, Range]:
    """Every `method.setting` that declares a range."""
    return {f"{name}.{key}": r for name, m in METHODS.items() for key, r in m.ranges.items()}


def with_tuned(base: Recipe, tuned: Mapping[str, Range]) -> Recipe:
    """`base` with the methods that are tuned, at their defaults where it lacks them."""
    have = {m.name for m in base.methods}
    fresh: list[Method] = [
        METHODS[name]() for name in dict.fromkeys(word.split(".")[0] for word in tuned)
        if name not in have
    ]  # fmt: skip
    return replace(base, methods=(*base.methods, *fresh))


def _default(word: str) -> Any:
    method, setting = word.split(".", 1)
    value = getattr(METHODS[method](), setting)
    return None if isinstance(value, bool) else value


# --- what every search is measured against -------------------------------------------------------
#
# Controls are trials like all others, of the same budget; they come first, so that samplers learn
# from them, and neither a pruner nor a collapse stops them. The shapes run at the middle flat rate,
# and once more, at the end, at the best one.


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
