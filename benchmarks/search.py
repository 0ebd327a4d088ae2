"""Searched rates beside their controls, EWC and replay; pruners by the steps they spend.

    python benchmarks/search.py --quick --json docs/results/search-quick.json

Writes the JSON, and beside it the table (.md) and pictures (.svg). Everything is kept under --runs:
the same command goes on where it was stopped. Three parts, each of which may be asked for alone:

* the default: a search for every pair of tasks, then EWC and replay at the best flat rate with the
  same fresh seeds;
* --pruners: how many steps halving and Hyperband spend against none, and what they miss. They are
  *simulated* on the whole learning curves of one unpruned random search, in many orders: what a
  pruner would have stopped is known, so that no training is spent on it;
* --overhead: seconds of a trial of 100 steps outside of training and evaluation.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import DATA, save

from holdfast.experiments.compare import compare
from holdfast.experiments.statistics import mean_spread, paired_difference
from holdfast.rates import Rates
from holdfast.recipe import Recipe
from holdfast.search import storage
from holdfast.search.final import Result
from holdfast.search.plan import Plan
from holdfast.search.run import search
from holdfast.tasks.task import slug

QUICK = ("trec6:sst2", "sst2:trec6")
FULL = ("trec6:sst2", "sst2:trec6", "ag_news:sst2", "trec6:mrpc")
FIFTH = "mrpc:trec6"
BESIDE = ("ewc", "replay")
KEEP = {"max_length": 64, "evaluation_size": 600, "selection": 200}
SECONDS = 0.4  # a step on one of two cores, as measured; what an estimate of hours is made from


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """Training of every run: rows a task, epochs, trials."""
    if chosen.tiny:
        return {"train_size": 96, "epochs": 2.0, "max_length": 32, "evaluation_size": 60,
                "selection": 40, "trials": 9, "flat": [1e-4, 2e-4]}  # fmt: skip
    if chosen.quick:
        return {**KEEP, "train_size": 480, "epochs": 2.0, "trials": 24}
    return {**KEEP, "train_size": 960, "epochs": 2.0, "trials": 50}


def steps_of(made: Mapping[str, Any], batch: int = 16) -> int:
    """Of a whole run of two tasks."""
    return 2 * math.ceil(math.ceil(made["train_size"] / batch) * made["epochs"])


def paths(pair: str) -> list[str]:
    return [str(DATA / name) if (DATA / name).exists() else name for name in pair.split(":")]


# --- searched against controls ------------------------------------------------------------------


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
        beside.append({"label": label, "kind": kind, "rate": rate, "seeds": rows})
    return {"pair": pair, "search": body, "beside": beside}


def table(pairs: list[dict[str, Any]]) -> list[str]:
    """Markdown: each pair, the searched curve beside everything else."""
    lines = []
    for found in pairs:
        body = found["search"]
        finals = [*body["final"], *found["beside"]]
        flat = next((f for f in body["final"] if f["kind"] == "flat"), None)
        lines += [
            f"### {found['pair'].replace(':', ' → ')}", "",
            "| curve | base rate | new | old before | old after | new + old | − best flat | "
            "steps to find it |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for f in finals:
            cells = [_spread(f, key) for key in ("new", "old", "old_after", "new_plus_old")]
            spent = body["steps"]["spent"] if f["kind"] == "searched" else _controls(body)
            spent = 0 if f["kind"] == "fused" else spent
            lines.append(
                f"| {f['label']} | {f['rate']:.2g} | {' | '.join(cells)} | {_gap(f, flat)} | "
                f"{spent:,} |"
            )
        counts = ", ".join(f"{n} {state}" for state, n in body["counts"].items() if n)
        share = body["steps"]["share"]
        part = f", {100 * share:.0f} % of the unpruned" if share else ""
        told = f"Trials: {counts}; {body['steps']['spent']:,} steps{part}."
        lines += ["", body["gain"]["sentence"], "", told, ""]
    return lines


def _controls(body: Mapping[str, Any]) -> int:
    """What it took to choose the flat rate: the flat trials."""
    return sum(t["steps"] or 0 for t in body["trials"] if t["kind"] == "flat")


def _spread(final: Mapping[str, Any], key: str) -> str:
    s = mean_spread(row[key] for row in final["seeds"])
    return "–" if s.mean is None else f"{s.mean:.3f}" + (f" ± {s.sd:.3f}" if s.sd else "")


def _gap(final: Mapping[str, Any], flat: Mapping[str, Any] | None) -> str:
    if flat is None or final is flat:
        return "–"
    one, two = ({r["seed"]: r["new_plus_old"] for r in f["seeds"]} for f in (final, flat))
    gap = paired_difference(one, two)
    if gap.mean is None or gap.low is None or gap.high is None:
        return "–"
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


# --- pruners, simulated -------------------------------------------------------------------------


def _none_of_them(_: Plan) -> Any:
    """No final runs: the curves are all that is wanted."""
    return lambda job: Result(None, None, None, 0, "not run")


def curves(chosen: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Whole learning curves of one unpruned random search with twelve rungs."""
    made = settings(chosen)
    # six rungs a task: every second one is a rung of halving, every third one of Hyperband
    asked = {**made, "trials": chosen.curves, "sampler": "random", "pruner": "none", "rungs": 6}
    body = search(
        "minilm", paths(chosen.tasks[0]), out=chosen.runs / "curves", seed=chosen.seed,
        workers=chosen.workers, command=sys.argv, evaluate=_none_of_them, **asked,
    )  # fmt: skip
    done = [t for t in body["trials"] if t["value"] is not None and len(t["rungs"]) == 12]
    return done, body["steps"]["of_a_trial"]


def simulate(done: list[dict[str, Any]], pruner: str, seed: int) -> dict[str, float]:
    """The pruner as searches use it, over recorded trials in an order drawn by the seed.

    Controls come first and are never pruned. regret: the best recorded value minus that of the
    best trial that was let through to its end.
    """
    import random

    optuna = storage.optuna()
    every = {"halving": 2, "hyperband": 3, "none": 2}[pruner]
    stop = storage.pruner(pruner)
    study = optuna.create_study(direction="maximize", pruner=stop, study_name=f"order {seed}",
                                sampler=optuna.samplers.RandomSampler(seed=seed))  # fmt: skip
    searched = [t for t in done if not t["control"]]
    random.Random(seed).shuffle(searched)
    order = [t for t in done if t["control"]] + searched
    spent, best = 0.0, -math.inf
    for recorded in order:
        trial = study.ask()
        rungs = [recorded["rungs"][str(k)] for k in range(every, 13, every)]
        for rung, value in enumerate(rungs, 1):
            trial.report(value, rung)
            last = rung == len(rungs)
            if trial.should_prune() and not last and not recorded["control"]:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                spent += rung / len(rungs)
                break
        else:
            study.tell(trial, recorded["value"])
            spent += 1
            best = max(best, recorded["value"])
    top = max(t["value"] for t in done)
    return {"share": spent / len(done), "regret": top - best, "best": best}


def pruners(chosen: argparse.Namespace) -> dict[str, Any]:
    """Share of steps and regret of each pruner over orders."""
    done, whole = curves(chosen)
    found: dict[str, Any] = {
        "trials": len(done),
        "steps_of_a_trial": whole,
        "orders": chosen.orders,
    }
    for name in ("none", "halving", "hyperband"):
        runs = [simulate(done, name, seed) for seed in range(chosen.orders)]
        found[name] = {
            key: mean_spread(run[key] for run in runs)._asdict() for key in ("share", "regret")
        } | {"runs": runs}  # fmt: skip
    values = sorted((t["value"] for t in done), reverse=True)
    found["values"] = values
    return found


def pruner_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Simulated on {found['trials']} whole curves, {found['orders']} orders each.", "",
        "| pruner | steps, share of unpruned | regret, new + old on selection rows | worst |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for name in ("none", "halving", "hyperband"):
        share, regret = found[name]["share"], found[name]["regret"]
        cells = (
            f"{100 * share['mean']:.0f} % ± {100 * (share['sd'] or 0):.0f}",
            f"{regret['mean']:.3f} ± {regret['sd'] or 0:.3f}",
            f"{regret['max']:.3f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


# --- overhead -----------------------------------------------------------------------------------


def overhead(chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of trials of 100 steps outside of training and evaluation, storage included.

    Training is what happens between the first step and the last one of a task; evaluation what
    `evaluate` takes outside of it. The first trial loads for all and is left out.
    """
    from transformers import TrainerCallback

    from holdfast.experiments import learner
    from holdfast.search import training
    from holdfast.search.study import Study

    spent = {"training": 0.0, "evaluation": 0.0}
    inside = False

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            nonlocal inside
            inside, self.began = True, time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            nonlocal inside
            inside = False
            spent["training"] += time.perf_counter() - self.began

    evaluate, callbacks = learner.evaluate, training.TrialLearner._callbacks

    def timed(*args: Any, **kwargs: Any) -> float:
        began = time.perf_counter()
        try:
            return evaluate(*args, **kwargs)
        finally:
            spent["evaluation"] += 0.0 if inside else time.perf_counter() - began

    learner.evaluate = timed
    training.TrialLearner._callbacks = lambda self, i: [*callbacks(self, i), Clock()]  # type: ignore[method-assign]
    plan = Plan.make("minilm", paths(chosen.tasks[0]), train_size=800, epochs=1.0, pruner="none",
                     sampler="tpe", trials=50, **KEEP)  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as place:
        study, train = Study(place, plan), training.Training(plan)
        from holdfast.search.worker import run

        for number in range(3):
            spent["training"] = spent["evaluation"] = 0.0
            began = time.perf_counter()
            claim = study.claim()
            assert claim is not None
            run(claim, train)
            claim.close()
            wall = time.perf_counter() - began
            over = wall - spent["training"] - spent["evaluation"]
            rows.append({"wall": wall, "over": over, "share": over / wall, **spent})
            print(
                f"trial {number}: {wall:.1f} s, {over:.2f} s ({100 * over / wall:.1f} %) of it "
                "outside of training and evaluation",
                flush=True,
            )
    later = rows[1:]
    share = sum(r["over"] for r in later) / sum(r["wall"] for r in later)
    return {"steps": 100, "first": rows[0], "later": later, "share": share}


# --- all of it ----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two pairs, 24 trials of 120 steps")
    parser.add_argument("--full", action="store_true", help="four pairs, 50 trials of 240 steps")
    parser.add_argument("--tiny", action="store_true", help="a smoke test: nothing is learned")
    parser.add_argument("--pruners", action="store_true", help="only the pruners")
    parser.add_argument("--overhead", action="store_true", help="only the overhead")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", metavar="OLD:NEW", help="pairs of tasks")
    parser.add_argument("--seeds", type=int, default=3, help="fresh seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curves", type=int, help="trials of the unpruned search (24; 60 in full)")
    parser.add_argument("--orders", type=int, default=20, help="search seeds of the simulation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/search"))
    chosen = parser.parse_args()
    chosen.tasks = chosen.tasks or list(FULL if chosen.full else QUICK)
    chosen.curves = chosen.curves or (9 if chosen.tiny else 60 if chosen.full else 24)
    size = "full" if chosen.full else "tiny" if chosen.tiny else "quick"
    chosen.runs = chosen.runs / size
    return chosen


def announce(chosen: argparse.Namespace) -> None:
    """The number of training steps, before the first of them."""
    made = settings(chosen)
    one = steps_of(made)
    if chosen.pruners:
        most = chosen.curves * one
        print(f"at most {most:,} training steps: {chosen.curves} whole trials of {one}", flush=True)
        return
    finals = (4 + len(BESIDE)) * chosen.seeds
    pairs = len(chosen.tasks) + chosen.full
    most = pairs * one * (made["trials"] + finals)
    hours = most * SECONDS / 3600 / max(1, chosen.workers)
    print(f"at most {most:,} training steps ({pairs} searches of {made['trials']} trials and "
          f"{finals} final runs of {one}), fewer where trials are pruned; at {SECONDS} s a step at "
          f"most {hours:.1f} h on {chosen.workers} cores", flush=True)  # fmt: skip


def main() -> int:
    """Run or go on with the benchmark."""
    chosen = arguments()
    announce(chosen) if not chosen.overhead else None
    body: dict[str, Any] = {"settings": settings(chosen)}
    lines: list[str] = []
    if chosen.overhead:
        body["overhead"] = overhead(chosen)
        lines.append(f"{100 * body['overhead']['share']:.1f} % of a trial of 100 steps is spent "
                     "outside of training and evaluation.")  # fmt: skip
    elif chosen.pruners:
        body["pruners"] = pruners(chosen)
        lines += pruner_table(body["pruners"])
    else:
        pairs = []
        for pair in chosen.tasks:
            pairs.append(one_pair(pair, chosen))
            save(chosen.json, body | {"pairs": pairs}, "\n".join(table(pairs)))
        if chosen.full:
            from holdfast.search.combine import combine

            fused = chosen.runs / "fused.yaml"
            combine([folder(chosen, pair) for pair in chosen.tasks], out=fused)
            pairs.append(one_pair(FIFTH, chosen, fused))
        body["pairs"], lines = pairs, lines + table(pairs)
        draw(pairs, chosen.json)
    save(chosen.json, body, "\n".join(lines))
    return 0


def draw(pairs: list[dict[str, Any]], path: Path) -> None:
    """The pictures of each search, beside the JSON."""
    from holdfast.report.search_draw import pictures

    for found in pairs:
        for picture in pictures(found["search"]):
            name = picture.title.lower().replace(" ", "-")
            stem = f"{path.stem}-{found['pair'].replace(':', '-')}-{name}"
            picture.panels[0].save(path.with_name(f"{stem}.svg"))


if __name__ == "__main__":
    sys.exit(main())
