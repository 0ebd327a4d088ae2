"""The command line: one verb a job. 0 done, 1 damage found, 2 refused input, 130 or 143 stopped."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from holdfast import __version__
from holdfast.errors import Refused, nearest
from holdfast.search.command import add_search
from holdfast.search.verbs import add_combine, run_combine
from holdfast.training import stopping

RECIPE_HELP = "a name that `holdfast methods` lists, or a YAML file"
TASK_HELP = (
    "a folder, a CSV, TSV, JSONL or Parquet file ('reviews.csv?text=body&label=stars', quoted), "
    "builtin:NAME or a Hub id"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    goes_on = "the same command goes on from the last checkpoint"
    resumes = chosen.run not in (_report, _methods, _verify, run_combine)
    try:
        run: Callable[[argparse.Namespace], int | None] = chosen.run
        with stopping.handled():
            return run(chosen) or 0
    except Refused as refusal:
        print(f"holdfast: {refusal}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, stopping.Stopped) as end:
        number = end.number if isinstance(end, stopping.Stopped) else signal.SIGINT
        said = str(stopping.Stopped(number))
        print(f"holdfast: {said}{f'; {goes_on}' if resumes else ''}", file=sys.stderr)
        return 128 + number
    except Exception as error:
        if (fault := _fault(error)) is None:
            raise
        remedy = f"; once that is mended, {goes_on}"
        print(f"holdfast: {fault}{remedy if resumes and 'too long' not in fault else ''}",
              file=sys.stderr)  # fmt: skip
        return 2


def _fault(error: Exception) -> str | None:
    """One line for what the system refused, such as a full disk; None for an error of ours."""
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        said = "the name is too long" if error.errno == errno.ENAMETOOLONG else said
        return said if error.filename is None else f"{error.filename}: {said}"
    # safetensors and torch raise errors of their own where a file cannot be written
    said = str(error).partition("\n")[0]
    written = re.search(r"os error \d+|PytorchStreamWriter|inline_container", said)
    return f"a file could not be written ({said})" if written else None


class Parser(argparse.ArgumentParser):
    """Complains in one line and names the nearest option or verb."""

    verbs: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("-") else "word"
            self.error(f"unknown {kind} {word!r}", nearest(word, list(self._option_string_actions)))
        return found, unknown

    def error(self, message: str, remedy: str = "") -> NoReturn:
        if verb := re.match(r"argument VERB: invalid choice: '?([^' ]*)", message):
            message, remedy = f"unknown verb {verb[1]!r}", nearest(verb[1], list(self.verbs))
        if not remedy.startswith("did you mean"):
            remedy = f"see {self.prog} --help"
        self.exit(2, f"holdfast: {' '.join(message.split())}; {remedy}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(
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
                 "holdfast train --task 'reviews.csv?text=body&label=stars' --recipe dps",
                 "--out runs/reviews")  # fmt: skip
    train.add_argument("--task", required=True, help=TASK_HELP)
    _add_training(train, usual="plain")  # of one task nothing measured does better (docs/results)

    sequence = verb("sequence", _sequence, "learn tasks one after another and show what was kept",
                    "holdfast sequence --tasks data/trec6 data/snli --recipe default",
                    "--lr 2e-4 --out runs/a")  # fmt: skip
    sequence.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help=TASK_HELP)
    sequence.add_argument("--alone", action="store_true",
                          help="train later tasks alone too: gives forward transfer")  # fmt: skip
    _add_training(sequence)

    comparing = verb("compare", _compare, "run several recipes over several seeds",
                     "holdfast compare --tasks data/trec6 data/snli",
                     "--recipes plain default --flat 5e-5 1e-4 --out runs/c")  # fmt: skip
    comparing.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help=TASK_HELP)
    comparing.add_argument("--recipes", required=True, nargs="+", help=RECIPE_HELP)
    comparing.add_argument("--flat", nargs="+", type=float, default=[], metavar="LR",
                           help="controls: plain at these learning rates too; the best of all "
                           "plain runs is what recipes are measured against")  # fmt: skip
    comparing.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    comparing.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    _add_training(comparing, single=False)

    add_search(verb, _search, _add_training, TASK_HELP)
    add_combine(verb)

    report = verb("report", _report, "draw a page from records",
                  "holdfast report runs/a runs/b --out report.html")  # fmt: skip
    report.add_argument("paths", nargs="+", type=Path, help="records, or folders that hold some")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")

    verify = verb("verify", _verify, "check that checkpoints and records are whole",
                  "holdfast verify runs/a")  # fmt: skip
    verify.add_argument("paths", nargs="+", type=Path, metavar="DIR",
                        help="a checkpoint, a run, or a folder that holds some")  # fmt: skip

    verb("methods", _methods, "list methods and recipes", "holdfast methods")

    demo = verb("demo", _demo, "two built-in tasks, with and without holdfast, in minutes",
                "holdfast demo --out runs/demo")  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.verbs = list(verbs.choices)
    return parser


def _add_training(
    parser: argparse.ArgumentParser,
    *,
    single: bool = True,
    searching: bool = False,
    usual: str = "default",
) -> None:
    """The settings of a run; defaults are those of `experiments.sequence.Settings`."""
    add = parser.add_argument
    add("--model", default="minilm", help="minilm, a saved model's folder or a Hub id")
    if single:
        usual = "plain" if searching else usual
        add("--recipe", default=usual, help=f"{RECIPE_HELP} ({usual})")
        add("--seed", type=int, default=0)
    required = searching or not single
    add("--out", type=Path, required=required,
        help="the folder" if required else "the run's folder (runs/<hash>)")  # fmt: skip
    add("--train-size", type=int, help="a stratified subset of the training rows")
    add("--evaluation-size", type=int, help="a stratified subset of the evaluation rows")
    add("--epochs", type=float, help="passes over the training rows (3)")
    add("--batch-size", type=int, help="rows a micro-batch (16)")
    add("--accumulation", type=int, help="micro-batches a step (1)")
    if not searching:
        add("--lr", type=float, help="base learning rate; larger models take less (2e-4)")
    add("--weight-decay", type=float, help="decoupled weight decay (0.01)")
    add("--warmup", type=number, help="steps of warm-up, or a share below 1 (0.1)")
    add("--schedule", help="a learning-rate schedule of Transformers (linear)")
    add("--max-length", type=int, help="tokens a row is cut at (128)")
    add("--selection", type=number, help="training rows kept for choosing, or a share (0.1)")
    add("--save-steps", type=int, help="steps between checkpoints; 0: none (each epoch)")
    add("--bf16", action="store_true", default=None, help="train in bfloat16 mixed precision")


SETTINGS = ("train_size", "evaluation_size", "epochs", "batch_size", "accumulation", "lr",
            "weight_decay", "warmup", "schedule", "max_length", "selection", "save_steps", "bf16",
            "alone")  # fmt: skip


def _settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """What was given; the rest keeps its default."""
    given = {name: getattr(chosen, name, None) for name in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


def number(text: str) -> float | int:
    """What a share or a count says; argparse names this function when it refuses."""
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
    _print(matrix_table(record), f"{folder / 'record.json'}  {page}")


def _compare(chosen: argparse.Namespace) -> None:
    from holdfast.experiments.compare import compare
    from holdfast.experiments.sequence import Settings
    from holdfast.recipe import Recipe
    from holdfast.report import comparison_table, run_rows, write_csv, write_report

    recipes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        Path(name).stem: (Recipe.named(name), {}) for name in chosen.recipes
    }
    if len(recipes) != len(chosen.recipes):
        raise Refused("two recipes have one name", where="--recipes")
    usual = Settings().lr if chosen.lr is None else chosen.lr
    for rate in chosen.flat:
        label = f"plain@{rate}"
        if label in recipes or (rate == usual and "plain" in recipes):
            raise Refused(f"plain runs at {rate} already", where="--flat")
        recipes[label] = (Recipe.named("plain"), {"lr": rate})
    records = compare(
        chosen.model, chosen.tasks, recipes, seeds=chosen.seeds, out=chosen.out,
        workers=chosen.workers, **_settings(chosen),
    )  # fmt: skip
    cells = chosen.out / "runs.csv"
    write_csv(run_rows(records), cells)
    page = write_report(records, chosen.out / "report.html")
    _print(comparison_table(records), f"{cells}  {page}")


def _search(chosen: argparse.Namespace) -> None:
    from holdfast.report.search import search_table, write_search_report
    from holdfast.search.command import asked
    from holdfast.search.run import search

    body = search(chosen.model, chosen.tasks, **asked(chosen), **_settings(chosen))
    page = write_search_report(body, chosen.out / "report.html")
    rates = chosen.out / "rates.yaml"
    _print(search_table(body), body["gain"]["sentence"], f"{rates}  {page}")


def _report(chosen: argparse.Namespace) -> None:
    from holdfast.report import comparison_table, find_records, matrix_table, write_report
    from holdfast.report.search import FACTS, load_search, said, search_table, write_search_report

    if len(chosen.paths) == 1 and (chosen.paths[0] / FACTS).is_file():
        found = load_search(chosen.paths[0])
        page = write_search_report(found, chosen.out)
        _print(search_table(found), ": ".join(said(found)), page)
        return
    records = find_records(chosen.paths)
    table = matrix_table(records[0]) if len(records) == 1 else comparison_table(records)
    _print(table, write_report(records, chosen.out))


def _verify(chosen: argparse.Namespace) -> int:
    from holdfast.experiments.verify import verify

    return verify(chosen.paths)


def _methods(_: argparse.Namespace) -> None:
    from rich.table import Table

    from holdfast.methods import METHODS
    from holdfast.recipe import PRESETS

    methods = Table("method", "what it does", "paper", "bytes per weight", title="methods")
    for name, method in METHODS.items():
        methods.add_row(name, method.summary, method.paper, method.bytes_per_weight)
    recipes = Table("recipe", "head first", "rates", "methods", title="recipes")
    for name, make in PRESETS.items():
        recipe = make()
        settings = "; ".join(_differing(m) for m in recipe.methods)
        first = "–" if recipe.head_first is None else "yes"
        recipes.add_row(name, first, recipe.rates.name, settings or "–")
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
