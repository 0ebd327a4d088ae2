"""Check that the checkpoints and records in a folder tree are still what was written.

Needs no torch. Folders are walked without following links, and of a checkpoint only the files that
its own manifest names are read.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from holdfast.errors import Refused, printable
from holdfast.experiments.record import Record
from holdfast.experiments.runs import CONFIG, RECORD, config_in, disagreement
from holdfast.files import INDEX, MODEL, check_seal, no_archive, parse_json
from holdfast.training.manifest import MANIFEST, damage, step_of

MODELS = (MODEL, INDEX, "holdfast.json")
SEARCH = "search.json"
UNSEALED = "whole, as far as can be seen: it has no checksum, as files of an older holdfast"
LARGEST = 256 << 20  # bytes of a record; one of a long run takes a few hundred thousand

Tell = Callable[[str], None]


def verify(paths: Sequence[Path], tell: Tell = print) -> int:
    """Report whether each checkpoint, record and configuration below `paths` is whole.

    Returns 0 if all are, 1 if one is damaged. Raises `Refused` where there is nothing to check.
    """
    found = [(path, kind) for path in paths for path, kind in _below(path)]
    sizes = sum(_size(path) for path, kind in found if kind is damage)
    damaged = 0
    with tqdm(total=sizes, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for path, kind in found:
            wrong = kind(path, bar.update)
            damaged += wrong not in (None, UNSEALED)
            with bar.external_write_mode(file=sys.stdout):
                tell(f"{printable(path)}: {'whole' if wrong is None else wrong}")
    tell(f"{len(found) - damaged} whole, {damaged} damaged")
    return int(damaged > 0)


Kind = Callable[[Path, Callable[[int], object]], str | None]


def _below(path: Path) -> Iterator[tuple[Path, Kind]]:
    """What can be checked in a folder and all below it."""
    if not path.exists():
        raise Refused("no such folder", where=str(path))
    no_archive(path)
    if not path.is_dir():
        raise Refused("is a file", where=str(path), remedy="name the folder it lies in")
    count = 0

    def stop(error: OSError) -> None:
        raise Refused(error.strerror or str(error), where=str(error.filename))

    for home, folders, files in os.walk(path, onerror=stop):
        folders.sort()
        here, names = Path(home), {*files}
        for name in sorted((*folders, *files)):
            if name in (MANIFEST, RECORD, CONFIG) and (here / name).is_symlink():
                names.discard(name)
                yield here / name, _link
                count += 1
        # A checkpoint whose manifest is gone was not written to its end.
        if MANIFEST in names or _looks_saved(here, names):
            yield here, damage
            count += 1
        for name in (RECORD, CONFIG, SEARCH):
            if name in names:
                yield here / name, _json
                count += 1
        if RECORD in names and CONFIG not in names and "tasks" in folders:
            yield here / CONFIG, _gone
    if not count:
        raise Refused("holds no checkpoint, run or record", where=str(path),
                      remedy="name a folder that training wrote")  # fmt: skip


def _looks_saved(folder: Path, names: set[str]) -> bool:
    tasks = folder.parent.name == "tasks" and bool(names & {*MODELS})
    return step_of(folder) is not None or tasks


def _size(folder: Path) -> int:
    """Bytes that will be read, as far as the folder says."""
    return sum(e.stat(follow_symlinks=False).st_size for e in os.scandir(folder) if e.is_file())


def _files(folder: Path, body: Mapping[str, Any]) -> str | None:
    """The first file beside a `search.json` that is not as it was written."""
    for name, sha in dict(body.get("files", {})).items():
        if Path(name).name != name or (folder / name).is_symlink():
            return f"names {printable(name)}, which is no file beside it"
        if not (folder / name).is_file():
            return f"{name}, beside it, is missing"
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha:
            return f"{name}, beside it, is not as it was written"
    return None


def _beside(config: Path, body: Mapping[str, Any]) -> str | None:
    """What a configuration says otherwise than the record beside it."""
    try:
        return disagreement(body, Record.load(config.parent))
    except Refused:  # none yet, or it is told by itself
        return None


def _gone(path: Path, _: Callable[[int], object]) -> str | None:
    return "is missing: the run cannot go on, nor be told from another"


def _link(path: Path, _: Callable[[int], object]) -> str | None:
    return "is a symbolic link, not the file that was written"


def _json(path: Path, _: Callable[[int], object]) -> str | None:
    try:
        if not path.is_file():
            return "is no plain file"
        if path.stat().st_size > LARGEST:
            return f"is larger than {LARGEST >> 20} MiB"
        body = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict):
            return "is not a holdfast record" if path.name == RECORD else "is no mapping"
        if path.name == RECORD:
            Record.from_dict(body)
        if path.name == CONFIG:
            return _beside(path, config_in(path.parent))
        return _files(path.parent, body) if check_seal(body) else UNSEALED
    except Refused as refusal:
        return _line(refusal.what)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"cannot be read ({_line(error)})"


def _line(error: object) -> str:
    return printable(" ".join(str(getattr(error, "strerror", None) or error).split())[:200])
