"""The pictures of a search: history, rates of the best trials, importance, front, controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.experiments.statistics import mean_spread
from holdfast.report.canvas import Picture, Theme, label, legend, log_axis, name_rows, panel
from holdfast.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST = 10  # trials whose rates are drawn
ENOUGH = 3  # of them, for a mean and a spread
NAMED = 14  # parts that an axis has room to name
SHAPE = (5.2, 3.5)
Body = Mapping[str, Any]
Trials = Sequence[Mapping[str, Any]]


def pictures(body: Body) -> list[Picture]:
    """Every picture for which something was measured, the most telling first."""
    drawers = [controls, history, rates, importance, front]
    return [picture for draw in drawers if (picture := draw(body)) is not None]


def controls(body: Body) -> Picture | None:
    """The final runs: the searched curve and what needs no search, on evaluation rows."""
    shown = body["final"]
    if all(f["mean"] is None for f in shown):
        return None
    flat = next((f["mean"] for f in shown if f["kind"] == "flat"), None)

    def on(axes: Axes, theme: Theme) -> None:
        if flat is not None:
            axes.axvline(flat, color=theme.muted, lw=1, ls=(0, (4, 3)), zorder=1)
        for i, f in enumerate(shown):
            colour = theme.colours[0] if f["kind"] == "searched" else theme.plain
            if f["mean"] is None:
                axes.text(0.02, i, "diverged", transform=axes.get_yaxis_transform(),
                          color=theme.colours[1], va="center")  # fmt: skip
                continue
            axes.plot([f["mean"]] * 2, [i - 0.3, i + 0.3], color=colour, lw=3)
            if f["sd"] is not None:
                axes.errorbar(f["mean"], i, xerr=f["sd"], color=theme.ink, lw=1.2, capsize=3)
            values = [s["new_plus_old"] for s in f["seeds"] if s["new_plus_old"] is not None]
            axes.scatter(values, [i] * len(values), s=22, color=colour, edgecolors=theme.ink,
                         lw=0.6, zorder=3)  # fmt: skip
        name_rows(axes, [f["label"] for f in shown], 24, "new + old score, evaluation rows")
        axes.locator_params(axis="x", nbins=6)

    alt = "; ".join(f"{f['label']} {number(f['mean'])}" for f in shown)
    return Picture(
        "The searched curve and its controls",
        "Fresh seeds, evaluation rows that nothing was chosen on; right is better. Bar: mean, "
        "line: standard deviation, dots: seeds, dashed: the best flat rate.",
        [panel(on, (5.2, max(2.4, 0.9 + 0.5 * len(shown))), None, alt)],
    )


def history(body: Body) -> Picture | None:
    """new + old of every finished trial by number, the best so far, and which were stopped."""
    trials = body["trials"]
    done = _done(trials)
    if not done:
        return None
    tops: list[float] = []
    for t in done:
        tops.append(max(t["value"], tops[-1] if tops else -math.inf))
    last = max(t["number"] for t in trials)

    def on(axes: Axes, theme: Theme) -> None:
        at = [*(t["number"] for t in done), last]
        lines: list[Any] = axes.step(at, [*tops, tops[-1]], where="post", lw=1.3,
                                     color=theme.muted)  # fmt: skip
        names = ["best so far"]
        for group, name, marker, colour in _groups(done, theme):
            points = [t["number"] for t in group], [t["value"] for t in group]
            lines.append(axes.scatter(*points, s=30, marker=marker, color=colour, zorder=3))
            names.append(name)
        # Stopped trials have no such score: they are drawn on the axis, below all scores.
        axes.margins(y=0.14)
        floor = axes.get_xaxis_transform()
        for state, name, marker, colour in (
            ("pruned", "pruned", "x", theme.colours[1]), ("fail", "failed", "v", theme.colours[3]),
        ):  # fmt: skip
            if at := [t["number"] for t in trials if t["state"] == state]:
                low = [0.04] * len(at)
                lines.append(axes.scatter(at, low, s=22, marker=marker, lw=1, color=colour,
                                          transform=floor))  # fmt: skip
                names.append(name)
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel="trial", ylabel="new + old score, selection rows")
        legend(axes, lines, names)

    return Picture(
        "History",
        "Finished trials on selection rows, up is better. Marks on the axis: trials that were "
        "stopped and have no such score.",
        [panel(on, SHAPE, None, f"new + old of {len(done)} finished trials")],
    )


def rates(body: Body) -> Picture | None:
    """The learning rates of the best searched trials, with the best flat rate beside them."""
    parts = body["space"]["parts"]
    won = body.get("winner")  # perhaps not the highest: further seeds may have decided
    done = sorted(_done(body["trials"]), key=lambda t: (t["number"] != won, -t["value"]))
    best = [t for t in done if not t["control"] and len(t["multipliers"] or ()) == len(parts)]
    best = best[:BEST]
    if not best:
        return None
    curves = [[t["rate"] * m for m in t["multipliers"]] for t in best]
    flat = next((t["rate"] for t in done if t["number"] == body.get("best_flat")), None)
    logs = [[math.log(c[i]) for c in curves] for i in range(len(parts))]
    spreads = [mean_spread(column) for column in logs]
    centre = [s.mean or 0.0 for s in spreads]
    off = [s.sd or 0.0 for s in spreads]

    def on(axes: Axes, theme: Theme) -> None:
        places = list(range(len(parts)))
        for curve in curves[1:]:
            axes.plot(places, curve, color=theme.plain, lw=0.9, alpha=0.6)
        lines: list[Any] = axes.plot(places, curves[0], color=theme.colours[1], marker="o", ms=4,
                                     lw=1.6, zorder=3)  # fmt: skip
        names = [f"trial {best[0]['number']}, the best"]
        if len(curves) >= ENOUGH:
            low = [math.exp(c - s) for c, s in zip(centre, off, strict=True)]
            high = [math.exp(c + s) for c, s in zip(centre, off, strict=True)]
            axes.fill_between(places, low, high, color=theme.colours[0], alpha=0.2, lw=0)
            lines += axes.plot(places, [math.exp(c) for c in centre], color=theme.colours[0], lw=2)
            names.append(f"mean of the {len(curves)} best")
        if flat is not None:
            lines.append(axes.axhline(flat, color=theme.ink, lw=1.1, ls=(0, (4, 3))))
            names.append("best flat rate")
        log_axis(axes, [v for c in [*curves, [flat or curves[0][0]]] for v in c])
        shown = places[:: math.ceil(len(parts) / NAMED)]
        axes.set_xticks(shown, [label(parts[i], 14) for i in shown], rotation=35, ha="right")
        axes.set(xlabel="part of the network, from the input to the head", ylabel="learning rate")
        legend(axes, lines, names)

    band = " Shaded: one standard deviation of the logarithm." if len(curves) >= ENOUGH else ""
    return Picture(
        "Rates of the best trials",
        f"Learning rate of each part in the best searched trials, on a log axis.{band}",
        [panel(on, SHAPE, None, f"Learning rates by part of the {len(curves)} best trials")],
    )


def importance(body: Body) -> Picture | None:
    """How much each part's rate mattered; no picture if all trials scored alike."""
    found = body["importance"]
    shares = {k: v for k, v in found["shares"].items() if v is not None}
    if not any(shares.values()):
        return None
    names = list(shares)

    def on(axes: Axes, theme: Theme) -> None:
        axes.barh(range(len(names)), [shares[n] for n in names], height=0.6,
                  color=theme.colours[0], alpha=0.75)  # fmt: skip
        name_rows(axes, names, 20, "share of the importance (all: 1)")

    alt = "; ".join(f"{n} {number(shares[n])}" for n in names)
    return Picture(
        "Importance of each part",
        "PED-ANOVA over the normalised multipliers and the base rate, from "
        f"{found['note']}. Few trials make it rough.",
        [panel(on, (5.2, max(3.0, 0.8 + 0.27 * len(names))), None, alt)],
    )


def front(body: Body) -> Picture | None:
    """New against old afterwards for all finished trials, with the Pareto front joined."""
    done = _done(body["trials"])
    if len(done) < 2:
        return None
    numbers = set(body["front"])
    best = sorted((t for t in done if t["number"] in numbers),
                  key=lambda t: (t["old_after"], -t["new"]))  # fmt: skip
    old, new = (task["metric"] for task in body["tasks"])

    def on(axes: Axes, theme: Theme) -> None:
        handles, names = [], []
        for group, name, marker, colour in _groups(done, theme):
            points = [t["old_after"] for t in group], [t["new"] for t in group]
            handles.append(axes.scatter(*points, s=32, marker=marker, color=colour, zorder=3))
            names.append(name)
        joined, = axes.plot([t["old_after"] for t in best], [t["new"] for t in best], lw=1.4,
                            color=theme.colours[1], marker="o", ms=10, mfc="none", mew=1.4,
                            zorder=2)  # fmt: skip
        axes.set(xlabel=f"old task afterwards ({label(old, 14)}, selection rows)",
                 ylabel=f"new task ({label(new, 14)})")  # fmt: skip
        axes.margins(0.1)
        legend(axes, [*handles, joined], [*names, "front"])

    again = ""
    if body["config"].get("objective") == "pareto":
        again = " Of these, the one of the highest sum was trained again with fresh seeds."
    return Picture(
        "Learned against kept",
        "Finished trials on selection rows; up and right is better. Ringed and joined: those that "
        f"no other beats in both.{again} Trials of equal scores cover each other.",
        [panel(on, SHAPE, None, "New task against old task for all finished trials")],
    )


def _groups(done: Trials, theme: Theme) -> list[tuple[Trials, str, str, str]]:
    """Controls and searched trials, where there are any: trials, name, marker, colour."""
    fixed = [t for t in done if t["control"]]
    searched = [t for t in done if not t["control"]]
    both = [(fixed, "control", "s", theme.plain), (searched, "searched", "o", theme.colours[0])]
    return [group for group in both if group[0]]


def _done(trials: Trials) -> list[Mapping[str, Any]]:
    return [t for t in trials if t["value"] is not None]
