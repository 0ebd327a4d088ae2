"""General ability, as records hold it: before the first task, and after each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.experiments.statistics import Spread, mean_spread
from holdfast.report.facts import RunFacts
from holdfast.report.words import clean, spread_text

# what the first word of a measure says; others are scores of lm_eval
MEANINGS = {
    "nll": "nats a token of the reference text; higher is worse",
    "masked_nll": "nats a masked token of the reference text; higher is worse",
    "kl": "KL(base ‖ model) in nats an answer token of the task just learned; 0: has not moved",
    "cosine_distance": "1 − cos between the base's vectors of the task just learned and the "
    "model's, 0 to 2; 0: has not moved",
}


def general(runs: Sequence[RunFacts]) -> dict[str, list[Spread]]:
    """Each measure at its T + 1 points, over runs of the same T tasks; empty if none was taken."""
    points = [_points(run.body) for run in runs]
    names = dict.fromkeys(name for run in points for point in run for name in point)
    return {
        clean(name): [
            mean_spread(point.get(name) for point in at) for at in zip(*points, strict=True)
        ]
        for name in names
    }


def meaning(measure: str) -> str:
    """What a measure says, in words; empty for scores of lm_eval."""
    return MEANINGS.get(measure.partition(" ")[0], "")


def _points(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Numbers by measure before the first task and after each; of a text by its name and hash."""
    told = body["general"]
    after, text = told.get("after", {}), told.get("reference") or {}
    of = f" of {Path(str(text.get('source'))).name} ({str(text.get('hash'))[:6]})"
    return [
        {name + of if name.endswith("nll") else name: value for name, value in point.items()}
        for point in (told.get("base", {}), *(after.get(t["name"], {}) for t in body["tasks"]))
    ]


def general_lines(run: RunFacts) -> list[str]:
    """`kl before –, after day 0.498, after night 0.627`, a line a measure."""
    when = ["before", *(f"after {clean(task.name, width=28)}" for task in run.tasks)]
    return [
        f"{name} " + ", ".join(f"{w} {spread_text(v)}" for w, v in zip(when, values, strict=True))
        for name, values in general([run]).items()
    ]
