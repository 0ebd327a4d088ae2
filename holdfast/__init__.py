"""Fine-tune pre-trained transformers without overfitting and without forgetting, and measure it.

The public names, loaded when they are first used: importing holdfast imports no torch.
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
    "DPS": "holdfast.methods",
    "EWC": "holdfast.methods",
    "GPM": "holdfast.methods",
    "KfacEWC": "holdfast.methods",
    "KLAnchor": "holdfast.methods",
    "L2SP": "holdfast.methods",
    "LwF": "holdfast.methods",
    "Merge": "holdfast.methods",
    "Replay": "holdfast.methods",
    "WiSE": "holdfast.methods",
    "HeadFirst": "holdfast.engine.head_first",
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
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if TYPE_CHECKING:
    from holdfast.engine.bound import Bound as Bound
    from holdfast.engine.head_first import HeadFirst as HeadFirst
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
    from holdfast.methods import DPS as DPS
    from holdfast.methods import EWC as EWC
    from holdfast.methods import GPM as GPM
    from holdfast.methods import L2SP as L2SP
    from holdfast.methods import KfacEWC as KfacEWC
    from holdfast.methods import KLAnchor as KLAnchor
    from holdfast.methods import LwF as LwF
    from holdfast.methods import Merge as Merge
    from holdfast.methods import Replay as Replay
    from holdfast.methods import WiSE as WiSE
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
