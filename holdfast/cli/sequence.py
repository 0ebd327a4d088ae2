"""`holdfast sequence`: tasks one after another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.options import add_run, add_settings, add_tasks, given, show

ABOUT = "learn tasks one after another and show what was kept"
EXAMPLE = "holdfast sequence --tasks data/trec6 data/snli --recipe default --lr 2e-4 --out runs/a"
RESUMES = True


RUN = "the run's folder (runs/<hash>)"


def options(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser)
    add_run(parser, recipe="default")
    add_settings(parser, out=RUN)


def run(chosen: argparse.Namespace) -> None:
    learn(chosen.tasks, chosen)


def learn(tasks: Sequence[str], chosen: argparse.Namespace) -> None:
    """Learn the tasks, write the report and print the score matrix."""
    from holdfast.experiments.sequence import run_sequence
    from holdfast.report import matrix_table, write_report

    record = run_sequence(
        chosen.model, tasks, chosen.recipe, seed=chosen.seed, out=chosen.out,
        label=str(chosen.recipe), **given(chosen),
    )  # fmt: skip
    folder = Path(str(record.settings["out"]))
    page = write_report([record], folder / "report.html")
    show(matrix_table(record), f"{folder / 'record.json'}  {page}")
