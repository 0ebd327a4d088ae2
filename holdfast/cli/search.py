"""`holdfast search`: a learning rate for each part of the network."""

from __future__ import annotations

import argparse
from typing import get_args

from holdfast.cli.options import (
    add_engine,
    add_run,
    add_settings,
    add_tasks,
    asked_engine,
    asked_tasks,
    given,
    show,
)
from holdfast.search.objective import LearnOld, Pruner, Sampler

ABOUT = "find how fast each part should learn, to take up a task and keep another"
EXAMPLE = (
    "holdfast search --tasks data/trec6 data/sst2 --trials 50 --workers 2 --train-size 960 "
    "--epochs 2 --out runs/s"
)
RESUMES = True


ASKED = ("shift", "recipe", "tune", "parts", "flat", "sampler", "pruner", "objective", "trials",
         "population", "replicates", "seed", "confirm", "confirm_seeds", "learn_old")  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_tasks(parser, "the old and the new one; one for other shifts than task. ")
    add("--shift", default="task", help="task (two tasks), or two halves of one: length, cluster, "
        "labels")  # fmt: skip
    add("--trials", type=int, help="in all, controls and what confirms among them (50)")
    add("--population", type=int, help="members, of --sampler pbt (8)")
    add("--replicates", type=int, default=1, help="seeds a trial, averaged (1)")
    add("--confirm", type=int, default=0, metavar="K",
        help="the best K trials run again with further selection seeds, before one of them is "
        "called the winner; each run counts as a trial (0)")  # fmt: skip
    add("--confirm-seeds", type=int, default=2, metavar="R", help="the further seeds of each (2)")
    add("--learn-old", default="each", help=f"{' or '.join(get_args(LearnOld))}: task one in every "
        "trial, with its curve, or once a seed at the middle flat rate for all (each)")  # fmt: skip
    add("--sampler", default="tpe", help=f"{', '.join(get_args(Sampler))} (tpe)")
    add("--pruner", help=f"{', '.join(get_args(Pruner))} (halving; none for pareto)")
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
    add_run(parser, recipe="plain")
    add_settings(parser, without=["alone", "head", "lr"])
    add_engine(parser)


def run(chosen: argparse.Namespace) -> None:
    tasks = asked_tasks(chosen.tasks, chosen)
    from holdfast.report.search import search_table, write_search_report
    from holdfast.search.run import search

    asked = {name: getattr(chosen, name) for name in ASKED}
    body = search(
        chosen.model, tasks, fresh=chosen.seeds, url=chosen.storage, out=chosen.out,
        engine=asked_engine(chosen), **asked, **given(chosen),
    )  # fmt: skip
    page = write_search_report(body, chosen.out / "report.html")
    rates = chosen.out / "rates.yaml"
    show(search_table(body), body["gain"]["sentence"], f"{rates}  {page}")
