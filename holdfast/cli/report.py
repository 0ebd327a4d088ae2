"""`holdfast report`: a page of records."""

from __future__ import annotations

import argparse
from pathlib import Path

from holdfast.cli.options import show

ABOUT = "draw a page from records"
EXAMPLE = "holdfast report runs/a runs/b --out report.html"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="records, or folders that hold some")
    add("--out", type=Path, default=Path("report.html"), help="the page to write")


def run(chosen: argparse.Namespace) -> None:
    from holdfast.experiments.intact import drawn
    from holdfast.report import comparison_table, find_records, matrix_table, write_report
    from holdfast.report.search import FACTS, load_search, said, search_table, write_search_report

    if len(chosen.paths) == 1 and (chosen.paths[0] / FACTS).is_file():
        found = load_search(chosen.paths[0])
        with drawn(f"{FACTS} in {chosen.paths[0]}"):
            page = write_search_report(found, chosen.out)
            facts, line = search_table(found), ": ".join(said(found))
        show(facts, line, page)
        return
    records = find_records(chosen.paths)
    with drawn("record"):
        table = matrix_table(records[0]) if len(records) == 1 else comparison_table(records)
        page = write_report(records, chosen.out)
    show(table, page)
