"""`holdfast demo`: the whole workflow, small."""

from __future__ import annotations

import argparse
from pathlib import Path

from holdfast.cli.options import show

ABOUT = "two built-in tasks, with and without holdfast, in minutes"
EXAMPLE = "holdfast demo --out runs/demo"
RESUMES = True


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")


def run(chosen: argparse.Namespace) -> None:
    from holdfast.experiments.demo import demo
    from holdfast.report import comparison_table, matrix_table, write_cards, write_report

    records = demo(chosen.out, workers=chosen.workers)
    write_cards(records)
    for record in records:
        show(matrix_table(record))
    show(comparison_table(records), write_report(records, chosen.out / "report.html"))
    print(
        "The tasks are synthetic: made by holdfast from templates, to show the work, not a claim."
    )
