"""What a trial is worth, what is told on the way, and when it is stopped.

    new_plus_old   S[1][1] + S[1][0]          the papers' reward; 2 is perfect
    pareto         (S[1][1], S[1][0])         both, as a front

S is the score matrix on *selection* rows; evaluation rows are not scored while searching. At rung
k = 1 … 2n (n a task, the last at its end) a trial tells S[0][0] so far, in task one, and
new + old so far, in task two. A pruner compares trials of one rung only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.errors import Refused, nearest
from holdfast.experiments.metrics import score

Objective = Literal["new_plus_old", "pareto"]
Pruner = Literal["halving", "hyperband", "none"]
Sampler = Literal["tpe", "gp", "cmaes", "random", "nsga2"]
RUNGS = {"halving": 3, "hyperband": 2, "none": 3}  # a task; see `holdfast.search.study.pruner`


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
    """A trial ends before its time; `steps` of training were spent on it."""

    def __init__(self, reason: str, steps: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.steps = reason, steps


class Pruned(Stop):
    """It collapsed, or does worse than others did at this rung."""


class Diverged(Stop):
    """A score, the loss or every gradient is not finite."""


@dataclass
class Watch:
    """One replicate of a trial on its way: tells each rung, and ends what is not worth its steps.

    tell(rung, value) passes a value on and says whether to prune.
    """

    rungs: int  # of each task
    tell: Callable[[int, float], bool]
    floor: float | None = None  # what a constant answer scores on task one; None: no such stop
    whole: bool = False  # a control: it runs to its end, whatever it scores

    def at(self, rung: int, *, steps: int, old: float, new: float | None = None) -> None:
        """Rung `rung` (from 1) is reached after `steps` steps; raises `Pruned` or `Diverged`."""
        value = old if new is None else new + old
        if not math.isfinite(value):
            raise Diverged("diverged: a score is not finite", steps)
        end_of_one = rung == self.rungs
        if end_of_one and not self.whole and self.floor is not None and old <= self.floor:
            raise Pruned(f"collapsed: {old:.3f} on task one, as one answer for all rows "
                         f"({self.floor:.3f})", steps)  # fmt: skip
        # What is trained to its end is finished, however it compares.
        if self.tell(rung, value) and rung < 2 * self.rungs:
            raise Pruned(f"pruned at rung {rung}", steps)


def constant_score(metric: str, labels: Sequence[float], classes: int | None) -> float:
    """The best score of one answer for all rows; 0 for a ranking."""
    if classes is None:
        return 0.0
    return max(score(metric, labels, [c] * len(labels), classes=classes) for c in set(labels))


def rung_steps(total: int, rungs: int) -> list[int]:
    """The steps of a task after which its rungs come, the last at its end: (rungs,)."""
    return [math.ceil(k * total / rungs) for k in range(1, rungs + 1)]


def check_choice(sampler: str, pruner: str | None, objective: str) -> Pruner:
    """The pruner that is meant, after refusing what does not go together."""
    for name, value, known in (
        ("--sampler", sampler, ("tpe", "gp", "cmaes", "random", "nsga2")),
        ("--pruner", pruner or "none", ("halving", "hyperband", "none")),
        ("--objective", objective, ("new_plus_old", "pareto")),
    ):
        if value not in known:
            raise Refused(f"unknown {value!r}", where=name, remedy=nearest(str(value), known))
    if objective == "pareto":
        if pruner not in (None, "none"):
            raise Refused("no pruner can compare trials by two objectives", where="--pruner",
                          remedy="take --pruner none, or --objective new_plus_old")  # fmt: skip
        if sampler == "cmaes":
            raise Refused("cmaes maximises one objective", where="--sampler",
                          remedy="take nsga2, tpe or gp, or --objective new_plus_old")  # fmt: skip
        return "none"
    return pruner or "halving"  # type: ignore[return-value]
