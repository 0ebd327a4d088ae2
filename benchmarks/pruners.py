"""What pruners spend and what they miss, simulated on whole learning curves.

    python benchmarks/pruners.py --quick --json docs/results/pruners-quick.json

One random search without a pruner records the scores of its trials at twelve rungs. Every pruner is
then asked about them, trial by trial, in many orders: this shows what it would have stopped,
without more training. Besides the pruners as searches use them: halving with evenly spaced rungs,
also with Optuna's default factor. Kept under --runs; the same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from results import markdown, save
from scipy.stats import spearmanr
from search import arguments, estimate, paths, settings

from holdfast.experiments.statistics import mean_spread
from holdfast.report.canvas import Panel, Theme, legend, panel
from holdfast.search import storage
from holdfast.search.final import Result
from holdfast.search.objective import RUNGS, Rungs, evenly
from holdfast.search.plan import Plan
from holdfast.search.run import search
from holdfast.tasks.task import slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FINE = 6  # rungs of a task that are recorded
THIRDS = evenly(3)
CASES: dict[str, tuple[str, Rungs, int | None]] = {  # pruner, its rungs, another factor
    "none": ("none", RUNGS["none"], None),
    "halving": ("halving", RUNGS["halving"], None),
    "hyperband": ("hyperband", RUNGS["hyperband"], None),
    "halving at thirds": ("halving", THIRDS, None),
    "halving at thirds, η = 4": ("halving", THIRDS, 4),
}


def curves(chosen: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """The trials that have a score at every rung; the steps of one trial."""
    made = {**settings(chosen), "trials": chosen.curves}
    pair = chosen.tasks[0]
    body = search(
        "minilm", paths(pair), out=chosen.runs / f"curves-{slug(pair)}", seed=chosen.seed,
        workers=chosen.workers, command=sys.argv, evaluate=_none_of_them, sampler="random",
        pruner="none", rungs=FINE, **made,
    )  # fmt: skip
    done = [t for t in body["trials"] if t["value"] is not None and len(t["rungs"]) == 2 * FINE]
    return done, body["steps"]["of_a_trial"]


def _none_of_them(_: Plan) -> Any:
    """No final runs: only the curves are needed."""
    return lambda job: Result(None, None, None, 0, "not run")


def simulate(done: Sequence[Mapping[str, Any]], case: str, seed: int) -> dict[str, Any]:
    """The pruner as searches use it, over recorded trials in an order drawn by the seed.

    Controls come first and are never pruned. regret: the best recorded value minus that of the
    best trial that was let through to its end. path: (trials' worth of steps spent, best so far).
    """
    optuna = storage.optuna()
    name, shares, factor = CASES[case]
    pruner = storage.pruner(name, seed)
    if factor is not None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    study = optuna.create_study(direction="maximize", pruner=pruner,
                                sampler=optuna.samplers.RandomSampler(seed=seed))  # fmt: skip
    searched = [t for t in done if not t["control"]]
    random.Random(seed).shuffle(searched)
    places = [task * FINE + round(share * FINE) for task in (0, 1) for share in shares]
    spent, best, path = 0.0, -math.inf, []
    for recorded in [*(t for t in done if t["control"]), *searched]:
        trial = study.ask()
        for rung, place in enumerate(places, 1):
            trial.report(recorded["rungs"][str(place)], rung)
            if place < 2 * FINE and trial.should_prune() and not recorded["control"]:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, recorded["value"])
            best = max(best, recorded["value"])
        spent += place / (2 * FINE)
        path.append((spent, best))
    top = max(t["value"] for t in done)
    return {"share": spent / len(done), "regret": top - best, "best": best, "path": path}


def pruners(chosen: argparse.Namespace) -> dict[str, Any]:
    """Share of steps and regret of each pruner over orders."""
    done, whole = curves(chosen)
    found: dict[str, Any] = {
        "pair": chosen.tasks[0], "trials": len(done),
        "controls": sum(bool(t["control"]) for t in done),
        "steps_of_a_trial": whole, "orders": chosen.orders,
        "values": sorted((t["value"] for t in done), reverse=True),
        "correlations": [
            spearmanr([t["rungs"][str(k)] for t in done], [t["value"] for t in done]).statistic
            for k in range(1, 2 * FINE + 1)
        ],
    }  # fmt: skip
    for name in CASES:
        runs = [simulate(done, name, seed) for seed in range(chosen.orders)]
        both = {k: mean_spread(run[k] for run in runs)._asdict() for k in ("share", "regret")}
        found[name] = both | {"runs": runs}
    return found


def table(found: Mapping[str, Any]) -> str:
    rows = []
    for name in CASES:
        share, regret = found[name]["share"], found[name]["regret"]
        rows.append([
            name, f"{100 * share['mean']:.0f} % ± {100 * (share['sd'] or 0):.0f}",
            f"{regret['mean']:.3f} ± {regret['sd'] or 0:.3f}", regret["max"],
        ])  # fmt: skip
    heads = ("pruner", "steps, of the unpruned", "regret, new + old on selection rows", "worst")
    ends = markdown(
        ["rung", *(f"{k}/{FINE} of task {task}" for task in ("one", "two")
                   for k in range(1, FINE + 1))],
        [["correlation", *(f"{c:.2f}" for c in found["correlations"])]],
    )  # fmt: skip
    return (
        f"Simulated on {found['trials']} whole curves of {found['pair']}, {found['controls']} of "
        f"them controls, in {found['orders']} orders.\n\n{markdown(heads, rows)}\n\n"
        f"Rank correlation of what a trial tells at a rung with its value at the end:\n\n{ends}"
    )


def picture(found: Mapping[str, Any]) -> Panel:
    """The best trial so far against the steps spent on it, the mean over orders."""

    def on(axes: Axes, theme: Theme) -> None:
        lines = []
        for name, colour in zip(CASES, (theme.plain, *theme.colours), strict=False):
            paths = [run["path"] for run in found[name]["runs"]]
            trials = range(found["controls"] - 1, len(paths[0]))  # all share the controls
            steps = [100 * mean(p[i][0] for p in paths) / len(paths[0]) for i in trials]
            bests = [mean(p[i][1] for p in paths) for i in trials]
            lines += axes.plot(steps, bests, color=colour, lw=1.8)
            axes.plot(steps[-1:], bests[-1:], color=colour, marker="o")
        axes.set(xlabel="steps, % of a search without a pruner", ylabel="best new + old so far")
        legend(axes, lines, list(CASES))

    return panel(on, (5.2, 3.5), None, "Best trial so far against steps spent, by pruner")


def mean(values: Any) -> float:
    return mean_spread(values).mean or 0.0


def main() -> int:
    """Run or resume the benchmark."""
    chosen = arguments(__doc__, curves=True)
    print(f"{chosen.curves} whole trials: {estimate(chosen, chosen.curves)}", flush=True)
    found = pruners(chosen)
    picture(found).save(chosen.json.with_suffix(".svg"))
    save(chosen.json, {"settings": settings(chosen), **found}, table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
