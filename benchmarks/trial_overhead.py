"""Seconds of a trial of 100 steps outside of training and evaluation.

    python benchmarks/trial_overhead.py --json docs/results/trial-overhead.json

Training is the time between the first step and the last one of a task; evaluation is the time in
`evaluate` outside of it. The first trial loads for all that follow, and is left out of the share.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from results import markdown, save
from search import QUICK, paths
from transformers import TrainerCallback

from holdfast.experiments import learner
from holdfast.search import trial
from holdfast.search.plan import Plan
from holdfast.search.study import Study
from holdfast.search.worker import run

SETTINGS = {"train_size": 800, "epochs": 1.0, "max_length": 64, "evaluation_size": 600,
            "selection": 200}  # fmt: skip


class Clock(TrainerCallback):
    """Sums the seconds of training, and of evaluation outside of it."""

    def __init__(self) -> None:
        self.training = self.evaluation = 0.0
        self.began: float | None = None

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        assert self.began is not None
        self.training += time.perf_counter() - self.began
        self.began = None

    def wrapped(self, evaluate: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> float:
            began = time.perf_counter()
            try:
                return evaluate(*args, **kwargs)
            finally:
                if self.began is None:  # at a rung within an epoch it counts as training
                    self.evaluation += time.perf_counter() - began

        return timed


def clocked(make: Any, clock: Clock, *given: Any, callbacks: Any, **how: Any) -> Any:
    """A `Learner` whose tasks the clock watches too."""
    return make(*given, callbacks=lambda *at: [*callbacks(*at), clock], **how)


def trials(number: int, place: str) -> list[dict[str, float]]:
    """Seconds of each of `number` trials, storage included."""
    plan = Plan.make("minilm", paths(QUICK[0]), pruner="none", sampler="tpe", trials=50, **SETTINGS)
    study, train, rows = Study(place, plan), trial.Training(plan), []
    evaluate, made = learner.evaluate, trial.Learner
    try:
        for _ in range(number):
            clock = Clock()
            learner.evaluate = clock.wrapped(evaluate)
            trial.Learner = partial(clocked, made, clock)  # type: ignore[assignment, misc]
            began = time.perf_counter()
            claim = study.claim()
            assert claim is not None
            run(claim, train)
            claim.close()
            wall = time.perf_counter() - began
            over = wall - clock.training - clock.evaluation
            rows.append({"wall": wall, "training": clock.training, "evaluation": clock.evaluation,
                         "over": over, "share": over / wall})  # fmt: skip
            print(f"trial {len(rows)} of {number}: {wall:.1f} s", flush=True)
    finally:
        learner.evaluate, trial.Learner = evaluate, made  # type: ignore[misc]
    return rows


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = trials(chosen.trials, place)
    later = rows[1:]
    share = sum(r["over"] for r in later) / sum(r["wall"] for r in later)
    heads = ("trial", "seconds", "training", "evaluation", "the rest", "share of it, %")
    lines = [[i, *(r[k] for k in ("wall", "training", "evaluation", "over")), 100 * r["share"]]
             for i, r in enumerate(rows, 1)]  # fmt: skip
    told = (f"{100 * share:.1f} % of a trial of 100 steps is spent outside of training and "
            f"evaluation, the first trial left out.\n\n{markdown(heads, lines)}")  # fmt: skip
    save(chosen.json, {"settings": SETTINGS, "steps": 100, "trials": rows, "share": share}, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
