"""`holdfast sequence`: tasks one after another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.check import tell
from holdfast.cli.options import (
    add_loggers,
    add_probe,
    add_run,
    add_settings,
    add_tasks,
    add_trust,
    asked_tasks,
    forgetting,
    given,
    group,
    show,
)
from holdfast.experiments.ranks import follows

ABOUT = "learn tasks one after another and show what was kept"
EXAMPLE = "holdfast sequence --tasks data/trec6 data/snli --recipe default --lr 2e-4 --out runs/a"
RESUMES = True
TOGETHER = True  # by several processes, with torchrun


RUN = "the run's folder (runs/<hash>)"


def options(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser)
    add_run(parser, recipe="default")
    add_settings(parser, out=RUN)
    add_loggers(parser)
    add_probe(parser)
    group(parser, "what").add_argument(
        "--from", dest="from_run", type=Path, metavar="RUN",
        help="go on from a finished run: its model, recipe, seed and settings, unless given; or "
        "from a saved model, with --old-task",
    )  # fmt: skip
    group(parser, "what").add_argument(
        "--old-task", metavar="TASK",
        help="what that model was trained on; of a language model also running text (.txt)",
    )  # fmt: skip
    group(parser, "which rows").add_argument("--without-old-rows", action="store_true",
                        help="go on though the old tasks' rows are gone or changed")  # fmt: skip
    parser.add_argument("--max-forgetting", type=forgetting, metavar="SCORE",
                        help="exit with 3 if a task's score fell by more; see `check`")  # fmt: skip
    add_trust(parser)
    parser.set_defaults(model=None, recipe=None, seed=None)  # those of the run, or the usual ones


def run(chosen: argparse.Namespace) -> int:
    if chosen.from_run is None:
        chosen.model = chosen.model or "minilm"
        chosen.recipe = chosen.recipe or (
            "default" if chosen.head in (None, "task", "shared") else "plain"
        )
    asked = ("from_run", "old_task", "without_old_rows", "reference", "lm_eval", "report_to")
    more = {name: getattr(chosen, name) for name in asked}
    if chosen.old_task is not None:
        more["old_task"] = asked_tasks([chosen.old_task], chosen)[0]
    folder = learn(chosen.tasks, chosen, **more)
    if chosen.max_forgetting is None or follows():
        return 0
    from holdfast.experiments.gate import judge_run

    found = judge_run(folder, max_forgetting=chosen.max_forgetting)
    return tell(found, chosen.max_forgetting)


def learn(tasks: Sequence[str], chosen: argparse.Namespace, **more: Any) -> Path:
    """Learn the tasks, write the report and print the score matrix."""
    tasks = asked_tasks(tasks, chosen)
    from holdfast.experiments.sequence import run_sequence
    from holdfast.report import matrix_table, write_cards, write_report

    record = run_sequence(
        chosen.model, tasks, chosen.recipe, seed=chosen.seed, out=chosen.out,
        label=str(chosen.recipe or ""), **more, **given(chosen),
    )  # fmt: skip
    folder = Path(str(record.settings["out"]))
    if follows():
        return folder
    page = write_report([record], folder / "report.html")
    write_cards([record])
    show(matrix_table(record), f"{folder / 'record.json'}  {page}")
    return folder
