"""Tables and the picture of benchmarks/low_resource.py: each method beside plain's best rate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import markdown

from holdfast.experiments.statistics import paired_difference

Run = dict[str, Any]
Cells = dict[str, dict[str, dict[int, Run]]]  # task → arm → seed → the run at the arm's best rate
CONTROL = "plain"


def best(runs: Sequence[Run]) -> Cells:
    """The runs of each arm and task at the rate of the best mean score on selection rows.

    Only rates that were run on every seed of the arm's compete.
    """
    grouped: dict[tuple[str, str], dict[float, dict[int, Run]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for run in runs:
        grouped[run["task"], run["arm"]][run["lr"]][run["seed"]] = run
    found: Cells = defaultdict(dict)
    for (task, arm), rates in grouped.items():
        most = max(len(seeds) for seeds in rates.values())
        whole = [seeds for seeds in rates.values() if len(seeds) == most]
        found[task][arm] = max(
            whole, key=lambda seeds: statistics.fmean(r["selection"] or 0 for r in seeds.values())
        )
    return found


def tables(runs: Sequence[Run]) -> str:
    """Each size, all its tasks together and one by one; then out of domain."""
    found, parts = best(runs), []
    sizes: dict[str, Cells] = defaultdict(dict)
    for task, arms in found.items():
        sizes[task.partition("@")[2]][task] = arms
    for size in sorted(sizes, key=int):
        title = f"{int(size):,} rows"
        parts.append(f"## {title}\n\n{_together(sizes[size])}\n\n{_each(sizes[size])}")
    away = {
        f"{task} → {other}": {
            arm: {
                s: r | {"score": r["elsewhere"][other], "constant": 0.0} for s, r in seeds.items()
            }
            for arm, seeds in arms.items()
        }
        for task, arms in found.items()
        for other in next(iter(next(iter(arms.values())).values())).get("elsewhere", ())
    }
    if away:
        parts.append(f"## Out of domain\n\n{_together(away)}\n\n{_each(away)}")
    return "\n\n".join(parts)


def gains(cells: Cells, arm: str) -> dict[str, dict[int, float]]:
    """Points above plain at its best rate, by task and seed, where both were run."""
    found = {}
    for task, arms in cells.items():
        ours, plain = arms.get(arm, {}), arms.get(CONTROL, {})
        both = {s: 100 * (_score(ours[s]) - _score(plain[s])) for s in ours.keys() & plain.keys()}
        if both:
            found[task] = both
    return found


def over_seeds(found: Mapping[str, Mapping[int, float]]) -> Any:
    """The mean over tasks by seed, of the seeds that all tasks have, as a paired difference."""
    shared = set.intersection(*({*seeds} for seeds in found.values()))
    means = {s: statistics.fmean(seeds[s] for seeds in found.values()) for s in sorted(shared)}
    return paired_difference(means, dict.fromkeys(means, 0.0)) if means else None


def _together(cells: Cells) -> str:
    rows = []
    for arm in dict.fromkeys(a for arms in cells.values() for a in arms):
        found = gains(cells, arm)
        if not found:
            continue
        mine = [{s: cells[t][arm][s] for s in seeds} for t, seeds in found.items()]
        sds = [100 * statistics.stdev(map(_score, r.values())) for r in mine if len(r) > 1]
        plain = [
            statistics.stdev([_score(cells[t][CONTROL][s]) for s in seeds]) * 100
            for t, seeds in found.items() if len(seeds) > 1
        ]  # fmt: skip
        failed = sum(_failed(r) for runs in mine for r in runs.values())
        count = sum(map(len, mine))
        mean = 100 * statistics.fmean(statistics.fmean(map(_score, r.values())) for r in mine)
        seconds = statistics.fmean(r["seconds"] for runs in mine for r in runs.values())
        theirs = statistics.fmean(
            cells[t][CONTROL][s]["seconds"] for t, seeds in found.items() for s in seeds
        )
        rows.append([
            arm, len(found), count, f"{mean:.1f}",
            _interval(over_seeds(found)) if arm != CONTROL else "–",
            f"{statistics.fmean(sds):.1f} ({statistics.fmean(plain):.1f})" if sds else "–",
            failed, f"{seconds:.0f} ({seconds / theirs:.2f})",
        ])  # fmt: skip
    heads = ["arm", "tasks", "runs", "mean score × 100", "beside plain's best rate (points)",
             "sd over seeds (plain's)", "failed", "seconds a run (of plain's)"]  # fmt: skip
    return markdown(heads, rows)


def _each(cells: Cells) -> str:
    arms = dict.fromkeys(a for mine in cells.values() for a in mine)
    rows = [
        [arm, *(_cell(mine[arm]) if arm in mine else "–" for mine in cells.values())]
        for arm in arms
    ]
    return markdown(["arm", *(t.partition("@")[0] if "→" not in t else t for t in cells)], rows)


def _cell(seeds: Mapping[int, Run]) -> str:
    scores = [100 * _score(run) for run in seeds.values()]
    deviation = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.1f}{deviation}, {next(iter(seeds.values()))['lr']:g}"


def _score(run: Run) -> float:
    return run["score"] or 0.0  # a correlation with a constant is none


def _failed(run: Run) -> bool:
    return _score(run) <= run["constant"]


def _interval(found: Any) -> str:
    if found is None or found.mean is None:
        return "–"
    if found.low is None:
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def draw(runs: Sequence[Run], path: Path) -> None:
    """A line an arm: its points above plain's best rate, with the interval over seeds."""
    from matplotlib.figure import Figure

    found = best(runs)
    sizes = sorted({int(task.partition("@")[2]) for task in found})
    if not sizes:
        return
    arms = [a for a in dict.fromkeys(r["arm"] for r in runs) if a != CONTROL]
    figure = Figure(figsize=(3.6 * len(sizes) + 1.5, 0.26 * len(arms) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(panels, sizes, strict=True):
        cells = {t: a for t, a in found.items() if t.endswith(f"@{size}")}
        for line, arm in enumerate(arms):
            mine = gains(cells, arm)
            told = over_seeds(mine) if mine else None
            if told is None:
                continue
            if told.low is not None:
                axes.plot([told.low, told.high], [line, line], color="#4477aa", linewidth=1.5)
            axes.plot(told.mean, line, "o", color="#4477aa", markersize=4)
        axes.axvline(0, color="black", linewidth=0.7)
        axes.set_title(f"{size:,} rows, {len(cells)} tasks", fontsize=9)
        axes.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(arms)), arms, fontsize=7)
    panels[0].invert_yaxis()
    figure.supxlabel("points beside plain at its best rate; bars: 95 % over seeds", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
