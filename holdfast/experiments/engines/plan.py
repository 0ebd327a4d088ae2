"""No engine of ours: one command a run, for xargs, SkyPilot, Kubernetes or any other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import Busy, Refused
from holdfast.experiments.engines import Job, Partly, finished


@dataclass(frozen=True)
class Plan:
    """Prints a line of JSON for each run that can begin: its name and the command that makes it."""

    words: Sequence[str]  # of the whole comparison, from its verb on
    drawn = False

    def __call__(
        self, jobs: Sequence[Job], *, where: str
    ) -> Generator[tuple[int, Any], None, None]:
        for job in jobs:
            run = named(job, where)
            command = shlex.join(["holdfast", *self.words, "--only", run])
            print(json.dumps({"run": run, "command": command}))
        raise Partly
        yield


@dataclass(frozen=True)
class Only:
    """Carries out one run of those that can begin, in this process."""

    run: str
    drawn = False

    def __call__(
        self, jobs: Sequence[Job], *, where: str
    ) -> Generator[tuple[int, Any], None, None]:
        job = next((job for job in jobs if named(job, where) == self.run), None)
        if job is None and not finished(Path(where) / self.run):
            raise Refused(f"{self.run} is none of the runs that can begin", where="--only",
                          remedy="holdfast plan lists them")  # fmt: skip
        if job is not None and isinstance(busy := job.work(), Busy):
            raise busy
        raise Partly
        yield


def named(job: Job, where: str) -> str:
    """A run's folder below that of the comparison."""
    return str(job.folder.relative_to(where))
