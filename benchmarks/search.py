"""Searched rates beside what needs no search, and beside EWC and replay.

    python benchmarks/search.py --quick --json docs/results/search-quick.json

For every pair of tasks a search; then the winner, its ablation, the best flat rate, layer decay,
`bertcl`, EWC and replay with the same fresh seeds on evaluation rows, all at the best flat rate
except the winner and its ablation. --full also fuses the pairs' curves and tries the result on a
fifth pair. Writes the JSON, and beside it the table (.md) and pictures (.svg). Everything is kept
under --runs: the same command resumes where it was stopped.

    python benchmarks/search.py --quick --searches --json docs/results/searches-quick.json

compares searches with each other instead: what each has found after how many steps, and what its
winner is worth on evaluation rows with fresh seeds. With --full the curves of the first search are
fused too, and tried on the fifth pair.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import DATA, markdown, need_data, save

from holdfast.experiments.compare import compare
from holdfast.experiments.statistics import Difference, mean_spread
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.report.canvas import Panel, Theme, legend, panel
from holdfast.report.search import differences
from holdfast.report.search_draw import pictures
from holdfast.search.combine import combine
from holdfast.search.plan import Plan
from holdfast.search.run import search
from holdfast.tasks.task import slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK = ("trec6:sst2", "sst2:trec6")
FULL = (*QUICK, "ag_news:sst2", "trec6:mrpc")
FIFTH = "mrpc:trec6"
BESIDE = ("ewc", "replay")
FINALS = 4 + len(BESIDE)  # winner, flat, layer decay, bertcl
# What --searches compares, by what each is asked besides the settings; trials as many for all but
# populations, whose size is given. One-shot: every draw is trained to its end, and the best taken.
SEARCHES: dict[str, dict[str, Any]] = {
    "tpe": {},
    "gp": {"sampler": "gp"},
    "cmaes": {"sampler": "cmaes"},
    "nsga2": {"sampler": "nsga2"},
    "pbt": {"sampler": "pbt"},
    "one-shot": {"sampler": "random", "pruner": "none"},
    "tpe, confirmed": {"confirm": 3},
    "tpe, old learned once": {"learn_old": "once"},
}
BATCH = 16
SECONDS = 0.45  # a step on one of two cores, as measured; for the estimate of hours


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """The training settings of every run, and the number of trials."""
    if chosen.tiny:
        return {"train_size": 96, "epochs": 2.0, "max_length": 32, "evaluation_size": 60,
                "selection": 40, "trials": 9, "flat": [1e-4, 2e-4]}  # fmt: skip
    if chosen.searches and not chosen.full:  # there are many, and all have the controls
        return {"train_size": 128, "epochs": 2.0, "max_length": 32, "evaluation_size": 300,
                "selection": 100, "trials": 16, "flat": [1e-4, 2e-4]}  # fmt: skip
    size, trials = (960, 50) if chosen.full else (480, 24)
    return {"train_size": size, "epochs": 2.0, "max_length": 64, "evaluation_size": 600,
            "selection": 200, "trials": trials}  # fmt: skip


def estimate(chosen: argparse.Namespace, runs: int) -> str:
    """What `runs` runs of two tasks cost at most, in words."""
    made = settings(chosen)
    steps = 2 * math.ceil(math.ceil(made["train_size"] / BATCH) * made["epochs"])
    seconds = SECONDS * made["max_length"] / 64
    hours = runs * steps * seconds / 3600 / chosen.workers
    return (f"at most {runs * steps:,} training steps, {steps} a run; at {seconds:.2g} s a step "
            f"{hours:.1f} h by {chosen.workers} workers")  # fmt: skip


def paths(pair: str) -> list[str]:
    return [str(DATA / name) if (DATA / name).exists() else name for name in pair.split(":")]


def folder(chosen: argparse.Namespace, pair: str, name: str = "") -> Path:
    """Where the search of a pair is kept, or one of several by its name."""
    home = Path(chosen.runs) / slug(pair.replace(":", "-"))
    return home / slug(name) if name else home


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


# --- several searches of a pair -----------------------------------------------------------------


def one_search(pair: str, name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a search found after how many steps, and its final runs."""
    made = settings(chosen) | SEARCHES[name]
    if made.get("sampler") == "pbt":  # the rest are controls, and trials of the others are pruned
        made["population"] = 8 if chosen.full else 4 if chosen.quick else 2
        del made["trials"]
    body = search("minilm", paths(pair), out=folder(chosen, pair, name), workers=chosen.workers,
                  seed=chosen.seed, fresh=chosen.seeds, command=sys.argv, **made)  # fmt: skip
    kept = ("final", "gain", "counts", "steps", "winner")
    return {"pair": pair, "name": name, "path": path(body), **{k: body[k] for k in kept}}


def path(body: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(steps spent, new + old on selection rows of what would be chosen then), as it changes.

    A population's members end together. Where the best are confirmed the last choice may score less
    than the one before.
    """
    spent = body["steps"].get("first", 0)
    end, best, found = spent + sum(t["steps"] or 0 for t in body["trials"]), -math.inf, []
    for trial in body["trials"]:
        spent += trial["steps"] or 0
        if trial["value"] is not None and trial["value"] > best:
            best = trial["value"]
            found.append((end if "lineage" in trial else spent, best))
    won = next((t["value"] for t in body["trials"] if t["number"] == body["winner"]), best)
    return [*found, (total(body), won)]


def total(body: Mapping[str, Any]) -> int:
    """All steps before the final runs."""
    return sum(int(body["steps"].get(key, 0)) for key in ("spent", "first", "confirming"))


def regret(found: Mapping[str, Any], top: float, steps: float) -> float | None:
    """How much less than `top` the search's choice scored after so many steps; None: no choice."""
    known = [value for at, value in found["path"] if at <= steps]
    return top - known[-1] if known else None


def compared(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each pair and search."""
    heads = ("pair", "search", "steps", "regret at half", "at the least", "at its end",
             "new + old, fresh seeds", "− best flat")  # fmt: skip
    rows = []
    for pair in dict.fromkeys(f["pair"] for f in found):
        mine = [f for f in found if f["pair"] == pair]
        top = max(value for f in mine for _, value in f["path"])
        least = min(f["path"][-1][0] for f in mine)
        for f in mine:
            regrets = [regret(f, top, at) for at in (least / 2, least, f["path"][-1][0])]
            won = next((c for c in f["final"] if c["kind"] == "searched"),
                       next(c for c in f["final"] if c["kind"] == "flat"))  # fmt: skip
            gaps = differences({"final": f["final"]})
            rows.append([
                pair.replace(":", " → "), f["name"], f"{total(f):,}",
                *("–" if r is None else f"{r:.3f}" for r in regrets),
                f"{_spread(won, 'new_plus_old')} ({won['label']})", _gap(gaps[won["label"]]),
            ])  # fmt: skip
    return markdown(heads, rows) + (
        "\n\nSteps: all before the final runs, controls among them. Regret: by how much the "
        "new + old, on selection rows, of what a search would choose is below the best that any of "
        "them chose on the pair: after half the steps of the search that took the least, after all "
        "of these, and at its own end. Fresh seeds: on evaluation rows."
    )


def regrets(found: list[dict[str, Any]], pair: str) -> Panel:
    """What each search would choose, against the steps spent."""
    mine = [f for f in found if f["pair"] == pair]

    def on(axes: Axes, theme: Theme) -> None:
        top, lines = max(value for f in mine for _, value in f["path"]), []
        for i, f in enumerate(mine):
            colours = (theme.plain, *theme.colours)
            steps, values = zip(*f["path"], strict=True)
            lines += axes.step(steps, [top - v for v in values], where="post", lw=1.6,
                               color=colours[i % len(colours)],
                               linestyle="-" if i < len(colours) else "--")  # fmt: skip
        axes.set(xlabel="training steps", ylabel="regret, new + old on selection rows")
        legend(axes, lines, [f["name"] for f in mine])

    return panel(on, (5.2, 3.5), None, f"Regret against steps: {pair.replace(':', ' → ')}")


def searches(chosen: argparse.Namespace) -> None:
    """Run or resume the comparison of searches; what is done is written after each."""
    asked = inspect.signature(Plan.make).parameters
    names = [name for name in chosen.searches if SEARCHES[name].keys() <= asked.keys()]
    most = settings(chosen)["trials"] + 5 * chosen.seeds
    told = estimate(chosen, len(names) * len(chosen.tasks) * most)
    print(f"{len(names)} searches of {len(chosen.tasks)} pairs: {told}", flush=True)
    body: dict[str, Any] = {"settings": settings(chosen), "searches": [], "pairs": []}

    def keep() -> None:
        told = [compared(body["searches"])]
        told += [table(body["pairs"])] if body["pairs"] else []
        save(chosen.json, body, "\n\n".join(told))

    for pair in chosen.tasks:
        for name in names:
            body["searches"].append(one_search(pair, name, chosen))
            keep()
        picture = chosen.json.with_name(f"{chosen.json.stem}-{slug(pair.replace(':', '-'))}.svg")
        regrets(body["searches"], pair).save(picture)
    if chosen.full:
        fused = chosen.runs / "fused.yaml"
        combine([folder(chosen, pair, names[0]) for pair in chosen.tasks], out=fused)
        body["pairs"].append(one_pair(FIFTH, chosen, fused))
        keep()


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
        parser.add_argument("--seeds", type=int, help="fresh seeds (3; 5 to compare searches)")
        parser.add_argument("--searches", nargs="*", choices=SEARCHES, metavar="NAME",
                            help=f"compare these, or all: {', '.join(SEARCHES)}")  # fmt: skip
    chosen = parser.parse_args()
    if curves:
        chosen.searches = None
    else:
        chosen.seeds = chosen.seeds or (3 if chosen.searches is None else 5)
        chosen.searches = list(SEARCHES) if chosen.searches == [] else chosen.searches
    if not chosen.tasks:
        need_data()
    quick = QUICK[:1] if chosen.searches else QUICK
    chosen.tasks = chosen.tasks or list(FULL if chosen.full else quick)
    name = next(size for size in ("quick", "full", "tiny") if getattr(chosen, size))
    name = f"searches-{name}" if chosen.searches else name
    chosen.runs = chosen.runs / name
    if curves:
        chosen.curves = chosen.curves or (9 if chosen.tiny else 50)
    return chosen


def main() -> int:
    """Run or resume the benchmark."""
    chosen = arguments(__doc__)
    if chosen.searches:
        searches(chosen)
        return 0
    number = len(chosen.tasks) + chosen.full
    runs = number * (settings(chosen)["trials"] + FINALS * chosen.seeds)
    runs += chosen.full * chosen.seeds
    print(f"{number} searches, fewer steps where trials are pruned: {estimate(chosen, runs)}",
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
