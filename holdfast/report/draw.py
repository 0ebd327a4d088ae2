"""Facts -> pictures: what is drawn, and what its caption says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.experiments.metrics import Cell
from holdfast.report.canvas import Picture, Theme, label, legend, log_axis, name_rows, panel
from holdfast.report.facts import Comparison, GroupFacts, RunFacts
from holdfast.report.words import clean, number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vPX"
PANELS = 8


def pictures(study: Comparison) -> list[Picture]:
    """Every picture for which something was measured, the most telling first."""
    many = len(study.runs) > 1
    single = len(study.tasks) == 1
    drawers: list[Callable[[Comparison], Picture | None]] = []
    if many:
        drawers += [seed_scores] if single else [tradeoff, forgetting_by_recipe]
    if not single:
        drawers.append(matrices)
    drawers.append(training)
    if not many and not single:
        drawers.append(forgetting_by_task)
    drawers.append(rates)
    return [picture for draw in drawers if (picture := draw(study)) is not None]


def matrices(study: Comparison) -> Picture | None:
    """The score matrix of each recipe, learned (down) by tested (across)."""
    groups = [g for g in study.groups if _known(v for row in g.mean_scores for v in row)][:PANELS]
    known = _known(value for g in groups for row in g.mean_scores for value in row)
    if not known:
        return None
    low, high = min(known), max(known)
    pad = max((high - low) * 0.25, 0.02)
    names = [label(task.name, 14) for task in study.tasks]

    def draw(group: GroupFacts) -> Callable[[Axes, Theme], None]:
        only = group.runs[0] if len(group.runs) == 1 else None
        spread = only.noise if only else group.sd_scores

        def on(axes: Axes, theme: Theme) -> None:
            _heat(axes, theme, names, group.mean_scores, spread, (low - pad, high + pad / 4))

        return on

    size = len(names)
    shape = (max(3.4, 1.3 + 0.8 * size), max(2.3, 1.0 + 0.5 * size))
    if len(groups) == 1:
        shape = (max(5.2, shape[0]), max(3.4, shape[1]))
    several = len(groups) > 1
    seeds = any(len(group.runs) > 1 for group in groups)
    below = "Mean over seeds, ± standard deviation." if seeds else "± noise of one score."
    return Picture(
        "What each task scored after each task was learned",
        f"Down: the task just learned; across: the task tested on its evaluation rows. {below} "
        "A dash was not measured.",
        [
            panel(draw(g), shape, g.label if several else None, f"Score matrix of {g.label}")
            for g in groups
        ],
    )


def _heat(
    axes: Axes,
    theme: Theme,
    names: list[str],
    scores: list[list[Cell]],
    spread: list[list[Cell]],
    limits: tuple[float, float],
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.patches import Rectangle

    ramp = LinearSegmentedColormap.from_list("scores", theme.ramp)
    size = len(names)
    for i in range(size):
        for j in range(size):
            value = scores[i][j]
            share = 0.0 if value is None else (value - limits[0]) / (limits[1] - limits[0])
            face = theme.empty if value is None else ramp(share)
            axes.add_patch(Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, facecolor=face, lw=0))
            red, green, blue = to_rgb(face)
            bright = 0.299 * red + 0.587 * green + 0.114 * blue
            ink = theme.muted if value is None else "#10151c" if bright > 0.5 else "#ffffff"
            off = spread[i][j]
            big = 13 if size <= 3 else 10 if size <= 5 else 8
            middle = i + (0.42 if off is not None else 0.5)
            axes.text(
                j + 0.5, middle, number(value), ha="center", va="center", color=ink, fontsize=big,
                fontweight="bold" if i == j else "normal",
            )  # fmt: skip
            if value is not None and off is not None:
                axes.text(
                    j + 0.5, i + 0.74, f"± {number(off)}", ha="center", va="center", color=ink,
                    fontsize=big * 0.66, alpha=0.85,
                )  # fmt: skip
    axes.set(xlim=(0, size), ylim=(size, 0))
    axes.set_xticks([j + 0.5 for j in range(size)], names)
    axes.set_yticks([i + 0.5 for i in range(size)], names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("after learning")
    axes.set_title("tested on", fontsize=9.5, color=theme.muted, pad=6)
    if size > 4:
        axes.tick_params(axis="x", rotation=35)


def training(study: Comparison) -> Picture | None:
    """Scores on selection rows over training, a line a task, a panel a recipe."""
    groups = [g for g in study.groups if any(run.history for run in g.runs)][:PANELS]
    lines = {g.label: [_lines(run) for run in g.runs] for g in groups}
    known = _known(v for runs in lines.values() for run in runs for ys in run[1] for v in ys)
    if not known:
        return None
    pad = max(0.04 * (max(known) - min(known)), 0.01)
    limits = (min(known) - pad, max(known) + pad)
    names = [label(task.name, 18) for task in study.tasks]

    def draw(group: GroupFacts) -> Callable[[Axes, Theme], None]:
        def on(axes: Axes, theme: Theme) -> None:
            for run_, (steps, columns) in enumerate(lines[group.label]):
                for j, values in enumerate(columns):
                    axes.plot(
                        steps, [math.nan if v is None else v for v in values],
                        color=theme.colours[j % len(theme.colours)],
                        marker=MARKERS[j % len(MARKERS)], markersize=3.2,
                        lw=1.8 if len(group.runs) == 1 else 1.2,
                        alpha=1 if len(group.runs) == 1 else 0.75,
                        label=names[j] if run_ == 0 else None,
                    )  # fmt: skip
            axes.set(xlabel="step", ylabel="score", ylim=limits)
            for start in group.runs[0].starts[1:]:
                axes.axvline(start, color=theme.muted, lw=1, ls=(0, (3, 3)), zorder=0)
            handles = axes.get_lines()[: len(names)]
            legend(axes, handles, names)

        return on

    several = len(groups) > 1
    shape = (4.4, 3.1) if several else (5.2, 3.4)
    return Picture(
        "Scores while training",
        "Measured on selection rows"
        + (", one line a seed" if len(study.runs) > len(groups) else "")
        + (". A dashed line marks where the next task begins." if len(names) > 1 else "."),
        [
            panel(draw(g), shape, g.label if several else None, f"Training of {g.label}")
            for g in groups
        ],
    )


def _lines(run: RunFacts) -> tuple[list[float], list[list[Cell]]]:
    """The steps, and for each task its scores at them."""
    steps = [step for step, _ in run.history]
    return steps, [[scores[j] for _, scores in run.history] for j in range(len(run.tasks))]


def rates(study: Comparison) -> Picture | None:
    """The learning-rate multiplier of every part, on a log axis."""
    # recipes with the same curve share a line, in the colour of the first
    curves: list[tuple[list[str], list[Cell], list[int]]] = []
    for index, group in enumerate(study.groups):
        curve = group.runs[0].body["rates"]
        if curve and any(value for value in curve["multiplier"]):
            order = [clean(part) for part in curve["order"]]
            same = next((c for c in curves if c[:2] == (order, curve["multiplier"])), None)
            if same is None:
                curves.append((order, curve["multiplier"], [index]))
            else:
                same[2].append(index)
    if not curves:
        return None
    positive = [v for _, values, _ in curves for v in values if v is not None and v > 0]
    if not positive:
        return None
    floor = min(positive) / 4
    names = []
    for _, _, owners in curves:
        more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
        names.append(short(study.groups[owners[0]].label) + more)
    parts = max((order for order, _, _ in curves), key=len)
    frozen = any(value == 0 for _, values, _ in curves for value in values)

    def on(axes: Axes, theme: Theme) -> None:
        styles = _styles(study.groups, theme)
        for _, values, owners in curves:
            axes.plot(
                range(len(values)), [math.nan if v is None else max(v, floor) for v in values],
                markersize=5, lw=1.8, **styles[owners[0]],
            )  # fmt: skip
        log_axis(axes, [floor if frozen else min(positive), max(positive)])
        every = max(1, math.ceil(len(parts) / 14))
        shown = range(0, len(parts), every)
        axes.set_xticks(list(shown), [label(parts[i], 16) for i in shown], rotation=35, ha="right")
        axes.set_ylabel("times the base rate")
        if len(curves) > 1:
            legend(axes, axes.get_lines(), [label(name, 40) for name in names])

    said = " A frozen part (0) is drawn at the bottom." if frozen else ""
    alt = "Learning-rate multipliers by part of " + ", ".join(names)
    return Picture(
        "Learning rates by part",
        "Multiplier of the base learning rate, from the embeddings to the head, on a log axis."
        + said,
        [panel(on, (5.2, 3.4), None, alt)],
    )


def tradeoff(study: Comparison) -> Picture | None:
    """New task against old tasks: every run, every recipe's mean, the control's rates joined."""
    groups = [g for g in study.groups if _pairs(g)]
    if not groups:
        return None

    def on(axes: Axes, theme: Theme) -> None:
        handles = []
        for group, style in zip(groups, _styles(groups, theme), strict=True):
            old, new = zip(*_pairs(group), strict=True)
            axes.scatter(old, new, s=24, alpha=0.6, linewidths=0, **style)
            handles.append(
                axes.scatter(
                    *_centre(group), s=95, edgecolors=theme.ink, linewidths=1, zorder=3, **style
                )
            )
        plain = sorted((g for g in groups if g.plain), key=_rate)
        if len(plain) > 1:
            centres = [_centre(g) for g in plain]
            axes.plot(*zip(*centres, strict=True), color=theme.plain, lw=1.3, ls="--", zorder=1)
        axes.margins(0.12)
        for (low, high), stretch in (
            (axes.get_xlim(), axes.set_xlim),
            (axes.get_ylim(), axes.set_ylim),
        ):
            widen = max(0.0, 0.02 - (high - low)) / 2  # an axis spans at least two points of score
            stretch(low - widen, high + widen)
        axes.set(xlabel="old tasks, at the end", ylabel="new task")
        axes.annotate(
            "better ↗", (0.985, 0.975), xycoords="axes fraction", ha="right", va="top",
            color=theme.muted, fontsize=8.5,
        )  # fmt: skip
        legend(axes, handles, [label(group.label, 40) for group in groups])

    joined = " Dashed: the control at its rates." if sum(g.plain for g in groups) > 1 else ""
    return Picture(
        "Learned against kept",
        "Score on the new task against the mean score of the old ones afterwards. Small: a seed; "
        "large: a recipe's mean. Up and right is better." + joined,
        [panel(on, (5.2, 3.9), None, "New task against old tasks for every recipe and seed")],
    )


def forgetting_by_recipe(study: Comparison) -> Picture | None:
    return _by_recipe(
        study, "forgetting", "Forgetting",
        "Best earlier score minus the score at the end, mean over old tasks; right of zero is "
        "worse. Bar: mean; line: standard deviation; dots: seeds.",
    )  # fmt: skip


def seed_scores(study: Comparison) -> Picture | None:
    return _by_recipe(
        study, "new", f"Score on {study.tasks[-1].name}",
        "Evaluation rows. Bar: mean; line: standard deviation; dots: seeds.",
    )  # fmt: skip


def _by_recipe(study: Comparison, column: str, title: str, caption: str) -> Picture | None:
    groups = [group for group in study.groups if group.spread[column].mean is not None]
    if not groups:
        return None
    zero = column == "forgetting"

    def on(axes: Axes, theme: Theme) -> None:
        styles = _styles(groups, theme)
        for i, (group, style) in enumerate(zip(groups, styles, strict=True)):
            spread, values = group.spread[column], _known(group.points[column])
            mean, colour = spread.mean or 0.0, style["color"]
            if zero:
                axes.barh(i, mean, height=0.56, color=colour, alpha=0.55)
            else:
                axes.plot([mean] * 2, [i - 0.3, i + 0.3], color=colour, lw=3)
            if spread.sd is not None:
                axes.errorbar(mean, i, xerr=spread.sd, color=theme.ink, lw=1.2, capsize=3)
            rows = [i + 0.16 * (k - (len(values) - 1) / 2) / max(1, len(values)) for k in
                    range(len(values))]  # fmt: skip
            axes.scatter(values, rows, s=16, color=colour, edgecolors=theme.ink, lw=0.6, zorder=3)
        if zero:
            axes.axvline(0, color=theme.muted, lw=1)
        measure = "forgetting" if zero else study.tasks[-1].metric
        name_rows(axes, [group.label for group in groups], 24, measure)

    height = max(3.0, 0.8 + 0.5 * len(groups))
    alt = f"{title}: " + "; ".join(f"{g.label} {number(g.spread[column].mean)}" for g in groups)
    return Picture(title, caption, [panel(on, (5.2, height), None, alt)])


def forgetting_by_task(study: Comparison) -> Picture | None:
    """Of one run: what each old task lost, with the noise of its score."""
    tasks = [task for task in study.tasks if task.forgetting is not None]
    if not tasks:
        return None

    def on(axes: Axes, theme: Theme) -> None:
        for i, task in enumerate(tasks):
            colour = theme.colours[study.tasks.index(task) % len(theme.colours)]
            axes.barh(
                i, task.forgetting or 0, height=0.5, color=colour, alpha=0.75, xerr=task.noise,
                error_kw={"ecolor": theme.ink, "lw": 1.2, "capsize": 3},
            )  # fmt: skip
        axes.axvline(0, color=theme.muted, lw=1)
        name_rows(axes, [task.name for task in tasks], 20, "forgetting")

    alt = "Forgetting: " + "; ".join(f"{task.name} {number(task.forgetting)}" for task in tasks)
    return Picture(
        "Forgetting by task",
        "Best earlier score minus the score at the end; right of zero is worse. The line is the "
        "noise of the last score.",
        [panel(on, (5.2, max(3.0, 1.0 + 0.55 * len(tasks))), None, alt)],
    )


def _pairs(group: GroupFacts) -> list[tuple[float, float]]:
    columns = zip(group.points["old_after"], group.points["new"], strict=True)
    return [(old, new) for old, new in columns if old is not None and new is not None]


def _centre(group: GroupFacts) -> tuple[float, float]:
    pairs = _pairs(group)
    return sum(old for old, _ in pairs) / len(pairs), sum(new for _, new in pairs) / len(pairs)


def _rate(group: GroupFacts) -> float:
    rate = group.settings.get("lr")
    return float(rate) if isinstance(rate, int | float) else math.inf


def _styles(groups: Sequence[GroupFacts], theme: Theme) -> list[dict[str, Any]]:
    """Grey for the control at every rate, a colour and a shape for each other recipe."""
    styles, plain, other = [], 0, 0
    for group in groups:
        index = plain if group.plain else other + 1
        colour = theme.plain if group.plain else theme.colours[other % len(theme.colours)]
        styles.append({"color": colour, "marker": MARKERS[index % len(MARKERS)]})
        plain, other = plain + group.plain, other + (not group.plain)
    return styles


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]
