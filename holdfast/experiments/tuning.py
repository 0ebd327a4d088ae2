"""The same number of tuning runs for every recipe: what is tried, and what is chosen of it.

Run 0 is the recipe as it is given, at its own learning rate. Each further one is a point u of a
scrambled Sobol sequence, which fills any number of dimensions more evenly than chance:

    value = low + u · (high − low), or low · (high / low)^u on a log scale

The first dimension is the rate and the same for all recipes: all try the same rates, and a first
task that several leave as it is need be trained only once a rate. The others, the ranges that a
recipe's methods declare, are scrambled by its label. A larger number goes on where a smaller one
ended.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from holdfast.engine.method import Method, Range
from holdfast.errors import Refused
from holdfast.experiments.metrics import Cell, new_plus_old
from holdfast.experiments.record import Record
from holdfast.recipe import Recipe

RATE = "rate"  # the base learning rate among the values
SEED = 1000  # of tuning runs; no final run has it
AROUND = 0.1, 2.5  # the range of rates, in usual ones
EDGE = 0.05  # of a range: a value chosen there is told


def check_budget(budget: object, seeds: Sequence[int]) -> None:
    """Refuse what is no number of tuning runs, and final seeds that are used for tuning."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise Refused(f"must be a whole number from 1 on, not {budget!r}", where="--budget")
    if SEED in seeds:
        raise Refused(f"{SEED} is the seed of tuning runs: what is chosen there is scored with "
                      "others", where="--seeds", remedy="take another")  # fmt: skip


def rates_around(usual: float, asked: Sequence[float] | None = None) -> Range:
    """The range of rates to try: from the lowest asked for to the highest, or around `usual`."""
    low, high = asked or [usual * factor for factor in AROUND]
    if not 0 < low < high < math.inf:
        raise Refused(f"must be a lower and a higher rate above 0, not {low} and {high}",
                      where="--rates", remedy="--rates 2e-5 5e-4")  # fmt: skip
    return Range(low, high, log=True)


@dataclass(frozen=True)
class Tuning:
    """The tuning runs of one recipe: `budget` mappings of `RATE` and `method.setting` → value."""

    recipe: Recipe
    ranges: Mapping[str, Range]
    values: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, recipe: Recipe, label: str, *, rate: float, rates: Range, budget: int) -> Tuning:
        """`rate` is the recipe's own, `rates` the range of all."""
        settings = {f"{m.name}.{key}": (m, key) for m in recipe.methods for key in m.ranges}
        ranges = {RATE: rates, **{word: m.ranges[key] for word, (m, key) in settings.items()}}
        whole = {word for word, (m, key) in settings.items() if _whole(m, key)}
        points = _sobol(len(ranges), label, budget - 1)
        points[:, :1] = _sobol(1, RATE, budget - 1)
        own = {RATE: rate, **{word: getattr(m, key) for word, (m, key) in settings.items()}}
        drawn = [
            {word: _at(u, where, word in whole)
             for u, (word, where) in zip(point, ranges.items(), strict=True)}
            for point in points.tolist()
        ]  # fmt: skip
        return cls(recipe, ranges, [own, *drawn])

    def at(self, number: int) -> Recipe:
        """The recipe of a tuning run."""
        if number == 0:
            return self.recipe
        given: dict[str, dict[str, Any]] = {m.name: {} for m in self.recipe.methods}
        for word, value in self.values[number].items():
            if word != RATE:
                method, setting = word.split(".", 1)
                given[method][setting] = value
        return replace(self.recipe, methods=[replace(m, **given[m.name])
                                             for m in self.recipe.methods])  # fmt: skip

    def told(self, scores: Sequence[Cell]) -> dict[str, Any]:
        """What a record says of the choice, by the scores of all runs on selection rows."""
        best = chosen(scores)
        values = self.values[best]
        return {
            "runs": len(scores),
            "chosen": best,
            "score": scores[best],
            "scores": list(scores),
            "rows": "selection",
            "seed": SEED,
            "diverged": sum(score is None for score in scores),
            "values": dict(values),
            "ranges": {word: list(where) for word, where in self.ranges.items()},
            "edges": {
                w: end for w, where in self.ranges.items() if (end := edge(values[w], where))
            },
        }


def chosen(scores: Sequence[Cell]) -> int:
    """The run with the best score, of equal ones the first; None is one that diverged."""
    known = [i for i, score in enumerate(scores) if score is not None]
    if not known:
        raise Refused(f"all {len(scores)} tuning runs diverged", where="--budget",
                      remedy="lower --lr and --rates, in another --out")  # fmt: skip
    return max(known, key=lambda i: (scores[i], -i))


def quality(record: Record) -> float:
    """new_plus_old on selection rows, of a single task its score; `Refused` without such rows."""
    matrix = record.selection_scores or [[None]]
    value = matrix[0][0] if len(matrix) == 1 else new_plus_old(matrix)
    if value is None:
        raise Refused("has no score on selection rows to choose by", where=str(record.names[-1]),
                      remedy="leave some by --selection")  # fmt: skip
    return value


def edge(value: Any, where: Range) -> str | None:
    """`low` or `high` where a value lies within `EDGE` of an end of its range, or beyond it."""
    if not isinstance(value, int | float):
        return None
    low, high, at = (where.low, where.high, value)
    if where.log:
        low, high, at = math.log(low), math.log(high), math.log(value) if value > 0 else -math.inf
    share = (at - low) / (high - low)
    return "low" if share <= EDGE else "high" if share >= 1 - EDGE else None


def _at(u: float, where: Range, whole: bool) -> float | int:
    """The value at u in [0, 1]; whole numbers are equally likely on a linear scale."""
    low, high = (where.low - 0.5, where.high + 0.5) if whole else (where.low, where.high)
    value = low * (high / low) ** u if where.log else low + u * (high - low)
    # To six digits, which all machines draw alike: it is part of a run's configuration.
    value = round(value) if whole else float(f"{value:.6g}")
    value = min(max(value, where.low), where.high)
    return int(value) if whole else value


def _whole(method: Method, setting: str) -> bool:
    return type(next(f.default for f in fields(method) if f.name == setting)) is int


def _sobol(dimensions: int, word: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The first points of the sequence that is scrambled by a word: (count, dimensions)."""
    from scipy.stats import qmc

    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    sequence = qmc.Sobol(dimensions, scramble=True, seed=np.random.default_rng(seed))
    points = sequence.random_base2(max(0, count - 1).bit_length())[:count]
    return np.asarray(points, dtype=np.float64)
