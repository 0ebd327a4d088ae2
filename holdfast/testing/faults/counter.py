"""The n-th call that writes fails, for every n, over a whole command (as SQLite tests itself).

    python -m holdfast.testing.faults.counter --job sequence --how kill --every 10

Calls: opening a file to write, sync, rename, link, in the folder of the command. They fail once, or
from then on; with an error of the disk, a full disk, or the process is killed there. A short write
is a limit on the size of files. The command has to end in one line, or as undisturbed; the same
command then has to end as undisturbed, or in one line. Each is carried out in a fork.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.testing.faults.place import Place
from holdfast.testing.faults.suite import Wrong, isolated, quiet, swapped

Job = Literal["train", "sequence", "compare", "search"]
How = Literal["EIO", "ENOSPC", "kill", "short"]
SHORT = ["--epochs=1", "--batch-size=8", "--max-length=16", "--save-steps=2"]
LARGEST = 1 << 18  # bytes: no file of these runs is larger


@dataclass(frozen=True)
class Fault:
    """What goes wrong. at: the number of a call, from 1 on; of a short write, the bytes of a file
    that fit. good: all calls after it fail too."""

    how: How
    at: int
    good: bool = False

    def __str__(self) -> str:
        return f"{self.how} at {self.at}{' and on' if self.good else ''}"


def words(job: Job, place: Place, out: Path) -> list[str]:
    """A command on this place's model and tasks."""
    tasks = [str(place / f"{name}.jsonl") for name in ("one", "two")]
    given = ["--model", str(place.bert), "--out", str(out), *SHORT]
    return {
        "train": ["train", "--task", tasks[0], *given, "--recipe", "dps"],
        "sequence": ["sequence", "--tasks", *tasks, *given, "--recipe", "dps"],
        "compare": ["compare", "--tasks", *tasks, *given, "--recipes", "plain", "ewc",
                    "--seeds", "0"],
        "search": ["search", "--tasks", *tasks, *given, "--trials", "5", "--sampler", "random",
                   "--parts", "4", "--flat", "1e-3", "--storage", f"journal:{out}/journal"],
    }[job]  # fmt: skip


def ended(job: Job, out: Path) -> dict[str, Any]:
    """Scores and weights of each run of a command, and of a search its trials."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("record.json")):
        scores = json.loads(path.read_text())["scores"]
        files = sorted(path.parent.glob("tasks/*/*.safetensors"))
        weights = {f"{p.parent.name}/{p.name}": sha256(p.read_bytes()).hexdigest() for p in files}
        found[str(path.parent.relative_to(out))] = [scores, weights]
    if job == "search":
        body = json.loads((out / "search.json").read_text())
        trials = [[t[k] for k in ("number", "params", "state", "value")] for t in body["trials"]]
        found["search"] = [trials, body["counts"], body["winner"], body["final"]]
    return json.loads(json.dumps(found))


@contextmanager
def failing(folder: Path, fault: Fault | None) -> Iterator[list[str]]:
    """The calls that write in a folder, as they come; one of them fails."""
    calls: list[str] = []

    def reached(name: str, path: object) -> None:
        place = os.fspath(path) if isinstance(path, str | os.PathLike) else path
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        if not str(place).startswith(str(folder)):
            return
        calls.append(f"{name} {str(place)[len(str(folder)) + 1 :]}")
        if fault is None or fault.how == "short" or len(calls) < fault.at:
            return
        if len(calls) == fault.at or fault.good:
            if fault.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, fault.how)
            raise OSError(number, os.strerror(number), str(place))

    def counted(name: str, call: Any, writes: Callable[..., bool]) -> Any:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if writes(*args, **kwargs):
                reached(name, path)
            return call(path, *args, **kwargs)

        return wrapped

    def by_mode(mode: str = "r", *_: Any, **__: Any) -> bool:
        return any(letter in mode for letter in "wax+")

    def by_flags(flags: int, *_: Any, **__: Any) -> bool:
        return bool(flags & (os.O_CREAT | os.O_WRONLY))

    with ExitStack() as stack:
        for module in (builtins, io):
            stack.enter_context(swapped(module, "open", counted("open", module.open, by_mode)))
        stack.enter_context(swapped(os, "open", counted("open", os.open, by_flags)))
        for name in ("fsync", "replace", "rename", "link"):
            always = counted(name, getattr(os, name), lambda *_, **__: True)
            stack.enter_context(swapped(os, name, always))
        yield calls


def carried_out(given: Sequence[str], out: Path, fault: Fault | None) -> tuple[int, str, list[str]]:
    """A command in a fork: its exit code, what it said, and the calls it made."""
    with tempfile.TemporaryDirectory() as home:
        said, made = Path(home, "said"), Path(home, "made")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 125
            try:
                handle = os.open(said, os.O_WRONLY | os.O_CREAT)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                # Kept in memory until the end: a limit of what a file may hold would cut it.
                sys.stdout = sys.stderr = words_said = io.StringIO()
                code, calls = _in_fork(given, out, fault)
                made.write_text("\n".join(calls))
                with open(said, "a", errors="replace") as file:
                    file.write(words_said.getvalue())
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        calls = made.read_text().splitlines() if made.exists() else []
        return os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), calls


def _in_fork(given: Sequence[str], out: Path, fault: Fault | None) -> tuple[int, list[str]]:
    from holdfast.cli import main

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault is not None and fault.how == "short":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, before[1]))
    try:
        with failing(out, fault) as calls:
            try:
                return main(list(given)), calls
            except SystemExit as end:
                return int(end.code or 0), calls
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def explained(code: int, said: str) -> bool:
    """Whether a command ended in a line of ours."""
    lines = said.replace("\r", "\n").splitlines()
    return code == 2 and "Traceback" not in said and any("holdfast: " in line for line in lines)


class Counter:
    """A command of a place, its undisturbed end, and its end with one fault."""

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place
        for name in ("one", "two"):
            place.rows(f"{name}.jsonl", more=f" {name}")
        out = place / "whole"
        code, said, self.calls = self._run(out, None)
        assert code == 0, said
        self.whole = ended(job, out)

    def _run(self, out: Path, fault: Fault | None) -> tuple[int, str, list[str]]:
        return carried_out(words(self.job, self.place, out), out, fault)

    def tried(self, fault: Fault) -> str:
        """How the command ended with a fault, and then without; raises if it was lost."""
        out = self.place / "run"
        shutil.rmtree(out, ignore_errors=True)
        code, said, _ = self._run(out, fault)
        first = "ended as undisturbed"
        if code == 0:
            self._same(out, f"{fault}: told as done")
        elif code == -signal.SIGKILL and fault.how == "kill":
            first = "killed"
        else:
            assert explained(code, said), f"{fault}: exit code {code}: {said.strip()[-300:]}"
            first = "refused"
        code, said, _ = self._run(out, None)
        if code != 0:
            assert explained(code, said), f"{fault}, then again: {code}: {said.strip()[-300:]}"
            return f"{first}, then refused"
        self._same(out, f"{fault}, then again")
        return f"{first}, then as undisturbed"

    def _same(self, out: Path, what: str) -> None:
        found = ended(self.job, out)
        other = [k for k in {*found, *self.whole} if found.get(k) != self.whole.get(k)]
        if other:
            raise Wrong(f"{what}: {', '.join(sorted(other))} ended otherwise")

    def faults(self, how: How, every: int = 1) -> list[Fault]:
        """The n-th calls, each once and for good; of short writes, sizes from nothing on."""
        if how == "short":
            return [Fault(how, 0), *(Fault(how, 1 << n) for n in range(0, LARGEST.bit_length()))]
        numbers = range(1, len(self.calls) + 1, every)
        return [
            Fault(how, n, good) for n in numbers for good in (False, True)[: 1 + (how != "kill")]
        ]


def sweep(job: Job, how: How, *, every: int = 1,
          tell: Callable[[str], object] = print) -> tuple[int, list[str]]:  # fmt: skip
    """Every `every`-th call of a command fails; how many were tried, and what was lost."""
    with tempfile.TemporaryDirectory(prefix="holdfast-counter-") as home, quiet():
        place = Place(Path(home).resolve() / "try", Path(home).resolve())
        place.folder.mkdir()
        lost: list[str] = []
        with isolated(place.folder):
            counter = Counter(job, place)
            faults = counter.faults(how, every)
        for fault in faults:
            at = counter.calls[fault.at - 1] if how != "short" else f"{fault.at} bytes"
            try:
                with isolated(place.folder):
                    came = counter.tried(fault)
            except AssertionError as error:
                came = f"LOST: {error}"
                lost.append(f"{fault} ({at}): {error}")
            tell(f"{job}: {fault} ({at}): {came}")
        return len(faults), lost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m holdfast.testing.faults.counter", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--job", choices=get_args(Job), default="sequence")
    parser.add_argument("--how", choices=get_args(How), nargs="+", default=[*get_args(How)])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th call (1)")
    chosen = parser.parse_args(arguments)
    count, lost = 0, list[str]()
    for how in chosen.how:
        tried, bad = sweep(chosen.job, how, every=chosen.every,
                           tell=lambda line: print(line, flush=True))  # fmt: skip
        count, lost = count + tried, lost + bad
    print(f"{count} tried, {len(lost)} lost", *lost, sep="\n")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
