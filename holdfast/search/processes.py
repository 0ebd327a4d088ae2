"""Several workers of one search: processes of one thread each, watched by the first.

A worker that is killed, or runs out of memory, costs nobody else: its trial is taken up by another
one, and a fresh process takes its place, a bounded number of times. One that is refused something,
or fails by an error of ours, ends the search: the others stop after the step they are at.
"""

from __future__ import annotations

import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments.compare import _alone
from holdfast.search.plan import Plan
from holdfast.search.progress import EVERY, Line
from holdfast.search.run import MakeEvaluate, MakeTrain, labour
from holdfast.search.study import ATTEMPTS, Study
from holdfast.training import stopping


def spread(
    study: Study, workers: int, train: MakeTrain, evaluate: MakeEvaluate, *, progress: bool
) -> None:
    """Run `workers` processes until the study and its final runs are done."""
    context = get_context("spawn")
    started = (context.RLock(), context.Value("i", 0))
    left = workers * ATTEMPTS  # processes that may take another one's place
    line = Line(study, shown=progress)

    def start() -> tuple[Any, Connection]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_worker,
            args=(theirs, started, study.folder, study.plan, study.url, train, evaluate),
        )
        # Ctrl-C reaches all of a terminal's processes; this one answers it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        return process, ours

    running = [start() for _ in range(workers)]
    try:
        while running:
            wait([process.sentinel for process, _ in running], timeout=EVERY)
            stopping.check()
            line.look()
            for entry in [e for e in running if not e[0].is_alive()]:
                process, ours = entry
                running.remove(entry)
                process.join()
                if (told := _received(ours)) is not None:
                    raise told
                if process.exitcode and process.exitcode < 0 and left:
                    left -= 1
                    running.append(start())
                elif process.exitcode and process.exitcode < 0:
                    name = signal.Signals(-process.exitcode).name
                    raise Refused(f"its processes were ended too often, the last one by {name}",
                                  where=str(study.folder), remedy="the same command goes on; "
                                  "where memory is short, with fewer --workers")  # fmt: skip
                elif process.exitcode:
                    raise RuntimeError(f"a worker of the search ended with {process.exitcode}")
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.join()
        line.close()


def _received(ours: Connection) -> BaseException | None:
    """What an ended worker told of its end; None if nothing, as when it was done, or killed."""
    try:
        error = ours.recv()
    except (EOFError, OSError):
        return None
    return error if isinstance(error, BaseException) else RuntimeError(str(error))


def _worker(
    tell: Connection, started: Any, folder: Any, plan: Plan, url: str, train: MakeTrain,
    evaluate: MakeEvaluate,
) -> None:  # fmt: skip
    try:
        _alone(*started)
        labour(Study(folder, plan, url), train, evaluate)
    except (Refused, OSError) as error:  # what one line tells, such as a full disk
        tell.send(error)
    except Exception as error:
        import traceback

        traceback.print_exc()
        tell.send(RuntimeError(f"a worker of the search failed: {error!r}"))
