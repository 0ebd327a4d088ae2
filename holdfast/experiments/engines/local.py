"""This machine: this process, or several of one thread each."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.experiments.engines import ATTEMPTS, Job
from holdfast.experiments.processes import check_workers, spread


@dataclass(frozen=True)
class Local:
    """workers: how many processes; 1 for none besides this one."""

    workers: int = 1

    def __post_init__(self) -> None:
        check_workers(self.workers)

    @property
    def drawn(self) -> bool:
        return self.workers > 1

    def __call__(
        self, jobs: Sequence[Job], *, where: str
    ) -> Generator[tuple[int, Any], None, None]:
        if self.workers > 1:
            work = [job.work for job in jobs]
            yield from spread(work, self.workers, where=where, attempts=ATTEMPTS)
            return
        for number, job in enumerate(jobs):
            yield number, job.work()
