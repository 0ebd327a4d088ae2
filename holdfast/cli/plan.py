"""`holdfast plan`: the runs of another verb as commands, for any scheduler."""

from __future__ import annotations

import argparse

from holdfast.cli import compare

ABOUT = "print one exact command for each run of a comparison, a line of JSON each"
EXAMPLE = "holdfast plan compare --tasks data/trec6 --recipes plain dps --out runs/c"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="work", metavar="VERB", required=True)
    made = verbs.add_parser("compare", allow_abbrev=False, help=compare.ABOUT)
    made.set_defaults(planned=compare)
    compare.options(made)


def run(chosen: argparse.Namespace) -> None:
    chosen.planned.run(chosen)
