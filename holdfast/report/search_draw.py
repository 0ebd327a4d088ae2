"""The pictures of a search: history, rates of the best trials, importance, front, controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.report.canvas import Picture, Theme, label, legend, name_rows, panel
from holdfast.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST = 10  # trials whose rates are drawn
SHAPE = (5.2, 3.5)
Trials = Sequence[Mapping[str, Any]]


def pictures(body: Mapping[str, Any]) -> list[Picture]:
    """Every picture for which something was measured, the most telling first."""
    trials = body["trials"]
    drawers = [
        lambda: controls(body["final"]),
        lambda: history(trials),
        lambda: rates(trials, body["space"]["parts"]),
        lambda: importance(body["importance"]),
        lambda: front(trials, body["front"]),
    ]
    return [picture for draw in drawers if (picture := draw()) is not None]


def history(trials: Trials) -> Picture | None:
    """new + old of every finished trial by number, the best so far, and where others ended."""
    done = _done(trials)
    if not done:
        return None
    searched = [t for t in done if not t["control"]]
    fixed = [t for t in done if t["control"]]
    ended = [t["number"] for t in trials if t["state"] in ("pruned", "fail")]
    tops: list[float] = []
    for t in done:
        tops.append(max(t["value"], tops[-1] if tops else -math.inf))

    def on(axes: Axes, theme: Theme) -> None:
        lines: list[Any] = axes.step([t["number"] for t in done], tops, where="post", lw=1.3,
                                     color=theme.muted)  # fmt: skip
        names = ["best so far"]
        for group, name, marker, colour in (
            (fixed, "control", "s", theme.plain), (searched, "searched", "o", theme.colours[0]),
        ):  # fmt: skip
            if group:
                points = [t["number"] for t in group], [t["value"] for t in group]
                lines.append(axes.scatter(*points, s=30, marker=marker, color=colour, zorder=3))
                names.append(name)
        if ended:
            low = min(t["value"] for t in done)
            lines.append(axes.scatter(ended, [low] * len(ended), s=22, marker="x",
                                      color=theme.colours[1], lw=1))  # fmt: skip
            names.append("pruned or failed")
        axes.set(xlabel="trial", ylabel="new + old, selection rows")
        legend(axes, lines, names)

    return Picture(
        "History", "Each finished trial on selection rows. A cross marks a trial that was stopped.",
        [panel(on, SHAPE, None, f"new + old of {len(done)} finished trials")],
    )  # fmt: skip


def rates(trials: Trials, parts: Sequence[str]) -> Picture | None:
    """The learning rates of the best trials: each thin, their geometric mean and spread thick."""
    done = sorted(_done(trials), key=lambda t: -t["value"])[:BEST]
    curves = [[t["rate"] * m for m in t["multipliers"]] for t in done
              if t["multipliers"] and len(t["multipliers"]) == len(parts)]  # fmt: skip
    if not curves:
        return None
    logs = [[math.log(c[i]) for c in curves] for i in range(len(parts))]
    centre = [sum(column) / len(column) for column in logs]
    off = [_deviation(column) for column in logs]

    def on(axes: Axes, theme: Theme) -> None:
        places = range(len(parts))
        for curve in curves[1:]:
            axes.plot(places, curve, color=theme.plain, lw=0.9, alpha=0.6)
        low = [math.exp(c - s) for c, s in zip(centre, off, strict=True)]
        high = [math.exp(c + s) for c, s in zip(centre, off, strict=True)]
        axes.fill_between(list(places), low, high, color=theme.colours[0], alpha=0.2, lw=0)
        mean = [math.exp(c) for c in centre]
        (middle,) = axes.plot(places, mean, color=theme.colours[0], lw=2)
        (top,) = axes.plot(places, curves[0], color=theme.colours[1], marker="o", ms=4, lw=1.6)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xticks(list(places), [label(p, 14) for p in parts], rotation=35, ha="right")
        axes.set_ylabel("learning rate")
        legend(axes, [top, middle], ["the best trial", f"mean of the {len(curves)} best"])

    return Picture(
        "Rates of the best trials",
        "Learning rate of each part, on a log axis. Shaded: one standard deviation of the "
        "logarithm among the best trials; where it is wide, the part decides little.",
        [panel(on, SHAPE, None, f"Learning rates by part of the {len(curves)} best trials")],
    )


def importance(found: Mapping[str, Any]) -> Picture | None:
    """How much each part's rate decided."""
    shares = {k: v for k, v in found["shares"].items() if v is not None}
    if not shares:
        return None
    names = list(shares)

    def on(axes: Axes, theme: Theme) -> None:
        axes.barh(range(len(names)), [shares[n] for n in names], height=0.6,
                  color=theme.colours[0], alpha=0.75)  # fmt: skip
        name_rows(axes, names, 20, "share")

    alt = "; ".join(f"{n} {number(shares[n])}" for n in names)
    return Picture(
        "Importance of each part",
        "PED-ANOVA over the normalised multipliers and the base rate, from "
        f"{found['note']}. Few trials make it rough.",
        [panel(on, (5.2, max(3.0, 0.8 + 0.27 * len(names))), None, alt)],
    )


def front(trials: Trials, numbers: Sequence[int]) -> Picture | None:
    """New against old afterwards for all finished trials; those that none beats in both joined."""
    done = _done(trials)
    if len(done) < 2:
        return None
    best = sorted((t for t in done if t["number"] in set(numbers)), key=lambda t: t["old_after"])

    def on(axes: Axes, theme: Theme) -> None:
        handles, names = [], []
        for control, name, marker, colour in (
            (True, "control", "s", theme.plain), (False, "searched", "o", theme.colours[0]),
        ):  # fmt: skip
            group = [t for t in done if bool(t["control"]) is control]
            if group:
                points = [t["old_after"] for t in group], [t["new"] for t in group]
                handles.append(axes.scatter(*points, s=32, marker=marker, color=colour))
                names.append(name)
        joined, = axes.plot([t["old_after"] for t in best], [t["new"] for t in best],
                            color=theme.colours[1], lw=1.4, zorder=1)  # fmt: skip
        axes.set(xlabel="old task, afterwards", ylabel="new task")
        axes.margins(0.1)
        legend(axes, [*handles, joined], [*names, "front"])

    return Picture(
        "Learned against kept",
        "Finished trials on selection rows; up and right is better. The line joins those that no "
        "other beats in both.",
        [panel(on, SHAPE, None, "New task against old task for all finished trials")],
    )


def controls(final: Sequence[Mapping[str, Any]]) -> Picture | None:
    """The final runs: the searched curve and what needs no search, on evaluation rows."""
    shown = [f for f in final if f["mean"] is not None]
    if not shown:
        return None

    def on(axes: Axes, theme: Theme) -> None:
        for i, f in enumerate(shown):
            colour = theme.colours[0] if f["kind"] == "searched" else theme.plain
            axes.plot([f["mean"]] * 2, [i - 0.3, i + 0.3], color=colour, lw=3)
            if f["sd"] is not None:
                axes.errorbar(f["mean"], i, xerr=f["sd"], color=theme.ink, lw=1.2, capsize=3)
            values = [s["new_plus_old"] for s in f["seeds"] if s["new_plus_old"] is not None]
            axes.scatter(values, [i] * len(values), s=18, color=colour, edgecolors=theme.ink,
                         lw=0.6, zorder=3)  # fmt: skip
        name_rows(axes, [f["label"] for f in shown], 24, "new + old, evaluation rows")

    alt = "; ".join(f"{f['label']} {number(f['mean'])}" for f in shown)
    return Picture(
        "The searched curve and its controls",
        "Fresh seeds, evaluation rows that nothing was chosen on. Bar: mean; line: standard "
        "deviation; dots: seeds.",
        [panel(on, (5.2, max(2.8, 0.9 + 0.5 * len(shown))), None, alt)],
    )


def _done(trials: Trials) -> list[Mapping[str, Any]]:
    return [t for t in trials if t["value"] is not None]


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
