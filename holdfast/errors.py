"""The one error that a user's mistake raises, and warnings logged once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable


def printable(text: object) -> str:
    r"""`text` on one line, with what would command a terminal (or hide) written as an escape.

    Example:
        >>> printable("\x1b[31mred\n")
        '\\x1b[31mred\\n'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Refused(ValueError):
    """Input that holdfast will not work with: one line saying what, where and the remedy.

    The command line prints it and exits with 2; nothing has been trained or overwritten.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        line = what if where is None else f"{where}: {what}"
        super().__init__(printable(line if remedy is None else f"{line}; {remedy}"))

    def within(self, place: str | None) -> Refused:
        """The same refusal, found inside `place`."""
        where = f"{place}: {self.where}" if place and self.where else place or self.where
        return type(self)(self.what, where=where, remedy=self.remedy)


class TrainingDiverged(Refused):
    """Training ended in non-finite numbers."""


class NotFinite(TrainingDiverged):
    """What was to be remembered of rows, or written into weights, is NaN or infinite.

    A setting that is tried, by a budget or a search, has diverged with it.
    """


class OutOfMemory(TrainingDiverged):
    """Memory did not suffice, nor with half the rows at a time: what was tried has failed."""


class Busy(Refused):
    """Another process is working on this run."""


@functools.cache
def tell_once(line: str) -> None:
    """Log a warning, each line once per process."""
    logging.getLogger("holdfast").warning(printable(line))


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """A remedy naming the nearest of `known`, or all of them."""
    return meant(word, known) or f"known are {', '.join(sorted(known))}"


def meant(word: str, known: Iterable[str], *, alike: float = 0.5) -> str | None:
    """A remedy naming the nearest of `known`; None if none is `alike`, from 0 to 1."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=alike)
    return f"did you mean {close[0]!r}?" if close else None
