"""Population-based training: the worst of several runs go on from the best.

Jaderberg et al. 2017, arXiv 1711.09846. Every member of a population learns both tasks at rates of
its own. After each sixth of a task all are scored, as at a rung of other searches. Then each of the
worst quarter goes on from the weights, moments and methods' state of one of the best quarter, at
that one's rates but for a perturbation::

    m_i ← m_i · f_i / exp(mean_j ln f_j)     f_i is 1.2 or 0.8, for each part by itself: the shape
    r   ← r · f                              f is 1.2 or 0.8: the scale

so that the geometric mean of the shape stays 1. Data order and random generators are a member's
own. The lineage of a member, a donor and its rates for each sixth, is a schedule of rates that a
run from scratch can follow. What is known of a population is computed from the outcomes of its
segments, one for each member and sixth, so that any process may go on with it at any time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from holdfast.errors import Refused
from holdfast.files import write_text_atomic
from holdfast.search.final import finish
from holdfast.search.rows import TrialRow
from holdfast.search.space import INTERVALS, MULTIPLIER, RATE, Ancestor

if TYPE_CHECKING:
    from holdfast.search.plan import Plan

MEMBERS, MOST = 8, 100  # of a population
GENERATIONS = 2 * INTERVALS
QUANTILE, FACTORS = 0.25, (0.8, 1.2)
FOLDER, FILE, OUTCOME = "population", "population.json", "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How a segment ended. Scores are on selection rows, None where they were not reached."""

    value: float | None = None  # what members are compared by; None: it diverged
    old: float | None = None
    new: float | None = None
    old_after: float | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class Segment:
    """What one member does in one sixth of a task. Its folder holds all that it needs."""

    population: Path
    generation: int
    member: int
    parent: int  # whose weights it goes on from, of the generation before; maybe its own
    lineage: tuple[Ancestor, ...]  # this segment's rates come last

    @property
    def key(self) -> tuple[int, int]:
        return self.generation, self.member

    @property
    def folder(self) -> Path:
        return self._folder(self.generation, self.member)

    @property
    def source(self) -> Path:
        """Where its parent ended."""
        return self._folder(self.generation - 1, self.parent)

    @property
    def before(self) -> Path:
        """Where the member itself ended."""
        return self._folder(self.generation - 1, self.member)

    def _folder(self, generation: int, member: int) -> Path:
        return self.population / f"{generation + 1}" / f"{member}"

    @property
    def task(self) -> int:
        return self.generation // INTERVALS

    @property
    def within(self) -> int:
        """Sixths of the task before it."""
        return self.generation % INTERVALS

    @property
    def outcome(self) -> Outcome | None:
        return read(self.folder)


def read(folder: Path) -> Outcome | None:
    """The outcome of the segment in a folder; None while it has none."""
    try:
        return Outcome(**json.loads((folder / OUTCOME).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise Refused(f"its {OUTCOME} is damaged", where=str(folder),
                      remedy="choose another --out") from None  # fmt: skip


# --- who goes on from whom, and how -------------------------------------------------------------


def first(plan: Plan, member: int) -> Ancestor:
    """A member's rates in the beginning: drawn as a random search draws them, on a log scale."""
    draw = Random(f"holdfast population {plan.seed} {member}").random

    def within(low: float, high: float) -> float:
        return math.exp(math.log(low) + draw() * (math.log(high) - math.log(low)))

    raw = {name: within(MULTIPLIER.low, MULTIPLIER.high) for name in plan.space.shape}
    rate = within(plan.space.rate.low, plan.space.rate.high)
    return Ancestor(member, rate, tuple(plan.space.multipliers(raw)))


def perturbed(donor: Ancestor, member: int, draw: Callable[[], float]) -> Ancestor:
    """A donor's rates, shape and scale apart, for the member that takes its weights.

    draw: numbers from 0 to 1, one for each part and one for the rate; above ½ is 1.2, else 0.8.
    """
    factors = [FACTORS[draw() > 0.5] for _ in donor.multipliers]
    mean = geometric_mean(factors)
    shape = (m * f / mean for m, f in zip(donor.multipliers, factors, strict=True))
    return Ancestor(member, donor.rate * FACTORS[draw() > 0.5], tuple(shape))


def parents(values: Sequence[float | None], draw: Callable[[], float]) -> list[int]:
    """For each member the one whose weights it goes on from.

    Of n members the worst max(1, n / 4), and all that diverged, take from one of as many that are
    the best. Ties go to the earlier one.
    """
    order = sorted(range(len(values)), key=lambda k: (-_known(values[k]), k))
    share = max(1, int(QUANTILE * len(values)))
    best = [k for k in order if values[k] is not None][:share]
    worst = {*order[-share:], *(k for k, v in enumerate(values) if v is None)} - {*best}
    return [best[int(draw() * len(best))] if best and k in worst else k
            for k in range(len(values))]  # fmt: skip


def _known(value: float | None) -> float:
    return -math.inf if value is None else value


def succeed(
    segments: Sequence[Segment], values: Sequence[float | None], seed: int
) -> list[Segment]:
    """The next generation, after one that scored `values`."""
    generation = segments[0].generation + 1
    draw = Random(f"holdfast population {seed} generation {generation}").random
    found = []
    for member, parent in enumerate(parents(values, draw)):
        lineage = segments[parent].lineage
        now = lineage[-1] if parent == member else perturbed(lineage[-1], member, draw)
        found.append(
            Segment(segments[0].population, generation, member, parent, (*lineage, now))
        )  # fmt: skip
    return found


def generations(population: Path, plan: Plan) -> Iterator[list[Segment]]:
    """The segments of each generation, up to the first that has not ended."""
    now = [Segment(population, 0, k, k, (first(plan, k),)) for k in range(plan.population)]
    while True:
        yield now
        found = [outcome for segment in now if (outcome := segment.outcome) is not None]
        if len(found) < len(now) or now[0].generation + 1 >= GENERATIONS:
            return
        now = succeed(now, [outcome.value for outcome in found], plan.seed)


def evolve(
    folder: Path,
    plan: Plan,
    train: Callable[[Segment], Outcome],
    *,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Train every generation, together with other processes; `population.json` tells of each."""
    population = folder / FOLDER
    for segments in generations(population, plan):
        finish(segments, train, look=look)
        keep(folder, plan)
        # Nobody goes on from the generation before any more: its outcomes are all that is left.
        number = segments[0].generation + 1
        stale = [*population.glob(f"{number - 1}/*/*")]
        if number == GENERATIONS:
            stale += population.glob(f"{number}/*/tasks")
        for path in stale:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # another process may be at it too
            elif path.name != OUTCOME:
                path.unlink(missing_ok=True)


# --- what came of it ----------------------------------------------------------------------------


def lives(folder: Path, plan: Plan) -> list[tuple[Segment, list[Outcome]]]:
    """For each member its last segment so far, and how all of its segments ended."""
    known = list(generations(folder / FOLDER, plan))
    return [
        (segment, [o for g in known if (o := g[segment.member].outcome) is not None])
        for segment in known[-1]
    ]


def keep(folder: Path, plan: Plan) -> None:
    """Write `population.json`: for each member the chain of donors and rates that led to it."""
    members = [
        {"trial": len(plan.controls) + segment.member,
         "scores": [outcome.value for outcome in told],
         "lineage": [{"task": i // INTERVALS + 1, "at": f"{i % INTERVALS}/{INTERVALS}",
                      **asdict(ancestor)} for i, ancestor in enumerate(segment.lineage)]}
        for segment, told in lives(folder, plan)
    ]  # fmt: skip
    body = {"kind": "population", "schema": 1, "seed": plan.seed, "quantile": QUANTILE,
            "factors": FACTORS, "members": members}  # fmt: skip
    write_text_atomic(folder / FILE, json.dumps(body, indent=1) + "\n")


def rows(folder: Path, plan: Plan) -> list[TrialRow]:
    """The members as trials, after the controls; rates are geometric means over their lineage."""
    made = []
    for segment, told in lives(folder, plan):
        last = told[-1] if told else Outcome()
        state = "running" if told else "waiting"
        if len(told) == GENERATIONS:
            state = "fail" if last.value is None else "complete"
        rate = geometric_mean(a.rate for a in segment.lineage)
        by_part = zip(*(a.multipliers for a in segment.lineage), strict=True)
        shape = [geometric_mean(each) for each in by_part]
        made.append(TrialRow(
            number=len(plan.controls) + segment.member, state=state, control=None, kind=None,
            params={RATE: rate, **dict(zip(plan.space.shape, shape, strict=True))},
            rate=rate, multipliers=shape, old=last.old, new=last.new, old_after=last.old_after,
            reason=last.reason, steps=sum(o.steps for o in told),
            seconds=round(math.fsum(o.seconds for o in told), 3), attempts=1,
            rungs={i: o.value for i, o in enumerate(told, 1) if o.value is not None},
            lineage=segment.lineage,
        ))  # fmt: skip
    return made


# --- what is asked ------------------------------------------------------------------------------


def check(sampler: str, population: int | None, **others: Any) -> int:
    """How many members; 0 for another sampler. Refuses what does not go with a population.

    others: options by name, empty or None where they were not given.
    """
    if sampler != "pbt":
        if population is not None:
            raise Refused("is of --sampler pbt", where="--population", remedy="leave it out")
        return 0
    for name, value in others.items():
        if value:
            raise Refused("does not go with --sampler pbt", where=f"--{name}",
                          remedy="leave it out")  # fmt: skip
    members = MEMBERS if population is None else population
    if isinstance(members, bool) or not isinstance(members, int) or not 2 <= members <= MOST:
        raise Refused(f"must be a whole number from 2 to {MOST}, not {members!r}",
                      where="--population")  # fmt: skip
    return members


def check_steps(plan: Any, tasks: Sequence[Any]) -> None:
    """Refuse tasks of fewer steps than they have intervals."""
    for task in tasks:
        steps = plan.total(len(task.train))
        if steps < INTERVALS:
            raise Refused(f"{steps} steps, of which a population needs {INTERVALS}",
                          where=task.name, remedy="raise --epochs or --train-size")  # fmt: skip
