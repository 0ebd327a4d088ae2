"""Two built-in tasks, with plain AdamW and with a recipe: what `holdfast demo` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.experiments.compare import compare
from holdfast.experiments.record import Record
from holdfast.recipe import Recipe

TASKS = ("builtin:inference", "builtin:intents")
SEEDS = (0, 1)
SETTINGS: dict[str, Any] = {
    "train_size": 960,
    "epochs": 1.0,
    "lr": 2e-4,
    "schedule": "constant_with_warmup",
    "max_length": 64,
    "save_steps": 0,
}


def demo(out: Path, *, workers: int = 2) -> list[Record]:
    """Plain fine-tuning and the default recipe on two synthetic tasks, two seeds each."""
    recipes: dict[str, tuple[Recipe, dict[str, Any]]] = {
        name: (Recipe.named(name), {}) for name in ("plain", "default")
    }
    return compare("minilm", TASKS, recipes, seeds=SEEDS, out=out, workers=workers, **SETTINGS)
