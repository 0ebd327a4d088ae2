"""`holdfast check`: a gate for CI, whether a model still does what an earlier one did."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli.options import add_trust, forgetting, show

if TYPE_CHECKING:
    from holdfast.experiments.gate import Verdict

ABOUT = "compare a run with an earlier one on the earlier one's tasks: exit code 3 on loss"
EXAMPLE = "holdfast check runs/october runs/november --max-forgetting 0.02 --junit check.xml"
RESUMES = False
WORDS = {"kept": "kept", "lost": "LOST", "unclear": "cannot be told"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="BEFORE", help="the earlier run's folder")
    parser.add_argument("after", type=Path, metavar="AFTER", help="the later run's folder")
    parser.add_argument("--max-forgetting", type=forgetting, default=0.02, metavar="SCORE",
                        help="how far a task's score may fall (0.02)")  # fmt: skip
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write a JUnit report as well")
    add_trust(parser)


def run(chosen: argparse.Namespace) -> int:
    from holdfast.experiments import gate
    from holdfast.experiments.origin import FromRun
    from holdfast.experiments.serving import load

    most = chosen.max_forgetting
    tasks = FromRun(chosen.before).tasks()
    before, after = load(chosen.before), load(chosen.after)
    for task in tasks:
        after.named(task.name)
    found = gate.judge(before, after, tasks, max_forgetting=most)
    if chosen.junit is not None:
        gate.write_junit(found, chosen.junit)
    return tell(found, most)


def tell(found: Sequence[Verdict], most: float) -> int:
    """Print the verdicts; returns the exit code, 3 if a task is lost."""
    from rich.table import Table

    table = Table("task", "metric", "rows", "before", "after", "change", "90 % interval", "",
                  title=f"may fall by {most:g}", title_justify="left")  # fmt: skip
    for each in found:
        needed = f" (about {each.rows_needed:,} rows would)" if each.rows_needed else ""
        table.add_row(
            each.task, each.metric, f"{each.rows:,}", f"{each.before:.3f}", f"{each.after:.3f}",
            f"{each.change:+.3f}", f"{each.low:+.3f} to {each.high:+.3f}",
            WORDS[each.verdict] + needed,
        )  # fmt: skip
    show(table)
    return 3 if any(each.verdict == "lost" for each in found) else 0
