"""Options that several verbs have; those of a run's settings come from `Settings` itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from holdfast.errors import Refused
from holdfast.files import strictly

if TYPE_CHECKING:
    from holdfast.config import Checked

RECIPE_HELP = "a name that `holdfast methods` lists, or a YAML file"
ROWS = ("train_size", "evaluation_size", "selection", "max_length", "mix")  # settings about rows
ASKED = ("bad_rows", "strip")  # options of a task that are words of the command line too
TASK_HELP = (
    "a folder, a CSV, TSV, JSONL or Parquet file ('reviews.csv?text=body&label=stars', quoted), "
    "running text (.txt), a folder of pictures, your own network's FILE.py:TASK, builtin:NAME or a "
    "Hub id"
)


def add_tasks(parser: argparse.ArgumentParser, about: str = "", *, protocol: bool = False) -> None:
    """The tasks of a sequence, in order, or a `protocol` that names them."""
    what = group(parser, "what")
    if protocol:
        what = what.add_mutually_exclusive_group(required=True)
        what.add_argument("--protocol", metavar="NAME",
                          help="a published order of tasks with its rows and settings (standard-1, "
                          "long-4, idbr, … see docs/protocols.md), or a YAML file")  # fmt: skip
    what.add_argument(
        "--tasks", required=not protocol, nargs="+", metavar="TASK", help=about + TASK_HELP
    )
    if protocol:
        which = group(parser, "which rows")
        which.add_argument("--data", type=Path, metavar="DIR",
                           help="of a protocol: take its tasks from folders in DIR, not from the "
                           "Hub")  # fmt: skip
        about = "of a protocol: leave out the tasks that are nowhere to be had"
        which.add_argument("--only-served", action="store_true", help=about)
    add_rows(parser)


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The options in `ASKED`, which are of every task."""
    add = group(parser, "which rows").add_argument
    about = "leave out and count rows that would be refused"
    add("--bad-rows", choices=["skip"], help=about)
    about = "labels lose blanks around them; of spellings by case, the most frequent one is taken"
    add("--strip", action="store_const", const="yes", help=about)


def group(parser: argparse.ArgumentParser, title: str) -> Any:
    """The group of options of that name in the help, made when it is first asked for."""
    found = [each for each in parser._action_groups if each.title == title]
    return found[0] if found else parser.add_argument_group(title)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust-code, which `main` acts on."""
    parser.add_argument("--trust-code", action="store_true",
                        help="run the Python file kept in a run of your own network")  # fmt: skip


def asked_tasks(specs: Sequence[str], chosen: argparse.Namespace) -> list[str]:
    """The tasks with the options in `ASKED` that were given.

    A file that is not there is refused before anything heavy is imported.
    """
    from holdfast.tasks.files import must_exist
    from holdfast.tasks.spec import parse, with_options

    for spec in specs:
        asked = parse(spec)
        if asked.kind in ("file", "text"):
            must_exist(Path(asked.place))
    more = {name: getattr(chosen, name) for name in ASKED if getattr(chosen, name) is not None}
    return [with_options(spec, **more) for spec in specs]


def add_run(parser: argparse.ArgumentParser, *, recipe: str) -> None:
    """The options of a single run besides its tasks and settings."""
    what = group(parser, "what")
    what.add_argument("--recipe", default=recipe, help=f"{RECIPE_HELP} ({recipe})")
    what.add_argument("--seed", type=int, default=0, help="of rows, order, dropout and heads (0)")


def add_probe(parser: argparse.ArgumentParser) -> None:
    """The options of what is measured beside the tasks."""
    beside = group(parser, "what is measured beside the tasks")
    beside.add_argument(
        "--reference", type=Path, metavar="FILE",
        help="running text by which general ability is measured, before the first task and after "
        "each",
    )  # fmt: skip
    beside.add_argument(
        "--lm-eval", nargs="+", default=[], metavar="NAME",
        help="tasks of lm_eval that a language model is scored on then too (pip install lm-eval)",
    )  # fmt: skip


def add_loggers(parser: argparse.ArgumentParser) -> None:
    """--report-to."""
    group(parser, "where").add_argument(
        "--report-to", nargs="+", default=[], metavar="LOGGER",
        help="loggers of Transformers that get scores, forgetting and rates too: tensorboard, "
        "mlflow, wandb, trackio, …",
    )  # fmt: skip


def add_engine(parser: argparse.ArgumentParser, *, several: bool = True) -> None:
    """Where runs are carried out; several: whether they can be at once."""
    add = group(parser, "where it runs").add_argument
    if several:
        add("--workers", type=int, metavar="N",
            help="processes of one thread each, on this machine (1)")  # fmt: skip
        add("--jobs", type=int, metavar="N",
            help="at once, of ray (all that there is room for) and slurm (20)")  # fmt: skip
    add("--engine", choices=["local", "ray", "slurm"], default="local",
        help="local (this machine), ray or slurm")  # fmt: skip
    add("--address", help="of a Ray cluster (one of its own, on this machine)")
    add("--partition", help="of Slurm")
    add(
        "--time",
        metavar="H:MM:SS",
        help="Slurm's limit of a job, after which it is renewed (4:00:00)",
    )
    add("--cpus", type=float, help="of a run, for ray and slurm (1)")
    add("--gpus", type=float, help="of a run, for ray and slurm; ray shares a half (0)")


def asked_engine(chosen: argparse.Namespace) -> Any:
    """The engine of the options above."""
    from holdfast.experiments.engines import local, plan, ray, slurm

    if getattr(chosen, "planned", False):
        return plan.Plan(chosen.words[1:], chosen.out)
    if getattr(chosen, "only", None) is not None:
        return plan.Only(chosen.only, chosen.out)
    made = {"local": local.Local, "ray": ray.Ray, "slurm": slurm.Slurm}[chosen.engine]
    known = {field.name for field in fields(made)}
    asked = {}
    for name in ("workers", "address", "partition", "time", "jobs", "cpus", "gpus"):
        if (value := getattr(chosen, name, None)) is None:
            continue
        if name not in known:
            raise Refused(f"is no option of the engine {chosen.engine}", where=f"--{name}")
        asked[name] = value
    return made(**asked)


def add_settings(
    parser: argparse.ArgumentParser, *, out: str | None = None, without: Collection[str] = ()
) -> None:
    """--model, --out (`out` says where it is by default) and one option for each of `Settings`."""
    from holdfast.experiments.settings import Settings

    group(parser, "what").add_argument(
        "--model",
        default="minilm",
        help="minilm, a saved model's folder, a Hub id (ID@COMMIT pins it) or your own network's "
        "FILE.py (minilm)",
    )
    group(parser, "where").add_argument(
        "--out", type=Path, required=out is None, help=out or "the folder"
    )
    add_fields(
        parser,
        Settings,
        lambda name: "which rows" if name in ROWS else "how it is trained",
        without=without,
    )


def add_fields(
    parser: argparse.ArgumentParser, cls: type[Checked], title: Callable[[str], str], *,
    without: Collection[str] = (),
) -> None:  # fmt: skip
    """One option for each field of a configuration, in the group that `title` says."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        if field.name in without:
            continue
        about, kind = _described(hints[field.name])
        if field.default not in (None, False):
            about += f" ({field.default})"
        how: dict[str, Any] = {"help": about, "default": None}
        if kind is bool:
            how["action"] = "store_true"
        elif get_origin(kind) is not None:  # true, or a word
            how |= {"nargs": "?", "const": True, "choices": get_args(get_args(kind)[1])}
        else:
            how["type"] = kind
        group(parser, title(field.name)).add_argument(cls.where(field.name), **how)


def given(chosen: argparse.Namespace, cls: type[Checked] | None = None) -> dict[str, Any]:
    """The settings (or fields of `cls`) that were given; the rest keeps its default."""
    from holdfast.experiments.settings import Settings

    values = {field.name: getattr(chosen, field.name, None) for field in fields(cls or Settings)}
    return {name: value for name, value in values.items() if value is not None}


def forgetting(text: str) -> float:
    """How far a score may fall: finite and not below 0."""
    if not 0 <= (value := decimal(text)) < float("inf"):
        raise ValueError
    return value


def number(text: str) -> float | int:
    """A share or a count as a number; argparse shows this function's name in its errors."""
    return whole(text) if text.lstrip("+-").isdigit() else decimal(text)


def whole(text: str) -> int:
    """What every option of type int is parsed by."""
    return int(strictly(int, text))


def decimal(text: str) -> float:
    """What every option of type float is parsed by."""
    return float(strictly(float, text))


def show(table: Any, *lines: object) -> None:
    """Print a table and lines below it."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # Rich's own ends the process with 1
            raise BrokenPipeError

    Plain(width=None if sys.stdout.isatty() else 140).print(table)
    for line in lines:
        print(line)


def _described(hint: Any) -> tuple[str, Any]:
    """The description in a setting's annotation, and the function that parses its value."""
    if get_origin(hint) is UnionType or NoneType in get_args(hint):  # … | None
        return _described(next(each for each in get_args(hint) if each is not NoneType))
    if get_origin(hint) is not Annotated:
        raise TypeError(f"a setting without a description: {hint}")
    kind, *notes = get_args(hint)
    about = next(note.description for note in notes if getattr(note, "description", None))
    if get_origin(kind) is UnionType:
        return about, number
    if bool in get_args(kind):
        return about, kind
    return about, kind if kind in (int, float, bool) else str
