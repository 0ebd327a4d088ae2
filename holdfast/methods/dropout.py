"""Dropout at another rate while training, by default none (Srivastava et al., JMLR 2014).

    y = m x / (1 − p),   m ~ Bernoulli(1 − p) per entry:   E[y] = x;   at p = 0, y = x

Pre-trained models come with the p of their pre-training, mostly .1. Over few steps its noise may
slow learning more than it regularises. Every dropout of the network takes the new p: `nn.Dropout`
and its kin, and numbers whose name tells of dropout, as recurrent layers, attention and many models
of Transformers keep them. The old ones come back when the recipe lets go. What a model reads from
its config in each pass is not reached; dropped layers and paths are another thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Dropout(Method):
    """Set every dropout of the network to `p` while the recipe is bound.

    p: the chance that an entry is dropped, 0 ≤ p < 1.
    """

    name: ClassVar[str] = "dropout"
    summary: ClassVar[str] = "trains with another rate of dropout, or with none"
    paper: ClassVar[str] = "Srivastava et al., JMLR 2014"
    bytes_per_weight: ClassVar[str] = "0"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "none; without dropout less than plain"
    use: ClassVar[str] = "few steps"
    ranges: ClassVar[Mapping[str, Range]] = {"p": Range(0.0, 0.3)}
    tunable: ClassVar[tuple[str, ...]] = ("p",)

    p: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def begin_task(self, view: View) -> None:
        before = set_dropout_(view.bound.models[view.task], self.p)
        if self.p and not before:
            raise Refused("the network has none", where="dropout", remedy="leave it out")
        view.state.numbers["before"] = before

    def unbound(self, view: View) -> None:
        restore_(view.bound.models[view.task], view.state.numbers.pop("before", {}))


def set_dropout_(model: nn.Module, p: float) -> dict[str, dict[str, float]]:
    """Give every dropout of `model` this rate; returns the former: {module: {attribute: rate}}."""
    before = {path: rates for path, m in model.named_modules() if (rates := _rates(m))}
    for path, rates in before.items():
        vars(model.get_submodule(path)).update(dict.fromkeys(rates, p))
    return before


def restore_(model: nn.Module, before: Mapping[str, Mapping[str, float]]) -> None:
    """Undo `set_dropout_`."""
    for path, rates in before.items():
        vars(model.get_submodule(path)).update(rates)


def _rates(module: nn.Module) -> dict[str, float]:
    name = "^p$" if isinstance(module, _DropoutNd) else "dropout|pdrop"
    return {
        key: value
        for key, value in vars(module).items()
        if re.search(name, key) and isinstance(value, int | float) and not isinstance(value, bool)
        if 0 <= value <= 1
    }
