"""This machine: this process, or several of one thread each."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.experiments.engines import Job
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
            yield from spread([job.work for job in jobs], self.workers, where=where)
            return
        for number, job in enumerate(jobs):
            yield number, job.work()
