"""Studies made for tests, as objects and as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.search.trials import (
    COLUMNS,
    ReadStudy,
    Trial,
    part_names,
    write_trials,
)

SHA = iter(range(10**9))


def study(trials: Sequence[tuple[float, Sequence[float]]]) -> ReadStudy:
    """A study of (reward, rates) pairs, each reward half from either task."""
    made = tuple(
        Trial(number=i, lr=tuple(lr), old=0.9, new=reward / 2, old_after=reward / 2)
        for i, (reward, lr) in enumerate(trials)
    )
    usual: dict[str, Any] = {
        "source": "made",
        "sha256": str(next(SHA)),
        "study": None,
        "layers": None,
    }
    return ReadStudy(**usual | {"trials": made, "left_out": {}})


def logs(count: int = 49, seed: int = 0, parts: int = 10) -> list[tuple[float, list[float]]]:
    """Trials of the published shape: rewards, and log-uniform rates in [1e-7, 1e-3]."""
    draw = np.random.default_rng(seed)
    rates = 10 ** draw.uniform(-7, -3, (count, parts))
    return [(float(r), [float(v) for v in lr]) for r, lr in
            zip(draw.uniform(1.0, 1.8, count), rates, strict=True)]  # fmt: skip


def csv(folder: Path, *lines: str, header: str | None = None, name: str = "trials.csv") -> Path:
    rates = ",".join(f"lr.{part}" for part in part_names(3))
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([header or f"{','.join(COLUMNS)},{rates}", *lines]) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


GOOD = "0,complete,.9,.8,.7,1.5,100,a,1e-5,2e-5,3e-5"
OTHER = GOOD.replace("0,complete", "1,complete").replace(",a,", ",b,")


def write(path: Path, trials: Sequence[tuple[float, Sequence[float]]], name: str, **m: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_trials(path, study(trials).trials, study=name, **m)
    return path
