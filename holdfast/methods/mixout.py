"""Mixout: forward weights swapped by chance for those of the start (Lee et al., arXiv 1909.11299).

    W̃ = (N W + (1 − N) W⁰ − p W⁰) / (1 − p) = W⁰ + N (W − W⁰) / (1 − p),   N ~ Bernoulli(1 − p)

W⁰ are the weights when the task begins: dropout towards W⁰ in place of 0, E[W̃] = W. It covers the
matrices of linear layers, the head's too, never biases, norms or embeddings. Evaluation sees W.

The published code draws N for one row and repeats it, so that whole input columns are swapped
(`noise="column"`; the paper's is `"weight"`), and its backward pass omits 1 / (1 − p)
(`gradient="published"`: N g in place of N g / (1 − p)). It also sets every `nn.Dropout` to 0
(`dropout="off"`). N is drawn once a step here, there in every forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common.mixing import (
    Noise,
    draw,
    drawn,
    mixed,
    refuse_unseen,
    widened,
)
from holdfast.methods.dropout import Dropout, restore_, set_dropout_
from holdfast.network.layers import linear


@dataclass(frozen=True, kw_only=True)
class Mixout(Method):
    """Swap linear layers' weights for those at the start of the task, by chance and while training.

    drop: p, the chance of a swap, 0 ≤ drop < 1.
    noise: drawn for each input "column" (the published code) or each "weight" (the paper).
    gradient: "exact", the derivative, or "published", which is 1 − p times as large.
    dropout: "off" is `Dropout()` beside it, as in the published code; "keep" leaves it.
    """

    name: ClassVar[str] = "mixout"
    summary: ClassVar[str] = "swaps weights for those of the start by chance while training"
    paper: ClassVar[str] = "Lee et al., ICLR 2020, arXiv 1909.11299"
    bytes_per_weight: ClassVar[str] = "4 (the start); for a step 1 more with noise per weight"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "one pass over the covered weights, forward and backward"
    use: ClassVar[str] = "few rows"
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"drop": Range(0.1, 0.9)}

    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    noise: Noise = "weight"
    gradient: Literal["exact", "published"] = "exact"
    dropout: Literal["keep", "off"] = "keep"

    def begin_task(self, view: View) -> None:
        names = [n for n, w in view.weights.items() if linear(w, view.modules[n])]
        if not names:
            raise Refused("no linear layer to mix", where="mixout",
                          remedy="let one train")  # fmt: skip
        view.state.weights["start"] = {n: widened(view.weights[n]) for n in names}
        beside = [m.p for m in view.bound.methods if isinstance(m, Dropout)]
        if self.dropout == "off" and any(beside):  # the later of the two would win
            raise Refused(f"dropout is off here and {beside[0]} beside it", where="mixout.dropout",
                          remedy="use keep")  # fmt: skip
        if self.dropout == "off":
            view.state.numbers["before"] = set_dropout_(view.bound.models[view.task], 0.0)

    def unbound(self, view: View) -> None:
        restore_(view.bound.models[view.task], view.state.numbers.pop("before", {}))

    def mixed(self, view: View) -> Collection[str]:
        return view.state.slot("start")

    def weights(self, view: View, name: str, w: Tensor) -> Tensor:
        view.scratch["mixed"], start = True, view.state.slot("start")
        gain = 1 / (1 - self.drop) if self.gradient == "exact" else 1.0
        return mixed(w, start[name], drawn(view, start, self.draw)[name], self.drop, gain=gain)

    def draw(self, view: View, name: str) -> Tensor:
        """N ~ Bernoulli(1 − p), True where the trained weight is used."""
        return draw(view, name, self.drop, self.noise)

    def before_step(self, view: View) -> None:
        refuse_unseen(view, view.state.slot("start"), where="mixout", what="nothing is swapped")
