"""The command line: one verb a job. 0 done, 2 refused input, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast import __version__
from holdfast.errors import Refused

RECIPE_HELP = "a name that `holdfast methods` lists, or a YAML file"
TASK_HELP = "a folder, a CSV/TSV/JSONL/Parquet file (FILE?text=…&label=…), builtin:NAME or a Hub id"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run: Callable[[argparse.Namespace], int | None] = chosen.run
        return run(chosen) or 0
    except Refused as refusal:
        print(f"holdfast: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("holdfast: interrupted; the same command goes on from the last checkpoint",
              file=sys.stderr)  # fmt: skip
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="holdfast",
        allow_abbrev=False,
        description="Fine-tune pre-trained transformers without forgetting, and measure it.",
    )
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Any, about: str, *example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            allow_abbrev=False,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog="example:\n  " + " ".join(example),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    train = verb("train", _train, "fine-tune on one task",
                 "holdfast train --task reviews.csv?text=body --recipe dps",
                 "--out runs/reviews")  # fmt: skip
    train.add_argument("--task", required=True, help=TASK_HELP)
    _add_training(train)

    sequence = verb("sequence", _sequence, "learn tasks one after another and show what was kept",
                    "holdfast sequence --tasks data/trec6 data/snli --recipe ewc",
                    "--lr 2e-4 --out runs/a")  # fmt: skip
    sequence.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help=TASK_HELP)
    sequence.add_argument("--alone", action="store_true",
                          help="train later tasks alone too: gives forward transfer")  # fmt: skip
    _add_training(sequence)

    comparing = verb("compare", _compare, "run several recipes over several seeds",
                     "holdfast compare --tasks data/trec6 data/snli",
                     "--recipes plain ewc --out runs/c")  # fmt: skip
    comparing.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help=TASK_HELP)
    comparing.add_argument("--recipes", required=True, nargs="+", help=RECIPE_HELP)
    comparing.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    comparing.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    _add_training(comparing, single=False)

    report = verb("report", _report, "draw a page from records",
                  "holdfast report runs/a runs/b --out report.html")  # fmt: skip
    report.add_argument("paths", nargs="+", type=Path, help="records, or folders that hold some")
    report.add_argument("--out", type=Path, default=Path("report.html"))

    verb("methods", _methods, "list methods and recipes", "holdfast methods")

    demo = verb("demo", _demo, "two built-in tasks, with and without holdfast, in minutes",
                "holdfast demo --out runs/demo")  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    return parser


def _add_training(parser: argparse.ArgumentParser, *, single: bool = True) -> None:
    """The settings of a run; defaults are those of `experiments.sequence.Settings`."""
    add = parser.add_argument
    add("--model", default="minilm", help="minilm, a saved model's folder or a Hub id")
    if single:
        add("--recipe", default="default", help=RECIPE_HELP)
        add("--seed", type=int, default=0)
    add("--out", type=Path, required=not single, help="the run's folder (runs/<hash>)")
    add("--train-size", type=int, help="a stratified subset of the training rows")
    add("--evaluation-size", type=int, help="a stratified subset of the evaluation rows")
    add("--epochs", type=float, help="passes over the training rows (3)")
    add("--batch-size", type=int, help="rows a micro-batch (16)")
    add("--accumulation", type=int, help="micro-batches a step (1)")
    add("--lr", type=float, help="base learning rate (1e-4)")
    add("--weight-decay", type=float, help="decoupled weight decay (0.01)")
    add("--warmup", type=_number, help="steps of warm-up, or a share below 1 (0.1)")
    add("--schedule", help="a learning-rate schedule of Transformers (linear)")
    add("--max-length", type=int, help="tokens a row is cut at (128)")
    add("--selection", type=_number, help="training rows kept for choosing, or a share (0.1)")
    add("--save-steps", type=int, help="steps between checkpoints; 0: none (each epoch)")
    add("--bf16", action="store_true", default=None, help="train in bfloat16 mixed precision")


SETTINGS = ("train_size", "evaluation_size", "epochs", "batch_size", "accumulation", "lr",
            "weight_decay", "warmup", "schedule", "max_length", "selection", "save_steps", "bf16",
            "alone")  # fmt: skip


def _settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """What was given; the rest keeps its default."""
    given = {name: getattr(chosen, name, None) for name in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def _number(text: str) -> float | int:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


# --- verbs ------------------------------------------------------------------------------------


def _train(chosen: argparse.Namespace) -> None:
    _run([chosen.task], chosen)


def _sequence(chosen: argparse.Namespace) -> None:
    _run(chosen.tasks, chosen)


def _run(tasks: Sequence[str], chosen: argparse.Namespace) -> None:
    from holdfast.experiments.sequence import run_sequence
    from holdfast.report import matrix_table, write_report

    record = run_sequence(
        chosen.model, tasks, chosen.recipe, seed=chosen.seed, out=chosen.out,
        label=str(chosen.recipe), **_settings(chosen),
    )  # fmt: skip
    folder = Path(str(record.settings["out"]))
    page = write_report([record], folder / "report.html")
    for task in record.tasks:
        for warning in task["warnings"]:
            print(f"{task['name']}: {warning}", file=sys.stderr)
    _print(matrix_table(record), f"{folder / 'record.json'}  {page}")


def _compare(chosen: argparse.Namespace) -> None:
    from holdfast.experiments.compare import compare
    from holdfast.recipe import Recipe
    from holdfast.report import comparison_table, write_report

    recipes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        Path(name).stem: (Recipe.named(name), {}) for name in chosen.recipes
    }
    if len(recipes) != len(chosen.recipes):
        raise Refused("two recipes have one name", where="--recipes")
    records = compare(
        chosen.model, chosen.tasks, recipes, seeds=chosen.seeds, out=chosen.out,
        workers=chosen.workers, **_settings(chosen),
    )  # fmt: skip
    _print(comparison_table(records), write_report(records, chosen.out / "report.html"))


def _report(chosen: argparse.Namespace) -> None:
    from holdfast.report import comparison_table, find_records, matrix_table, write_report

    records = find_records(chosen.paths)
    table = matrix_table(records[0]) if len(records) == 1 else comparison_table(records)
    _print(table, write_report(records, chosen.out))


def _methods(_: argparse.Namespace) -> None:
    from rich.table import Table

    from holdfast.methods import METHODS
    from holdfast.recipe import PRESETS

    methods = Table("method", "what it does", "paper", "bytes per weight", title="methods")
    for name, method in METHODS.items():
        methods.add_row(name, method.summary, method.paper, method.bytes_per_weight)
    recipes = Table("recipe", "rates", "methods", title="recipes")
    for name, make in PRESETS.items():
        recipe = make()
        settings = "; ".join(_differing(m) for m in recipe.methods)
        recipes.add_row(name, recipe.rates.name, settings or "–")
    _print(methods)
    _print(recipes)


def _differing(method: Any) -> str:
    """A method's name with the settings in which it differs from its defaults."""
    plain = type(method)().to_dict()
    own = [f"{k}={v}" for k, v in method.to_dict().items() if plain[k] != v]
    return f"{method.name}({', '.join(own)})"


def _demo(chosen: argparse.Namespace) -> None:
    from holdfast.experiments.demo import demo
    from holdfast.report import comparison_table, matrix_table, write_report

    records = demo(chosen.out, workers=chosen.workers)
    for record in records:
        _print(matrix_table(record))
    _print(comparison_table(records), write_report(records, chosen.out / "report.html"))
    print(
        "The tasks are synthetic: made by holdfast from templates, to show the work, not a claim."
    )


def _print(table: Any, *lines: object) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for line in lines:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
