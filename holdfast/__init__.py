"""Fine-tune pre-trained transformers without overfitting and without forgetting, and measure it.

The public names, loaded when they are first used: importing holdfast imports no torch. Beside those
below, the class of every method (`holdfast.DPS`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "parts": "holdfast.network.parts",
    "Parts": "holdfast.network.parts",
    "Rates": "holdfast.network.rates",
    "Recipe": "holdfast.recipe",
    "Bound": "holdfast.engine.bound",
    "Method": "holdfast.engine.method",
    "View": "holdfast.engine.method",
    "Range": "holdfast.engine.method",
    "HeadFirst": "holdfast.engine.head_first",
    "HeadLast": "holdfast.engine.head_last",
    "LoRA": "holdfast.engine.peft",
    "PEFT": "holdfast.engine.peft",
    "Refused": "holdfast.errors",
    "with_recipe": "holdfast.training.trainer",
    "Trainer": "holdfast.training.trainer",
    "RecipeCallback": "holdfast.training.callback",
    "Task": "holdfast.tasks",
    "load_task": "holdfast.tasks",
    "run_sequence": "holdfast.experiments.sequence",
    "load": "holdfast.experiments.serving",
    "compare": "holdfast.experiments.compare",
    "Record": "holdfast.experiments.record",
    "write_report": "holdfast.report",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return ["__version__", *_HOMES, *_methods()]
    if name not in _HOMES and (name.startswith("_") or name not in _methods()):
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    home = importlib.import_module(_HOMES.get(name, "holdfast.methods"))
    globals()[name] = getattr(home, name)
    return globals()[name]


def _methods() -> dict[str, Any]:
    """The class of every method, by its own name."""
    found: dict[str, Any] = importlib.import_module("holdfast.methods").CLASSES
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_methods()})


if TYPE_CHECKING:
    from holdfast.engine.bound import Bound as Bound
    from holdfast.engine.head_first import HeadFirst as HeadFirst
    from holdfast.engine.head_last import HeadLast as HeadLast
    from holdfast.engine.method import Method as Method
    from holdfast.engine.method import Range as Range
    from holdfast.engine.method import View as View
    from holdfast.engine.peft import PEFT as PEFT
    from holdfast.engine.peft import LoRA as LoRA
    from holdfast.errors import Refused as Refused
    from holdfast.experiments.compare import compare as compare
    from holdfast.experiments.record import Record as Record
    from holdfast.experiments.sequence import run_sequence as run_sequence
    from holdfast.experiments.serving import load as load
    from holdfast.network.parts import Parts as Parts
    from holdfast.network.parts import parts as parts
    from holdfast.network.rates import Rates as Rates
    from holdfast.recipe import Recipe as Recipe
    from holdfast.report import write_report as write_report
    from holdfast.tasks import Task as Task
    from holdfast.tasks import load_task as load_task
    from holdfast.training.callback import RecipeCallback as RecipeCallback
    from holdfast.training.trainer import Trainer as Trainer
    from holdfast.training.trainer import with_recipe as with_recipe
