"""The manifest that marks a folder of files as whole, and the check of a folder against it.

A checkpoint is whole once its manifest, written last and durably, lists the size and SHA-256 of
every file in it. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
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


def commit(folder: str | Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Declare a folder whole as it is: sync its files, then its manifest, to survive a crash.

    known: size and SHA-256 of files by their path in it, from whoever wrote them; these are not
    read again.
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
    write_text_atomic(folder / MANIFEST, _manifest(files))
    sync_folder(folder.parent)


def sha256(file: BufferedReader | BufferedRandom, read: Read | None = None) -> str:
    """The SHA-256 of all bytes from the file's current position, in hexadecimal."""
    if read is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
        read(count)
    return digest.hexdigest()


def _manifest(files: Mapping[str, Any]) -> str:
    """The text of a manifest, with a hash of its own content."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"schema": 1, "sha256": digest, "files": files}, indent=1)


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
        with _open(folder, MANIFEST) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            return f"{MANIFEST} is larger than {LARGEST >> 20} MiB"
        text = content.decode("utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} is not as it was written"
        named = [(name, int(size), str(sha)) for name, (size, sha) in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except _NotPlain as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError):  # fmt: skip
        return f"{MANIFEST} cannot be read"
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
    """A name in a manifest is not that of a plain file inside its folder."""


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
    """The latest whole checkpoint in a Trainer's output folder.

    tell: called with a line about each later one that is passed over. Trainer itself would resume
    from it with other weights (faults P2, P3), or stop (P4).
    """
    for checkpoint in reversed(checkpoints_in(Path(folder))):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        tell(f"{checkpoint.name} is passed over: {wrong}")
    return None


def rotate(newest: Path, limit: int | None, *, best: str | None = None) -> None:
    """Keep `limit` checkpoints, among them `newest`, which is whole, and `best`.

    The earliest committed are deleted first, and before them those never committed.
    """

    def committed(checkpoint: Path) -> float:
        manifest = checkpoint / MANIFEST
        return manifest.stat().st_mtime if manifest.exists() else 0.0

    if limit is not None and limit > 0:
        found = checkpoints_in(newest.parent)
        spare = [p for p in found if p != newest and (best is None or p != Path(best))]
        for old in sorted(spare, key=committed)[: max(len(found) - limit, 0)]:
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
