"""Worker processes of one thread each (two with two threads would crawl), watched by the first.

A worker that is killed, or runs out of memory, does not affect the others: a fresh one resumes its
job from what was saved, a bounded number of times. One that raises `Refused`, or fails by an error
of ours, ends all: the others stop after their current step, with a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from holdfast.errors import Refused
from holdfast.training import stopping

ATTEMPTS = 3  # worker processes that one job may lose
EVERY = 1.0  # seconds between calls of `look`


def check_workers(workers: int, where: str = "--workers") -> None:
    """Refuse what is no number of processes."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise Refused(f"must be a whole number from 1 on, not {workers!r}", where=where)


def spread(
    jobs: Sequence[Callable[[], Any]],
    workers: int,
    *,
    where: str,
    look: Callable[[], None] = lambda: None,
    attempts: int = ATTEMPTS,
) -> Generator[tuple[int, Any], None, None]:
    """Do picklable `jobs` in up to `workers` processes; yields (number, result) as each ends.

    look: called about once a second while waiting. where: the place that a refusal names.
    attempts: processes that one job may cost.
    """
    crew = _Crew(jobs)
    waiting, ended = list(range(len(jobs))), [0] * len(jobs)
    try:
        while waiting or any(worker.job is not None for worker in crew.workers):
            while waiting and (worker := crew.free(workers)):
                worker.take(waiting.pop(0))
            wait([w.pipe for w in crew.workers if w.job is not None], timeout=EVERY)
            stopping.check()
            look()
            for worker in [w for w in crew.workers if w.job is not None and w.pipe.poll()]:
                job = worker.job
                assert job is not None
                if (result := worker.result()) is not None:
                    yield result
                    continue
                crew.workers.remove(worker)
                code, ended[job] = worker.process.exitcode or 0, ended[job] + 1
                if code == 128 + signal.SIGTERM:  # `Stopped`: not by us, for we are here
                    code = -signal.SIGTERM
                if code >= 0:
                    raise RuntimeError(f"a process ended with {code} and said nothing")
                if ended[job] >= attempts:
                    name = signal.Signals(-code).name
                    raise Refused(f"its processes were ended too often, the last one by {name}",
                                  where=where, remedy="the same command goes on; where memory is "
                                  "short, with fewer --workers")  # fmt: skip
                waiting.insert(0, job)
    finally:
        crew.end()


class _Crew:
    """Processes that wait for jobs, each on its pipe."""

    def __init__(self, jobs: Sequence[Callable[[], Any]]) -> None:
        from tqdm.auto import tqdm

        self.jobs, self.workers = jobs, list[_Worker]()
        self.context = get_context("spawn")
        self.bars = self.context.RLock(), self.context.Value("i", 0)
        tqdm.set_lock(_Lock(self.bars[0]))

    def free(self, most: int) -> _Worker | None:
        """One without a job: an idle one, or a fresh one while there are fewer than `most`."""
        idle = next((w for w in self.workers if w.job is None), None)
        if idle is None and len(self.workers) < most:
            idle = _Worker(self)
            self.workers.append(idle)
        return idle

    def end(self) -> None:
        """End all workers: idle ones at once, busy ones after their current step."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()


class _Worker:
    def __init__(self, crew: _Crew) -> None:
        self.job: int | None = None
        self.pipe, theirs = crew.context.Pipe()
        self.process = crew.context.Process(target=_serve, args=(theirs, crew.jobs, crew.bars))
        # Ctrl-C reaches all processes of a terminal; only the first one handles it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    def take(self, job: int) -> None:
        self.job = job
        with suppress(OSError):  # it was killed while idle: `result` finds out
            self.pipe.send(job)

    def result(self) -> tuple[int, Any] | None:
        """The job's number and its result; None if the process is gone."""
        assert self.job is not None
        try:
            error, result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        if error is not None:
            raise error
        job, self.job = self.job, None
        return job, result


class _Lock:
    """The lock of all bars. A killed process never releases it: the others go on without it."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._own = lock, threading.local()

    def acquire(self, *_: Any, **__: Any) -> bool:
        taken = self._lock.acquire(timeout=1.0)
        self._own.taken = [*getattr(self._own, "taken", []), taken]
        return True

    def release(self) -> None:
        if self._own.taken.pop():
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


def _serve(pipe: Connection, jobs: Sequence[Callable[[], Any]], bars: tuple[Any, Any]) -> None:
    """Do the jobs whose numbers arrive on the pipe, until it is closed."""
    # SIGTERM, by which the first process ends this one, may also come from elsewhere.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping.install(only=(signal.SIGTERM,), patient=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch
    from tqdm.auto import tqdm

    from holdfast.experiments import callbacks

    torch.set_num_threads(1)
    lock, number = bars
    tqdm.set_lock(_Lock(lock))
    with number.get_lock():
        number.value += 1
        callbacks.BAR_LINE = number.value
    while True:
        try:
            job = jobs[pipe.recv()]
        except EOFError:
            return
        try:
            stopping.check()
            told: tuple[Exception | None, Any] = None, job()
        except (Refused, OSError) as error:  # explained by one line, such as a full disk
            told = error, None
        except Exception as error:
            import traceback

            traceback.print_exc()
            told = RuntimeError(f"a process failed: {error!r}"), None
        pipe.send(told)


def end_with_parent() -> None:
    """A killed first process must not leave others training into its folders."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
