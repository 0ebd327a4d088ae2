"""The command line: one verb a file. 0 done, 1 damage found, 2 refused input, 3 a task was
lost (`check`), 130 or 143 stopped, 141 who read the output reads no more (`| head`).

A verb is a module with `ABOUT`, `EXAMPLE`, `RESUMES` (whether the same command resumes after it was
stopped), `options(parser)` and `run(chosen)`. Another package adds one by an entry point, which is
looked up only for a verb that is not here:

    [project.entry-points."holdfast.verbs"]
    mine = "my_package.mine"

All verb modules are loaded for every `--help`: import heavy packages in `run`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from holdfast import __version__
from holdfast.cli.options import decimal, whole
from holdfast.errors import OutOfMemory, Refused, meant, printable
from holdfast.experiments.ranks import check_alone, follows
from holdfast.files import must_be_utf8
from holdfast.plugins import plugin
from holdfast.training import stopping

VERBS = (
    "train", "sequence", "selftrain", "compare", "search", "rates", "combine", "predict", "export",
    "delta", "plan", "check", "runs", "report", "verify", "methods", "doctor", "demo",
)  # fmt: skip
GROUP = "holdfast.verbs"
# What other trainers call our options.
OTHERS = {"learning-rate": "lr", "num-train-epochs": "epochs", "num-epochs": "epochs",
          "per-device-train-batch-size": "batch-size",
          "gradient-accumulation-steps": "accumulation", "lr-scheduler-type": "schedule",
          "fp16": "bf16", "output-dir": "out", "dataset": "tasks", "max-seq-length": "max-length",
          }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    _open_streams()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # now, while it can be told that it failed
    except OSError as error:  # of the streams alone: `_run` tells all others
        _drop_streams()
        if not isinstance(error, BrokenPipeError):
            _say(f"the output could not be written ({error.strerror})", own=True)
            return 2
        return 128 + 13  # SIGPIPE, which Windows has not


def _open_streams() -> None:
    """Let no result be lost for how it is printed: to no stream, or in letters that it has not."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _drop_streams() -> None:
    """Send what is still to be written nowhere, or Python would fail once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    goes_on, resumes = "the same command goes on from the last checkpoint", False
    try:
        chosen = build_parser(words[:1]).parse_args(words, argparse.Namespace(words=words))
        resumes = chosen.verb.RESUMES
        if resumes and not getattr(chosen.verb, "TOGETHER", False):
            check_alone()
        must_be_utf8(getattr(chosen, "out", None), "--out")
        if "--out=" in words or ("--out", "") in itertools.pairwise(words):
            # As of a variable that is not set: a path would read it as the folder one is in.
            raise Refused("names no folder", where="--out", remedy="as runs/first")
        if getattr(chosen, "trust_code", False):
            from holdfast.tasks.program import trust_all

            trust_all()
        with stopping.handled():
            return chosen.verb.run(chosen) or 0
    except Refused as refusal:
        _say(str(refusal), own=isinstance(refusal, OutOfMemory))
        return 2
    except (KeyboardInterrupt, stopping.Stopped) as end:
        number = end.number if isinstance(end, stopping.Stopped) else signal.SIGINT
        said = str(stopping.Stopped(number))
        _say(f"{said}{f'; {goes_on}' if resumes else ''}")
        return 128 + number
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            raise
        if (fault := _fault(error)) is None:
            raise
        remedy = f"; once that is mended, {goes_on}"
        _say(f"{fault}{remedy if resumes and 'too long' not in fault else ''}", own=True)
        return 2


def _unread() -> bool:
    """Whether it is a stream of ours that nobody reads any more, no pipe between processes."""
    if not hasattr(select, "poll"):  # Windows
        return True
    asked = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it is no file
            asked.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def _say(line: str, *, own: bool = False) -> None:
    """Every last word of a command; it may repeat what strangers wrote.

    Of processes that share a run the first says it, and each what befell it on its `own`.
    """
    if not follows():
        print(f"holdfast: {printable(line)}", file=sys.stderr)
    elif own:
        print(f"holdfast: process {os.environ['RANK']}: {printable(line)}", file=sys.stderr)


def _fault(error: Exception) -> str | None:
    """One line for an error of the system, such as a full disk; None for an error of ours."""
    if isinstance(error.__cause__, Exception) and re.search(
        "disk (is full|I/O)", str(error.__cause__)
    ):
        return f"a database could not be written ({error.__cause__.args[0]})"  # SQLite's words
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        said = "the name is too long" if error.errno == errno.ENAMETOOLONG else said
        return said if error.filename is None else f"{error.filename}: {said}"
    # safetensors and torch raise errors of their own where a file cannot be written
    said = str(error).partition("\n")[0]
    written = re.search(r"os error \d+|PytorchStreamWriter|inline_container", said)
    return f"a file could not be written ({said})" if written else None


class Parser(argparse.ArgumentParser):
    """Complains in one line, names the nearest option, and reads numbers in plain digits."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.register("type", int, whole)
        self.register("type", float, decimal)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self._subparsers:  # before it is found that something else is missing
            for word in args or ():
                name = word.partition("=")[0]
                if re.match(r"--\w", name) and name not in self._option_string_actions:
                    self.error(f"unknown option {name!r}", self._near(name))
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            self.error(f"unknown {'option' if word[0] == '-' else 'word'} {word!r}")
        return found, unknown

    def _near(self, word: str) -> str:
        """What was probably meant by an option that is not known."""
        plain, known = word.strip("-"), [o.strip("-") for o in self._option_string_actions]
        if plain in ("gpu", "device", "cuda", "cpu"):
            return "the device is found by itself (`holdfast doctor` tells it)"
        remedy = meant(OTHERS.get(plain, plain), known, alike=0.7) or ""
        return remedy.replace("'", "'--", 1)

    def error(self, message: str, remedy: str = "") -> NoReturn:
        remedy = remedy or f"see {self.prog} --help"
        self.exit(2, f"holdfast: {printable(' '.join(message.split()))}; {remedy}\n")


def build_parser(asked: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of all verbs, and of the one `asked` for if another package provides it."""
    parser = Parser(
        prog="holdfast",
        allow_abbrev=False,
        description="Fine-tune pre-trained transformers without forgetting, and measure it.",
    )
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    modules = {name: import_module(f"holdfast.cli.{name}") for name in VERBS}
    for word in asked:
        if word not in modules and re.match(r"\w", word):
            modules[word], whence = plugin(GROUP, word, VERBS)
            needed = ("ABOUT", "EXAMPLE", "RESUMES", "options", "run")
            if lacking := [name for name in needed if not hasattr(modules[word], name)]:
                raise Refused(f"{whence} is no verb: it has no {', '.join(lacking)}")
    for name, module in modules.items():
        about: str = module.ABOUT
        made = verbs.add_parser(
            name,
            allow_abbrev=False,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(verb=module)
        module.options(made)
    return parser
