"""General ability, as records hold it: before the first task, and after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.experiments.statistics import Spread, mean_spread
from holdfast.report.canvas import Picture, Theme, label, legend, panel
from holdfast.report.draw import SHAPE, shown, styles
from holdfast.report.facts import Comparison, RunFacts
from holdfast.report.words import clean, spread_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def by_recipe(study: Comparison) -> dict[str, dict[str, list[Spread]]]:
    """Measure -> label of a recipe -> its values at the T + 1 points."""
    found: dict[str, dict[str, list[Spread]]] = {}
    for group in shown(study):
        for measure, values in general(group.runs).items():
            found.setdefault(measure, {})[group.label] = values
    return found


def draw(study: Comparison) -> Picture | None:
    """Each measure before the first task and after each: a panel a measure, a line a recipe."""
    found = by_recipe(study)
    if not found:
        return None
    when = ["before", *(label(task.name, 16) for task in study.tasks)]

    def drawer(lines: dict[str, list[Spread]]) -> Callable[[Axes, Theme], None]:
        def on(axes: Axes, theme: Theme) -> None:
            style_of = styles(study, theme)
            for name, values in lines.items():
                mean = [math.nan if v.mean is None else v.mean for v in values]
                axes.errorbar(range(len(mean)), mean, yerr=[v.sd or 0 for v in values], lw=1.6,
                              capsize=3, markersize=5, label=label(name, 40),
                              **style_of[name])  # fmt: skip
            axes.set_xticks(range(len(when)), when, rotation=25, ha="right")
            axes.margins(0.08)
            if len(lines) > 1:
                legend(axes, *axes.get_legend_handles_labels())

        return on

    return Picture(
        "General ability",
        "Before the first task and after each. The table says what each number is. Line: the mean; "
        "bar: standard deviation over seeds.",
        [panel(drawer(lines), SHAPE, measure, f"{measure} before and after each task")
         for measure, lines in found.items()],
    )  # fmt: skip
