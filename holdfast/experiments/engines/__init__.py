"""Where many runs run: an engine a file.

A job is a run's folder under its lease, and doing it again changes nothing. So an engine only has
to carry out each job at least once, wherever it likes, and any number of processes and hosts that
were given the same command share the work: what another one holds is left out, and looked at later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm.auto import tqdm

from holdfast.errors import Busy
from holdfast.experiments import lease
from holdfast.experiments.runs import ended
from holdfast.training import stopping


class Job(NamedTuple):
    """A run to carry out. `work` can be pickled, and returns `Busy` where another holds it."""

    folder: Path
    label: str
    work: Callable[[], Any]


class Engine(Protocol):
    """Carries out jobs.

    Called with jobs, it yields (number, result) as each ends, in any order; closing it stops them,
    after their current step and with a checkpoint. A `Refused` of one is raised, and ends all.
    where: the folder that a refusal names. look: called about once a second while it waits.
    attempts: processes that one job may cost.
    """

    @property
    def drawn(self) -> bool:
        """Whether a bar counts the jobs; those in this process draw their own."""

    @property
    def at_once(self) -> int | None:
        """How many jobs run at once, at most; None for as many as there is room for."""

    @property
    def far(self) -> bool:
        """Whether jobs may run on other machines."""

    def __call__(
        self, jobs: Sequence[Job], *, where: str, look: Callable[[], None] = ...,
        attempts: int = ...,
    ) -> Generator[tuple[int, Any], None, None]: ...  # fmt: skip


class Partly(Exception):
    """Ends a comparison of which only a part was asked for; nothing is left to tell of it."""


def carry_out(
    what: Callable[..., Any],
    jobs: Sequence[Mapping[str, Any]],
    engine: Engine,
    *,
    where: str | Path,
    progress: bool = True,
) -> list[Any]:
    """`what(**job)` of every job, by whichever process or host; the results in the jobs' order.

    jobs: arguments, among them `out`, the run's folder, and `label`. Runs that are over, also
    meanwhile and by others, are read here.
    """
    made = [Job(Path(j["out"]), str(j["label"]), partial(attempt, what, **j)) for j in jobs]
    results: dict[int, Any] = {}
    watch, held = lease.Watch(), set[int]()
    with tqdm(total=len(made), unit="run", disable=not (progress and engine.drawn)) as bar:

        def note(number: int, result: Any) -> None:
            if isinstance(result, Busy):
                held.add(number)
                return
            results[number] = result
            bar.set_postfix_str(made[number].label, refresh=False)
            bar.update()

        while len(results) < len(made):
            before = len(results)
            todo = [i for i, job in enumerate(made) if i not in results and not ended(job.folder)
                    and (i not in held or watch.free(job.folder))]  # fmt: skip
            if todo:
                with closing(engine([made[i] for i in todo], where=str(where))) as coming:
                    for place, result in coming:
                        note(todo[place], result)
            for number, job in enumerate(made):
                if number not in results and ended(job.folder):
                    note(number, job.work())
            if len(results) == before:
                stopping.check()
                bar.set_postfix_str(f"{len(made) - before} held elsewhere")
                time.sleep(lease.LOOK)
    return [results[i] for i in range(len(made))]


def attempt(what: Callable[..., Any], **job: Any) -> Any:
    """`what(**job)`, or `Busy` if another process holds its folder, asked before work is done."""
    try:
        lease.check_free(Path(job["out"]))
        return what(**job)
    except Busy as busy:
        return busy
