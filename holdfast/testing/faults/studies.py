"""Searches whose trials are computed, not trained, in this process and in others.

python -m holdfast.testing.faults.studies PLACE HOME NAME URL TRIALS SECONDS KILLED
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.search.objective import Scores, Watch
from holdfast.search.plan import Plan
from holdfast.search.study import Study
from holdfast.search.worker import Replicate, work

if TYPE_CHECKING:
    from holdfast.testing.faults.place import Place

STEPS = 60  # of a trial


def curve(job: Replicate, watch: Watch) -> Scores:
    """Scores that peak at a rate of 1e-3; every rung is told, as training would."""
    near = math.exp(-abs(math.log(job.lr / 1e-3)) / 3)
    old, after = 0.5 + 0.4 * near, 0.5 + 0.3 * near / (1 + job.recipe.rates.head)
    for k, share in enumerate(watch.rungs, 1):
        watch.at(k, steps=int(STEPS / 2 * share), old=old * share)
    return Scores(old, old, after, STEPS, 1.0)


def study(place: Place, name: str, *, url: str | None = None, trials: int = 12) -> Study:
    """A search of this place's model and two tasks, made or joined."""
    tasks = [place.rows(f"{task}.jsonl", more=f" {task}") for task in ("one", "two")]
    plan = Plan.make(str(place.bert), tasks, trials=trials, sampler="random", pruner="none",
                     epochs=1.0, max_length=16, selection=6, parts=4)  # fmt: skip
    return Study(place / name, plan, url)


def started(place: Place, name: str, *, url: str | None = None, trials: int = 12,
            slow: float = 0.0, killed: int = -1) -> subprocess.Popen[str]:  # fmt: skip
    """A worker in a process of its own, which kills itself in one of the trials."""
    given = [place.folder, place.home, name, url or "", trials, slow, killed]
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast.testing.faults.studies", *map(str, given)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def main(folder: str, home: str, name: str, url: str, trials: str, slow: str, killed: str) -> None:
    from holdfast.testing.faults.place import Place

    def train(job: Replicate, watch: Watch) -> Scores:
        time.sleep(float(slow))
        if job.number == int(killed):
            os.kill(os.getpid(), signal.SIGKILL)
        return curve(job, watch)

    place = Place(Path(folder), Path(home))
    work(study(place, name, url=url or None, trials=int(trials)), train)


if __name__ == "__main__":
    main(*sys.argv[1:])
