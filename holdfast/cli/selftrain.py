"""`holdfast selftrain`: few rows with a label, many without."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from holdfast.cli.options import (
    TASK_HELP,
    add_engine,
    add_fields,
    add_rows,
    add_run,
    add_settings,
    asked_engine,
    asked_tasks,
    given,
    group,
    show,
)
from holdfast.errors import Busy
from holdfast.experiments.settings import SelfTraining

ABOUT = "learn from rows without a label too: teacher and student in turn"
EXAMPLE = (
    "holdfast selftrain --task 'few.csv?text=body&label=stars' --unlabelled many.csv --out runs/s"
)
RESUMES = True


def options(parser: argparse.ArgumentParser) -> None:
    what = group(parser, "what")
    what.add_argument("--task", required=True, help=TASK_HELP)
    what.add_argument(
        "--unlabelled", required=True, metavar="FILE",
        help="rows without a label: a CSV, TSV, JSONL or Parquet file with the task's columns, or "
        "a .txt of one text a line",
    )  # fmt: skip
    add_rows(parser)
    add_run(parser, recipe="plain")
    what.add_argument("--student", metavar="RECIPE",
                      help="the students' recipe (--recipe, with adapters)")  # fmt: skip
    add_fields(parser, SelfTraining, lambda _: "how rows without a label are used")
    add_settings(parser, out="the folder (runs/<hash>)", without=["alone", "head", "mix"])
    add_engine(parser, several=False)


def run(chosen: argparse.Namespace) -> None:
    from rich.table import Table

    from holdfast.experiments.engines import Job
    from holdfast.experiments.selftrain import rounds_in, selftrain
    from holdfast.report import write_cards, write_report

    (task,) = asked_tasks([chosen.task], chosen)
    # A round needs the one before it: one job. The folder of a run without --out is found there.
    work = partial(
        selftrain, chosen.model, task, chosen.unlabelled, chosen.recipe, student=chosen.student,
        seed=chosen.seed, out=chosen.out, **given(chosen), **given(chosen, SelfTraining),
    )  # fmt: skip
    home = chosen.out or Path("runs")
    ((_, records),) = asked_engine(chosen)([Job(home, "self-training", work)], where=str(home))
    if isinstance(records, Busy):
        raise records
    write_cards(records)
    folder = Path(str(records[0].settings["out"])).parent
    table = Table("round", "training rows", "pseudo labels", "of them true", "selection",
                  "evaluation", title=records[0].names[0], title_justify="left")  # fmt: skip
    for record, told in zip(records, rounds_in(folder), strict=False):
        counts = ", ".join(f"{name} {count:,}" for name, count in told.get("pseudo", {}).items())
        rows = record.tasks[0]["rows"]["train"]
        shares = (told.get("agreement"), told["selection"], told["evaluation"])
        table.add_row(str(told["round"]), f"{rows:,}", counts or "–",
                      *("–" if v is None else f"{v:.3f}" for v in shares))  # fmt: skip
    show(table, f"{folder}  {write_report(records, folder / 'report.html')}")
