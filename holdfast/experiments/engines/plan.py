"""No engine of ours: one command a run, for xargs, SkyPilot, Kubernetes or any other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import Busy, Refused, tell_once
from holdfast.experiments.compare import FIRST, TUNING
from holdfast.experiments.engines import Job, Partly
from holdfast.experiments.runs import ended


@dataclass(frozen=True)
class Plan:
    """Prints a line of JSON for each run that can begin: its name and the command that makes it."""

    words: Sequence[str]  # of the whole comparison, from its verb on
    out: Path  # its folder, below which runs are named
    drawn, far, at_once = False, False, 1

    def __call__(
        self, jobs: Sequence[Job], *, where: str, **_: Any
    ) -> Generator[tuple[int, Any], None, None]:
        runs = [job.folder.relative_to(self.out) for job in jobs]
        for run in map(str, runs):
            command = shlex.join(["holdfast", *self.words, "--only", run])
            print(json.dumps({"run": run, "command": command}))
        if any({FIRST, TUNING} & set(run.parts) for run in runs):
            tell_once("further runs begin where these end: plan again when they are done")
        raise Partly
        yield


@dataclass
class Only:
    """Carries out one run of those that can begin, in this process."""

    run: str
    out: Path
    found: bool = False
    drawn, far, at_once = False, False, 1

    def __call__(
        self, jobs: Sequence[Job], *, where: str, **_: Any
    ) -> Generator[tuple[int, Any], None, None]:
        for job in jobs:
            if job.folder == self.out / self.run:
                self.found = True
                if isinstance(busy := job.work(), Busy):
                    raise busy
        raise Partly
        yield

    def end(self) -> None:
        """Refuse a name that was none."""
        if not self.found and not ended(self.out / self.run):
            raise Refused(f"{self.run} is none of the runs that can begin", where="--only",
                          remedy="holdfast plan lists them")  # fmt: skip
