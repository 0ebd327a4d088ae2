"""LISA: layerwise importance sampled AdamW (Pan et al., NeurIPS 2024, arXiv 2403.17919).

Embeddings and head always train, and with them γ layers, drawn anew every K steps with equal
chances. The other layers rest: no update, no decay; their moments wait, and a layer that was never
drawn has none. Adam corrects its bias by the steps that a tensor took part in.

What LISA saves in memory, activations, gradients and moments of resting layers, is not reproduced
here: only the update is. Gradients are computed for all layers, and moments stay where they were
made, as in the published code (‡) but for its switching of `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from holdfast.config import Share, count
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common.subnetwork import in_layer


@dataclass(frozen=True, kw_only=True)
class LISA(Method):
    """Train embeddings, head, and a few layers that change with time.

    layers: γ, how many layers train at a time.
    every: K, for how long the same ones: a share of the task's steps or a number of steps.
    """

    name: ClassVar[str] = "lisa"
    summary: ClassVar[str] = "trains embeddings, head and a few layers at a time"
    paper: ClassVar[str] = "Pan et al., NeurIPS 2024, arXiv 2403.17919"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "nothing measurable"
    use: ClassVar[str] = "instruction tuning of language models"
    bytes_per_weight: ClassVar[str] = "0"
    shares: ClassVar[tuple[str, ...]] = ("every",)
    ranges: ClassVar[Mapping[str, Range]] = {"every": Range(5, 100, log=True)}

    layers: Annotated[int, Field(gt=0)] = 1
    every: Share = 20

    def begin_task(self, view: View) -> None:
        numbers = view.state.numbers
        numbers["parts"] = list(
            dict.fromkeys(view.parts[n] for n in view.shared if in_layer(view, n))
        )
        if self.layers > len(numbers["parts"]):
            raise Refused(f"{len(numbers['parts'])} layers train, {self.layers} are to be drawn",
                          where="lisa.layers")  # fmt: skip
        numbers["every"] = count(self.every, view.total_steps)
        self._draw(view)

    def _draw(self, view: View) -> None:
        parts = view.state.numbers["parts"]
        drawn = torch.randperm(len(parts), generator=view.generator)[: self.layers]
        view.state.numbers["resting"] = [p for i, p in enumerate(parts) if i not in drawn.tolist()]

    def before_step(self, view: View) -> None:
        resting = set(view.state.numbers["resting"])
        for name in view.shared:
            if view.parts[name] in resting:
                view.grads[name] = None

    def after_step(self, view: View) -> None:
        if (view.step + 1) % view.state.numbers["every"] == 0:
            self._draw(view)
