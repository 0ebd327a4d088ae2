"""The trials of a study as plain rows: what reports, files and choices are made from.

The importance of each part's rate is computed by PED-ANOVA, from the normalised multipliers and not
the raw ones that the sampler drew: those share a factor that has no effect.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.experiments.statistics import mean_spread
from holdfast.search import storage
from holdfast.search.space import RATE, Ancestor, Space
from holdfast.search.trials import Trial, part_names

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

CONFIRMS = "confirms"  # what a trial that trains another again is marked with: its number
LEAST = 12  # trials, below which shares of importance are not worth showing


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial. Scores are on selection rows, None where they were not reached."""

    number: int
    state: str
    control: str | None  # its label; None: searched
    kind: str | None  # of a control: flat, layer_decay, bertcl
    params: Mapping[str, float]
    rate: float | None
    multipliers: list[float] | None  # (parts,), geometric mean 1
    old: float | None
    new: float | None
    old_after: float | None
    reason: str | None  # why it was pruned or failed
    steps: int | None
    seconds: float | None
    attempts: int
    rungs: Mapping[int, float] = field(default_factory=dict)  # rung → the value reported there
    replicates: Sequence[Mapping[str, Any]] = ()
    confirming: Sequence[Mapping[str, Any]] = ()  # its runs with further selection seeds
    lineage: tuple[Ancestor, ...] = ()  # of a population's member: params are the mean over it

    @property
    def value(self) -> float | None:
        """new + old after, the mean over replicates."""
        if self.state != "complete" or self.new is None or self.old_after is None:
            return None
        return self.new + self.old_after

    @property
    def further(self) -> dict[int, float]:
        """new + old after of each further seed that it was trained to the end with."""
        return {r["seed"]: r["new"] + r["old_after"] for r in self.confirming
                if r["state"] == "complete"}  # fmt: skip

    @property
    def by_seed(self) -> dict[int, float]:
        """new + old after of each selection seed."""
        return {r["seed"]: r["new"] + r["old_after"] for r in self.replicates} | self.further

    @property
    def rank(self) -> tuple[int, float, int]:
        """The larger the better: how many further seeds, the mean over all seeds, the earlier.

        Further seeds are the same for all that have some, and only the best trials have: these
        come before all others. One that diverged with a seed has fewer than the rest of them.
        """
        seeds = len(self.replicates) or 1
        total = seeds * (self.value or 0.0) + math.fsum(self.further.values())
        return len(self.further), total / (seeds + len(self.further)), -self.number

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        body = asdict(self)
        body["rungs"] = {str(k): v for k, v in self.rungs.items()}
        if self.lineage:
            body["lr"] = self.lineage[0].rate  # which its recipe is relative to
        else:
            del body["lineage"]
        return {**body, "value": self.value, "mean": None if self.value is None else self.rank[1]}


def row(trial: FrozenTrial, space: Space) -> TrialRow:
    """The row of a trial of Optuna's."""
    told = trial.user_attrs
    params = {k: float(v) for k, v in trial.params.items()}
    params = params or {k: float(v) for k, v in trial.system_attrs.get("fixed_params", {}).items()}
    whole = space.ranges.keys() <= params.keys()
    return TrialRow(
        number=trial.number, state=trial.state.name.lower(), control=told.get("control"),
        kind=told.get("kind"), params=params, rate=params.get(RATE),
        multipliers=space.multipliers(params) if whole else None,
        old=_known(told.get("old")), new=_known(told.get("new")),
        old_after=_known(told.get("old_after")), reason=told.get("reason"),
        steps=told.get("steps"), seconds=told.get("seconds"),
        attempts=int(told.get("attempts", 0)),
        rungs={int(k): float(v) for k, v in sorted(trial.intermediate_values.items())},
        replicates=told.get("replicates", ()),
    )  # fmt: skip


def rows(trials: Iterable[FrozenTrial], space: Space) -> list[TrialRow]:
    """All trials by number, each with the runs that confirm it."""
    made: dict[int, TrialRow] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        one, told = row(trial, space), trial.user_attrs
        if CONFIRMS not in told:
            made[trial.number] = one
            continue
        keys = ("number", "state", "new", "old", "old_after", "steps", "seconds", "reason")
        again = {"seed": told["seed"], **{key: getattr(one, key) for key in keys}}
        of = made[told[CONFIRMS]]
        made[of.number] = replace(of, confirming=(*of.confirming, again))
    return list(made.values())


def best_of(found: Iterable[TrialRow], count: int) -> list[TrialRow]:
    """The finished trials of the highest new + old before any was confirmed, ties by number."""
    known = [r for r in found if r.value is not None]
    return sorted(known, key=lambda r: (-(r.value or 0.0), r.number))[:count]


def best(found: Iterable[TrialRow], *, kind: str | None = None) -> TrialRow | None:
    """The finished trial of the highest `rank`: where none was confirmed, of new + old.

    kind: among the controls of a kind only.
    """
    known = [r for r in found if r.value is not None and kind in (None, r.kind)]
    return max(known, key=lambda r: r.rank, default=None)


def noise(found: Iterable[TrialRow]) -> float | None:
    """The standard deviation of new + old over further seeds, pooled over the trials k::

        sqrt( Σ_k Σ_s (v_ks - mean_s v_ks)^2 / Σ_k (n_k - 1) )

    Nothing was chosen by these seeds; by the others the trials were, which would widen it.
    """
    spreads = [mean_spread(r.further.values()) for r in found]
    free = sum(s.n - 1 for s in spreads if s.sd is not None)
    if not free:
        return None
    return math.sqrt(math.fsum((s.n - 1) * s.sd**2 for s in spreads if s.sd is not None) / free)


def front(found: Iterable[TrialRow]) -> list[TrialRow]:
    """The finished trials on the Pareto front of both scores, sorted by the new task's."""
    known = [r for r in found if r.value is not None]

    def beaten(r: TrialRow) -> bool:
        mine = (r.new or 0.0, r.old_after or 0.0)
        theirs = [(o.new or 0.0, o.old_after or 0.0) for o in known]
        return any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in theirs)

    return sorted((r for r in known if not beaten(r)), key=lambda r: (r.new or 0.0, r.number))


def as_trials(found: Iterable[TrialRow], space: Space) -> list[Trial]:
    """For `trials.csv`; a trial that was not drawn yet has no line."""
    made = []
    for r in found:
        if r.multipliers is None:
            continue
        tuned = {name: r.params[name] for name in space.tuned}
        extra = {"control": r.control, "reason": r.reason, "rate": r.rate, "seconds": r.seconds,
                 **tuned}  # fmt: skip
        made.append(
            Trial(number=r.number, state=r.state, old=r.old, new=r.new, old_after=r.old_after,
                  steps=r.steps, lr=space.lr(r.params), extra=extra)
        )  # fmt: skip
    return made


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class Importance(NamedTuple):
    """Shares that sum to 1 (or nothing), and what they were computed from."""

    shares: Mapping[str, float]
    note: str


def importance(found: Sequence[TrialRow], space: Space) -> Importance:
    """The share of each part, the base rate and the tuned settings.

    With fewer than `LEAST` finished trials, the values at the last rung that at least `LEAST`
    trials reached are used instead of their scores.
    """
    usable = [r for r in found if r.multipliers is not None and r.rate is not None]
    done = [(r, r.value) for r in usable if r.value is not None]
    note = f"new + old of {len(done)} finished trials"
    if len(done) < LEAST:
        reached = Counter(rung for r in usable for rung in r.rungs)
        rungs = [rung for rung, count in reached.items() if count >= LEAST]
        if not rungs:
            return Importance({}, f"fewer than {LEAST} trials: nothing to compute it from")
        last = max(rungs)
        done = [(r, r.rungs[last]) for r in usable if last in r.rungs]
        note = f"what {len(done)} trials told at rung {last}, since few were finished"
    columns = _columns([r for r, _ in done], space)
    moved = {name: values for name, values in columns.items() if max(values) > min(values)}
    shares = dict.fromkeys(columns, 0.0)
    if moved and len({value for _, value in done}) > 1:
        shares |= _ped_anova(moved, [value for _, value in done])
    return Importance(shares, note)


def _columns(found: Sequence[TrialRow], space: Space) -> dict[str, list[float]]:
    names = part_names(space.parts)
    columns = {
        name: [(r.multipliers or [])[i] for r in found] for i, name in enumerate(names)
    }  # fmt: skip
    columns["base rate"] = [r.params[RATE] for r in found]
    return columns | {name: [r.params[name] for r in found] for name in space.tuned}


def _ped_anova(columns: Mapping[str, list[float]], values: Sequence[float | None]) -> Any:
    optuna = storage.optuna()
    study = optuna.create_study(direction="maximize")
    ranges = {
        name: optuna.distributions.FloatDistribution(
            min(column), max(column), log=min(column) > 0
        )
        for name, column in columns.items()
    }  # fmt: skip
    for i, value in enumerate(values):
        params = {name: column[i] for name, column in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    found = optuna.importance.get_param_importances(study)
    return {name: float(share) for name, share in found.items()}
