"""`holdfast search` on the command line: its options, and what they ask for.

Loaded for every `--help`: whatever is heavy is imported when the verb runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASKED = ("shift", "recipe", "tune", "parts", "flat", "sampler", "pruner", "objective", "trials",
         "replicates", "seed")  # fmt: skip


def add_search(
    verb: Callable[..., argparse.ArgumentParser],
    run: Callable[..., Any],
    add_training: Callable[..., None],
    task_help: str,
) -> None:
    """Add `search`; see `combine`'s twin in `holdfast.search.verbs`."""
    parser = verb(
        "search", run, "find how fast each part should learn, to take up a task and keep another",
        "holdfast search --tasks data/trec6 data/sst2 --trials 50 --workers 2",
        "--train-size 960 --epochs 2 --out runs/s",
    )  # fmt: skip
    add = parser.add_argument
    add("--tasks", required=True, nargs="+", metavar="TASK",
        help=f"the old and the new one; one for other shifts than task. {task_help}")  # fmt: skip
    add("--shift", default="task", help="task (two tasks), or two halves of one: length, cluster, "
        "labels")  # fmt: skip
    add("--trials", type=int, default=50, help="in all, controls among them (50)")
    add("--replicates", type=int, default=1, help="seeds a trial, averaged (1)")
    add("--sampler", default="tpe", help="tpe, gp, cmaes, random, nsga2 (tpe)")
    add("--pruner", help="halving, hyperband, none (halving; none for pareto)")
    add("--objective", default="new_plus_old", help="new_plus_old, or pareto: both scores")
    add("--parts", type=int, default=10,
        help="multipliers: embeddings, points over the layers, head (10)")  # fmt: skip
    add("--tune", nargs="+", default=[], metavar="METHOD.SETTING",
        help="settings of methods to search too: dps.drop ewc.strength")  # fmt: skip
    add("--flat", nargs="+", type=float, metavar="LR",
        help="the flat controls' rates (1e-5 … 2e-4, times 768 / the model's width)")  # fmt: skip
    add("--seeds", type=int, default=3, help="fresh seeds of the final runs (3)")
    add("--storage", metavar="URL",
        help="journal:PATH, or a database that Optuna takes (a SQLite file in --out)")  # fmt: skip
    add("--workers", type=int, default=1, help="processes of one thread each (1)")
    add_training(parser, searching=True)


def asked(chosen: argparse.Namespace) -> dict[str, Any]:
    """What was given, as `holdfast.search.run.search` takes it, training settings left aside."""
    given = {name: getattr(chosen, name) for name in ASKED}
    return {
        **given, "fresh": chosen.seeds, "url": chosen.storage, "workers": chosen.workers,
        "out": Path(chosen.out),
    }  # fmt: skip
