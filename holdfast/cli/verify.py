"""`holdfast verify`: which files are damaged."""

from __future__ import annotations

import argparse
from pathlib import Path

ABOUT = "check that checkpoints and records are whole"
EXAMPLE = "holdfast verify runs/a"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="DIR",
                        help="a checkpoint, a run, or a folder that holds some")  # fmt: skip


def run(chosen: argparse.Namespace) -> int:
    from holdfast.experiments.verify import verify

    return verify(chosen.paths)
