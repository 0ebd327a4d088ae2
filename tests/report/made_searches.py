"""The facts of a search as `search.json` holds them, made by hand."""

from __future__ import annotations

from typing import Any

PARTS = ["embeddings", "point.1", "point.2", "head"]
FLAT = [5e-4, 1e-3, 2e-3]
CURVE = [0.5, 1.0, 1.0, 2.0]


def trial(number: int, value: float | None = None, **more: Any) -> dict[str, Any]:
    """A searched trial: finished where it has a value, else pruned."""
    usual: dict[str, Any] = {
        "number": number, "state": "pruned" if value is None else "complete", "control": None,
        "kind": None, "params": {"rate": 1e-3}, "rate": 1e-3, "multipliers": list(CURVE),
        "old": 0.9, "new": value and value / 2 - 0.01 * (number % 3),
        "old_after": value and value / 2 + 0.01 * (number % 3),
        "reason": None, "steps": 60, "seconds": 1.0, "attempts": 1, "rungs": {"1": 0.5},
        "replicates": [], "value": value,
    }  # fmt: skip
    return {**usual, **more}


def control(number: int, value: float | None, rate: float, kind: str = "flat") -> dict[str, Any]:
    name = f"flat@{rate:g}" if kind == "flat" else kind
    return trial(number, value, control=name, kind=kind, rate=rate, multipliers=[1.0] * 4)


def final(label: str, kind: str, *values: float | None) -> dict[str, Any]:
    """A contender with a value for each of the seeds 1, 2, …; None: it diverged."""
    known = [v for v in values if v is not None]
    mean = sum(known) / len(known) if known else None
    body: dict[str, Any] = {
        "label": label, "kind": kind, "trial": 0, "rate": 1e-3, "params": {}, "steps": 1440,
        "seeds": [{"seed": i + 1, "new": v and v / 2, "old": 0.9, "old_after": v and v / 2,
                   "new_plus_old": v, "steps": 60, "reason": None if v else "diverged"}
                  for i, v in enumerate(values)],
        "mean": mean, "sd": None if mean is None else 0.02,
    }  # fmt: skip
    for key in ("new", "old", "old_after"):
        body |= {f"{key}_mean": mean and mean / 2, f"{key}_sd": body["sd"]}
    return body


def task(name: str, **more: Any) -> dict[str, Any]:
    rows = {"train": 960, "selection": 107, "evaluation": 500}
    return {"name": name, "metric": "accuracy", "labels": ["no", "yes"], "rows": rows,
            "source": f"data/{name}", "synthetic": False, "warnings": [], **more}  # fmt: skip


def search(trials: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """Three flat rates, two shapes and five searched trials, one pruned; trial 7 won."""
    if trials is None:
        trials = [control(i, 1.3 + (i == 1) / 10, rate) for i, rate in enumerate(FLAT)]
        trials += [control(3, 1.35, 1e-3, "layer_decay"), control(4, 1.36, 1e-3, "bertcl")]
        trials += [trial(5, 1.38), trial(6), trial(7, 1.5), trial(8, 1.2), trial(9, 1.45)]
    done = sorted((t for t in trials if t["value"]), key=lambda t: -t["value"])
    flats = [t for t in done if t["kind"] == "flat"]
    states = [t["state"] for t in trials]
    finals = [final("trial 7", "searched", 1.45, 1.46, 1.45),
              final("flat@0.001", "flat", 1.40, 1.42, 1.41),
              final("bertcl@0.001", "bertcl", 1.41, 1.40, 1.43)]  # fmt: skip
    usual: dict[str, Any] = {
        "schema": 1, "kind": "search", "commit": None, "versions": {"torch": "2"},
        "command": ["holdfast", "search"], "model": "minilm",
        "study": {"name": "s", "title": "t", "storage": "sqlite:///study.db"},
        "tasks": [task("trec6"), task("sst2")], "shift": {"shift": "task"},
        "config": {"shift": "task", "settings": {"epochs": 2}, "sampler": "tpe",
                   "rungs": [1 / 6, 2 / 3, 1], "pruner": "halving", "objective": "new_plus_old",
                   "replicates": 1, "seed": 0,
                   "flat": FLAT, "tune": []},
        "space": {"parts": PARTS, "layers": 6, "rate": [2.5e-4, 4e-3], "multiplier": [0.1, 10.0],
                  "tuned": {}},
        "planned": len(trials), "trials": trials,
        "counts": {s: states.count(s) for s in ("complete", "pruned", "fail", "running")},
        "reasons": {"pruned at rung 1": states.count("pruned")} if "pruned" in states else {},
        "winner": done[0]["number"] if done else None,
        "best_flat": flats[0]["number"] if flats else None,
        "front": [t["number"] for t in done[:2]],
        "importance": {"shares": {"embeddings": 0.7, "head": 0.3}, "note": "12 finished trials"},
        "final": finals,
        "gain": {"verdict": "gain", "mean": 0.043, "low": 0.029, "high": 0.058, "n": 3, "p": 0.25,
                 "sentence": "Gain: trial 7 reaches new + old 1.453 ± 0.020 over 3 fresh seeds; "
                             "difference +0.043, 95 % interval [+0.029, +0.058]."},
        "steps": {"spent": 12345, "share": 0.53, "final": 1440, "seconds": 9.0},
    }  # fmt: skip
    return {**usual, **more}


def only_controls() -> dict[str, Any]:
    """All searched trials were no better than one answer; a flat rate is the best."""
    trials = [control(i, 1.0 - i / 10, rate) for i, rate in enumerate(FLAT)]
    trials += [trial(i, reason="collapsed: 0.2 on task one") for i in range(3, 9)]
    sentence = "No gain: of all trials the flat rate 0.0005 did best on selection rows."
    finals = [final("flat@0.0005", "flat", 1.0, 1.0, 1.0)]
    return search(trials, reasons={"collapsed": 6}, final=finals,
                  gain={"verdict": "no gain", "sentence": sentence})  # fmt: skip


def nothing() -> dict[str, Any]:
    """No trial was finished."""
    sentence = "No flat control was finished: there is nothing to compare with."
    trials = [trial(i, state="fail", multipliers=None) for i in range(4)]
    return search(trials, final=[], gain={"verdict": "not measured", "sentence": sentence},
                  importance={"shares": {}, "note": "fewer than 12 trials"},
                  steps={"spent": 0, "share": None, "final": 0},
                  reasons={"diverged": 4})  # fmt: skip
