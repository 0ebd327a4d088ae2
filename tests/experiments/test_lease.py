"""Leases: one holder, on one host or on several; who is dead, paused, or only far away."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import Busy, Refused
from holdfast.experiments import lease, runs
from holdfast.experiments.lease import BEAT, STALE, Watch, newest, take
from holdfast.experiments.runs import check_held, open_run, runs_below

HOLDER = """
import sys, time
from pathlib import Path
from holdfast.experiments import lease, runs
folder, lease.HOST, lease.BEAT = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with runs.open_run(folder, {"a": 1}):
    print("held", flush=True)
    while sys.stdin.readline():
        try:
            runs.check_held(folder)
            print("mine", flush=True)
        except ValueError as why:
            print(type(why).__name__, why, flush=True)
"""


class Holder:
    """Another process that holds a folder, on this host or one of another name."""

    def __init__(self, folder: Path, host: str = lease.HOST, beat: float = 0.05) -> None:
        words = [sys.executable, "-c", HOLDER, str(folder), host, str(beat)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        assert self._out.readline() == "held\n"

    def asked(self) -> str:
        """What it says about its lease."""
        self._in.write("?\n")
        self._in.flush()
        return self._out.readline().strip()

    def killed(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Makes holders of `tmp_path/run`."""
    made: list[Holder] = []

    def make(*args: Any) -> Holder:
        made.append(Holder(tmp_path / "run", *args))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silence of a second."""
    for name, value in (("BEAT", 0.05), ("STALE", 1.0), ("LOOK", 0.01)):
        monkeypatch.setattr(lease, name, value)


def status(folder: Path) -> str:
    (folder / "run.json").write_text('{"a": 1, "tasks": []}')
    ((_, _, said),) = runs_below(folder)
    return said


def test_a_live_owner_is_named(held: Callable[..., Holder], tmp_path: Path) -> None:
    pid = held().process.pid
    with pytest.raises(Busy) as refusal, open_run(tmp_path / "run", {"a": 1}):
        raise AssertionError("two processes hold one run")
    assert f"process {pid} on {lease.HOST}" in str(refusal.value)
    assert "--out" in str(refusal.value)


def test_a_dead_owners_lease_is_taken_at_once(held: Callable[..., Holder], tmp_path: Path) -> None:
    held(lease.HOST, BEAT).killed()
    with open_run(tmp_path / "run", {"a": 1}) as folder:
        assert [p.name for p in folder.glob("lease*")] == ["lease.2"]
        told = json.loads((folder / "lease.2").read_text())
        assert told["process"] == os.getpid() and told["host"] == lease.HOST


def test_one_of_many_takes_it(tmp_path: Path) -> None:
    """Every process believes that it is free, and begins at once."""
    for number in range(1, 30):
        if number > 1:
            assert newest(tmp_path) == number - 1
        taken, start = [], threading.Barrier(8)

        def grab(taken: Any = taken, start: Any = start, free: int = number - 1) -> None:
            start.wait()
            try:
                taken.append(take(tmp_path, over=free))
            except Busy:
                taken.append(None)

        threads = [threading.Thread(target=grab) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [each for each in taken if each is not None]
        assert winner.held() and [p.name for p in tmp_path.iterdir()] == [f"lease.{number}"]
        winner.release()


def test_who_read_an_old_listing_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of NFS may list a folder from its cache until it creates a file there itself."""
    for _ in range(3):
        take(tmp_path).release()
    mine, current, asked = take(tmp_path), lease._numbers, []

    def cached(folder: Path) -> list[int]:
        asked.append(1)
        return [1] if len(asked) == 1 else current(folder)

    monkeypatch.setattr(lease, "_numbers", cached)
    with pytest.raises(Busy):
        take(tmp_path)
    assert mine.held() and [p.name for p in tmp_path.iterdir()] == ["lease.4"]
    mine.release()


def test_silence_is_counted_by_the_observer_and_only_while_it_looks(tmp_path: Path) -> None:
    now = [5e9]
    theirs, watch = take(tmp_path), Watch(lambda: now[0])
    looks = 0
    while not watch.free(tmp_path):
        now[0] += BEAT
        looks += 1
        os.utime(theirs.path, (now[0] * looks, 0))  # times of files say nothing
    assert looks == STALE / BEAT and not theirs.held()

    theirs, watch = take(tmp_path), Watch(lambda: now[0])
    for step in range(40):  # a sign of life now and then
        if step % 7 == 6:
            theirs._beats += 1
            theirs._sign()
        assert not watch.free(tmp_path)
        now[0] += BEAT
    assert theirs.held() and watch.alive(tmp_path)

    watch = Watch(lambda: now[0])  # an observer that is itself paused, for a year each time
    for _ in range(3):
        assert not watch.free(tmp_path)
        now[0] += 3e7
    assert theirs.held()
    theirs.release()
    assert watch.free(tmp_path)


@pytest.mark.usefixtures("hasty")
def test_a_process_that_was_paused_finds_out_and_writes_nothing(
    held: Callable[..., Holder], tmp_path: Path
) -> None:
    holder, watch = held(), Watch()
    assert holder.asked() == "mine"
    holder.process.send_signal(signal.SIGSTOP)
    while not watch.free(tmp_path / "run"):
        time.sleep(lease.LOOK)
    with open_run(tmp_path / "run", {"a": 1}) as folder:
        before = (folder / "lease.3").read_bytes()
        holder.process.send_signal(signal.SIGCONT)
        said = holder.asked()
        assert said.startswith("Busy ") and f"taken over by process {os.getpid()} on " in said
        holder._in.close()  # it ends, and releases what it no longer has
        assert holder.process.wait() == 0
        check_held(folder)
        assert json.loads(before)["token"] == json.loads((folder / "lease.3").read_text())["token"]
        assert status(folder) == "at work"
    assert status(folder) == "stopped"


@pytest.mark.usefixtures("hasty")
def test_another_hosts_process_is_heard_or_not(held: Callable[..., Holder], tmp_path: Path) -> None:
    holder = held("elsewhere")
    with pytest.raises(Busy, match="on elsewhere"), open_run(tmp_path / "run", {"a": 1}):
        pass
    holder.killed()  # its lock is free, which on another host says nothing
    began = time.monotonic()
    with open_run(tmp_path / "run", {"a": 1}) as folder:
        assert time.monotonic() - began >= lease.STALE
        assert newest(folder) == 3  # the silent one's was taken and released


def test_a_child_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    """A killed holder's own workers may outlive it for a while."""
    mine, fork = take(tmp_path), multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=lambda: (ready.set(), time.sleep(60)))
    child.start()
    assert ready.wait(60)
    os.close(mine._handle or 0)  # as a kill does
    mine._handle = None
    take(tmp_path).release()
    child.kill()
    child.join()
    mine.release()


def planted(kind: str, path: Path, victim: Path) -> None:
    if kind == "hard link":
        path.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({"nothing": b"", "noise": b"\xff\x00{", "list": b"[1]"}[kind])


@pytest.mark.parametrize("kind", ["hard link", "pipe", "nothing", "noise", "list"])
def test_what_is_no_lease_ends_after_a_silence(kind: str, tmp_path: Path) -> None:
    """Fault S14: a hard link as lease does not truncate its victim."""
    (tmp_path / "run").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("kept")
    planted(kind, tmp_path / "run" / "lease.7", victim)
    planted(kind, tmp_path / "run" / "lease", victim)
    now = [0.0]
    watch = Watch(lambda: now[0])
    while not watch.free(tmp_path / "run"):
        now[0] += BEAT
    with open_run(tmp_path / "run", {"a": 1}) as folder:
        assert newest(folder) == 9 and now[0] == STALE
    assert victim.read_text() == "kept" and status(folder) == "stopped"


def _no_space(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def _one_byte(handle: int, text: bytes, at: int, write: Any = os.pwrite) -> int:
    return int(write(handle, text[:1], at))


@pytest.mark.parametrize("full", [_no_space, _one_byte])
def test_a_full_disk_leaves_no_lease(
    full: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    with monkeypatch.context() as patch, pytest.raises(Refused, match="No space left"):
        patch.setattr(os, "pwrite", full)
        with open_run(tmp_path, {"a": 1}):
            pass
    assert not list(tmp_path.iterdir())
    with open_run(tmp_path, {"a": 1}):
        pass


@pytest.mark.parametrize("full", [_no_space, _one_byte])
def test_a_disk_that_filled_meanwhile_keeps_nobody_waiting(
    full: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        held.release()
    monkeypatch.setattr(lease, "HOST", "another")  # which cannot see whose lock is free
    take(tmp_path).release()


@pytest.mark.usefixtures("hasty")
def test_a_beat_that_fails_ends_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, failed = os.pwrite, []

    def at_times(*args: Any) -> int:
        failed.append(len(failed) % 2)
        if failed[-1]:
            raise OSError(5, "Input/output error")
        return original(*args)

    monkeypatch.setattr(os, "pwrite", at_times)
    with open_run(tmp_path, {"a": 1}):
        while len(failed) < 6:
            time.sleep(0.01)
        check_held(tmp_path)
        assert json.loads((tmp_path / "lease.1").read_text())["beats"] >= 2


def test_without_locks_signs_of_life_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lease.fcntl, "flock", none)
    monkeypatch.setattr(runs.lease, "LOOK", 0.0)
    now = [0.0]
    theirs, watch = take(tmp_path), Watch(lambda: now[0])
    while not watch.free(tmp_path):
        now[0] += BEAT
    assert now[0] == STALE and not theirs.held()
