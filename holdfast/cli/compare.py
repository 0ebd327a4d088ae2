"""`holdfast compare`: several recipes side by side."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.cli.options import (
    RECIPE_HELP,
    add_engine,
    add_loggers,
    add_probe,
    add_settings,
    add_tasks,
    asked_engine,
    asked_tasks,
    given,
    group,
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
    add_tasks(parser, protocol=True)
    add("--recipes", required=True, nargs="+", help=RECIPE_HELP)
    add("--flat", nargs="+", type=float, default=[], metavar="LR",
        help="controls: plain at these learning rates too; the best of all plain runs is what "
        "recipes are measured against")  # fmt: skip
    add("--budget", type=int, metavar="N",
        help="tuning runs for each recipe, plain among them, over rates and the ranges its methods "
        "declare; the best on selection rows is trained anew with --seeds")  # fmt: skip
    add("--rates", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="the rates that tuning runs try (a tenth of --lr to 2.5 times it)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--repeat", action="store_true",
        help="run the first seed of every recipe twice: what scores move by when nothing is "
        "changed, below which no difference counts")  # fmt: skip
    add_settings(parser, without=["alone"])
    add_loggers(parser)
    add_probe(parser)
    add_engine(parser)
    group(parser, "where it runs").add_argument(
        "--only", metavar="RUN", help="carry out one run that `holdfast plan` listed, and no more"
    )


def run(chosen: argparse.Namespace) -> None:
    told: list[str] = []
    sequences: list[tuple[list[str], Path, dict[str, Any]]]  # tasks, folder, more
    if chosen.protocol is None:
        if chosen.data or chosen.only_served:
            raise Refused("--data and --only-served are of a protocol", remedy="add --protocol")
        sequences, settings = [(asked_tasks(chosen.tasks, chosen), chosen.out, {})], given(chosen)
    else:
        sequences, settings, told = protocol(chosen)
    from holdfast.experiments.compare import compare
    from holdfast.experiments.engines import Partly
    from holdfast.experiments.engines.plan import Only, Plan
    from holdfast.experiments.settings import Settings
    from holdfast.recipe import Recipe
    from holdfast.report import comparison_table, run_rows, write_cards, write_csv, write_report

    recipes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        Path(name).stem: (Recipe.named(name), {}) for name in chosen.recipes
    }
    if len(recipes) != len(chosen.recipes):
        raise Refused("two recipes have one name", where="--recipes")
    if chosen.flat and chosen.budget is not None:
        raise Refused("the control's rate is chosen by --budget", where="--flat",
                      remedy="leave out one of them")  # fmt: skip
    usual = settings.get("lr", Settings().lr)
    for rate in chosen.flat:
        label = f"plain@{rate}"
        if label in recipes or (rate == usual and "plain" in recipes):
            raise Refused(f"plain runs at {rate} already", where="--flat")
        recipes[label] = (Recipe.named("plain"), {"lr": rate})
    engine, records = asked_engine(chosen), []
    for tasks, out, more in sequences:
        with suppress(Partly):
            records += compare(
                chosen.model, tasks, recipes, seeds=chosen.seeds, out=out, engine=engine,
                reference=chosen.reference, lm_eval=chosen.lm_eval, report_to=chosen.report_to,
                budget=chosen.budget, rates=chosen.rates, repeat=chosen.repeat, **more, **settings,
            )  # fmt: skip
    if isinstance(engine, Only):
        engine.end()
    if isinstance(engine, Plan | Only):  # of a part no table is made
        return
    cells = chosen.out / "runs.csv"
    write_csv(run_rows(records), cells)
    page = write_report(records, chosen.out / "report.html")
    write_cards(records)
    show(comparison_table(records), *told, f"{cells}  {page}")


def protocol(
    chosen: argparse.Namespace,
) -> tuple[list[tuple[list[str], Path, dict[str, Any]]], dict[str, Any], list[str]]:
    """The sequences of a protocol, its settings, and what the terminal says of it."""
    from holdfast.experiments.settings import Settings
    from holdfast.tasks.protocol import Protocol

    found, name = Protocol.named(chosen.protocol), Path(chosen.protocol).stem
    Settings.from_dict(found.settings, where=chosen.protocol)
    plan = found.plan(name, given(chosen), data=chosen.data, only_served=chosen.only_served)
    sequences = [
        (asked_tasks(tasks, chosen), chosen.out / plan.folder(sequence),
         {"tests": plan.tests, "protocol": plan.of(sequence)})
        for sequence, tasks in plan.sequences.items()
    ]  # fmt: skip
    count = len(plan.told["differs"])
    said = (
        f"protocol {name}: {count} {'thing differs' if count == 1 else 'things differ'} from what"
    )
    said += " was published"
    if left_out := plan.told["left_out"]:
        said += f"; left out: {', '.join(left_out)}"
    return sequences, plan.settings, [f"{said}; the page has them"]
