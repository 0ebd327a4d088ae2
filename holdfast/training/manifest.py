"""The manifest that marks a folder of files as whole, and the check of a folder against it.

A checkpoint is whole once its manifest, written last and durably, lists the size and SHA-256 of
every file in it. Checkpoints of one folder are numbered as they are committed, each with the number
of the one that it went on from: the newest is the one that was committed last, whatever its step.
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedRandom, BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

from holdfast.errors import printable
from holdfast.files import NotPlain, open_plain, sync_folder, write_text_atomic

LOG = logging.getLogger("holdfast")
MANIFEST = "manifest.json"
LARGEST = 64 << 20  # bytes of a manifest; a name takes about 100
CHUNK = 1 << 20  # bytes

Read = Callable[[int], Any]  # called with the number of bytes just read
Spot = tuple[Path, int]  # a folder of checkpoints, and the number of one in it
ANEW: Spot = (Path(), 0)  # of a run that has neither saved nor loaded one


def commit(
    folder: str | Path,
    known: Mapping[str, tuple[int, str]] | None = None,
    *,
    after: Spot | None = None,
) -> Spot:
    """Declare a folder whole as it is: sync its files, then its manifest, to survive a crash.

    Returns where a run is that has just saved this checkpoint.

    known: size and SHA-256 of files by their path in it, from whoever wrote them; these are not
    read again. after: of a checkpoint, where its run was saved last or went on from, or `ANEW`; if
    not said, at the checkpoint of this folder that was committed last.
    """
    folder, known = Path(folder), known or {}
    inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST]

    def settle(path: Path) -> tuple[str, list[Any]]:
        name = path.relative_to(folder).as_posix()
        with path.open("r+b") as file:
            # Hash while the system writes the file out, and only then wait for the disk.
            size = os.fstat(file.fileno()).st_size
            sha = known[name][1] if known.get(name, (-1, ""))[0] == size else sha256(file)
            os.fsync(file.fileno())
        return name, [size, sha]

    with ThreadPoolExecutor(2) as pool:  # hashing releases the GIL: two files at a time
        files = dict(pool.map(settle, inside))
    for home in {folder, *(path.parent for path in inside)}:
        sync_folder(home)
    numbers = _numbered(folder, after)
    write_text_atomic(folder / MANIFEST, _manifest(files, numbers))
    sync_folder(folder.parent)
    return folder.resolve().parent, numbers[0] if numbers else 0


def spot(checkpoint: str | Path) -> Spot:
    """Where a run is that has just loaded this checkpoint."""
    saved = _saved(Path(checkpoint))
    return Path(checkpoint).resolve().parent, saved[0] if saved else 0


def _numbered(folder: Path, after: Spot | None) -> tuple[int, int] | None:
    """The numbers for a checkpoint's manifest: its own, above all others, and the one before it."""
    if step_of(folder) is None:
        return None
    numbers = [saved[0] for path in checkpoints_in(folder.parent) if (saved := _saved(path))]
    last, here = max(numbers, default=0), folder.resolve().parent
    home, before = after or (here, last)
    return 1 + last, before if home == here else 0


def sha256(file: BufferedReader | BufferedRandom, read: Read | None = None) -> str:
    """The SHA-256 of all bytes from the file's current position, in hexadecimal."""
    if read is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
        read(count)
    return digest.hexdigest()


def _manifest(files: Mapping[str, Any], saved: Any = None) -> str:
    """The text of a manifest, with a hash of its own content."""
    vouched = files if saved is None else [files, saved]
    digest = hashlib.sha256(json.dumps(vouched).encode()).hexdigest()
    body = {"schema": 1, "sha256": digest, "files": files}
    return json.dumps(body if saved is None else body | {"saved": saved}, indent=1)


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file by the folder's manifest; empty if there is none."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (int(size), str(sha)) for name, (size, sha) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def identity(folder: Path) -> str:
    """A hash of a whole folder's content: the one that its manifest gives of itself."""
    return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])


def damage(folder: str | Path, read: Read | None = None) -> str | None:
    """What is wrong with a folder that `commit` should have declared whole; None if nothing is.

    read: called with the number of bytes just read, to show progress. Whatever a manifest says,
    only plain files inside the folder are opened.
    """
    folder = Path(folder)
    try:
        named, _ = _said(folder)
    except _NotPlain as error:
        return str(error)
    for name, size, sha in named:
        try:
            with _open(folder, name) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{_shown(name)} has {found} bytes of {size}"
                if sha256(file, read) != sha:
                    return f"{_shown(name)} is not as it was written"
        except FileNotFoundError:
            return f"{_shown(name)} is missing"
        except _NotPlain as error:
            return str(error)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            return f"{_shown(name)} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


class _NotPlain(Exception):
    """A manifest is not as it was written, or a name in it not that of a plain file inside."""


def _said(folder: Path) -> tuple[list[tuple[str, int, str]], tuple[int, int]]:
    """What a manifest says: name, size and SHA-256 of each file, and a checkpoint's two numbers,
    0 where it has none."""
    try:
        with _open(folder, MANIFEST) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise _NotPlain(f"{MANIFEST} is larger than {LARGEST >> 20} MiB")
        text = content.decode("utf-8")
        body = json.loads(text)
        files, saved = body["files"], body.get("saved")
        if text != _manifest(files, saved):
            raise _NotPlain(f"{MANIFEST} is not as it was written")
        number, before = saved or (0, 0)
        named = [(name, int(size), str(sha)) for name, (size, sha) in files.items()]
        return named, (int(number), int(before))
    except FileNotFoundError:
        raise _NotPlain(f"{MANIFEST} is missing: it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError):  # fmt: skip
        raise _NotPlain(f"{MANIFEST} cannot be read") from None


def _saved(checkpoint: Path) -> tuple[int, int] | None:
    """A checkpoint's number and that of the one before it; None without a sound manifest."""
    try:
        return _said(checkpoint)[1]
    except _NotPlain:
        return None


def _open(folder: Path, name: str) -> BufferedReader:
    """Open a plain file inside `folder` to read; follows no link and never blocks on a pipe."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        raise _NotPlain(f"{MANIFEST} names {_shown(name)}, which is no file in its folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise _NotPlain(f"{_shown(name)} is a symbolic link, not the file that was written")
    try:
        return open_plain(path, follow=False)
    except NotPlain:
        raise _NotPlain(f"{_shown(name)} is no plain file") from None


def _shown(name: str) -> str:
    """A name from an untrusted manifest, as one short printable line."""
    plain = printable(name)
    return plain if len(plain) <= 120 else plain[:117] + "…"


def newest_complete(folder: str | Path, tell: Callable[[str], None] = LOG.warning) -> Path | None:
    """The whole checkpoint in a Trainer's output folder that was committed last.

    tell: called with a line about each of a later step that is passed over. Trainer itself would
    resume from it with other weights (faults P2, P3), or stop (P4). Where a run went back to an
    earlier checkpoint, or began anew, those that it left behind do not count once it has saved.
    """
    numbers = {path: _saved(path) for path in checkpoints_in(Path(folder))}
    # Without a sound manifest the number is not known; such a one is never whole.
    order = sorted(numbers, key=lambda path: (numbers[path] or (math.inf, 0))[0])
    wrong, found, left = dict[Path, str](), None, range(0)
    for checkpoint in reversed(order):
        number, before = numbers[checkpoint] or (0, 0)
        if number in left:
            continue
        if (harm := damage(checkpoint)) is None:
            found = checkpoint
            break
        wrong[checkpoint] = harm
        if number:
            left = range(before + 1, number)  # committed between, by a run that was left
    later = list(numbers)
    for path in reversed(later[later.index(found) + 1 :] if found else later):
        why = wrong.get(path, "the run that wrote it was left for another")
        tell(f"{path.name} is passed over: {why}")
    return found


def rotate(newest: Path, limit: int | None, *, best: str | None = None) -> None:
    """Keep `limit` checkpoints, among them `newest`, which is whole, and `best`.

    The earliest committed are deleted first, before them those of runs that were left for another,
    and before these any that were never committed.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints_in(newest.parent)
    numbers = {path: _saved(path) for path in found}
    befores = dict(saved for saved in numbers.values() if saved is not None)
    branch, number = set[int](), (numbers.get(newest) or (0, 0))[0]
    while number in befores and number not in branch:
        branch.add(number)
        number = befores[number]

    def worth(path: Path) -> tuple[bool, bool, int]:
        number = (numbers[path] or (0, 0))[0]
        return numbers[path] is not None, number in branch, number

    spare = [p for p in found if p != newest and (best is None or p != Path(best))]
    for old in sorted(spare, key=worth)[: max(len(found) - limit, 0)]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints by their step."""
    steps = {path: step_of(path) for path in folder.glob("checkpoint-*")}
    found = {path: step for path, step in steps.items() if step is not None}
    return sorted(found, key=found.__getitem__)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, by the name that Trainer gives it; None for other folders."""
    name, step = path.name.partition("-")[::2]
    return int(step) if name == "checkpoint" and step.isdecimal() else None
