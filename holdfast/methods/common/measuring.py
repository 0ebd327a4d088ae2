"""What merge, gpm and kfac_ewc share: they measure layers' inputs when a task ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from holdfast.engine.grams import Grams, Structure
from holdfast.engine.method import Method, View
from holdfast.errors import tell_once


@dataclass(frozen=True, kw_only=True)
class Measuring(Method):
    """Methods with Gram matrices of layer inputs, and how much of these is measured and kept.

    rows: rows of the finished task that are measured.
    structure, width, rank: for inputs wider than `width`: `full`, `block` (diagonal blocks of at
        most `width`) or `low_rank` (`rank` directions and a diagonal).
    """

    rows: Annotated[int, Field(gt=0)] = 400
    structure: Structure = "block"
    width: Annotated[int, Field(gt=0)] = 4096
    rank: Annotated[int, Field(gt=0)] = 256

    @property
    def needs_data(self) -> bool:
        return True

    def measured(self, view: View, **more: Any) -> Grams:
        """The Grams of this task, in `end_task`; methods with the same settings share one pass,
        but for those that change weights."""
        found = view.grams(
            rows=self.rows, structure=self.structure, width=self.width, rank=self.rank, **more
        )
        if view.shared and not found.moments and not found.counts:
            tell_once(f"{self.name}: no weight that trains is in a linear layer or an embedding, "
                      "whose inputs could be measured")  # fmt: skip
        return found

    def remembered(self, view: View) -> Grams | None:
        """The Grams of earlier tasks, as `Grams.save` left them; None before the first."""
        return Grams.load(view.state.tensors, view.state.numbers, self.rank)
