"""How much each part's rate decided, by PED-ANOVA over what trials told.

It is computed from the normalised multipliers, not from the raw ones that the sampler drew: raw
multipliers share a factor that no trial feels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.search import storage
from holdfast.search.rows import TrialRow
from holdfast.search.space import RATE, Space
from holdfast.search.trials import part_names

LEAST = 12  # trials, below which shares are not worth showing


class Importance(NamedTuple):
    """Shares that sum to 1 (or nothing), and what they were computed from."""

    shares: Mapping[str, float]
    note: str


def importance(found: Sequence[TrialRow], space: Space) -> Importance:
    """The share of each part, the base rate and the tuned settings.

    Where fewer than `LEAST` trials were finished, what they told at the last rung that as many
    reached is taken in place of their scores.
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
