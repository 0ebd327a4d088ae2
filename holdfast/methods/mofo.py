"""MoFO: momentum-filtered optimizer (Chen et al., TMLR 2025, arXiv 2407.20999).

Each step moves the entries of each covered tensor with the largest momentum, and no others:

    m, v ← as the optimizer does, for all entries       M = the ⌈share · n⌉ largest entries of |m|
    w ← w + M ⊙ (w' − w)                                 w' the optimizer's step

so that a step goes along few coordinates and the weights stay near where they were. m is the
momentum after this step's gradient; of ties the first entries count.

Deviations from the published code: it always moves biases and norms (`modules="matrices"`), and
its weight decay takes from all entries, also those that do not move (`decay="all"`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from holdfast.engine.method import Range, View
from holdfast.errors import Refused
from holdfast.methods.common.order import refuse_after_holding
from holdfast.methods.common.subnetwork import Modules, Subnetwork, decay_of, restore_
from holdfast.ops.selection import top

MOMENTA = ("exp_avg", "momentum_buffer")  # of Adam and its kin, of SGD


@dataclass(frozen=True, kw_only=True)
class MoFO(Subnetwork):
    """Move only the entries with the largest momentum.

    share: α, of the entries of each covered tensor, that moves in a step, 0 < share < 1.
    modules: what is covered: weights of "linear" layers (HF Conv1D included), all "matrices", the
        network's "layers" whole, "all", or globs of parameter names, each of which must match.
    head: whether the task's own head trains whole; if not, it is covered as other weights are.
    decay: whether weight decay takes from the entries that move ("moving") or from "all".
    """

    name: ClassVar[str] = "mofo"
    summary: ClassVar[str] = "moves only the entries with the largest momentum"
    paper: ClassVar[str] = "Chen et al., TMLR 2025, arXiv 2407.20999"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "a selection and two passes over the covered weights"
    use: ClassVar[str] = "fine-tuning of a language model whose pre-training data is gone"
    bytes_per_weight: ClassVar[str] = "0, and 4 within a step (the weights before it)"
    needs_previous: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"share": Range(0.02, 0.5, log=True)}

    modules: Modules = "all"
    decay: Literal["moving", "all"] = "moving"

    def begin_task(self, view: View) -> None:
        super().begin_task(view)
        for group in () if view.resuming else view.bound.optimizer.param_groups:
            if not (group.get("momentum") or (group.get("betas") or [group.get("beta1")])[0]):
                raise Refused(f"{type(view.bound.optimizer).__name__} has no momentum",
                              where="mofo", remedy="use AdamW")  # fmt: skip
        if self.decay == "all":
            refuse_after_holding(view, self)
            for name in view.state.numbers["covered"]:
                decay_of(view, name)

    def previous_of(self, view: View) -> Collection[str]:
        return view.state.numbers["covered"]

    def after_step(self, view: View) -> None:
        for name in view.state.numbers["covered"]:
            if view.grads[name] is None:
                continue
            before = view.previous[name]
            if self.decay == "all":
                before = before * (1 - decay_of(view, name))
            restore_(view, name, before, top({name: _momentum(view, name).abs()}, self.share)[name])


def _momentum(view: View, name: str) -> Tensor:
    kept = view.moments(name)
    for key in MOMENTA:
        if isinstance(m := kept.get(key), Tensor) and m.shape == view.weights[name].shape:
            return m
    raise Refused(f"{type(view.bound.optimizer).__name__} keeps no momentum of this weight",
                  where=name, remedy="use AdamW")  # fmt: skip
