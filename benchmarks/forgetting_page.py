"""Tables and the picture of benchmarks/forgetting.py: new task against old, per pair and pooled."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import markdown

Run = dict[str, Any]
KEPT = 0.99  # of the old task's score: the target
LEARNED = 0.05  # a score at or below it means that nothing was learned
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#222222"]


class Cell:
    """The runs of one arm on one sequence, a value a seed."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, joint = runs, runs[0]["arm"] == "joint"
        last = [run["scores"][-1] for run in runs]
        self.seeds = [run["seed"] for run in runs]
        self.new = [row[-1] for row in last]
        self.average = [statistics.fmean(row) for row in last]
        self.old = [statistics.fmean(row[:-1] or [math.nan]) for row in last]
        self.kept = [
            1.0 if joint or len(row) == 1 else _kept(run["scores"])
            for run, row in zip(runs, last, strict=True)
        ]


def _kept(scores: list[list[float]]) -> float:
    """Score at the end / just after learning, mean over old tasks that were learned at all."""
    old = [(scores[j][j], scores[-1][j]) for j in range(len(scores) - 1) if scores[j][j] > LEARNED]
    return statistics.fmean(after / before for before, after in old) if old else math.nan


def cells(runs: Sequence[Run]) -> dict[str, dict[str, Cell]]:
    """Sequence → arm → its runs."""
    grouped: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        grouped[run["sequence"]][run["arm"]].append(run)
    return {
        sequence: {arm: Cell(sorted(found, key=lambda r: r["seed"])) for arm, found in arms.items()}
        for sequence, arms in grouped.items()
    }


def same_seeds(arms: dict[str, Cell], arm: str) -> dict[str, Cell]:
    """The arms that ran on all seeds which this one and plain fine-tuning have, on those alone."""
    seeds = {*arms[arm].seeds} & {*arms.get("flat 2e-4", arms[arm]).seeds}
    return {
        name: Cell([run for run in cell.runs if run["seed"] in seeds])
        for name, cell in arms.items()
        if seeds and seeds <= {*cell.seeds}
    }


def rate(arm: str) -> float | None:
    """The rate of plain fine-tuning; None for any other arm, such as "flat 2e-4 + head last"."""
    word, _, value = arm.partition(" ")
    return float(value) if word == "flat" and " " not in value else None


def best_flat(arms: dict[str, Cell], value: str) -> tuple[str, float] | None:
    """The flat rate of the best mean, chosen on the rows it is judged on: a strong control."""
    flat = {a: statistics.fmean(getattr(c, value)) for a, c in arms.items() if rate(a)}
    return max(flat.items(), key=lambda item: item[1]) if flat else None


def learned(arms: dict[str, Cell]) -> bool:
    """Whether there was anything to keep."""
    return not any(math.isnan(kept) for cell in arms.values() for kept in cell.kept)


def tables(runs: Sequence[Run]) -> str:
    """Every sequence, then all pairs and all chains together."""
    found, parts = cells(runs), []
    for kind, tasks in (("Pairs", 2), ("Chains of four", 4), ("Chain of ten", 10)):
        chosen = {s: arms for s, arms in found.items() if s.count(">") + 1 == tasks}
        if chosen:
            parts.append(f"## {kind} together\n\n{_together(chosen)}")
    if alone := {s: arms for s, arms in found.items() if ">" not in s}:
        parts.append(f"## Single tasks together\n\n{_alone(alone)}")
    for sequence, arms in found.items():
        if ">" not in sequence:
            continue
        rows = [
            [arm, len(cell.new), _spread(cell.new), _spread(cell.old),
             _share(cell, arm),
             _spread(cell.average)]
            for arm, cell in arms.items()
        ]  # fmt: skip
        heads = ["arm", "seeds", "new task", "old tasks after", "kept %", "average at the end"]
        parts.append(f"## {sequence}\n\n{markdown(heads, rows)}")
    return "\n\n".join(parts)


def _share(cell: Cell, arm: str) -> str:
    kept = statistics.fmean(cell.kept)
    return "–" if arm == "joint" or math.isnan(kept) else f"{100 * kept:.1f}"


def _together(found: dict[str, dict[str, Cell]]) -> str:
    """Each arm over the sequences it was run on: differences to the best flat rate of like seeds.

    Sequences whose first task was not learned have nothing to keep, and are left out.
    """
    found = {s: a for s, a in found.items() if learned(a)}
    rows = []
    for arm in dict.fromkeys(a for arms in found.values() for a in arms):
        mine = [same_seeds(arms, arm) for arms in found.values() if arm in arms]
        mine = [arms for arms in mine if arms]
        if not mine:
            continue
        gains, kept, ceiling, met, sds = [], [], [], [], []
        for arms in mine:
            cell, flat = arms[arm], best_flat(arms, "new")
            kept.append(statistics.fmean(cell.kept))
            if len(cell.seeds) > 1:
                sds.append(100 * statistics.stdev(cell.average))
            if flat is not None:
                gains.append(statistics.fmean(cell.new) - flat[1])
                met.append(gains[-1] >= 0 and kept[-1] >= KEPT)
            if "joint" in arms:
                ceiling.append(_difference(cell, arms["joint"], "average"))
        rows.append(
            [arm, len(mine), _points(gains), "–" if arm == "joint" else f"{100 * min(kept):.1f}",
             "–" if arm == "joint" else f"{100 * statistics.fmean(kept):.1f}",
             _points(ceiling), f"{statistics.fmean(sds):.1f}" if sds else "–",
             "–" if arm == "joint" else f"{sum(met)} of {len(met)}"]
        )  # fmt: skip
    heads = ["arm", "sequences", "new, beside the best flat rate's (points)", "kept %, least",
             "kept %, mean", "average, beside joint (points)",
             "sd of the average over seeds", "both targets met"]  # fmt: skip
    return markdown(heads, rows)


def _alone(found: dict[str, dict[str, Cell]]) -> str:
    """Each arm on each single task, and over all of them."""
    arms = dict.fromkeys(a for arms in found.values() for a in arms)
    whole = [a for a in arms if all(a in mine for mine in found.values())]
    rows = [
        [task, *(_spread(mine[a].new) if a in mine else "–" for a in arms)]
        for task, mine in found.items()
    ]
    means = {a: statistics.fmean(statistics.fmean(m[a].new) for m in found.values()) for a in whole}
    spreads = {
        a: statistics.fmean(statistics.stdev(m[a].new) for m in found.values())
        for a in whole
        if all(len(m[a].new) > 1 for m in found.values())
    }
    rows.append(["mean", *(f"{means[a]:.3f}" if a in means else "–" for a in arms)])
    rows.append(["mean sd", *(f"{spreads[a]:.3f}" if a in spreads else "–" for a in arms)])
    return markdown(["task", *arms], rows)


def _difference(cell: Cell, other: Cell, value: str) -> float:
    """Mean difference over the seeds that both have."""
    theirs = dict(zip(other.seeds, getattr(other, value), strict=True))
    pairs = [(v, theirs[s]) for s, v in zip(cell.seeds, getattr(cell, value), strict=True)
             if s in theirs]  # fmt: skip
    return statistics.fmean(a - b for a, b in pairs) if pairs else 0.0


def _points(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):+.1f}" if values else "–"


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """A panel a sequence, and one pooled: up is more learned, right is more kept.

    Variants of `default` lie on it, nearly, and are left to the tables.
    """
    from matplotlib.figure import Figure

    found = {s: {n: c for n, c in a.items() if "default" not in a or not _variant(n)}
             for s, a in cells(runs).items()
             if ">" in s and any(map(rate, a)) and learned(a)}  # fmt: skip
    if not found:
        return
    columns = 4
    lines = -(-(len(found) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines + 0.6), layout="constrained")
    others = [a for a in dict.fromkeys(a for arms in found.values() for a in arms)
              if not rate(a) and a != "joint"]  # fmt: skip
    style = {a: {"color": COLOURS[i % len(COLOURS)], "marker": "osD^v<>PX"[i % 9]}
             for i, a in enumerate(others)}  # fmt: skip
    panels = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    pooled = panels.pop(0)
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for axes, (sequence, arms) in zip(panels, found.items(), strict=False):
        flat = best_flat(arms, "new")
        for arm, cell in arms.items() if sequence.count(">") == 1 else ():
            base = flat[1] if flat else 0.0
            sums[arm].append((statistics.fmean(cell.kept), statistics.fmean(cell.new) - base))
        points = {a: (statistics.fmean(c.kept), statistics.fmean(c.new)) for a, c in arms.items()}
        _panel(axes, points, style)
        tasks = sequence.split(">")
        shown = tasks if len(tasks) < 5 else [tasks[0], f"{len(tasks) - 2} more", tasks[-1]]
        axes.set_title(" → ".join(shown), fontsize=8 if len(shown) < 4 else 7)
    every = max(map(len, sums.values()), default=0)
    means = {a: (statistics.fmean(x for x, _ in v), statistics.fmean(y for _, y in v))
             for a, v in sums.items() if len(v) == every}  # fmt: skip
    _panel(pooled, means, style)
    pooled.set_title(f"mean of {every} pairs; up: above the best flat rate", fontsize=8)
    pooled.set_visible(bool(every))
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    handles, labels = [], []
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
    figure.suptitle(
        "up: the new task's score;  right: old tasks' scores after / before", fontsize=9
    )
    figure.savefig(path, metadata={"Date": None})


def _variant(arm: str) -> bool:
    return arm != "default" and arm.startswith("default")


def _panel(axes: Any, points: dict[str, tuple[float, float]], style: dict[str, Any]) -> None:
    flat = sorted((lr, p) for arm, p in points.items() if (lr := rate(arm)))
    axes.plot([p[0] for _, p in flat], [p[1] for _, p in flat], ".-", color="#999999",
              label="flat rates")  # fmt: skip
    for lr, p in flat:
        axes.annotate(f"{lr:g}", p, fontsize=5, color="#777777")
    for arm, p in points.items():
        if arm in style:
            axes.plot(*p, linestyle="", markersize=5, label=arm, **style[arm])
    if "joint" in points:
        axes.axhline(points["joint"][1], color="black", linewidth=0.6, linestyle=":", label="joint")
    axes.axvline(KEPT, color="#bbbbbb", linewidth=0.6)
    axes.tick_params(labelsize=6)
