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
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
PANELS = 6  # recipes that a picture has room for
SHAPE = (5.2, 3.5)


def shown(study: Comparison, most: int = PANELS) -> list[GroupFacts]:
    """What a picture has room for: the control, and the best by mean, in the table's order."""

    def rank(group: GroupFacts) -> tuple[bool, float]:
        mean = group.spread[study.main].mean
        return not group.control, math.inf if mean is None else -mean

    ranked = sorted(study.groups, key=rank)
    return [group for group in study.groups if group in ranked[:most]]


Drawers = Sequence[Callable[[Comparison], Picture | None]]


def comparing(study: Comparison) -> list[Picture]:
    """Recipes against each other, the most telling first; none for a single run."""
    if len(study.runs) < 2:
        return []
    return _drawn(study, [tradeoff, sums, forgetting] if len(study.tasks) > 1 else [seed_scores])


def within(study: Comparison) -> list[Picture]:
    """What happened in the runs: by task, by step, by part of the network."""
    alone = len(study.runs) == 1 and len(study.tasks) > 1
    return _drawn(study, [*[forgetting_by_task] * alone, rates, training, movement])


def _drawn(study: Comparison, drawers: Drawers) -> list[Picture]:
    return [picture for draw in drawers if (picture := draw(study)) is not None]


# --- recipes against each other -------------------------------------------------------------------


def tradeoff(study: Comparison) -> Picture | None:
    """New task against old tasks: every run, every setting's mean, those of one recipe joined."""
    groups = [group for group in study.groups if _pairs(group)]
    if not groups:
        return None
    family = _families(study)
    named = {family[group.label] for group in shown(study)}
    apart = [group for group in groups if family[group.label] in named]

    def on(axes: Axes, theme: Theme) -> None:
        style_of, handles = styles(study, theme), {}
        if rest := [pair for group in groups if group not in apart for pair in _pairs(group)]:
            old, new = zip(*rest, strict=True)
            axes.scatter(old, new, s=9, color=theme.muted, alpha=0.35, linewidths=0, zorder=1)
        for group in apart:
            old, new = zip(*_pairs(group), strict=True)
            style = style_of[group.label]
            axes.scatter(old, new, s=20, alpha=0.5, linewidths=0, **style)
            handles[family[group.label]] = axes.scatter(
                *_centre(group), s=80, edgecolors=theme.ink, linewidths=1, zorder=4, **style
            )
        for front in study.fronts:
            if len(front.points) > 1 and front.label in named:
                by_new = [(old, new) for _, new, old in sorted(front.points, key=lambda p: p[1])]
                colour = style_of[front.points[0][0]]["color"]
                axes.plot(*zip(*by_new, strict=True), color=colour, lw=1.3, zorder=3,
                          ls="--" if front.control else "-")  # fmt: skip
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
        legend(axes, list(handles.values()), [label(name, 40) for name in handles])

    joined = any(len(front.points) > 1 for front in study.fronts)
    return Picture(
        "Learned against kept",
        "Score on the new task against the mean score of the old ones afterwards. Small: a seed; "
        "large: the mean of a setting. Up and right is better."
        + " Joined: one recipe at several rates or strengths; dashed: flat rates." * joined
        + " Pale: recipes that are not named here." * (len(apart) < len(groups)),
        [panel(on, (5.2, 3.9), None, "New task against old tasks for every recipe and seed")],
    )


def _families(study: Comparison) -> dict[str, str]:
    """Label of a group -> the recipe that it is a setting of."""
    found = {group.label: group.label for group in study.groups}
    return found | {name: front.label for front in study.fronts for name, _, _ in front.points}


def _pairs(group: GroupFacts) -> list[tuple[float, float]]:
    columns = zip(group.points["old_after"], group.points["new"], strict=True)
    return [(old, new) for old, new in columns if old is not None and new is not None]


def _centre(group: GroupFacts) -> tuple[float, float]:
    pairs = _pairs(group)
    return sum(old for old, _ in pairs) / len(pairs), sum(new for _, new in pairs) / len(pairs)


def sums(study: Comparison) -> Picture | None:
    return _by_recipe(
        study, "new_plus_old", "New plus old",
        "Score on the last task plus the mean of the earlier ones, at the end: what recipes are "
        "judged by. Bar: mean; line: standard deviation; dots: seeds.",
    )  # fmt: skip


def forgetting(study: Comparison) -> Picture | None:
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
    groups = [g for g in shown(study, 2 * PANELS) if g.spread[column].mean is not None]
    if not groups:
        return None
    zero = column == "forgetting"

    def on(axes: Axes, theme: Theme) -> None:
        style_of = styles(study, theme)
        for i, group in enumerate(groups):
            spread, values = group.spread[column], _known(group.points[column])
            mean, colour = spread.mean or 0.0, style_of[group.label]["color"]
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
        measure = study.tasks[-1].metric if column == "new" else title.lower()
        name_rows(axes, [group.label for group in groups], 24, measure)

    left_out = len(study.groups) > 2 * PANELS
    alt = f"{title}: " + "; ".join(f"{g.label} {number(g.spread[column].mean)}" for g in groups)
    return Picture(
        title,
        caption + (" The control and the best recipes; the table has all." * left_out),
        [panel(on, (5.2, max(3.0, 0.8 + 0.5 * len(groups))), None, alt)],
    )


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


# --- each recipe, by steps and by parts -----------------------------------------------------------


def training(study: Comparison) -> Picture | None:
    """Scores on selection rows over training: a colour a task, a dash a seed, a panel a recipe."""
    groups = [g for g in shown(study) if any(run.history for run in g.runs)]
    lines = {g.label: [_lines(run) for run in g.runs] for g in groups}
    known = _known(v for runs in lines.values() for run in runs for ys in run[1] for v in ys)
    if not known:
        return None
    pad = max(0.04 * (max(known) - min(known)), 0.01)
    limits = (min(known) - pad, max(known) + pad)
    names = [label(task.name, 18) for task in study.tasks]

    def draw(group: GroupFacts) -> Callable[[Axes, Theme], None]:
        def on(axes: Axes, theme: Theme) -> None:
            from matplotlib.lines import Line2D

            several = len(group.runs) > 1
            for k, (steps, columns) in enumerate(lines[group.label]):
                for j, values in enumerate(columns):
                    plain = several and len(_known(values)) > 1  # a single score is no line
                    axes.plot(
                        steps, [math.nan if v is None else v for v in values],
                        color=theme.colours[j % len(theme.colours)], ls=DASHES[k % len(DASHES)],
                        marker=None if plain else MARKERS[j % len(MARKERS)], markersize=3.2,
                        lw=1.2 if several else 1.8, alpha=0.85 if several else 1,
                    )  # fmt: skip
            axes.set(xlabel="step", ylabel="score", ylim=limits)
            axes.locator_params(axis="x", integer=True)
            for start in group.runs[0].starts[1:]:
                axes.axvline(start, color=theme.muted, lw=1, ls=(0, (3, 3)), zorder=0)
            handles = [Line2D([], [], color=theme.colours[j % len(theme.colours)])
                       for j in range(len(names))]  # fmt: skip
            seeds = group.seeds[: len(DASHES)] if 1 < len(group.runs) <= len(DASHES) else []
            handles += [Line2D([], [], color=theme.ink, lw=1.1, ls=dash)
                        for dash, _ in zip(DASHES, seeds, strict=False)]  # fmt: skip
            legend(axes, handles, [*names, *(f"seed {seed}" for seed in seeds)])

        return on

    shape = (4.4, 3.1) if len(groups) > 1 else SHAPE
    return Picture(
        "Scores while training",
        "Measured on selection rows"
        + (", one line a seed" if len(study.runs) > len(study.groups) else "")
        + (". A dashed line marks where the next task begins." if len(names) > 1 else "."),
        [panel(draw(g), shape, g.label if len(groups) > 1 else None, f"Training of {g.label}")
         for g in groups],
    )  # fmt: skip


def _lines(run: RunFacts) -> tuple[list[float], list[list[Cell]]]:
    """The steps, and for each task its scores at them."""
    steps = [step for step, _ in run.history]
    return steps, [[scores[j] for _, scores in run.history] for j in range(len(run.tasks))]


def rates(study: Comparison) -> Picture | None:
    """The learning-rate multiplier of every part, on a log axis, where it is not one for all."""
    # recipes with the same curve share a line, in the colour of the first
    curves: list[tuple[list[str], list[Cell], list[int]]] = []
    groups = shown(study)
    for index, group in enumerate(groups):
        curve = group.runs[0].body["rates"]
        if curve and any(value for value in curve["multiplier"]):
            order = [clean(part) for part in curve["order"]]
            same = next((c for c in curves if c[:2] == (order, curve["multiplier"])), None)
            if same is None:
                curves.append((order, curve["multiplier"], [index]))
            else:
                same[2].append(index)
    positive = [v for _, values, _ in curves for v in values if v is not None and v > 0]
    if not any(len({*values}) > 1 for _, values, _ in curves):
        return None
    floor = min(positive) / 4
    names = []
    for _, _, owners in curves:
        more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
        names.append(short(groups[owners[0]].label) + more)
    parts = max((order for order, _, _ in curves), key=len)
    frozen = any(value == 0 for _, values, _ in curves for value in values)

    def on(axes: Axes, theme: Theme) -> None:
        style_of = styles(study, theme)
        for _, values, owners in curves:
            axes.plot(
                range(len(values)), [math.nan if v is None else max(v, floor) for v in values],
                markersize=5, lw=1.8, **style_of[groups[owners[0]].label],
            )  # fmt: skip
        log_axis(axes, [floor if frozen else min(positive), max(positive)])
        _name_parts(axes, parts)
        axes.set_ylabel("times the base rate")
        if len(curves) > 1:
            legend(axes, axes.get_lines(), [label(name, 40) for name in names])

    said = " A frozen part (0) is drawn at the bottom." if frozen else ""
    return Picture(
        "Learning rates by part",
        "Multiplier of the base learning rate, from the embeddings to the head, on a log axis."
        + said,
        [panel(on, SHAPE, None, "Learning-rate multipliers by part of " + ", ".join(names))],
    )


def movement(study: Comparison) -> Picture | None:
    """How far each task took each part: a line a task, a panel a recipe."""
    found = {group.label: _moved(group) for group in shown(study)}
    known = [v for tasks in found.values() for parts in tasks.values() for v in parts.values() if v]
    if not known:
        return None
    limits = [min(known), max(known)]

    def draw(group: GroupFacts) -> Callable[[Axes, Theme], None]:
        def on(axes: Axes, theme: Theme) -> None:
            tasks = found[group.label]
            order: list[str] = max(tasks.values(), key=len, default={}).keys()  # type: ignore[assignment]
            for j, parts in enumerate(tasks.values()):
                axes.plot(
                    range(len(order)), [parts.get(part) or math.nan for part in order],
                    color=theme.colours[j % len(theme.colours)], lw=1.6, markersize=4,
                    marker=MARKERS[j % len(MARKERS)],
                )  # fmt: skip
            log_axis(axes, limits)
            axes.set_ylim(limits[0] / 1.2, limits[1] * 1.2)
            _name_parts(axes, [clean(part) for part in order])
            axes.set_ylabel("‖w − w₀‖ / ‖w₀‖")
            legend(axes, axes.get_lines(), [label(name, 18) for name in tasks])

        return on

    groups = [group for group in shown(study) if any(found[group.label].values())]
    several = len(groups) > 1
    return Picture(
        "How far each part moved",
        "Distance of the weights that tasks share from where each task began, relative to their "
        "size, on a log axis" + (", mean over seeds." if len(study.runs) > len(groups) else "."),
        [panel(draw(g), (4.4, 3.1) if several else SHAPE, g.label if several else None,
               f"Movement of {g.label}") for g in groups],
    )  # fmt: skip


def _moved(group: GroupFacts) -> dict[str, dict[str, float]]:
    """Task -> part -> relative distance, the mean over runs."""
    found: dict[str, dict[str, float]] = {}
    for task in group.runs[0].tasks:
        told = [run.body["movement"].get(task.name, {}).get("parts", {}) for run in group.runs]
        parts = dict.fromkeys(part for each in told for part in each)
        columns = {part: _known(each.get(part) for each in told) for part in parts}
        found[task.name] = {p: sum(values) / len(values) for p, values in columns.items() if values}
    return {task: parts for task, parts in found.items() if parts}


def _name_parts(axes: Axes, parts: Sequence[str]) -> None:
    shown = range(0, len(parts), max(1, math.ceil(len(parts) / 14)))
    axes.set_xticks(list(shown), [label(parts[i], 16) for i in shown], rotation=35, ha="right")


def styles(study: Comparison, theme: Theme) -> dict[str, dict[str, Any]]:
    """Label -> style: grey for the control at every rate, a colour and a shape a recipe else."""
    family, kinds = _families(study), dict[str, dict[str, Any]]()
    first = shown(study)  # so that those of most pictures differ
    others = 0
    for group in [*first, *(g for g in study.groups if g not in first)]:
        if family[group.label] not in kinds:
            others += not group.plain
            colour = theme.colours[(others - 1) % len(theme.colours)]
            kinds[family[group.label]] = {
                "color": theme.plain if group.plain else colour,
                "marker": MARKERS[0 if group.plain else others % len(MARKERS)],
            }
    return {name: kinds[kind] for name, kind in family.items()}


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]
