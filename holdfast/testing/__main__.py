"""The contract suite on a method of anybody's, with pytest:

    python -m holdfast.testing my_package.mine:Mine --settings '{strength: 3.0}' --accumulates no
    python -m holdfast.testing path/to/mine.py:Mine -k saved

The method is tested with its defaults and with each --settings. Other options are pytest's, and so
is the exit code; 2 where no method was found.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.engine.method import Method
from holdfast.errors import Refused, nearest
from holdfast.files import read_yaml


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m holdfast.testing", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("method", metavar="MODULE:CLASS", help="or FILE.py:CLASS")
    parser.add_argument("--settings", action="append", default=[], metavar="YAML",
                        help="test it with these settings too; may be repeated")  # fmt: skip
    parser.add_argument("--accumulates", choices=["yes", "no"], default="yes",
                        help="no: it draws anew for each micro-batch (yes)")  # fmt: skip
    chosen, more = parser.parse_known_args(arguments)
    try:
        kind = found(chosen.method)
        given = [read_yaml(text, where="--settings") for text in chosen.settings]
        methods = [kind.from_dict(values, where="--settings") for values in ({}, *given)]
        return run(methods, *more, accumulates=chosen.accumulates == "yes")
    except Refused as refusal:
        print(f"holdfast.testing: {refusal}", file=sys.stderr)
        return 2


def found(place: str) -> type[Method]:
    """The method class at `package.module:Class` or `path/to/file.py:Class`; runs the file."""
    home, _, name = place.rpartition(":")
    if not home or not name:
        raise Refused("names no class", where=place, remedy="say MODULE:CLASS or FILE.py:CLASS")
    try:
        if home.endswith(".py"):
            module = _run(Path(home))
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        raise Refused(str(error), where=place) from None
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        named = [n for n, k in vars(module).items()
                 if isinstance(k, type) and issubclass(k, Method) and k is not Method]  # fmt: skip
        remedy = nearest(name, named) if named else "derive it from holdfast.Method"
        raise Refused(f"no method {name!r}", where=home, remedy=remedy)
    needed = ("name", "summary", "paper", "bytes_per_weight")
    if lacking := [attribute for attribute in needed if not hasattr(kind, attribute)]:
        raise Refused(f"declares no {', '.join(lacking)}", where=name,
                      remedy="each is one line of text, a ClassVar[str]")  # fmt: skip
    return kind


def _run(file: Path) -> ModuleType:
    """The module in a file; what lies beside it can be imported, as for a script."""
    if not file.is_file():
        raise Refused("no such file", where=str(file))
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"holdfast_own_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where annotations are looked up
    spec.loader.exec_module(module)
    return module


def run(methods: Sequence[Method], *more: str, accumulates: bool = True) -> int:
    """The contract suite on these methods; `more` for pytest, whose exit code is returned."""
    if importlib.util.find_spec("pytest") is None:
        raise Refused("needs pytest", remedy="pip install 'holdfast[dev]', or pytest alone")
    import pytest

    from holdfast.testing import MethodContract

    class Asked:
        """The methods in place of the fixture that a subclass would override."""

        def pytest_generate_tests(self, metafunc: Any) -> None:
            if "method" in metafunc.fixturenames:
                metafunc.parametrize("method", methods, ids=repr)

    MethodContract.accumulates = accumulates
    suite = str(Path(__file__).with_name("contract.py"))
    # No settings or conftest.py of the project around; the suite itself is collected.
    alone = ["-q", "-c", os.devnull, "--rootdir", str(Path(suite).parent), "--noconftest",
             "-p", "no:cacheprovider", "-p", "no:xdist",
             "-o", "python_classes=MethodContract"]  # fmt: skip
    return int(pytest.main([*alone, suite, *more], plugins=[Asked()]))


if __name__ == "__main__":
    sys.exit(main())
