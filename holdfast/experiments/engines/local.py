"""This machine: this process, or several of one thread each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.experiments.engines import Job
from holdfast.experiments.processes import ATTEMPTS, check_workers, spread


@dataclass(frozen=True)
class Local:
    """workers: how many processes; 1 for none besides this one."""

    workers: int = 1
    far = False

    def __post_init__(self) -> None:
        check_workers(self.workers)

    @property
    def drawn(self) -> bool:
        return self.workers > 1

    @property
    def at_once(self) -> int:
        return self.workers

    def __call__(
        self, jobs: Sequence[Job], *, where: str, look: Callable[[], None] = lambda: None,
        attempts: int = ATTEMPTS,
    ) -> Generator[tuple[int, Any], None, None]:  # fmt: skip
        if self.workers > 1:
            yield from spread([job.work for job in jobs], self.workers, where=where, look=look,
                              attempts=attempts)  # fmt: skip
            return
        for number, job in enumerate(jobs):
            yield number, job.work()
