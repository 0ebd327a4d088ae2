"""Table, picture and shipped costs of benchmarks/step_overhead.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import markdown

from holdfast.methods import METHODS

NAMED = {"dps": "dps-dense-50", "kfac_ewc": "kfac-10"}  # a method's arm, where called otherwise
TARGETS = {"dps-dense-50": 1.05, "dps-dense-5": 1.05, "dps-mix-50": 1.15, "dps-mix-5": 1.15,
           "ewc": 1.03, "l2sp": 1.03}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = (
        "arm", "length", "whole step [95 %]", "mean", "optimizer phase [95 %]", "mean",
        "selection, ms/step", "state, bytes/weight", "forward, bytes/weight", "target",
    )  # fmt: skip
    lines = []
    for r in rows:
        cells = [r["arm"], r["length"]]
        for name in ("whole", "optimizer"):
            s = r[name]
            cells += [f"{s['median']:.3f} [{s['low']:.3f}, {s['high']:.3f}]", s["mean"]]
        cells.append(f"{r['selection']['per_step_ms']:.2f}" if "selection" in r else "")
        cells += [f"{r['bytes_per_weight'][k]:.2f}" for k in ("state", "forward")]
        target = TARGETS.get(r["arm"])
        cells.append(f"≤ {target:.2f}" if target else "")
        lines.append(cells)
    return markdown(heads, lines)


def costs(body: dict[str, Any]) -> dict[str, Any]:
    """What `holdfast methods` shows of a run: a method's ratios at the longest length."""
    named = {arm: name for name, arm in NAMED.items()}
    length = max(body["settings"]["lengths"])
    steps = {}
    for r in body["rows"]:
        name = named.get(r["arm"], r["arm"])
        if name in METHODS and r["length"] == length:
            steps[name] = {key: round(value, 3) for key, value in r["whole"].items()}
    return {
        "command": body["command"],
        "commit": body["commit"],
        "machine": f"{body['device']}, {body['threads']} threads",
        "model": body["settings"]["model"],
        "batch": body["settings"]["batch"],
        "tokens": length,
        "steps": steps,
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Whole-step ratios with their intervals, one panel a length."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths = sorted({r["length"] for r in rows})
    figure, axes = pyplot.subplots(1, len(lengths), sharey=True, squeeze=False,
                                   figsize=(5 * len(lengths), 4), layout="constrained")  # fmt: skip
    for axis, length in zip(axes[0], lengths, strict=True):
        mine = [r for r in rows if r["length"] == length]
        for i, r in enumerate(mine):
            s = r["whole"]
            axis.plot([s["low"], s["high"]], [i, i], color="#4477aa", lw=2)
            axis.plot(s["median"], i, "o", color="#4477aa")
            if r["arm"] in TARGETS:
                axis.plot(TARGETS[r["arm"]], i, "|", color="#cc3311", ms=14)
        axis.axvline(1, color="grey", lw=0.8)
        axis.set(title=f"{length} tokens", xlabel="step time / plain AdamW (red: target)",
                 yticks=range(len(mine)), yticklabels=[r["arm"] for r in mine])  # fmt: skip
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
