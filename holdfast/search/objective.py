"""What a trial is worth, what it reports on the way, and when it is stopped.

    new_plus_old   S[1][1] + S[1][0]          the papers' reward; 2 is perfect
    pareto         (S[1][1], S[1][0])         both, as a front

S is the score matrix on *selection* rows; evaluation rows are not scored while searching. At rung
k = 1 … 2n (n a task, the last at its end) a trial reports S[0][0] so far, in task one, and
new + old so far, in task two; where task one is learned once for all trials, k = 1 … n are those of
task two. A pruner compares trials at the same rung only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from holdfast.errors import Refused, nearest

Objective = Literal["new_plus_old", "pareto"]
Pruner = Literal["halving", "hyperband", "none"]
Sampler = Literal["tpe", "gp", "cmaes", "random", "nsga2", "pbt"]
LearnOld = Literal["each", "once"]  # the first task: in every trial, or once a seed for all
Rungs = tuple[float, ...]  # of a task: the shares of its steps after which they come, the last 1
# Halving decides at rungs 1, 2 and 4: before task one costs much, when it is nearly learned, and
# as soon as forgetting shows (docs/results says how well each rung predicts the end).
RUNGS: dict[Pruner, Rungs] = {
    "halving": (1 / 6, 2 / 3, 1.0), "hyperband": (1 / 2, 1.0), "none": (1 / 3, 2 / 3, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """A finished trial on selection rows; `steps` and `seconds` of training."""

    old: float  # task one, just learned
    new: float
    old_after: float
    steps: int = 0
    seconds: float = 0.0

    def values(self, objective: Objective) -> list[float]:
        """What is maximised."""
        both = [self.new, self.old_after]
        return both if objective == "pareto" else [sum(both)]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.old, self.new, self.old_after)))


class Stop(Exception):
    """A trial ends early; `steps` of training were spent on it."""

    def __init__(self, reason: str, steps: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.steps = reason, steps


class Pruned(Stop):
    """The trial collapsed, or does worse than others did at this rung."""


class Diverged(Stop):
    """A score, the loss or every gradient is not finite."""


@dataclass
class Watch:
    """Follows one replicate of a trial: reports each rung, and stops it if it is not worth it.

    tell(rung, value) reports a value and returns whether to prune.
    """

    rungs: Rungs  # of each task
    tell: Callable[[int, float], bool]
    floor: float | None = None  # what a constant answer scores on task one; None: no such stop
    whole: bool = False  # a control: it runs to its end, whatever it scores
    made: int = 0  # steps of all tasks so far, those of killed processes included
    begun: int = 0  # tasks that were learned for all trials, and the steps they took
    shared: int = 0

    def rung(self, index: int, within: int) -> int:
        """The number of the `within`-th rung (from 1) of task `index` (from 0)."""
        return (index - self.begun) * len(self.rungs) + within

    @property
    def spent(self) -> int:
        """The steps that were its own."""
        return max(0, self.made - self.shared)

    def at(self, rung: int, *, steps: int, old: float, new: float | None = None) -> None:
        """Rung `rung` (from 1) is reached after `steps` steps; raises `Pruned` or `Diverged`."""
        self.made = steps
        value = old if new is None else new + old
        if not math.isfinite(value):
            raise Diverged("diverged: a score is not finite", self.spent)
        end_of_one = rung == self.rung(0, len(self.rungs))
        if end_of_one and not self.whole and self.floor is not None and old <= self.floor:
            raise Pruned(f"collapsed: {old:.3f} on task one, as one answer for all rows "
                         f"({self.floor:.3f})", self.spent)  # fmt: skip
        # A trial that is trained to its end is finished, however it compares.
        if self.tell(rung, value) and rung < self.rung(1, len(self.rungs)):
            raise Pruned(f"pruned at rung {rung}", self.spent)


def evenly(count: int) -> Rungs:
    """`count` rungs a task, evenly spaced."""
    return tuple((k + 1) / count for k in range(count))


def rung_steps(total: int, rungs: Rungs) -> list[int]:
    """The steps of a task after which its rungs come, the last at its end: (rungs,)."""
    return [math.ceil(round(share * total, 6)) for share in rungs]


def check_choice(sampler: str, pruner: str | None, objective: str) -> Pruner:
    """The pruner to use; refuses unknown names and choices that do not go together."""
    for name, value, known in (
        ("--sampler", sampler, get_args(Sampler)),
        ("--pruner", pruner or "none", get_args(Pruner)),
        ("--objective", objective, get_args(Objective)),
    ):
        if value not in known:
            raise Refused(f"unknown {value!r}", where=name, remedy=nearest(str(value), known))
    if sampler == "pbt":
        if pruner not in (None, "none"):
            raise Refused("a population stops none: its worst go on from its best",
                          where="--pruner", remedy="leave it out")  # fmt: skip
        if objective == "pareto":
            raise Refused("pbt compares members by one objective", where="--sampler",
                          remedy="take nsga2, tpe or gp, or --objective new_plus_old")  # fmt: skip
        return "none"
    if objective == "pareto":
        if pruner not in (None, "none"):
            raise Refused("no pruner can compare trials by two objectives", where="--pruner",
                          remedy="take --pruner none, or --objective new_plus_old")  # fmt: skip
        if sampler == "cmaes":
            raise Refused("cmaes maximises one objective", where="--sampler",
                          remedy="take nsga2, tpe or gp, or --objective new_plus_old")  # fmt: skip
        return "none"
    return pruner or "halving"  # type: ignore[return-value]
