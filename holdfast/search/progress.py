"""A live line: best, running, pruned, failed, done of all, time left."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm

from holdfast.search.rows import best, rows
from holdfast.search.study import FINISHED, Study

EVERY = 1.0  # seconds between looks at the storage


class Line:
    """One line for a whole study, whichever process works on it."""

    def __init__(self, study: Study, *, shown: bool, position: int = 0) -> None:
        self.study, self.shown, self._looked = study, shown, 0.0
        counts = study.counts()
        done = sum(counts[s] for s in FINISHED)
        self.bar: Any = tqdm(
            total=max(study.plan.trials, done), initial=done, unit="trial", disable=not shown,
            dynamic_ncols=True, desc="search", position=position,
        )  # fmt: skip

    def look(self, *, now: bool = False) -> None:
        """Draw what the storage says, at most once a second."""
        if not self.shown or (not now and time.monotonic() - self._looked < EVERY):
            return
        self._looked = time.monotonic()
        found = rows(self.study.trials(), self.study.plan.space)
        self.bar.set_postfix_str(words(found), refresh=False)
        self.bar.update(sum(r.state in FINISHED for r in found) - self.bar.n)
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
