"""What is tried, by whom, and how it is counted."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from holdfast.errors import printable, tell_once

if TYPE_CHECKING:
    from holdfast.testing.faults.place import Place

GROUPS = {"D": "data", "C": "config", "N": "numbers", "P": "processes", "R": "ranks",
          "S": "security"}  # fmt: skip
Door = Literal["command line", "Trainer", "plain loop"]
DOORS: tuple[Door, ...] = ("command line", "Trainer", "plain loop")
SURVIVED, WRONG, FAILED, UNTRIED = "survived", "silent wrong", "failed", "not tried"

MEANINGS = {
    "D1": "an empty file, or one of which nothing is left",
    "D2": "one class; one output and whole numbers",
    "D3": "a label outside of the map",
    "D4": "texts and labels that read NA, None, null",
    "D5": "one label in several spellings; splits in another order",
    "D6": "missing text",
    "D7": "quoted newlines and commas; ragged rows",
    "D8": "bytes that are not UTF-8; a byte order mark; half a character",
    "D9": "a line of 5 MB",
    "D10": "a Parquet file that is cut, or is none",
    "D11": "evaluation rows among the training rows",
    "D12": "labels that are all -100",
    "D13": "rows that changed since the checkpoint",
    "D14": "a later task that is missing or mislabelled",
    "C1": "a misspelt key",
    "C2": "a key given twice",
    "C3": "1e-5, which YAML reads as a text",
    "C4": "no and 12:30, which YAML reads as false and 750",
    "C5": "rates and shares that are NaN, infinite, negative",
    "C6": "an alias bomb",
    "C7": "a pattern that matches nothing; a parameter claimed twice",
    "C8": "a pattern that takes for ever",
    "C9": "going on under other settings",
    "C10": "names that are paths, or no names of files",
    "N1": "an infinite gradient",
    "N2": "an infinite gradient, clipped, without a scaler",
    "N3": "gradients that stay NaN",
    "N4": "gradients read while they are scaled",
    "N5": "accumulation, with a short last window",
    "N6": "frozen weights that are trained later",
    "N7": "tied weights",
    "N8": "sparse gradients",
    "N9": "sums of bfloat16 gradients",
    "N10": "types of state that loading would change",
    "N11": "another order, or shape, of the parameters",
    "N12": "torch.compile",
    "N13": "a score that is infinite or NaN",
    "N14": "scores that are zero or tied",
    "P1": "kill -9 at any write",
    "P2": "a file of a checkpoint missing",
    "P3": "a flipped bit",
    "P4": "the newest checkpoint cut short",
    "P5": "a full disk while saving",
    "P6": "a journal whose last line is torn",
    "P7": "kill -9 while a journal is locked",
    "P8": "a dead worker's trial",
    "P9": "two workers end one trial",
    "P10": "two processes in one folder",
    "P11": "SIGTERM, and Ctrl-C twice",
    "P12": "a trial that does not fit into memory",
    "P13": "a folder that cannot be written, or is deleted",
    "P14": "SQLite on a network's disk",
    "P15": "a clock that jumps",
    "P16": "a checkpoint of another release",
    "P17": "going on in the middle of an epoch, a window, a stage",
    "P18": "old checkpoints are deleted",
    "P19": "killed again while recovering",
    "R1": "hooks see gradients of one rank",
    "R2": "the same under no_sync",
    "R3": "a threshold of one shard",
    "R4": "ZeRO, which has no gradients",
    "R5": "a rank that dies or hangs",
    "R6": "ranks that race for a rename",
    "R7": "another number of ranks",
    "R8": "ranks that share no disk",
    "R9": "a database that restarts",
    "R10": "a Ray node that is killed",
    "R11": "NaN on one rank",
    "S1": "a pickle in place of any file",
    "S2": "torch.load's weights_only got round",
    "S3": "a pickle among sharded checkpoints",
    "S4": "a configuration that has code fetched",
    "S5": "archives that lead elsewhere",
    "S6": "files that unpack to far more, headers that ask for far more",
    "S7": "scripts in names, labels, texts",
    "S8": "cells of a CSV that are formulas",
    "S9": "terminal codes in names",
    "S10": "tags of YAML that make objects",
    "S11": "passwords of a database",
    "S12": "services that anybody reaches",
    "S13": "Parquet that runs code in old readers",
    "S14": "planted links",
}


class Wrong(AssertionError):
    """A result changed, or may have, and nobody was told."""


class Missing(Exception):
    """Something that a try needs is not installed here."""


@dataclass(frozen=True)
class Try:
    """One fault through one door. `why`: why it is not tried here, and what tries it instead."""

    fault: str
    door: Door
    run: Callable[[Place], None] | None = None
    slow: bool = False
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a try."""

    fault: str
    door: Door
    came: str
    why: str = ""
    seconds: float = 0.0

    @property
    def lost(self) -> bool:
        """Whether the fault was not survived."""
        return self.came in (WRONG, FAILED)


TRIES: list[Try] = []


def tried(
    fault: str, door: Door, *, slow: bool = False
) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    """Register a function as the try of a fault through a door."""

    def register(run: Callable[[Place], None]) -> Callable[[Place], None]:
        TRIES.append(Try(fault, door, run, slow))
        return run

    return register


def untried(fault: str, door: Door, why: str) -> None:
    """Register that a fault is not tried through a door, and why."""
    TRIES.append(Try(fault, door, why=why))


def tries(
    group: str | None = None, only: Collection[str] = (), door: Door | None = None
) -> list[Try]:
    """All that is registered, of one group, some faults, one door, in order of the faults."""
    for name in GROUPS.values():
        importlib.import_module(f"holdfast.testing.faults.{name}")
    order = [*MEANINGS]
    kept = [t for t in TRIES if (not group or GROUPS[t.fault[0]] == group)
            and (not only or t.fault in only) and door in (None, t.door)]  # fmt: skip
    return sorted(kept, key=lambda t: (order.index(t.fault), DOORS.index(t.door)))


def run_all(
    group: str | None = None,
    only: Collection[str] = (),
    door: Door | None = None,
    *,
    slow: bool = False,
    tell: Callable[[Outcome], object] = lambda _: None,
) -> list[Outcome]:
    """Try them one after another, each in a folder of its own.

    group: one of `GROUPS`' values; only: ids of faults; door: one of `DOORS`; slow: those of
        minutes too; tell: is given each outcome as it comes.
    """
    from holdfast.testing.faults.place import Place

    found = []
    with tempfile.TemporaryDirectory(prefix="holdfast-faults-") as home, quiet():
        for number, each in enumerate(tries(group, only, door)):
            folder = Path(home) / str(number)
            folder.mkdir()
            outcome = _outcome(each, Place(folder, Path(home)), slow=slow)
            found.append(outcome)
            tell(outcome)
    return found


def _outcome(each: Try, place: Place, *, slow: bool) -> Outcome:
    if each.run is None or (each.slow and not slow):
        return Outcome(each.fault, each.door, UNTRIED, each.why or "slow: say --slow")
    began, came, why = time.monotonic(), SURVIVED, ""
    try:
        with isolated(place.folder):
            each.run(place)
    except KeyboardInterrupt:
        raise
    except Missing as needed:
        came, why = UNTRIED, str(needed)
    except BaseException as error:  # a SystemExit is a failure as well
        came = WRONG if isinstance(error, Wrong) else FAILED
        said = str(error) if isinstance(error, AssertionError) else repr(error)
        line = next(_lines_of(error, each.run), "")
        why = printable(f"{said.strip()[:300] or 'not as expected'}{line}")
    return Outcome(each.fault, each.door, came, why, time.monotonic() - began)


def _lines_of(error: BaseException, run: Callable[[Place], None]) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == run.__name__:
            yield f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next


@contextlib.contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """What a try may change of the process is put back, and what it prints is dropped."""
    import torch

    states, here, environment = (random.getstate(), torch.get_rng_state()), Path.cwd(), {
        **os.environ
    }  # fmt: skip
    dropped = io.StringIO()
    tell_once.cache_clear()
    try:
        with contextlib.redirect_stdout(dropped), contextlib.redirect_stderr(dropped), \
                warnings.catch_warnings():  # fmt: skip
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            os.chdir(folder)
            yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One thread, so that sums agree, and no word of other libraries."""
    import torch
    import transformers

    threads, level = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(level)
        if shown:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def swapped(module: object, name: str, value: object) -> Iterator[None]:
    """An attribute is another for a while: a disk that is full, a mount that is a network's."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def by_fault(found: Collection[Outcome]) -> dict[str, dict[Door, Outcome]]:
    """The worst outcome of each fault through each door: a door may be tried several times."""
    order = (UNTRIED, SURVIVED, FAILED, WRONG)
    table: dict[str, dict[Door, Outcome]] = {}
    for outcome in found:
        row = table.setdefault(outcome.fault, {})
        known = row.get(outcome.door)
        if known is None or order.index(outcome.came) > order.index(known.came):
            row[outcome.door] = outcome
    return table


def counted(found: Collection[Outcome]) -> tuple[int, int]:
    """How many faults survived wherever they were tried; through how many something was silent."""
    rows = by_fault(found).values()
    survived = sum(
        any(o.came == SURVIVED for o in row.values()) and not any(o.lost for o in row.values())
        for row in rows
    )
    return survived, sum(any(o.came == WRONG for o in row.values()) for row in rows)
