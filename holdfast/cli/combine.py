"""`holdfast combine`: several searches' rates as one curve."""

from __future__ import annotations

import argparse
from pathlib import Path

from holdfast.cli.options import show

ABOUT = "fuse the rates that searches found into one curve"
EXAMPLE = "holdfast combine runs/search-a runs/search-b --out rates.yaml"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="DIR|FILE",
        help="folders of searches, trials.csv files, or JSON")  # fmt: skip
    add("--out", type=Path, default=Path("rates.yaml"), help="the file to write")
    add(
        "--base",
        type=float,
        default=1.8,
        help="a trial of rank r weighs base^-r; 1: all alike (1.8)",
    )
    add("--layers", type=int, help="of the searched network, where the files do not say")


def run(chosen: argparse.Namespace) -> None:
    from holdfast.search.combine import combine, table

    fusion = combine(chosen.paths, out=chosen.out, base=chosen.base, layers=chosen.layers)
    show(table(fusion), chosen.out)
