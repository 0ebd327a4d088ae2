"""The one store of runs: a folder a run, a lease while it is worked on, an atomic record.

A run's configuration is kept in `run.json`. The same configuration goes on where it stopped, and a
different one in the same folder is refused, with what differs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from holdfast.errors import Refused
from holdfast.files import write_text_atomic

CONFIG, LEASE, RECORD = "run.json", "lease", "record.json"


def digest(config: Mapping[str, Any]) -> str:
    """A name for a configuration: twelve hex digits of the SHA-256 of its sorted JSON."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def open_run(folder: str | Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Hold a run's folder for as long as the block lasts.

    Raises `Refused` where another live process holds it, where it belongs to another
    configuration, or where it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lease = _take_lease(folder)
    except OSError as error:
        raise Refused(f"cannot be written: {error.strerror}", where=str(folder),
                      remedy="choose another --out") from None  # fmt: skip
    try:
        _check_config(folder, json.loads(json.dumps(config)))
        yield folder
    finally:
        lease.close()


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    path = folder / CONFIG
    if not any((folder / name).exists() for name in (RECORD, "tasks")):
        # Nothing was trained yet: a model that could not be loaded may be corrected.
        write_text_atomic(path, json.dumps(config, indent=1))
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Refused("its run.json is missing or damaged", where=str(folder),
                      remedy="choose another --out") from None  # fmt: skip
    changed = [k for k in sorted({*before, *config}) if before.get(k) != config.get(k)]
    if changed:
        told = ", ".join(f"{k}: {_short(before.get(k))} → {_short(config.get(k))}" for k in changed)
        raise Refused(f"holds a run with other settings ({told})", where=str(folder),
                      remedy="choose another --out")  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _take_lease(folder: Path) -> IO[str]:
    """Lock the lease file and sign it; the system lets go of it when this process ends."""
    # A link planted here is not followed: what it names would be emptied.
    handle = os.open(folder / LEASE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    file = open(handle, "r+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise Refused(f"is being worked on by {owner}", where=str(folder),
                      remedy="wait for it, or choose another --out") from None  # fmt: skip
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
    file.flush()
    return file


def check_disk(folder: Path, needed: int) -> None:
    """Refuse a run whose files will not fit; `needed` in bytes."""
    at = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(at).free
    if free < needed:
        raise Refused(
            f"{free / 1e9:.1f} GB free, the run needs about {needed / 1e9:.1f} GB",
            where=str(folder),
            remedy="free some space or choose another --out",
        )
