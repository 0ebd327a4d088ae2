"""What pruners spend and what they miss, simulated on whole learning curves.

    python benchmarks/pruners.py --quick --json docs/results/pruners-quick.json

One random search without a pruner records the scores of its trials at twelve rungs. Every pruner is
then asked about them, trial by trial, in many orders: what it would have stopped is known, so that
no training is spent on it. Kept under --runs; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from results import markdown, save
from search import arguments, estimate, paths, settings

from holdfast.experiments.statistics import mean_spread
from holdfast.report.canvas import Panel, Theme, legend, panel
from holdfast.search import storage
from holdfast.search.final import Result
from holdfast.search.plan import Plan
from holdfast.search.run import search

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUNGS = 6  # a task
EVERY = {"none": 2, "halving": 2, "hyperband": 3}  # a pruner's own rungs are every n-th of these


def curves(chosen: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """The trials that have a score at every rung; steps of one."""
    made = {**settings(chosen), "trials": chosen.curves}
    body = search(
        "minilm", paths(chosen.tasks[0]), out=chosen.runs / "curves", seed=chosen.seed,
        workers=chosen.workers, command=sys.argv, evaluate=_none_of_them, sampler="random",
        pruner="none", rungs=RUNGS, **made,
    )  # fmt: skip
    done = [t for t in body["trials"] if t["value"] is not None and len(t["rungs"]) == 2 * RUNGS]
    return done, body["steps"]["of_a_trial"]


def _none_of_them(_: Plan) -> Any:
    """No final runs: the curves are all that is wanted."""
    return lambda job: Result(None, None, None, 0, "not run")


def simulate(done: Sequence[Mapping[str, Any]], pruner: str, seed: int) -> dict[str, Any]:
    """The pruner as searches use it, over recorded trials in an order drawn by the seed.

    Controls come first and are never pruned. regret: the best recorded value minus that of the
    best trial that was let through to its end. path: (trials' worth of steps spent, best so far).
    """
    optuna = storage.optuna()
    study = optuna.create_study(
        direction="maximize", study_name=f"order {seed}", pruner=storage.pruner(pruner),
        sampler=optuna.samplers.RandomSampler(seed=seed),
    )  # fmt: skip
    searched = [t for t in done if not t["control"]]
    random.Random(seed).shuffle(searched)
    spent, best, path = 0.0, -math.inf, []
    for recorded in [*(t for t in done if t["control"]), *searched]:
        trial = study.ask()
        every = EVERY[pruner]
        rungs = [recorded["rungs"][str(k)] for k in range(every, 2 * RUNGS + 1, every)]
        for rung, value in enumerate(rungs, 1):
            trial.report(value, rung)
            if rung < len(rungs) and trial.should_prune() and not recorded["control"]:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                spent += rung / len(rungs)
                break
        else:
            study.tell(trial, recorded["value"])
            spent += 1
            best = max(best, recorded["value"])
        path.append((spent, best))
    top = max(t["value"] for t in done)
    return {"share": spent / len(done), "regret": top - best, "best": best, "path": path}


def pruners(chosen: argparse.Namespace) -> dict[str, Any]:
    """Share of steps and regret of each pruner over orders."""
    done, whole = curves(chosen)
    found: dict[str, Any] = {
        "trials": len(done), "controls": sum(bool(t["control"]) for t in done),
        "steps_of_a_trial": whole, "orders": chosen.orders,
        "values": sorted((t["value"] for t in done), reverse=True),
    }  # fmt: skip
    for name in EVERY:
        runs = [simulate(done, name, seed) for seed in range(chosen.orders)]
        both = {k: mean_spread(run[k] for run in runs)._asdict() for k in ("share", "regret")}
        found[name] = both | {"runs": runs}
    return found


def table(found: Mapping[str, Any]) -> str:
    rows = []
    for name in EVERY:
        share, regret = found[name]["share"], found[name]["regret"]
        rows.append([
            name, f"{100 * share['mean']:.0f} % ± {100 * (share['sd'] or 0):.0f}",
            f"{regret['mean']:.3f} ± {regret['sd'] or 0:.3f}", regret["max"],
        ])  # fmt: skip
    heads = ("pruner", "steps, of the unpruned", "regret, new + old on selection rows", "worst")
    return (
        f"Simulated on {found['trials']} whole curves, {found['controls']} of them controls, "
        f"in {found['orders']} orders.\n\n{markdown(heads, rows)}"
    )


def picture(found: Mapping[str, Any]) -> Panel:
    """The best trial so far against the steps spent on it, the mean over orders."""

    def on(axes: Axes, theme: Theme) -> None:
        lines = []
        for name, colour in zip(EVERY, (theme.plain, *theme.colours), strict=False):
            paths = [run["path"] for run in found[name]["runs"]]
            steps = [
                100 * mean(p[i][0] for p in paths) / len(paths[0]) for i in range(len(paths[0]))
            ]
            bests = [mean(p[i][1] for p in paths) for i in range(len(paths[0]))]
            lines += axes.plot(steps, bests, color=colour, lw=1.8)
            axes.plot(steps[-1:], bests[-1:], color=colour, marker="o")
        axes.set(xlabel="steps, % of a search without a pruner", ylabel="best new + old so far")
        legend(axes, lines, list(EVERY))

    return panel(on, (5.2, 3.5), None, "Best trial so far against steps spent, by pruner")


def mean(values: Any) -> float:
    return mean_spread(values).mean or 0.0


def main() -> int:
    """Run or go on with the benchmark."""
    chosen = arguments(__doc__, curves=True)
    print(f"{chosen.curves} whole trials: {estimate(chosen, chosen.curves)}", flush=True)
    found = pruners(chosen)
    picture(found).save(chosen.json.with_suffix(".svg"))
    save(chosen.json, {"settings": settings(chosen), **found}, table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
