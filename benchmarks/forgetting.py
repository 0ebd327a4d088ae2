"""What is learned and what is lost: recipes beside flat learning rates on tasks that forget.

    python benchmarks/forgetting.py --quick --json docs/results/forgetting-quick.json

Writes the JSON, and beside it a picture (.svg) and the table (.md). Runs are kept under --runs:
the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from holdfast.experiments.compare import compare
from holdfast.experiments.record import commit, versions
from holdfast.recipe import Recipe

FLAT = (5e-5, 1e-4, 2e-4)
QUICK = ("bertcl", "ewc", "dps", "dps_retention", "replay")
RECIPES = (*QUICK, "l2sp", "dps_mix")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def plan(chosen: argparse.Namespace) -> dict[str, tuple[Recipe, dict[str, Any]]]:
    """Label → recipe and settings: plain at every flat rate, each recipe at the given rates."""
    runs: dict[str, tuple[Recipe, dict[str, Any]]] = {}
    for lr in chosen.flat:
        runs[f"plain-{lr:g}"] = (Recipe.named("plain"), {"lr": lr})
    for name in chosen.recipes:
        for lr in chosen.rates:
            runs[f"{Path(name).stem}-{lr:g}"] = (Recipe.named(name), {"lr": lr})
    return runs


def main() -> int:
    """Run or go on with the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 seeds, 960 rows a task")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[str(DATA / "trec6"), str(DATA / "sst2")])
    parser.add_argument("--flat", nargs="*", type=float, default=list(FLAT), help="plain's rates")
    parser.add_argument("--recipes", nargs="+", help="names or files")
    parser.add_argument("--rates", nargs="+", type=float, help="of the recipes (2e-4)")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/forgetting"))
    chosen = parser.parse_args()
    seeds = chosen.seeds or ([0, 1, 2] if chosen.quick else [0, 1, 2, 3, 4])
    size = chosen.train_size or (960 if chosen.quick else 4000)
    chosen.recipes = chosen.recipes or list(QUICK if chosen.quick else RECIPES)
    chosen.rates = chosen.rates or ([2e-4] if chosen.quick else [1e-4, 2e-4])
    recipes = plan(chosen)
    steps = math.ceil(size / 16) * math.ceil(chosen.epochs) * len(chosen.tasks)
    print(f"{len(recipes) * len(seeds)} runs of {steps} training steps", flush=True)
    settings = {
        "train_size": size, "epochs": chosen.epochs, "save_steps": 0, "max_length": 64,
        "selection": 250, "evaluation_size": 600,
    }  # fmt: skip
    records = compare(
        "minilm", chosen.tasks, recipes, seeds=seeds, out=chosen.runs, workers=chosen.workers,
        **settings,
    )  # fmt: skip

    from holdfast.report import as_text, comparison_rows, comparison_table
    from holdfast.report.draw import tradeoff
    from holdfast.report.facts import comparisons

    rows = comparison_rows(records)
    command = f"python {shlex.join(sys.argv)}"
    body = {
        "command": command,
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
        "settings": settings,
        "rows": rows,
        "runs": [
            {"recipe": r.recipe["name"], "lr": r.settings["lr"], "seed": r.seed,
             "commit": r.commit, "scores": r.scores, "seconds": r.seconds, "steps": r.steps}
            for r in records
        ],
    }  # fmt: skip
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(body, indent=1) + "\n")
    table = as_text(comparison_table(records), width=160)
    chosen.json.with_suffix(".md").write_text(f"`{command}`\n\n```\n{table}\n```\n")
    picture = tradeoff(comparisons(records)[0])
    if picture is not None:
        picture.panels[0].save(chosen.json.with_suffix(".svg"))
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
