"""Processes and disks: what is torn, cut, flipped, full, killed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from holdfast.experiments import lease
from holdfast.methods import DPS
from holdfast.search.worker import work
from holdfast.testing.faults import studies
from holdfast.testing.faults.checkpoints import dying, flip, goes_on, looped
from holdfast.testing.faults.place import Loop, Place, check_refusal, equal, refuses, warned
from holdfast.testing.faults.suite import Wrong, swapped, tried
from holdfast.training.loop import save_checkpoint
from holdfast.training.manifest import newest_complete

KILLED = """
import os, signal, sys
from holdfast.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
calls, replace = [], os.replace
def counted(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        for number in {"KILL": [9], "INT": [2, 2]}[sys.argv[2]]:
            os.kill(os.getpid(), number)
    return replace(*args, **kwargs)
os.replace = counted
sys.exit(main(sys.argv[3:]))
"""


def _killed(place: Place, *counts: int) -> None:
    """Killed in other processes at their n-th renames, one after another, then gone on with."""
    task = place.rows()
    how: dict[str, Any] = {"recipe": "dps", "save_steps": 1}
    assert place.train(task, out="whole", **how)[0] == 0
    for count in counts:
        ended = _elsewhere(place, "KILL", task, count)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr[-300:]
    assert place.train(task, **how)[0] == 0
    equal(ends(place / "run"), ends(place / "whole"), "weights and scores")


def _elsewhere(place: Place, how: str, task: Path, count: int) -> subprocess.CompletedProcess[str]:
    """Such a training in a process of its own, that is sent signals at its n-th rename."""
    words = ["train", "--task", task, "--model", place.bert, "--out", place / "run", "--epochs=1",
             "--batch-size=8", "--max-length=16", "--recipe=dps", "--save-steps=1"]  # fmt: skip
    code = [sys.executable, "-c", KILLED, str(count), how, *map(str, words)]
    return subprocess.run(code, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip


def ends(folder: Path) -> list[Any]:
    """Scores, and the weights by SHA-256."""
    scores = json.loads((folder / "record.json").read_text())["scores"]
    files = sorted((folder / "tasks").rglob("*.safetensors"))
    return [scores, *((p.name, sha256(p.read_bytes()).hexdigest()) for p in files)]


@tried("P1", "command line", slow=True)
def p1_command(place: Place) -> None:
    for number, count in enumerate((1, 3, 6, 9, 12)):
        folder = Place(place / str(number), place.home)
        folder.folder.mkdir()
        _killed(folder, count)


@tried("P19", "command line", slow=True)
def p19(place: Place) -> None:
    _killed(place, 9, 3, 2)


@tried("P3", "command line")
def p3_record(place: Place) -> None:
    assert place.train(place.rows())[0] == 0
    path = place / "run/record.json"
    text = path.read_text()
    score = json.loads(text)["scores"][0][0]
    at = text.index(f"{score}", text.index('"scores"'))
    for place_of in (at, at + 2):
        flip(path, place_of)
        for verb in ("verify", "report"):
            code, said = place.command(verb, place / "run")
            if code == 0:
                raise Wrong(f"{verb} takes a record with a flipped bit in a score: {said[-80:]}")
        path.write_text(text)
    (model,) = (place / "run/tasks").glob("*/model.safetensors")
    flip(model, model.stat().st_size - 9)
    equal(place.command("verify", place / "run")[0], 1, "verify's exit code")


@tried("P5", "plain loop")
def p5(place: Place) -> None:
    folder = looped(place, 2)
    names = {p.name for p in (folder / "checkpoint-2").iterdir()}
    bound = Loop(DPS(stage=2)).steps(0, 4).bound
    for count in range(1, 6):
        with dying(count, lambda: OSError(errno.ENOSPC, "No space left on device")):
            try:
                save_checkpoint(folder / "checkpoint-4", bound, position={})
            except (OSError, ValueError):
                pass
            else:
                raise Wrong("a checkpoint was not written, and nobody is told")
        equal(newest_complete(folder), folder / "checkpoint-2", "the newest whole checkpoint")
        left = {p.name for p in (folder / "checkpoint-4").iterdir()} - names
        assert not left, f"temporary files are left: {left}"
    goes_on(folder)


@tried("P5", "command line")
def p5_command(place: Place) -> None:
    task = place.rows()
    assert place.train(task, out="whole")[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
        code, said = place.train(task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check_refusal(code, said)
    assert not [*(place / "run").rglob("*.tmp")], "temporary files are left"
    code, said = place.train(task)
    assert code == 0, said
    equal(ends(place / "run"), ends(place / "whole"), "weights and scores")


@tried("P6", "command line")
def p6(place: Place) -> None:
    from holdfast.search.storage import open_storage, optuna

    path = place / "log"
    made = optuna().create_study(storage=open_storage(f"journal:{path}"), study_name="s")
    for value in range(3):
        made.tell(made.ask(), float(value))
    content = path.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    for length in range(last + 1, len(content)):
        path.write_bytes(content[:length])
        storage = open_storage(f"journal:{path}")
        again = optuna().load_study(storage=storage, study_name="s")
        equal([t.number for t in again.trials], [0, 1, 2], "trials")
        again.tell(again.ask(), 1.0)
        assert place.folder.joinpath("log.torn").is_file(), "the torn journal was not kept"
        read = optuna().load_study(storage=open_storage(f"journal:{path}"), study_name="s")
        equal(len(read.trials), 4, "trials after it went on")


LOCKED = """
import os, signal, sys
from optuna.storages.journal import JournalFileSymlinkLock
JournalFileSymlinkLock(sys.argv[1]).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


@tried("P7", "command line", slow=True)
def p7(place: Place) -> None:
    url, path = f"journal:{place / 'log'}", place / "log"
    of = studies.study(place, "search", url=url, trials=8)
    held = subprocess.run([sys.executable, "-c", LOCKED, str(path)], timeout=60, check=False)
    assert held.returncode == -signal.SIGKILL and os.path.lexists(f"{path}.lock"), "nothing is held"
    worker = studies.started(place, "search", url=url, trials=8)
    try:
        said = worker.communicate(timeout=150)[1]
    except subprocess.TimeoutExpired:
        raise AssertionError("it waits for a dead process after 150 s") from None
    finally:
        worker.kill()
    assert worker.returncode == 0, said[-300:]
    equal(dict(of.counts()), {"complete": 8}, "trials")


@tried("P8", "command line", slow=True)
def p8(place: Place) -> None:
    of = studies.study(place, "search", trials=12)
    for killed, code in ((9, -signal.SIGKILL), (-1, 0)):
        worker = studies.started(place, "search", trials=12, killed=killed)
        said = worker.communicate(timeout=150)[1]
        equal(worker.returncode, code, f"a worker's exit code ({said[-200:]})")
    equal(dict(of.counts()), {"complete": 12}, "trials")
    equal([t.user_attrs["attempts"] for t in of.trials()], [1] * 9 + [2] + [1] * 2, "attempts")
    whole = studies.study(place, "whole", trials=12)
    work(whole, studies.curve)
    equal([(t.params, t.value) for t in of.trials()],
          [(t.params, t.value) for t in whole.trials()], "trials")  # fmt: skip


@tried("P9", "command line")
def p9(place: Place) -> None:
    """The lease is lost, and another worker ends the trial first."""
    of = studies.study(place, "search", trials=8)

    def train(job: Any, watch: Any) -> Any:
        if job.number == 3:
            of.study.tell(3, 1.25)
        return studies.curve(job, watch)

    with warned() as told:
        equal(work(of, train), 7, "trials that this worker made")
    equal((dict(of.counts()), of.trials()[3].value), ({"complete": 8}, 1.25), "trials")
    assert any("trial 3 was finished by another" in line for line in told), "nothing is said of it"


@tried("P10", "command line")
def p10(place: Place) -> None:
    task = place.rows()
    (place / "run").mkdir()
    held = lease.take(place / "run")
    try:
        code, said = place.train(task)
        check_refusal(code, said, str(os.getpid()))
    finally:
        held.release()
    code, said = place.train(task)
    assert code == 0, said


@contextmanager
def at_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Something happens before the n-th micro-batch."""
    step, calls = Trainer.training_step, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return step(self, *args, **kwargs)

    with swapped(Trainer, "training_step", counted):
        yield


@tried("P11", "command line")
def p11(place: Place) -> None:
    task = place.rows()
    how: dict[str, Any] = {"epochs": 2, "recipe": "dps"}
    assert place.train(task, out="whole", **how)[0] == 0
    with at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        code, said = place.train(task, **how)
    equal(code, 143, "exit code")
    assert "Traceback" not in said, "a traceback"
    assert place.train(task, **how)[0] == 0
    equal(ends(place / "run"), ends(place / "whole"), "weights and scores")


@tried("P11", "command line", slow=True)
def p11_twice(place: Place) -> None:
    task = place.rows()
    how: dict[str, Any] = {"recipe": "dps", "save_steps": 1}
    assert place.train(task, out="whole", **how)[0] == 0
    ended = _elsewhere(place, "INT", task, 5)
    equal(ended.returncode, 130, "exit code")
    assert "Traceback" not in ended.stderr, "a traceback"
    assert place.train(task, **how)[0] == 0
    equal(ends(place / "run"), ends(place / "whole"), "weights and scores")


@contextmanager
def room_for(rows: int) -> Iterator[None]:
    """Memory holds so many rows, as if on a GPU."""
    step = Trainer.training_step

    def limited(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        if len(inputs["labels"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, model, inputs, *more)

    with swapped(Trainer, "training_step", limited):
        yield


@tried("P12", "command line")
def p12(place: Place) -> None:
    task = place.rows()
    assert place.train(task, out="half", batch_size=4, accumulation=2)[0] == 0
    with room_for(4):
        code, said = place.train(task)
    assert code == 0, said
    equal(ends(place / "run"), ends(place / "half"), "weights and scores")
    if "4 and an accumulation of 2" not in said or not place.record().get("halved"):
        raise Wrong("other micro-batches than were asked for, and nobody is told")
    with room_for(3):
        check_refusal(*place.train(task, out="none"), "out of memory")


@tried("P13", "command line")
def p13(place: Place) -> None:
    task, file = place.rows(), place.write("file", "")
    check_refusal(*place.train(task, out=f"{file.name}/run"))

    def delete() -> None:
        shutil.rmtree(place / "run")

    with at_step(2, delete):
        code, said = place.train(task)
    check_refusal(code, said)
    code, said = place.train(task)
    assert code == 0, said


@tried("P14", "command line")
def p14(place: Place) -> None:
    from holdfast.search import storage

    with swapped(storage, "file_system", lambda _: "nfs4"):
        for url in (None, f"sqlite:///{place / 'x.db'}", f"sqlite+pysqlite:///{place / 'x.db'}"):
            refuses(lambda u=url: storage.address(u, place.folder), "postgresql://")  # type: ignore[misc]


HOLDING = """
import sys
from pathlib import Path
from holdfast.experiments import lease
held = lease.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@tried("P15", "command line")
def p15(place: Place) -> None:
    """Three years on, and a lease of 1970: who lives keeps it."""
    task, run, now = place.rows(), place / "run", time.time
    run.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for path in run.iterdir():
            os.utime(path, (0, 0))
        for years in (3, -3):
            with swapped(time, "time", lambda y=years: now() + y * 365 * 86400):
                check_refusal(*place.train(task), str(other.pid))
    finally:
        other.kill()
        other.communicate()
    code, said = place.train(task)
    assert code == 0, said
