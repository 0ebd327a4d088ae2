"""Tasks of your own: a Python file with `model()` and `tasks()`, named as `net.py:TASK`.

    def model():            # any nn.Module
    def tasks():            # by name: rows, a loss, a score
        return {"low": {"train": rows, "evaluation": rows, "loss": loss, "score": score}}

rows are a mapping of arrays by name, (rows, …) each, or a list of mappings, a row each.
loss(model, batch) returns a mean over the rows of a batch, or (loss, logits) with logits (rows,
classes); score(model, batch) a number for each row, (rows,), higher is better. May be given too:
metric, the score's name; collate(rows), for rows of different shapes; predict(model, batch).

The file is run. That is as it should be for one that you name yourself; one that lies in a run's
folder, which a stranger may have made, is run only if it was named, or trusted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.errors import Refused, nearest
from holdfast.tasks.files import label, must_exist
from holdfast.tasks.spec import PLACE
from holdfast.tasks.task import Row, slug

_trusted: set[Path] = set()
_everything = False


@dataclass(frozen=True, slots=True)
class Item(Row):
    """A row of arrays and numbers by name; `text` is the SHA-256 of them all."""

    values: Mapping[str, Any] = field(default_factory=dict, compare=False)


def parted(place: str) -> tuple[Path, str | None]:
    """`net.py:low` as the file and the name of a task."""
    found = PLACE.fullmatch(place)
    if found is None:
        raise Refused("is no Python file", where=place, remedy="name it as net.py:TASK")
    return Path(found["file"]), found["task"]


def trust(places: Iterable[object]) -> None:
    """Let these Python files be run: the user named them."""
    for place in map(str, places):
        if PLACE.fullmatch(place):
            _trusted.add(parted(place)[0].resolve())


def trust_all() -> None:
    """Let the Python files that lie in runs be run."""
    global _everything
    _everything = True


def named(file: Path) -> bool:
    """Whether the user named it."""
    return file.resolve() in _trusted


def trusted(file: Path) -> bool:
    return _everything or named(file)


def opened(file: Path) -> Any:
    """The module in a file, run once as long as the file stays as it is."""
    if not trusted(file):
        raise Refused("would be run, and was not named", where=str(file),
                      remedy="look at it, then say --trust-code, "
                      "in Python holdfast.tasks.program.trust_all()")  # fmt: skip
    content = must_exist(file).read_bytes()
    return _run(file.resolve(), hashlib.sha256(content).hexdigest())


@functools.lru_cache(maxsize=16)
def _run(file: Path, digest: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"holdfast_program_{digest[:12]}", file)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise Refused(
            f"cannot be run ({type(error).__name__}: {error})", where=str(file)
        ) from error
    for name in ("model", "tasks"):
        if not callable(getattr(module, name, None)):
            raise Refused(f"has no function {name}()", where=str(file))
    module.tasks = functools.cache(module.tasks)  # its rows may take time to make
    return module


def described(file: Path, name: str | None) -> tuple[str, Mapping[str, Any]]:
    """A task's name and what `tasks()` says of it; the only one if none is named."""
    known = opened(file).tasks()
    if not isinstance(known, Mapping) or not known:
        raise Refused("tasks() returns no tasks by name", where=str(file))
    if name is None and len(known) > 1:
        each = ", ".join(f"{file}:{task}" for task in known)
        raise Refused(f"has {len(known)} tasks", where=str(file), remedy=f"name them: {each}")
    # A run knows a task by its short name.
    found = [task for task in known if name in (None, task, slug(task))]
    if not found:
        raise Refused(f"no task {name!r}", where=str(file), remedy=nearest(str(name), list(known)))
    told = known[found[0]]
    for key in ("train", "loss", "score"):
        if key not in told:
            raise Refused(f"its task {found[0]!r} has no {key!r}", where=str(file))
    return found[0], told


def read(place: str) -> tuple[str, str, list[Row], list[Row] | None]:
    """Name, metric, training rows and evaluation rows of a task."""
    file, wanted = parted(place)
    name, told = described(file, wanted)
    held = told.get("evaluation")
    where = f"{label(file)}:{name}"
    train = items(told["train"], where)
    return (
        name,
        str(told.get("metric", "score")),
        train,
        None if held is None else items(held, where),
    )


def items(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], where: str) -> list[Row]:
    """Rows of arrays by name, floating-point ones in float32."""
    if isinstance(rows, Mapping):
        arrays = {str(name): _array(values) for name, values in rows.items()}
        sizes = {len(values) for values in arrays.values()}
        if len(sizes) != 1:
            raise Refused(f"arrays of {sorted(sizes)} rows", where=where)
        each: Any = [{n: v[i] for n, v in arrays.items()} for i in range(sizes.pop())]
    elif all(isinstance(row, Mapping) for row in rows):
        each = [{str(n): _array(v) for n, v in row.items()} for row in rows]
    else:
        raise Refused("rows are neither arrays by name nor a list of mappings", where=where)
    if not each:
        raise Refused("no rows", where=where)
    digests = [_digest(values) for values in each]
    return [
        Item(digest, None, digest, values) for digest, values in zip(digests, each, strict=True)
    ]


def _array(values: Any) -> Any:
    found = np.asarray(values)
    return found.astype(np.float32) if found.dtype == np.float64 else found


def _digest(values: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype} {values[name].shape}".encode())
        digest.update(np.ascontiguousarray(values[name]).tobytes())
    return digest.hexdigest()
