"""A live line: of the trials best, running, pruned, failed, done of all; then of the final runs."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm

from holdfast.experiments.processes import EVERY
from holdfast.search.final import FinalJob, ended, jobs
from holdfast.search.rows import best, rows
from holdfast.search.study import FINISHED, Study


class Line:
    """One line for a whole study, whichever processes work on it."""

    def __init__(self, study: Study, *, shown: bool) -> None:
        self.study, self.shown, self._looked = study, shown, 0.0
        self.open: list[FinalJob] | None = None  # final runs that are not over; None: trials yet
        counts = study.counts()
        done = sum(counts[s] for s in FINISHED)
        self.bar = self._bar("search", "trial", max(study.plan.trials, done), done)

    def _bar(self, about: str, unit: str, total: int, done: int) -> Any:
        # Workers end their trials together: only the mean over all of them tells the time left.
        return tqdm(total=total, initial=done, unit=unit, desc=about, disable=not self.shown,
                    dynamic_ncols=True, smoothing=0)  # fmt: skip

    def look(self, *, now: bool = False) -> None:
        """Draw what the storage and the folder say, at most once a second."""
        if not self.shown or (not now and time.monotonic() - self._looked < EVERY):
            return
        self._looked = time.monotonic()
        if self.open is None:
            self._trials()
        else:
            self.open = [job for job in self.open if not ended(job)]
            self._draw(self.bar.total - len(self.open))

    def _trials(self) -> None:
        study = self.study
        found = rows(study.trials(), study.plan.space)
        self.bar.set_postfix_str(words(found), refresh=False)
        self._draw(sum(r.state in FINISHED for r in found))
        if study.over:
            self.bar.close()
            todo = jobs(study.folder, study.plan, found)
            self.open = [job for job in todo if not ended(job)]
            self.bar = self._bar("fresh seeds", "run", len(todo), len(todo) - len(self.open))

    def _draw(self, done: int) -> None:
        self.bar.n = done
        self.bar.refresh()

    def close(self) -> None:
        self.look(now=True)
        self.bar.close()


def words(found: Any) -> str:
    """`best 1.652 (trial 17), 2 running, 9 pruned, 1 failed`."""
    top = best(found)
    said = ["best –" if top is None else f"best {top.value:.3f} (trial {top.number})"]
    for state, word in (("running", "running"), ("pruned", "pruned"), ("fail", "failed")):
        said.append(f"{sum(r.state == state for r in found)} {word}")
    return ", ".join(said)
