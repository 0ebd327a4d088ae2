"""`holdfast train`: one task."""

from __future__ import annotations

import argparse

from holdfast.cli.options import (
    TASK_HELP,
    add_loggers,
    add_probe,
    add_rows,
    add_run,
    add_settings,
    group,
)
from holdfast.cli.sequence import RUN, learn

ABOUT = "fine-tune on one task"
EXAMPLE = (
    "holdfast train --task 'reviews.csv?text=body&label=stars' --recipe dps --out runs/reviews"
)
RESUMES = True
TOGETHER = True  # by several processes, with torchrun


def options(parser: argparse.ArgumentParser) -> None:
    group(parser, "what").add_argument("--task", required=True, help=TASK_HELP)
    add_rows(parser)
    add_run(parser, recipe="plain")  # on one task nothing measured does better (docs/results)
    add_settings(parser, out=RUN, without=["alone"])
    add_loggers(parser)
    add_probe(parser)


def run(chosen: argparse.Namespace) -> None:
    learn([chosen.task], chosen, reference=chosen.reference, lm_eval=chosen.lm_eval,
          report_to=chosen.report_to)  # fmt: skip
