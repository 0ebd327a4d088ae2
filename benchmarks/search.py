"""Searched rates beside what needs no search, and beside EWC and replay.

    python benchmarks/search.py --quick --json docs/results/search-quick.json

For every pair of tasks a search; then the winner, its ablation, the best flat rate, layer decay,
`bertcl`, EWC and replay with the same fresh seeds on evaluation rows, all at the best flat rate
except the winner and its ablation. --full also fuses the pairs' curves and tries the result on a
fifth pair. Writes the JSON, and beside it the table (.md) and pictures (.svg). Everything is kept
under --runs: the same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import DATA, markdown, need_data, save

from holdfast.experiments.compare import compare
from holdfast.experiments.statistics import Difference, mean_spread
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.report.search import differences
from holdfast.report.search_draw import pictures
from holdfast.search.combine import combine
from holdfast.search.run import search
from holdfast.tasks.task import slug

QUICK = ("trec6:sst2", "sst2:trec6")
FULL = (*QUICK, "ag_news:sst2", "trec6:mrpc")
FIFTH = "mrpc:trec6"
BESIDE = ("ewc", "replay")
FINALS = 4 + len(BESIDE)  # winner, flat, layer decay, bertcl
BATCH = 16
SECONDS = 0.45  # a step on one of two cores, as measured; for the estimate of hours


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """The training settings of every run, and the number of trials."""
    if chosen.tiny:
        return {"train_size": 96, "epochs": 2.0, "max_length": 32, "evaluation_size": 60,
                "selection": 40, "trials": 9, "flat": [1e-4, 2e-4]}  # fmt: skip
    size, trials = (960, 50) if chosen.full else (480, 24)
    return {"train_size": size, "epochs": 2.0, "max_length": 64, "evaluation_size": 600,
            "selection": 200, "trials": trials}  # fmt: skip


def estimate(chosen: argparse.Namespace, runs: int) -> str:
    """What `runs` runs of two tasks cost at most, in words."""
    made = settings(chosen)
    steps = 2 * math.ceil(math.ceil(made["train_size"] / BATCH) * made["epochs"])
    hours = runs * steps * SECONDS / 3600 / chosen.workers
    return (f"at most {runs * steps:,} training steps, {steps} a run; at {SECONDS} s a step "
            f"{hours:.1f} h by {chosen.workers} workers")  # fmt: skip


def paths(pair: str) -> list[str]:
    return [str(DATA / name) if (DATA / name).exists() else name for name in pair.split(":")]


def folder(chosen: argparse.Namespace, pair: str) -> Path:
    """Where the search of a pair is kept."""
    return Path(chosen.runs) / slug(pair.replace(":", "-"))


def one_pair(pair: str, chosen: argparse.Namespace, curve: Path | None = None) -> dict[str, Any]:
    """A search, then EWC and replay (and a curve found elsewhere) at the best flat rate."""
    made = settings(chosen)
    out = folder(chosen, pair)
    body = search("minilm", paths(pair), out=out, workers=chosen.workers, seed=chosen.seed,
                  fresh=chosen.seeds, command=sys.argv, **made)  # fmt: skip
    flat = next((f for f in body["final"] if f["kind"] == "flat"), None)
    if flat is None:
        return {"pair": pair, "search": body, "beside": []}
    recipes = {name: Recipe.named(name) for name in BESIDE}
    if curve is not None:
        recipes["fused"] = Recipe(rates=Rates.load(curve).normalised(), name="fused")
    rate = flat["rate"]
    labels = {f"{name}@{rate:g}": (recipe, {"lr": rate}) for name, recipe in recipes.items()}
    seeds = [row["seed"] for row in flat["seeds"]]  # and so the same rows
    how = {k: v for k, v in made.items() if k not in ("trials", "flat")}
    records = compare("minilm", paths(pair), labels, seeds=seeds, out=out / "beside",
                      workers=chosen.workers, save_steps=0, **how)  # fmt: skip
    beside = []
    for i, (label, kind) in enumerate(zip(labels, recipes, strict=True)):
        mine = records[i * len(seeds) : (i + 1) * len(seeds)]
        rows = [{"seed": r.seed, "new": r.scores[1][1], "old": r.scores[0][0],
                 "old_after": r.scores[1][0], "new_plus_old": r.new_plus_old,
                 "steps": sum(n or 0 for n in r.steps)} for r in mine]  # fmt: skip
        all_ = mean_spread(row["new_plus_old"] for row in rows)
        beside.append({"label": label, "kind": kind, "rate": rate, "seeds": rows,
                       "mean": all_.mean, "sd": all_.sd})  # fmt: skip
    return {"pair": pair, "search": body, "beside": beside}


# --- told ---------------------------------------------------------------------------------------


def table(pairs: list[dict[str, Any]]) -> str:
    """Markdown: for each pair the searched curve beside everything else."""
    heads = ("", "base rate", "new", "old before", "old after", "new + old", "− best flat",
             "steps to find it")  # fmt: skip
    told = []
    for found in pairs:
        body = found["search"]
        finals = [*body["final"], *found["beside"]]
        gaps = differences({"final": finals})
        rows = [
            [f["label"], f"{f['rate']:.2g}",
             *(_spread(f, key) for key in ("new", "old", "old_after", "new_plus_old")),
             _gap(gaps[f["label"]]), f"{_spent(f, body):,}"]
            for f in finals
        ]  # fmt: skip
        counts = ", ".join(f"{n} {state}" for state, n in body["counts"].items() if n)
        share = body["steps"]["share"]
        part = f", {100 * share:.0f} % of the unpruned" if share else ""
        told += [
            f"### {found['pair'].replace(':', ' → ')}",
            markdown(heads, rows),
            body["gain"]["sentence"],
            f"Trials: {counts}; {body['steps']['spent']:,} steps{part}.",
        ]
    return "\n\n".join(told)


def _spent(final: Mapping[str, Any], body: Mapping[str, Any]) -> int:
    """Steps spent on finding it: the whole search, or the flat trials that gave the rate."""
    if final["kind"] in ("searched", "ablation"):
        return int(body["steps"]["spent"])
    return sum(t["steps"] or 0 for t in body["trials"] if t["kind"] == "flat")


def _spread(final: Mapping[str, Any], key: str) -> str:
    s = mean_spread(row[key] for row in final["seeds"])
    return "–" if s.mean is None else f"{s.mean:.3f}" + (f" ± {s.sd:.3f}" if s.sd else "")


def _gap(gap: Difference | None) -> str:
    if gap is None or gap.mean is None or gap.low is None or gap.high is None:
        return "–"
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def draw(pairs: list[dict[str, Any]], path: Path) -> None:
    """The pictures of each search, beside the JSON; EWC and replay among its controls."""
    for found in pairs:
        body = found["search"]
        for picture in pictures({**body, "final": [*body["final"], *found["beside"]]}):
            stem = f"{path.stem}-{slug(found['pair'].replace(':', '-'))}-{slug(picture.title)}"
            picture.panels[0].save(path.with_name(f"{stem.lower()}.svg"))


# --- asked --------------------------------------------------------------------------------------


def arguments(doc: str | None, *, curves: bool = False) -> argparse.Namespace:
    """The parsed options; `curves`: also the two of a simulation of pruners."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="two pairs, 24 trials of 120 steps")
    size.add_argument("--full", action="store_true", help="four pairs, 50 trials of 240 steps")
    size.add_argument("--tiny", action="store_true", help="a smoke test: nothing is learned")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", metavar="OLD:NEW", help="pairs of tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/search"))
    if curves:
        parser.add_argument("--curves", type=int, help="trials of the search (50)")
        parser.add_argument("--orders", type=int, default=20, help="orders, each with a seed")
    else:
        parser.add_argument("--seeds", type=int, default=3, help="fresh seeds")
    chosen = parser.parse_args()
    if not chosen.tasks:
        need_data()
    chosen.tasks = chosen.tasks or list(FULL if chosen.full else QUICK)
    name = next(size for size in ("quick", "full", "tiny") if getattr(chosen, size))
    chosen.runs = chosen.runs / name
    if curves:
        chosen.curves = chosen.curves or (9 if chosen.tiny else 50)
    return chosen


def main() -> int:
    """Run or resume the benchmark."""
    chosen = arguments(__doc__)
    searches = len(chosen.tasks) + chosen.full
    runs = searches * (settings(chosen)["trials"] + FINALS * chosen.seeds)
    runs += chosen.full * chosen.seeds
    print(f"{searches} searches, fewer steps where trials are pruned: {estimate(chosen, runs)}",
          flush=True)  # fmt: skip
    body: dict[str, Any] = {"settings": settings(chosen), "pairs": []}
    for pair in chosen.tasks:
        body["pairs"].append(one_pair(pair, chosen))
        save(chosen.json, body, table(body["pairs"]))
    if chosen.full:
        fused = chosen.runs / "fused.yaml"
        combine([folder(chosen, pair) for pair in chosen.tasks], out=fused)
        body["pairs"].append(one_pair(FIFTH, chosen, fused))
        save(chosen.json, body, table(body["pairs"]))
    draw(body["pairs"], chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
