"""What makes a task trainable: one file a kind. The rest of holdfast knows only this protocol.

Another package adds a kind by an entry point, looked up only for a name that is not here:

    [project.entry-points."holdfast.kinds"]
    mine = "my_package.mine:KIND"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from holdfast.errors import Refused
from holdfast.plugins import plugin
from holdfast.tasks.task import Prediction, Row, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from holdfast.tasks.kinds.packed import Packed

KINDS = (
    "classification", "multilabel", "tokens", "generation", "chat", "images", "module",
)  # fmt: skip
GROUP = "holdfast.kinds"
Encoded = dict[str, Any]  # a row as the model's inputs, not padded
Measured: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"  # (rows, …), see `Kind.total`


class Kind(Protocol):
    """What a file of this folder calls `KIND`."""

    HEADS: bool  # whether each task has a head of its own
    TEXT: bool  # whether its rows are text, and its processor a tokenizer

    def check(self, source: str, *, max_length: int) -> None:
        """Refuse a model that cannot learn such tasks, by its configuration."""

    def load_config(self, source: str) -> Any:
        """The model's configuration, without its weights."""

    def load_processor(self, source: str) -> Any:
        """What makes a model's inputs of rows: its tokenizer, or what else is saved beside it."""

    def dropped(self, source: str) -> str | None:
        """A line for the record if `load_model` leaves something of `source` out."""

    def load_model(self, source: str, task: Task, *, seed: int) -> nn.Module:
        """The pre-trained model for a first task, a fresh head drawn from `seed`."""

    def add_head(self, model: Any, task: Task, *, seed: int) -> nn.Module:
        """The model of a next task, around what `model` shares."""

    def shared(self, model: Any) -> nn.Module:
        """The module that all tasks share."""

    def encode(
        self, rows: Sequence[Row], task: Task, processor: Any, *, max_length: int, config: Any = ...
    ) -> Packed:
        """Rows as the model's inputs with `labels`, cut at `max_length` tokens."""

    def count_cut(
        self, rows: Sequence[Row], encoded: Packed, task: Task, processor: Any, *,
        max_length: int,
    ) -> int:  # fmt: skip
        """How many rows `encode` cut."""

    def collator(self, processor: Any) -> Any:
        """Encoded rows -> one padded batch."""

    def measure(
        self, model: nn.Module, rows: Sequence[Encoded], task: Task, collate: Any
    ) -> Measured:
        """What the task's score is made of, row by row; `TrainingDiverged` if not finite."""

    def total(self, task: Task, measured: Measured) -> float:
        """The task's score of these rows; higher is better."""

    def aligned(
        self, measured: Measured, labels: Sequence[str] | None, ours: Sequence[str]
    ) -> Measured:
        """What was measured with ids in the order of `labels`, with ids in that of `ours`, which
        come first."""

    def open_saved(self, folder: str, about: Mapping[str, Any] | None = None) -> Any:
        """A model that `save_pretrained` wrote. about: its task, see `with_head`."""

    def save_head(self, model: Any, file: Path) -> None:
        """Write what a model does not share."""

    def with_head(self, model: Any, about: Mapping[str, Any], file: Path) -> Any:
        """The model of another task around what `model` shares, as `save_head` wrote it.

        about: the task's `name` and `labels`."""

    def predict(
        self, model: nn.Module, about: Mapping[str, Any], texts: Sequence[str],
        pairs: Sequence[str] | None, processor: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """What the model says of each text."""


def kind_named(name: str) -> Kind:
    """The kind called `name`: one of `KINDS`, or from an installed package."""
    if name in KINDS:
        return cast(Kind, import_module(f"{__name__}.{name}").KIND)
    made, whence = plugin(GROUP, name, KINDS)
    if lacking := [n for n in vars(Kind) if n[0].islower() and not hasattr(made, n)]:
        raise Refused(f"{whence} is no kind of task: it has no {', '.join(lacking)}")
    return cast(Kind, made)


def kind_of(tasks: Sequence[Task]) -> Kind:
    """The kind of all tasks of a sequence, which are of one; see `one_kind`."""
    return kind_named(one_kind(tasks))


def one_kind(tasks: Sequence[Task]) -> str:
    """Its name; `Refused` if there are several."""
    names = list(dict.fromkeys(task.kind for task in tasks))
    if len(names) > 1:
        raise Refused(f"tasks of several kinds: {', '.join(names)}", where="--tasks",
                      remedy="a model serves tasks of one kind")  # fmt: skip
    return names[0]


def evaluate(
    model: nn.Module, rows: Sequence[Encoded], task: Task, collate: Any, kind: Kind | None = None
) -> float:
    """The task's score over rows that `kind` encoded; draws no random numbers."""
    kind = kind or kind_named(task.kind)
    return kind.total(task, kind.measure(model, rows, task, collate))
