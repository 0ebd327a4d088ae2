"""`holdfast runs`: the runs in a folder, and how far they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from holdfast.cli.options import show
from holdfast.errors import printable

ABOUT = "list runs with their status"
EXAMPLE = "holdfast runs"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR",
                        help="where to look, at any depth (runs)")  # fmt: skip


def run(chosen: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    from holdfast.experiments.runs import runs_below

    table = Table(
        "run", "recipe", "lr", "seed", "tasks", "learned", "status", "average", "forgetting"
    )
    for folder, record, status in runs_below(chosen.folder):
        if record is None:
            table.add_row(escape(printable(folder)), "", "", "", "", "", escape(status), "", "")
            continue
        scores = ("–" if v is None else f"{v:.3f}" for v in (record.average, record.forgetting))
        cells = [
            folder, record.recipe.get("name", ""), record.settings.get("lr", ""), record.seed,
            " > ".join(record.names),
            f"{len(record.seconds)} of {len(record.tasks)}", status, *scores,
        ]  # fmt: skip
        table.add_row(*(escape(printable(cell)) for cell in cells))
    show(table)
