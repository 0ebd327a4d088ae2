"""`holdfast compare`: several recipes side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from holdfast.cli.options import (
    RECIPE_HELP,
    add_engine,
    add_probe,
    add_settings,
    add_tasks,
    asked_engine,
    asked_tasks,
    given,
    show,
)
from holdfast.errors import Refused

ABOUT = "run several recipes over several seeds"
EXAMPLE = (
    "holdfast compare --tasks data/trec6 data/snli --recipes plain default --flat 5e-5 1e-4 "
    "--out runs/c"
)
RESUMES = True


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_tasks(parser)
    add("--recipes", required=True, nargs="+", help=RECIPE_HELP)
    add("--flat", nargs="+", type=float, default=[], metavar="LR",
        help="controls: plain at these learning rates too; the best of all plain runs is what "
        "recipes are measured against")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add_settings(parser, without=["alone"])
    add_probe(parser)
    add_engine(parser)


def run(chosen: argparse.Namespace) -> None:
    tasks = asked_tasks(chosen.tasks, chosen)
    from holdfast.experiments.compare import compare
    from holdfast.experiments.engines import Partly
    from holdfast.experiments.engines.plan import Only, Plan
    from holdfast.experiments.settings import Settings
    from holdfast.recipe import Recipe
    from holdfast.report import comparison_table, run_rows, write_csv, write_report

    recipes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        Path(name).stem: (Recipe.named(name), {}) for name in chosen.recipes
    }
    if len(recipes) != len(chosen.recipes):
        raise Refused("two recipes have one name", where="--recipes")
    usual = Settings().lr if chosen.lr is None else chosen.lr
    for rate in chosen.flat:
        label = f"plain@{rate}"
        if label in recipes or (rate == usual and "plain" in recipes):
            raise Refused(f"plain runs at {rate} already", where="--flat")
        recipes[label] = (Recipe.named("plain"), {"lr": rate})
    engine = asked_engine(chosen)
    try:
        records = compare(
            chosen.model, tasks, recipes, seeds=chosen.seeds, out=chosen.out,
            engine=engine, reference=chosen.reference, lm_eval=chosen.lm_eval,
            **given(chosen),
        )  # fmt: skip
    except Partly:
        return
    if isinstance(engine, Plan | Only):  # nothing was left to do
        return
    cells = chosen.out / "runs.csv"
    write_csv(run_rows(records), cells)
    page = write_report(records, chosen.out / "report.html")
    show(comparison_table(records), f"{cells}  {page}")
