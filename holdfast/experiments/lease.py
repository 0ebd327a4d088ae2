"""Who works on a folder: leases on which processes agree, on one host or on many.

Whoever creates `lease.<n>` of the highest n holds the folder. To take it is to create the next
number, which only one process can (O_EXCL, also on NFS), and to delete the lower ones before
anything else is written. So a holder that was taken for dead, and wakes, finds its file gone.

A lease is free if its holder released it; at once, if the holder was a process of this boot of this
host whose lock on the file the system has released; or if nobody heard from it for `STALE` seconds.
Each observer counts these by its own monotonic clock, and only while it looks: no two clocks are
compared, and neither a clock that is set nor a machine that slept makes a live holder a dead one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.errors import Busy, tell_once
from holdfast.training import stopping

LEASE = "lease"
BEAT = 15.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which others take the folder
LOOK = 1.0  # seconds between two looks of one that waits
TURN = 0.02  # the same, where holders are brief
HOST = socket.gethostname()
# A name alone may be given to two hosts; outside of Linux it has to do.
_ID = Path("/proc/sys/kernel/random/boot_id")
BOOT = _ID.read_text(encoding="ascii").strip() if _ID.is_file() else ""
LENGTH = 512  # bytes of a lease: overwritten in place, it must not change


class Lease:
    """A folder that this process holds, until `release` or until it is taken for dead."""

    def __init__(self, folder: Path, number: int) -> None:
        """Create the lease of that number; raises FileExistsError if somebody else has."""
        self.path, self.token, self._beats = _path(folder, number), secrets.token_hex(8), 0
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL  # an existing file, or link, is never opened
        self._handle: int | None = os.open(self.path, how, 0o644)
        self._guard, self._over = threading.Lock(), threading.Event()
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = True
        except OSError:  # a file system without locks: only signs of life count
            self._locked = False
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        _mine.add(self)
        try:
            self._sign()
        except OSError:  # a full disk
            self.path.unlink(missing_ok=True)
            self._forget()
            raise
        threading.Thread(target=self._beat, daemon=True, name="lease").start()

    def _sign(self, *, released: bool = False) -> None:
        told = {"process": os.getpid(), "host": HOST, "since": self._since, "boot": BOOT,
                "locked": self._locked, "token": self.token, "beats": self._beats,
                "released": released}  # fmt: skip
        with self._guard:
            if self._handle is not None:
                text = json.dumps(told).ljust(LENGTH - 1).encode() + b"\n"
                if os.pwrite(self._handle, text, 0) < len(text):  # others would wait for a sign
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(self._handle)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._beats += 1
            with suppress(OSError):  # such as a server that is away: others wait as long
                self._sign()

    def held(self) -> bool:
        """Whether it is ours still; the file is opened anew, so that NFS asks its server."""
        return bool(_read(self.path)[1].get("token") == self.token)

    def release(self) -> None:
        """Let others take the folder at once."""
        self._over.set()
        try:
            self._sign(released=True)
        except OSError:  # such as a full disk: what cannot be told is shown
            with suppress(OSError):
                self.path.unlink()
        self._forget()

    def _forget(self) -> None:
        """Close the file, which unlocks it."""
        _mine.discard(self)
        with self._guard:
            if self._handle is not None:
                os.close(self._handle)
            self._handle = None


_mine: set[Lease] = set()


def _forked() -> None:
    """A child would keep its parent's locks, also when the parent is killed."""
    for lease in _mine:
        with suppress(OSError):
            os.close(lease._handle if lease._handle is not None else -1)
        lease._handle, lease._guard = None, threading.Lock()
    _mine.clear()


os.register_at_fork(after_in_child=_forked)


def take(folder: Path, *, over: int = 0) -> Lease:
    """Hold a folder; `Busy` if another process does. over: a lease that counts as free."""
    number = newest(folder)
    while True:
        if number > over and (owner := holder(folder, number)) is not None:
            raise Busy(f"is being worked on by {owner}", where=str(folder),
                       remedy="wait for it, or choose another --out")  # fmt: skip
        number += 1
        try:
            lease = Lease(folder, number)
        except FileExistsError:  # somebody was faster
            continue
        if (last := newest(folder)) > number:  # the numbers read above were of a cache
            lease.path.unlink()
            lease.release()
            number = last
            continue
        for other in _numbers(folder):
            if other < number:
                with suppress(FileNotFoundError):
                    _path(folder, other).unlink()
        return lease


def take_patiently(folder: Path) -> Lease:
    """`take`, but a holder on another host is first given the time to show that it lives."""
    watch, looked = Watch(), 0.0
    while True:
        try:
            return take(folder)
        except Busy as busy:
            told = _read(_path(folder, newest(folder)))[1]
            if (_here(told) and told.get("locked")) or watch.alive(folder) or looked > 2 * STALE:
                raise
            tell_once(f"{folder}: {busy.what}; waiting for a sign of life")
        watch.free(folder)
        stopping.check()
        time.sleep(LOOK)
        looked += LOOK


def take_in_turn(folder: Path) -> Lease:
    """`take`, once whoever holds the folder, briefly, lets go of it or falls silent."""
    watch = Watch()
    while True:
        if watch.free(folder):
            with suppress(Busy):
                return take(folder)
        stopping.check()
        time.sleep(TURN)


class Watch:
    """Looks at folders that others hold, again and again, for holders that fell silent."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # What was last read of a folder; seconds without a change; when that was; any change seen.
        self._seen: dict[Path, tuple[bytes, float, float, bool]] = {}

    def free(self, folder: Path) -> bool:
        """Whether the folder may be taken now; ends the lease of a holder that fell silent."""
        number = newest(folder)
        if not number or holder(folder, number) is None:
            return True
        text, now = f"{number} ".encode() + _read(_path(folder, number))[0], self._now()
        before = self._seen.get(folder)
        if before is None or before[0] != text:
            self._seen[folder] = text, 0.0, now, before is not None
            return False
        # One look counts for one beat at most: this process may itself have been paused.
        quiet = before[1] + min(now - before[2], BEAT)
        self._seen[folder] = text, quiet, now, before[3]
        if quiet < STALE:
            return False
        with suppress(Busy):
            take(folder, over=number).release()
        return True

    def alive(self, folder: Path) -> bool:
        """Whether a sign of life was seen."""
        return self._seen.get(folder, (b"", 0.0, 0.0, False))[3]


def holder(folder: Path, number: int) -> str | None:
    """Who holds a lease, in words; None if it is free, or gone."""
    text, told = _read(_path(folder, number))
    if told.get("released") or (not text and not _path(folder, number).exists()):
        return None
    if _here(told) and told.get("locked"):
        with suppress(OSError):
            handle = os.open(_path(folder, number), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            finally:
                os.close(handle)
    if "process" not in told:
        return "another process"
    return f"process {told['process']} on {told.get('host')} since {told.get('since')}"


def check_free(folder: Path) -> None:
    """Raise `Busy` if another process holds the folder."""
    if (number := newest(folder)) and (owner := holder(folder, number)) is not None:
        raise Busy(f"is being worked on by {owner}", where=str(folder))


def newest(folder: Path) -> int:
    """The highest number of a lease; 0 without one."""
    return max(_numbers(folder), default=0)


def _here(told: dict[str, Any]) -> bool:
    return (told.get("host"), told.get("boot")) == (HOST, BOOT)


def _numbers(folder: Path) -> list[int]:
    with suppress(FileNotFoundError, NotADirectoryError):
        ends = [n.removeprefix(f"{LEASE}.") for n in os.listdir(folder) if n.startswith(LEASE)]
        return [int(end) for end in ends if end.isascii() and end.isdigit() and len(end) < 19]
    return []


def _path(folder: Path, number: int) -> Path:
    return folder / f"{LEASE}.{number}"


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A lease as bytes and what they say; nothing if it is gone, or is no lease."""
    try:
        # What was planted here may be a pipe, which must not hold us up.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b"", {}
    try:
        text = os.read(handle, LENGTH)
        told = json.loads(text)
        return text, told if isinstance(told, dict) else {}
    except (OSError, ValueError):
        return b"", {}
    finally:
        os.close(handle)
