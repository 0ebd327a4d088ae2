"""A learning rate for each part of a network, as a curve over relative depth.

Rates are shape × scale: `Rates` holds multipliers only, the base learning rate is separate, so
that a curve is never credited for a smaller overall step. One multiplier for the embeddings, K for
the layers, one for the head::

    rate(part) = lr · multiplier(part)

The published curves (BERTcL) have K = 8 points, found on 12 layers: layer i takes point
⌊i·8/12⌋. On a network of another depth those 12 values, at relative depths (i + ½)/12, are
interpolated: log m is linear between neighbours and constant beyond the first and the last.

A curve may change while it is used: each of its `pieces` holds from a step of a task on.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Real
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from holdfast.errors import Refused, nearest
from holdfast.files import only_keys, read_yaml, write_yaml
from holdfast.network.parts import EMBEDDINGS, HEAD, Parts

SCHEMA = 1
_BERTCL = (1.0, 1.0, 0.3, 0.7, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0)
_BERTCL_AVERAGED = (3.295, 4.363, 0.921, 1.923, 2.849, 2.143, 3.267, 3.699, 3.186, 11.188)
_BERTCL_SOURCE = "BERTcL, four task-shift pairs on bert-base-uncased (12 layers)"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Other multipliers from a step on, until the next piece."""

    task: int
    """Which task of a sequence, the first is 1."""
    at: float | int
    """Steps of the task that come before it; below 1 a share of all its steps."""
    multipliers: tuple[float, ...]
    """[embeddings, points…, head], as many as the curve has, each above 0."""

    def __post_init__(self) -> None:
        if isinstance(self.task, bool) or not isinstance(self.task, int) or self.task < 1:
            raise Refused(f"task {self.task!r} is no whole number from 1 on", where="pieces")
        number(self.at, "pieces.at")
        if isinstance(self.at, float) and self.at >= 1:
            raise Refused(f"at {self.at!r} is no share below 1", where="pieces",
                          remedy="write steps as a whole number")  # fmt: skip
        if isinstance(self.multipliers, str) or not isinstance(self.multipliers, Sequence):
            raise Refused(f"expected a list of numbers, found {self.multipliers!r}", where="pieces")
        values = tuple(number(m, "pieces.multipliers") for m in self.multipliers)
        if not all(values):
            raise Refused("a multiplier of 0 would freeze a part on the way", where="pieces",
                          remedy="freeze it from the beginning")  # fmt: skip
        object.__setattr__(self, "multipliers", values)

    def start(self, total: int) -> int:
        """Steps before it, of a task of `total` steps; rounded up."""
        return math.ceil(round(self.at * total, 6)) if isinstance(self.at, float) else self.at

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a rates file."""
        return {"task": self.task, "at": self.at, "multipliers": list(self.multipliers)}

    @classmethod
    def of(cls, given: Any) -> Piece:
        """A piece, or what a rates file says of one."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise Refused(f"{given!r} is no piece", where="pieces",
                          remedy="{task: 1, at: 0.5, multipliers: […]}")  # fmt: skip
        keys = ("task", "at", "multipliers")
        only_keys(given, keys, required=keys, where="pieces")
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Multipliers on the base learning rate, by relative depth; 0 freezes."""

    embeddings: float
    """Multiplier of what runs before the first layer."""
    points: tuple[float, ...]
    """Multipliers at K control points over the layers, from input to output."""
    head: float
    """Multiplier of what runs after the last layer."""
    layers: int | None = None
    """Layers of the network on which the curve was found; None: points at (j + ½)/K."""
    freeze_below: float = 0.0
    """Parts of smaller relative depth get 0, whatever the curve says."""
    geometric_mean_rate: float | None = None
    """Geometric mean of the learning rates of the curve where it was found, if known."""
    name: str = "rates"
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Where the curve comes from: plain data, kept in the file."""
    pieces: Sequence[Piece] = ()
    """What they become on the way, in order: `{task, at, multipliers}`, see docs/searching.md."""

    def __post_init__(self) -> None:
        if isinstance(self.points, str) or not isinstance(self.points, Sequence):
            raise Refused(f"points must be a list of numbers, not {self.points!r}", where="rates")
        if not self.points:
            raise Refused("no points", where="rates", remedy="give at least one multiplier")
        points = [number(m, f"point {j}") for j, m in enumerate(self.points)]
        fixed: dict[str, Any] = {
            "embeddings": number(self.embeddings, "embeddings"),
            "points": tuple(points),
            "head": number(self.head, "head"),
            "freeze_below": number(self.freeze_below, "freeze_below"),
            "pieces": self._checked_pieces(),
        }
        if fixed["freeze_below"] > 1:
            raise Refused(f"{self.freeze_below} is above 1", where="freeze_below")
        if self.layers is not None and (
            isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1
        ):
            raise Refused(f"{self.layers!r} is no number of layers", where="layers")
        if self.geometric_mean_rate is not None:
            rate = number(self.geometric_mean_rate, "geometric_mean_rate")
            fixed["geometric_mean_rate"] = rate
        if not isinstance(self.name, str):
            raise Refused(f"{self.name!r} is not text", where="name")
        if not isinstance(self.provenance, Mapping):
            raise Refused(f"{self.provenance!r} is not a mapping", where="provenance")
        fixed["provenance"] = dict(self.provenance)
        for key, value in fixed.items():
            object.__setattr__(self, key, value)

    def _checked_pieces(self) -> tuple[Piece, ...]:
        if isinstance(self.pieces, str) or not isinstance(self.pieces, Sequence):
            raise Refused(f"{self.pieces!r} is no list", where="pieces")
        pieces, parts = tuple(map(Piece.of, self.pieces)), len(self.points) + 2
        for piece in pieces:
            if len(piece.multipliers) != parts:
                raise Refused(f"{len(piece.multipliers)} multipliers, the curve has {parts}",
                              where="pieces")  # fmt: skip
        for one, two in pairwise(pieces):
            comparable = type(one.at) is type(two.at) and one.task == two.task
            if one.task > two.task or (comparable and one.at >= two.at):
                raise Refused(f"task {two.task} at {two.at:g} after task {one.task} at {one.at:g}",
                              where="pieces", remedy="list them in order")  # fmt: skip
        return pieces

    # --- curves --------------------------------------------------------------------------------

    @classmethod
    def from_list(
        cls, multipliers: Sequence[float], *, layers: int | None = None, **more: Any
    ) -> Rates:
        """[embeddings, points…, head]: ten numbers for a published curve, at least three."""
        if isinstance(multipliers, str) or not isinstance(multipliers, Sequence):
            raise Refused(f"expected a list of numbers, found {multipliers!r}", where="multipliers")
        if len(multipliers) < 3:
            raise Refused(
                f"{len(multipliers)} multipliers",
                where="rates",
                remedy="give embeddings, at least one point, head",
            )
        first, *points, last = multipliers
        return cls(embeddings=first, points=tuple(points), head=last, layers=layers, **more)

    @classmethod
    def flat(cls) -> Rates:
        """One rate for everything: the control for every other curve."""
        return cls(embeddings=1.0, points=(1.0,), head=1.0, name="flat")

    @classmethod
    def layer_decay(cls, decay: float = 0.9, layers: int = 12) -> Rates:
        """decayᵏ, k steps below the head: head 1, last layer decay, embeddings decay^(layers+1)."""
        decay = number(decay, "decay")
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise Refused(f"{layers!r} is no number of layers", where="layers")
        curve = [decay**k for k in range(layers + 1, -1, -1)]
        source = {"decay": decay}
        return cls.from_list(curve, layers=layers, name="layer_decay", provenance=source)

    @classmethod
    def bertcl(cls) -> Rates:
        """The published curve, rounded by its authors: 2e-5 · [1, 1, .3, .7, 1, 1, 1, 1, 1, 3]."""
        mean = 2e-5 * _geometric_mean(_BERTCL)
        source = {"source": _BERTCL_SOURCE, "published_base_rate": 2e-5}
        return cls.from_list(
            _BERTCL, layers=12, name="bertcl", geometric_mean_rate=mean, provenance=source
        )

    @classmethod
    def bertcl_averaged(cls) -> Rates:
        """The published averages of searched rates, relative to their geometric mean 3.0e-6.

        The searched rates are 6.6 times lower than the 2e-5 they were compared with; divided by
        their mean, they give only the shape.
        """
        rates = [1e-6 * rate for rate in _BERTCL_AVERAGED]
        mean = _geometric_mean(rates)
        source = {"source": _BERTCL_SOURCE, "published_rates": rates}
        return cls.from_list(
            [rate / mean for rate in rates],
            layers=12,
            name="bertcl_averaged",
            geometric_mean_rate=mean,
            provenance=source,
        )

    @classmethod
    def preset(cls, name: str) -> Rates:
        """A curve by its name, as files and the command line give it."""
        if name not in PRESETS:
            raise Refused(f"no rates called {name!r}", remedy=nearest(name, list(PRESETS)))
        return PRESETS[name]()

    def freeze(self, *, below: float) -> Rates:
        """The same curve with every part of relative depth under `below` frozen."""
        return replace(self, freeze_below=below)

    def normalised(self) -> Rates:
        """The same shape with geometric mean 1."""
        mean = self.geometric_mean
        if mean == 0:
            raise Refused("all multipliers are 0", where=self.name, remedy="nothing to normalise")
        pieces = [replace(p, multipliers=tuple(m / mean for m in p.multipliers))
                  for p in self.pieces]  # fmt: skip
        return replace(self._with([m / mean for m in self.multipliers]), pieces=pieces)

    def _with(self, multipliers: Sequence[float]) -> Rates:
        first, *points, last = multipliers
        return replace(self, embeddings=first, points=tuple(points), head=last)

    @property
    def multipliers(self) -> list[float]:
        """[embeddings, points…, head]."""
        return [self.embeddings, *self.points, self.head]

    @property
    def geometric_mean(self) -> float:
        """exp(mean log m) over the multipliers that are not 0; 0 if all are."""
        return _geometric_mean(self.multipliers)

    # --- applying ------------------------------------------------------------------------------

    def in_force(self, task: int, step: int, total: int) -> Rates:
        """The curve after `step` of `total` steps of a task, without pieces.

        It is that of the last piece listed which has begun, in this task or an earlier one.
        """
        begun = [p for p in self.pieces
                 if p.task < task or (p.task == task and p.start(total) <= step)]  # fmt: skip
        plain = replace(self, pieces=())
        return plain._with(begun[-1].multipliers) if begun else plain

    def at(self, depth: float) -> float:
        """The layers' multiplier at a relative depth, ignoring `freeze_below`.

        A share t of the way from one point a to the next b: exp((1 − t)·log a + t·log b). If one
        of them is 0, which has no logarithm, the nearer one counts (b half-way).
        """
        values = self._on_layers()
        places = [(i + 0.5) / len(values) for i in range(len(values))]
        j = bisect_right(places, depth) - 1
        if j < 0 or j == len(values) - 1:
            return values[max(j, 0)]
        a, b = values[j], values[j + 1]
        t = (depth - places[j]) / (places[j + 1] - places[j])
        if a == b or t == 0:
            return a
        if a == 0 or b == 0:
            return a if t < 0.5 else b
        between = math.exp((1 - t) * math.log(a) + t * math.log(b))
        return min(max(between, min(a, b)), max(a, b))

    def of(self, parts: Parts) -> dict[str, float]:
        """{part: multiplier} for a network."""
        ends = {EMBEDDINGS: self.embeddings, HEAD: self.head}
        return {
            part: 0.0
            if parts.depth[part] < self.freeze_below
            else ends[part] if part in ends else self.at(parts.depth[part])
            for part in parts.order
        }  # fmt: skip

    def _on_layers(self) -> tuple[float, ...]:
        """The K points spread over the L layers of the curve's network: layer i, point ⌊iK/L⌋."""
        k, n = len(self.points), self.layers or 0
        return self.points if n < k else tuple(self.points[i * k // n] for i in range(n))

    # --- files ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The content of a rates file."""
        body = {
            "kind": "rates",
            "schema": SCHEMA,
            "name": self.name,
            "multipliers": self.multipliers,
            "layers": self.layers,
            "freeze_below": self.freeze_below,
            "geometric_mean_rate": self.geometric_mean_rate,
            "provenance": dict(self.provenance),
        }
        if self.pieces:  # left out where there are none, so that recipes keep their hash
            body["pieces"] = [piece.to_dict() for piece in self.pieces]
        return body

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str | None = None) -> Rates:
        """Rates from the content of a file; unknown keys are Refused."""
        fields = ("name", "layers", "freeze_below", "geometric_mean_rate", "provenance", "pieces")
        header = ("kind", "schema", "multipliers")
        only_keys(data, header + fields, required=header, where=where)
        if data["kind"] != "rates":
            raise Refused(f"holds {data['kind']!r}, not rates", where=where)
        if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
            raise Refused(
                f"schema {data['schema']!r}, this version reads {SCHEMA}",
                where=where,
                remedy="update holdfast",
            )
        try:
            return cls.from_list(data["multipliers"], **{k: data[k] for k in fields if k in data})
        except Refused as error:
            raise Refused(str(error), where=where) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curve and its provenance as YAML."""
        write_yaml(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rates:
        """Read what `save` wrote, or what somebody typed."""
        return cls.from_dict(read_yaml(Path(path)), where=str(path))


PRESETS: dict[str, Callable[[], Rates]] = {
    "flat": Rates.flat,
    "layer_decay": Rates.layer_decay,
    "bertcl": Rates.bertcl,
    "bertcl_averaged": Rates.bertcl_averaged,
}


def plot(rates: Rates, path: str | os.PathLike[str], parts: Parts | None = None) -> None:
    """Plot multiplier by part on a log axis; a frozen part is a cross at the bottom.

    Without `parts` the control points are drawn, each as a part of its own.
    """
    from matplotlib.figure import Figure

    if parts is None:
        k = len(rates.points)
        depth = {EMBEDDINGS: 0.0, **{str(j + 1): (j + 0.5) / k for j in range(k)}, HEAD: 1.0}
        below = [d < rates.freeze_below for d in depth.values()]
        values = [0.0 if low else m for m, low in zip(rates.multipliers, below, strict=True)]
        labels = list(depth)
    else:
        labels, values = list(parts.order), list(rates.of(parts).values())
    trained = [(x, m) for x, m in enumerate(values) if m > 0]
    low = min([1.0, *(m for _, m in trained)]) / 2
    high = max([1.0, *(m for _, m in trained)]) * 2
    figure = Figure(figsize=(max(5.0, 0.35 * len(labels) + 2), 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color="black", linewidth=0.8)
    for x, m in trained:
        axes.plot([x, x, x], [1.0, m, m], "o-", markevery=[1], color="#4477aa")
    if frozen := [x for x, m in enumerate(values) if m == 0]:
        axes.plot(frozen, [low * 1.15] * len(frozen), "x", color="#aa3377", label="frozen")
        axes.legend()
    axes.set(yscale="log", ylim=(low, high), ylabel="× base learning rate", title=rates.name)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high / low < 30 else "")
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise Refused(str(error), where=str(path)) from None


def number(value: Any, where: str) -> float:
    """A finite, non-negative number, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Refused(f"{value!r} is not a number", where=where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise Refused(f"{value!r} is not finite and at least 0", where=where)
    return number


def _geometric_mean(values: Sequence[float]) -> float:
    positive = [m for m in values if m > 0]
    return geometric_mean(positive) if positive else 0.0
