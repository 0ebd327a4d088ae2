"""The verbs of searching, for the command line: their options, and what they call.

Loaded for every `--help`: whatever is heavy is imported when a verb runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def add_combine(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `combine`; `verb` makes a parser from name, function, description, example."""
    combine = verb("combine", run_combine, "fuse the rates that searches found into one curve",
                   "holdfast combine runs/search-a runs/search-b", "--out rates.yaml")  # fmt: skip
    combine.add_argument("paths", nargs="+", type=Path, metavar="DIR|FILE",
                         help="folders of searches, trials.csv files, or JSON")  # fmt: skip
    combine.add_argument("--out", type=Path, default=Path("rates.yaml"), help="the file to write")
    combine.add_argument("--base", type=float, default=1.8,
                         help="a trial of rank r weighs base^-r; 1: all alike (1.8)")  # fmt: skip
    combine.add_argument("--layers", type=int,
                         help="of the searched network, where the files do not say")  # fmt: skip


def run_combine(chosen: argparse.Namespace) -> None:
    """`holdfast combine`: print each study and the fusion, write the rates."""
    from rich.console import Console

    from holdfast.search.combine import combine, table

    fusion = combine(chosen.paths, out=chosen.out, base=chosen.base, layers=chosen.layers)
    Console(width=None if sys.stdout.isatty() else 140).print(table(fusion))
    print(chosen.out)
