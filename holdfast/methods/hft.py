"""HFT: half fine-tuning (Hui et al., ACL 2025, arXiv 2404.18466).

In each task a random half of the modules of every category trains, and the other half is frozen:

    attention       modules with a matrix, below one whose name says attention
    feed-forward    all other modules with a matrix
    norms           modules without one

A module is a matrix and its bias. ⌈share · N⌉ of the N modules of a category train, spread evenly:
each layer trains a share of its own, up to one module. (‡ Which of a layer's matrices the paper
takes where their number is odd, and that embeddings and head always train, is from memory.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import Field

from holdfast.config import exactly
from holdfast.engine.method import Range, View
from holdfast.errors import Refused
from holdfast.methods.common.subnetwork import LeavesOut, in_layer

Thing = TypeVar("Thing")
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class HFT(LeavesOut):
    """Train a random half of the modules of each category, drawn anew for every task.

    share: of the modules of each category, that trains, 0 < share < 1.
    others: whether embeddings, and a head that tasks share, "train" or are frozen ("freeze").
    """

    name: ClassVar[str] = "hft"
    summary: ClassVar[str] = "trains a random half of the matrices, another in every task"
    paper: ClassVar[str] = "Hui et al., ACL 2025, arXiv 2404.18466"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "less than plain training: frozen matrices get no gradient"
    use: ClassVar[str] = "several tasks in a row on one language model"
    bytes_per_weight: ClassVar[str] = "0"
    ranges: ClassVar[Mapping[str, Range]] = {"share": Range(0.1, 0.9)}

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    others: Literal["train", "freeze"] = "train"

    def begin_task(self, view: View) -> None:
        modules: dict[str, list[str]] = {}
        for name in view.shared:
            if in_layer(view, name):
                modules.setdefault(name.rpartition(".")[0], []).append(name)
        if not modules:
            raise Refused("no layer of the network trains", where="hft", remedy="take sift")
        trained = {n for m in self._drawn(view, modules) for n in modules[m]}
        if self.others == "train":
            trained |= {n for n in view.shared if not in_layer(view, n)}
        self.leave_out(view, [n for n in view.shared if n not in trained])

    def _drawn(self, view: View, modules: Mapping[str, list[str]]) -> list[str]:
        """The modules that train."""
        categories: dict[str, dict[str, list[str]]] = {}
        for module, names in modules.items():
            norm = all(view.weights[n].ndim < 2 for n in names)
            what = "norm" if norm else "attention" if ATTENTION.search(module) else "forward"
            layers = categories.setdefault(what, {})
            layers.setdefault(view.parts[names[0]], []).append(module)
        chosen = []
        for layers in categories.values():
            row = [
                m for layer in _shuffled(view, [*layers.values()]) for m in _shuffled(view, layer)
            ]
            # Every 1/share-th in a row of random layers, each in random order.
            upto = [math.ceil(exactly(self.share, i)) for i in range(len(row) + 1)]
            chosen += [m for i, m in enumerate(row) if upto[i + 1] > upto[i]]
        return chosen


def _shuffled(view: View, things: list[Thing]) -> list[Thing]:
    return [things[i] for i in torch.randperm(len(things), generator=view.generator).tolist()]
