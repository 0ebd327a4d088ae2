"""The command line: one verb a file. 0 done, 1 damage found, 2 refused input, 3 a task was
lost (`check`), 130 or 143 stopped.

A verb is a module with `ABOUT`, `EXAMPLE`, `RESUMES` (whether the same command resumes after it was
stopped), `options(parser)` and `run(chosen)`. Another package adds one by an entry point, which is
looked up only for a verb that is not here:

    [project.entry-points."holdfast.verbs"]
    mine = "my_package.mine"

All verb modules are loaded for every `--help`: import heavy packages in `run`.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from holdfast import __version__
from holdfast.errors import Refused, nearest
from holdfast.plugins import plugin
from holdfast.training import stopping

VERBS = (
    "train", "sequence", "compare", "search", "combine", "predict", "export", "check", "runs",
    "report", "verify", "methods", "doctor", "demo",
)  # fmt: skip
GROUP = "holdfast.verbs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    goes_on, resumes = "the same command goes on from the last checkpoint", False
    try:
        chosen = build_parser(words[:1]).parse_args(words)
        resumes = chosen.verb.RESUMES
        with stopping.handled():
            return chosen.verb.run(chosen) or 0
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
    """One line for an error of the system, such as a full disk; None for an error of ours."""
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        said = "the name is too long" if error.errno == errno.ENAMETOOLONG else said
        return said if error.filename is None else f"{error.filename}: {said}"
    # safetensors and torch raise errors of their own where a file cannot be written
    said = str(error).partition("\n")[0]
    written = re.search(r"os error \d+|PytorchStreamWriter|inline_container", said)
    return f"a file could not be written ({said})" if written else None


class Parser(argparse.ArgumentParser):
    """Complains in one line and names the nearest option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("-") else "word"
            self.error(f"unknown {kind} {word!r}", nearest(word, list(self._option_string_actions)))
        return found, unknown

    def error(self, message: str, remedy: str = "") -> NoReturn:
        if not remedy.startswith("did you mean"):
            remedy = f"see {self.prog} --help"
        self.exit(2, f"holdfast: {' '.join(message.split())}; {remedy}\n")


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
