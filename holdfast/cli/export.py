"""`holdfast export`: one task of a run as an ordinary Hugging Face model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from holdfast.cli.options import add_trust

ABOUT = "write one task of a run as an ordinary Hugging Face model"
EXAMPLE = "holdfast export runs/a --task trec6 --out models/trec6"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument("--task", required=True, help="the name of one of its tasks")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--onnx", action="store_true", help="also in ONNX, by Optimum")
    parser.add_argument("--license", metavar="ID", help="for the model card, as apache-2.0")
    add_trust(parser)


def run(chosen: argparse.Namespace) -> None:
    from holdfast.experiments.serving import load
    from holdfast.report import check_license, record_beside, write_card

    check_license(chosen.license)
    served = load(chosen.run_folder)
    record = record_beside(chosen.run_folder, served.tasks)
    print(served.save(chosen.task, chosen.out, onnx=chosen.onnx))
    if record is None:
        print(f"no README.md: {chosen.run_folder} has no record of these tasks", file=sys.stderr)
    else:
        write_card(record, chosen.out, task=chosen.task, license=chosen.license)
