"""Sequences of tiny tasks, run and looked at."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import models
import pytest

from holdfast import DPS, EWC, Rates, Recipe, Replay, run_sequence
from holdfast.experiments import learner
from holdfast.experiments.record import Record
from holdfast.tasks.kinds import classification

# 8 steps an epoch, saved every 3: kills fall into the middle of epochs and stages.
SETTINGS: dict[str, Any] = {
    "epochs": 2.0, "batch_size": 2, "accumulation": 2, "lr": 5e-3, "save_steps": 3,
    "max_length": 16, "progress": False,
}  # fmt: skip
RECIPE = Recipe(
    rates=Rates.bertcl(),
    methods=[EWC(strength=10.0, rows=8), Replay(memory=4), DPS(mix=True, stage=4)],
    name="together",
)


def run(place: Path, out: Path | None, topics: tuple[str, ...] = tuple(models.TOPICS),
        recipe: Any = RECIPE, **more: Any) -> Record:  # fmt: skip
    tasks = [place / f"{t}.jsonl" for t in topics]
    return run_sequence(str(place / "bert"), tasks, recipe, out=out, **{**SETTINGS, **more})


def told(folder: Path) -> dict[str, Any]:
    """What a record says, without what differs from one run to the next by nature."""
    record = json.loads((folder / "record.json").read_text())
    for key in ("seconds", "created", "command", "commit", "versions", "warnings", "sha256"):
        record.pop(key)
    record["settings"].pop("out")
    return record  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, str]:
    """Every weight and state that a run leaves, by SHA-256: contents would print as megabytes."""
    found = sorted((folder / "tasks").rglob("*.safetensors"))
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in found}


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:

        def called(*_: Any, _name: str = name, **__: Any) -> None:
            raise AssertionError(f"{_name} was called")

        monkeypatch.setattr(
            learner if hasattr(learner, name) else classification.KIND, name, called
        )
