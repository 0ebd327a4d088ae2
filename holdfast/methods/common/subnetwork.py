"""Subnetworks: which weights take part, which of their entries move, and the rest held still.

A zeroed gradient does not stop momentum and weight decay. So `freeze="exact"`, the default, also
restores after each step the entries that are not to move, bit for bit; `freeze="gradient"` only
zeroes gradients, as published codes do.

A mask that holds for many steps is kept as the values to restore (slot `held`), in which NaN marks
the entries that move: 4 bytes a weight. The optimizer's moments are of whole tensors, and zero
where no gradient passed. A tensor that is left out altogether has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.network.layers import linear
from holdfast.network.parts import EMBEDDINGS, HEAD
from holdfast.ops.distributed import world
from holdfast.ops.gradients import switch_on_
from holdfast.ops.masks import hold_, mark_, zero_

Freeze = Literal["exact", "gradient"]
Modules = Literal["linear", "matrices", "layers", "all"] | tuple[str, ...]

# --- which weights take part ----------------------------------------------------------------------


def covered(view: View, method: Method, modules: Modules, among: Collection[str]) -> list[str]:
    """The names of `among` that `modules` means, in the model's order; `Refused` if there are none.

    modules: weights of "linear" layers, HF Conv1D included; "matrices", all weights of two
    dimensions and more; all in the network's "layers"; "all"; or globs, each of which must match.
    """
    weights, where = view.weights, method.where("modules")
    kinds: dict[str, Callable[[str], bool]] = {
        "linear": lambda n: linear(weights[n], view.modules[n]),
        "matrices": lambda n: weights[n].ndim > 1,
        "layers": lambda n: in_layer(view, n),
        "all": lambda n: True,
    }
    if isinstance(modules, str):
        names = [n for n in weights if n in among and kinds[modules](n)]
    else:
        for glob in modules:
            if not any(fnmatchcase(n, glob) for n in weights):
                raise Refused(f"{glob!r} matches no parameter", where=where)
        names = [n for n in weights if n in among and any(fnmatchcase(n, g) for g in modules)]
    if not names:
        raise Refused("nothing to select from", where=where,
                      remedy="name parameters that the optimizer holds")  # fmt: skip
    return names


def in_layer(view: View, name: str) -> bool:
    """Whether a weight is in a layer of the network: not in its embeddings or head."""
    return view.parts[name] not in (EMBEDDINGS, HEAD)


@dataclass(frozen=True, kw_only=True)
class Subnetwork(Method):
    """Methods that move ⌈share · n⌉ of the n entries of what they cover.

    share: of the entries, that moves, 0 < share < 1.
    modules: what is covered, see `covered`.
    head: whether the task's own head trains whole; if not, it is covered as other weights are.
    """

    holds: ClassVar[bool] = True

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    modules: Modules = "linear"
    head: bool = True

    def begin_task(self, view: View) -> None:
        among = view.shared if self.head else view.weights
        view.state.numbers["covered"] = covered(view, self, self.modules, among)
        view.state.weights.clear()


# --- whole tensors --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LeavesOut(Method):
    """Methods that leave whole tensors out of a task: no update, no decay, no moments."""

    def leave_out(self, view: View, names: Iterable[str]) -> None:
        """In `begin_task`: these do not train in this task.

        Nor are their gradients computed, by one process: DDP and FSDP2 wait for every gradient
        they know of. Embeddings keep theirs, because under activation checkpointing a layer whose
        input needs no gradient may get none.
        """
        view.state.numbers["out"] = list(names)
        self.loaded(view)

    def loaded(self, view: View) -> None:
        switch_on_(view.cut)
        for name in view.state.numbers.get("out", ()) if world() == 1 else ():
            w = view.weights.get(name)  # None: a state between two tasks
            if w is not None and w.requires_grad and view.parts[name] != EMBEDDINGS:
                w.requires_grad_(False)
                view.cut.append(w)

    def before_step(self, view: View) -> None:
        for name in view.state.numbers["out"]:
            view.grads[name] = None


# --- some entries of a tensor ---------------------------------------------------------------------


def fix_(view: View, buffers: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Hold these weights from now on, but for the entries where `masks` (bool) are True.

    buffers: tensors of the weights' shapes, at least float32, that are used up for slot `held`.
    """
    held = view.state.slot("held")
    held |= {n: b.copy_(view.weights[n].detach()) for n, b in buffers.items()}
    for name, mask in masks.items():
        mark_(held[name], mask)


def zero_frozen_(view: View) -> None:
    """In `before_step`: zero the gradients of the entries that are held."""
    held = view.state.slot("held")
    grads = {n: g for n in held if (g := view.grads[n]) is not None}
    zero_(grads, held, view.state.tensors.get("mask"))


def hold_frozen_(view: View) -> None:
    """In `after_step`: put the entries that are held back to their values."""
    hold_(view.weights, view.state.slot("held"), view.state.tensors.get("mask"))


def restore_(view: View, name: str, values: Tensor, moves: Tensor) -> None:
    """weight ← `values` wherever `moves` (bool) is False."""
    held = values.clone()
    mark_(held, moves)
    hold_({name: view.weights[name]}, {name: held})


def decay_of(view: View, name: str) -> float:
    """ηλ, the share of a weight that AdamW's decay takes in a step; `Refused` for other decays."""
    group, optimizer = view.bound.group_of[name], view.bound.optimizer
    decay = float(group.get("weight_decay", 0.0))
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
    if decay and not decoupled:
        raise Refused(f"the weight decay of {type(optimizer).__name__} is in its gradient",
                      where="decay", remedy="use AdamW, or weight_decay=0")  # fmt: skip
    return view.lr(name) * decay
