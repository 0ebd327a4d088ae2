"""Where benchmarks leave what they measured: JSON for machines, Markdown for readers."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from holdfast.experiments.record import commit, versions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real tasks, not ours to commit


def need_data(*places: str | Path) -> None:
    """End in one line where the real tasks are not beside the checkout."""
    for place in places or (DATA,):
        if Path(place).is_relative_to(DATA) and not Path(place).exists():
            sys.exit(f"../shared/data: no {Path(place).name} there: the real tasks are not part of "
                     "the repository; docs/results/README.md says what they are")  # fmt: skip


def save(path: Path, found: dict[str, Any], told: str) -> dict[str, Any]:
    """Write what was found as JSON, with the command that found it, and `told` beside it as .md.

    Returns the JSON's body.
    """
    command = f"python {shlex.join(sys.argv)}"
    body = {
        "command": command,
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(body).replace(str(DATA), "../shared/data")  # not this machine's path
    path.write_text(text + "\n")
    path.with_suffix(".md").write_text(f"`{command}`\n\n{told}\n")
    print(told)
    return body


def listed(folder: Path) -> list[tuple[str, float | None, list[str]]]:
    """Each result: its name, the hours that its runs took in all, the commands that make it."""
    found = []
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        commands = [body["command"]] if "command" in body else [p["command"] for p in body["pairs"]]
        runs = body["runs"] if isinstance(body.get("runs"), list) else []
        each = [body.get("seconds", 0), *(run.get("seconds", 0) for run in runs)]
        spent = sum(sum(s) if isinstance(s, list) else s for s in each)  # some by task
        found.append((path.stem, spent / 3600 or None, commands))
    return found


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; floats to three places."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def summary(
    by_kind: dict[str, list[float]], shares: dict[str, float], seed: int
) -> dict[str, float]:
    """Median and mean of ratios over a cycle of kinds, and the 95 % bootstrap interval of the
    median. shares: how often each kind occurs in a cycle; they add up to 1.
    """

    def over(take: Callable[[list[float]], float]) -> float:
        return sum(share * take(by_kind[kind]) for kind, share in shares.items())

    draw = Random(seed)
    drawn = sorted(
        over(lambda v: statistics.median(draw.choices(v, k=len(v)))) for _ in range(1000)
    )
    return {
        "median": over(statistics.median),
        "mean": over(statistics.fmean),
        "low": drawn[25],
        "high": drawn[974],
    }


if __name__ == "__main__":
    for name, hours, commands in listed(Path(__file__).parents[1] / "docs" / "results"):
        told = "hours not kept" if hours is None else f"{hours:.2g} hours of one process"
        print(f"{name}: {told}", *commands, sep="\n    ")
