"""SIGTERM and Ctrl-C: finish the running step, save, end; a second signal ends at once.

Inside `looking`, a signal only sets a flag that the training loop polls; work outside of it has
nothing to save and ends where it is. A second signal leaves no torn file either: every file that
counts was written under another name and renamed, or is listed in a manifest written last.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal ended the work; `code` is what a shell expects, 128 + `number`: 143 or 130."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = int(number)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (self.number,)

    def __str__(self) -> str:
        return "interrupted" if self.number == signal.SIGINT else "stopped by SIGTERM"


class _Now:
    """The state of signal handling; per process, as signal handlers are."""

    installed = False
    asked = 0
    looking = 0


def install(*, only: tuple[int, ...] = SIGNALS, patient: bool = False) -> Callable[[], None]:
    """Handle signals from here on; the function returned restores the previous handlers.

    patient: further signals are ignored, for a process whose parent ends it. Does nothing outside
    of the main thread, or if signals are already handled here.
    """
    if _Now.installed or threading.current_thread() is not threading.main_thread():
        return lambda: None

    owner = os.getpid()

    def note(number: int, _: Any) -> None:
        forked = os.getpid() != owner
        if forked and number == signal.SIGTERM:  # from a pool, which waits for its processes to end
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if _Now.asked:
            if patient:
                return
            os._exit(128 + number)  # no cleaning up: it may be what hangs
        _Now.asked = number
        if not _Now.looking:
            raise Stopped(number)
        if not patient and not forked and os.isatty(2):
            with suppress(OSError):  # a terminal that is gone
                os.write(2, b"\nholdfast: finishing the step and saving; once more ends at once\n")

    before = {number: signal.getsignal(number) for number in only}
    _Now.installed, _Now.asked = True, 0
    for number in only:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, note)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _Now.installed, _Now.asked = False, 0

    return restore


@contextmanager
def handled() -> Iterator[None]:
    """Within the block the first SIGTERM or Ctrl-C becomes `Stopped`, between two steps."""
    restore = install()
    try:
        yield
    finally:
        restore()


@contextmanager
def looking() -> Iterator[None]:
    """A block that polls `asked` after each step and saves; at its end, `Stopped` if asked."""
    check()
    _Now.looking += 1
    try:
        yield
    finally:
        _Now.looking -= 1
    check()


def asked() -> int:
    """The signal that asked this process to end; 0 for none."""
    return _Now.asked


def ask(number: int) -> None:
    """Take over a signal that another rank received; 0 for none."""
    _Now.asked = _Now.asked or number


def active() -> bool:
    """Whether signals are handled here, so that a loop has to poll `asked`."""
    return _Now.installed


def check() -> None:
    """Raise `Stopped` if a signal asked for it."""
    if _Now.asked:
        raise Stopped(_Now.asked)
