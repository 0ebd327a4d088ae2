"""Slurm, by submitit: an array of jobs, each of which goes on after its time is over."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments.engines import Job
from holdfast.experiments.processes import ATTEMPTS, EVERY, check_workers
from holdfast.training import stopping

FOLDER = "slurm"  # submitit's scripts and logs
RENEWALS = 1000  # times that one run may reach its time limit


@dataclass(frozen=True)
class Slurm:
    """partition, time (H:MM:SS, or minutes), cpus, gpus: of one run; jobs: how many run at once.

    cluster: `local` has submitit run them here, without Slurm.
    """

    partition: str | None = None
    time: str = "4:00:00"
    jobs: int = 20
    cpus: float = 1
    gpus: float = 0
    cluster: str = "slurm"
    drawn = True

    def __post_init__(self) -> None:
        self.minutes()
        check_workers(self.jobs, "--jobs")
        for name in ("cpus", "gpus"):
            if getattr(self, name) % 1:
                raise Refused("Slurm gives whole ones", where=f"--{name}")

    @property
    def at_once(self) -> int:
        return self.jobs

    @property
    def far(self) -> bool:
        return self.cluster == "slurm"

    def minutes(self) -> int:
        """The time limit in whole minutes."""
        if not re.fullmatch(r"\d+|\d+:\d\d:\d\d", self.time):
            raise Refused(f"must be H:MM:SS or minutes, not {self.time!r}", where="--time")
        parts = [int(part) for part in self.time.split(":")]
        return max(1, parts[0] if len(parts) == 1 else 60 * parts[0] + parts[1])

    def __call__(
        self, jobs: Sequence[Job], *, where: str, look: Callable[[], None] = lambda: None,
        attempts: int = ATTEMPTS,
    ) -> Generator[tuple[int, Any], None, None]:  # fmt: skip
        executor = self._executor(Path(where) / FOLDER)
        do = Carried(int(self.cpus))
        waiting, open_, lost = list(range(len(jobs))), dict[int, Any](), [0] * len(jobs)
        if self.far:  # Slurm itself lets so many at once
            open_ = dict(enumerate(executor.map_array(do, [job.work for job in jobs])))
            waiting.clear()
        try:
            while waiting or open_:
                while waiting and len(open_) < self.jobs:
                    number = waiting.pop(0)
                    open_[number] = executor.submit(do, jobs[number].work)
                for number in [n for n, submitted in open_.items() if submitted.done()]:
                    if (why := open_[number].exception()) is None:
                        error, result = open_.pop(number).result()
                        if error is not None:
                            raise error
                        yield number, result
                        continue
                    lost[number] += 1
                    if lost[number] >= attempts:
                        raise Refused(f"its jobs failed too often ({type(why).__name__})",
                                      where=str(jobs[number].folder),
                                      remedy=f"see {open_[number].paths.stderr}")  # fmt: skip
                    open_[number] = executor.submit(do, jobs[number].work)
                stopping.check()
                look()
                time.sleep(EVERY)
        finally:
            for submitted in open_.values():
                submitted.cancel()

    def _executor(self, folder: Path) -> Any:
        try:
            import submitit
        except ImportError:
            raise Refused("is not installed", where="--engine slurm",
                          remedy="pip install 'holdfast[slurm]'") from None  # fmt: skip
        try:
            made = submitit.AutoExecutor(
                folder=folder, cluster=self.cluster, slurm_max_num_timeout=RENEWALS
            )
        except RuntimeError as why:
            raise Refused(str(why).splitlines()[0], where="--engine slurm",
                          remedy="run it where sbatch is") from None  # fmt: skip
        more = {} if self.partition is None else {"slurm_partition": self.partition}
        made.update_parameters(
            timeout_min=self.minutes(), cpus_per_task=int(self.cpus),
            gpus_per_node=int(self.gpus),
            name="holdfast", slurm_array_parallelism=self.jobs, **more,
        )  # fmt: skip
        return made


class Carried:
    """Does one job in a process of submitit: an error and the result, one of them None."""

    def __init__(self, threads: int) -> None:
        self.threads, self.words = threads, sys.argv

    def __call__(self, work: Callable[[], Any]) -> tuple[Exception | None, Any]:
        import torch

        torch.set_num_threads(self.threads)
        sys.argv = self.words  # which records name as their command
        # submitit ends the process within its handler: it has to wait for our checkpoint.
        requeue = signal.getsignal(signal.SIGUSR2)
        restore = stopping.install(only=(signal.SIGUSR2, signal.SIGTERM), patient=True)
        try:
            return None, work()
        except stopping.Stopped as stopped:
            if stopped.number == signal.SIGUSR2 and callable(requeue):
                requeue(signal.SIGUSR2, None)
            raise
        except (Refused, OSError) as error:
            return error, None
        finally:
            restore()

    def checkpoint(self, work: Callable[[], Any]) -> Any:
        """What submitit puts into the queue again: the same job, which goes on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, work)
