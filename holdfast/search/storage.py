"""Where a study is kept, and Optuna itself: imported only here, and only when it is needed.

`sqlite:///…` in the search's folder by default, `journal:PATH`, or any URL that Optuna takes.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from holdfast.errors import Refused
from holdfast.experiments.engines.slurm import Slurm
from holdfast.experiments.record import scrub
from holdfast.training import stopping

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from holdfast.experiments.engines import Engine

DATABASE = "study.db"
PATIENCE = 60.0  # seconds that a server may take to be back
WAIT = 100  # seconds a process waits for another one's write to SQLite
JOURNAL = "journal:"
OPENING = b'{"op_code"'  # how Optuna's journals begin
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph",
           "fuse.glusterfs", "9p", "virtiofs")  # file systems  # fmt: skip
INSTALL = "pip install 'holdfast[search]'"
DRIVER = "install the database's driver, such as 'psycopg[binary]'"
DAMAGED = "put back a copy of it, or begin anew in another --out"
PAPER = {"min_resource": 1, "max_resource": 4, "reduction_factor": 2}  # BERTcL's Hyperband


def optuna() -> Any:
    """Optuna with its logging quieted; `Refused` if it is missing or too old."""
    try:
        import optuna as found
    except ImportError:
        raise Refused("searching needs Optuna", remedy=INSTALL) from None
    if int(found.__version__.split(".")[0]) < 5:
        raise Refused(f"Optuna {found.__version__} is too old", remedy=INSTALL)
    found.logging.set_verbosity(found.logging.WARNING)
    return found


def check(sampler: str) -> None:
    """Refuse, before any training, a sampler whose package is not installed."""
    optuna()
    if sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise Refused("the sampler cmaes needs the package cmaes", where="--sampler",
                      remedy=INSTALL)  # fmt: skip


def check_engine(storage: str | None, engine: Engine) -> None:
    """Refuse, before any training, a storage that an engine's processes cannot share."""
    if engine.far and (storage or "sqlite").startswith("sqlite"):
        raise Refused("SQLite serves one machine", where="--storage",
                      remedy="take journal:FILE in a folder that all share, or postgresql://HOST/NAME"
                      )  # fmt: skip
    if isinstance(engine, Slurm) and re.search(r"://[^@/]*:[^@]*@|[?&]password=", storage or ""):
        raise Refused("its password would be written into Slurm's scripts", where="--storage",
                      remedy="leave it out, and set PGPASSWORD or ~/.pgpass")  # fmt: skip


def address(storage: str | None, folder: Path) -> str:
    """The storage's URL, with absolute paths: it is opened from other processes too."""
    if storage is None:
        path = folder.resolve() / DATABASE
        if odd := [c for c in "?%{}" if c in str(path)]:
            raise Refused(f"{odd[0]!r} cannot stand in the path of a database",
                          where=str(folder.resolve()), remedy="choose another --out")  # fmt: skip
        storage = f"sqlite:///{path}"
    if storage.startswith(JOURNAL):
        path = Path(storage.removeprefix(JOURNAL))
        if not path.name or path.is_dir():
            raise Refused("names no file", where="--storage", remedy="as journal:PATH")
        return JOURNAL + str(path.resolve())
    if "://" not in storage:
        remedy = "as sqlite:///FILE, postgresql://HOST/NAME or journal:PATH"
        raise Refused("is no URL", where="--storage", remedy=remedy)  # it may hold a password
    return _sqlite(storage) if storage.startswith("sqlite") else _server(storage)


def _server(storage: str) -> str:
    """A server's URL; refused if a password has signs in it that may be taken for its end.

    The rest of the password would be taken for the host, and show up in error messages.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
        user = storage.partition("://")[2].rpartition("@")[0]
        hidden = not user or user not in scrub(storage)  # as it is from a blank on, or 12/34
        whole = hidden and "@" not in (url.host or "") + (url.database or "")
    except (ValueError, ArgumentError):  # such as a port that is no number: maybe a password's end
        whole = False
    if not whole:
        remedy = "in a user or password write @ as %40, : as %3A, / as %2F, a space as %20"
        raise Refused("is no URL of a database", where="--storage", remedy=remedy)
    return storage


def _sqlite(storage: str) -> str:
    """A SQLite file's URL with its absolute path; refused where processes could not share it."""
    scheme, _, rest = storage.partition("://")
    name, mark, query = rest.removeprefix("/").partition("?")
    if not name or ":memory:" in name or "mode=memory" in query:
        raise Refused("a database in memory ends with its process", where="--storage",
                      remedy="as sqlite:///FILE")  # fmt: skip
    if name.startswith("file:"):
        return storage
    path = Path(name).resolve()
    if (kind := file_system(path)) in NETWORK:
        raise Refused(f"lies on {kind}, where SQLite's locks do not hold", where=str(path),
                      remedy="take a local file, or postgresql://HOST/NAME")  # fmt: skip
    return f"{scheme}:///{path}{mark}{query}"


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that an absolute path lies on; empty if unknown."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return ""
    found = [(Path(line[1].replace(r"\040", " ")), line[2]) for line in lines if len(line) > 2]
    # The deepest mount point; of two at one place the later one, which lies on top.
    over = [(len(at.parts), i, kind) for i, (at, kind) in enumerate(found)
            if path.is_relative_to(at)]  # fmt: skip
    return max(over)[2] if over else ""


def kept(url: str, folder: Path) -> str:
    """A storage as `study.json` has it: no secrets, and relative where it lies in the folder.

    The folder may be moved, study and all.
    """
    return scrub(url.replace(f"{folder.resolve()}/", ""))


def open_storage(url: str) -> BaseStorage:
    """Open or create a storage; the caller holds the search's lock while tables are made."""
    found = optuna()
    try:
        if url.startswith(JOURNAL):
            path = Path(url.removeprefix(JOURNAL))
            path.parent.mkdir(parents=True, exist_ok=True)
            mend_journal(path)
            return found.storages.JournalStorage(_journal(path))
        # Reopens a connection that was dropped while a trial was trained.
        arguments: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite:"):
            arguments["connect_args"] = {"timeout": WAIT, "factory": _Connection}
        return found.storages.RDBStorage(url, engine_kwargs=arguments)
    except Refused:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise _refusal(url, error) from None
    except Exception as error:
        if type(error).__module__.startswith(("sqlalchemy", "optuna")):
            raise _refusal(url, error) from None
        raise


class _Connection(sqlite3.Connection):
    """SQLite with a write-ahead log: a trial makes some twenty writes; none waits for the disk.

    A process may be killed at any moment and nothing is lost. If the power fails, the last writes
    may be gone: such a trial counts as running, and its run is read again, not repeated.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def _refusal(url: str, error: Exception) -> Refused:
    said = scrub(str(error).strip().partition("\n")[0])
    remedy = DAMAGED if url.startswith(("sqlite", JOURNAL)) else None
    if isinstance(error, ImportError) or "DB access module" in said:
        remedy = DRIVER
    return Refused(f"cannot be opened: {said}", where=f"--storage {scrub(url)}", remedy=remedy)


def mend_journal(path: Path) -> bool:
    """Cut off a last line torn by a kill or a full disk, keeping a copy; True if there was one.

    Optuna refuses to read past such a line once another one follows it, which would lose the study.
    Only a tail without its newline is cut: an operation that was never complete. A file that is no
    journal is refused, and left as it is.
    """
    if not path.is_file():
        return False
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        return _cut(path)
    finally:
        lock.release()


def _cut(path: Path) -> bool:
    """`mend_journal` for who holds the lock."""
    with open(path, "r+b") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n" and file.seek(0) == 0 and file.read(len(OPENING)) == OPENING:
            return False
        file.seek(0)
        data = file.read()
        if not data.startswith(OPENING[: len(data)]):
            raise Refused("is no journal of Optuna's", where=f"--storage {JOURNAL}{path}",
                          remedy="name another file")  # fmt: skip
        shutil.copyfile(path, path.with_name(path.name + ".torn"))
        file.truncate(data.rfind(b"\n") + 1)
        file.flush()
        os.fsync(file.fileno())
    logging.getLogger("holdfast").warning(
        "%s: a torn last line was cut; the file as it was is kept beside it as .torn", path
    )
    return True


def _journal(path: Path) -> Any:
    """Optuna's journal, that mends a tail which another worker tore before it writes after it."""
    from optuna.storages import journal

    class Mending(journal.JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self._lock.acquire()
            try:
                _cut(path)
                lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
                with open(path, "ab") as file:
                    file.write("".join(lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                self._lock.release()

    return Mending(str(path))


def patiently(call: Callable[[], Any], *, seconds: float = PATIENCE) -> Any:
    """`call()`, repeated for so long while a server restarts, drops connections or is in deadlock.

    What `call` does twice must be as if done once: an answer may have been lost on its way.
    """
    end, pause = time.monotonic() + seconds, 0.1
    while True:
        try:
            return call()
        except Exception as error:
            if (said := _unanswered(error)) is None:
                raise
        if time.monotonic() + pause > end:
            raise Refused(f"the database does not answer: {said}", where="--storage",
                          remedy="the same command goes on once it does")  # fmt: skip
        stopping.check()
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _unanswered(error: BaseException) -> str | None:
    """What a server's driver said, if it did not carry out what it was asked; else None."""
    if isinstance(error, optuna().exceptions.StorageInternalError) and error.__cause__:
        error = error.__cause__
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "sqlalchemy.exc"}
    # Of connections that end, drivers say many things; these are of what was asked.
    asked = {"DataError", "IntegrityError", "ProgrammingError", "ArgumentError"}
    lost = names and not names & asked
    return scrub(str(error).strip().partition("\n")[0]) if lost else None


def sampler(name: str, seed: int) -> BaseSampler:
    """Optuna's sampler of that name."""
    samplers = optuna().samplers
    made = {
        # The raw multipliers of one curve belong together: only their ratios count.
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True),
        # Scores are noisy, and it fits how much: told that they are exact, it would chase luck.
        "gp": lambda: samplers.GPSampler(seed=seed, deterministic_objective=False),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "pbt": lambda: samplers.RandomSampler(seed=seed),  # it only has the controls
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=20),
    }
    return made[name]()


def pruner(name: str, seed: int = 0) -> BasePruner:
    """Optuna's pruner over rungs 1 … 2n.

    halving, η = 2: at rungs 1, 2 and 4 (of which 4 is the first of task two) the better half goes
    on. hyperband with the paper's settings: grace 1, η = 2, max_t 4; a trial's bracket depends on
    the seed and its number.
    """
    pruners = optuna().pruners

    class Hyperband(pruners.HyperbandPruner):  # type: ignore[name-defined]
        """Optuna draws brackets by the study's name, which differs from folder to folder."""

        def _get_bracket_id(self, study: Any, trial: Any) -> int:
            found: int = super()._get_bracket_id(SimpleNamespace(study_name=f"seed {seed}"), trial)
            return found

    if name == "halving":
        made = pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    elif name == "hyperband":
        made = Hyperband(**PAPER)
    else:
        made = pruners.NopPruner()
    return made
