"""What methods remember, keyed by names, and how it becomes tensors and JSON and back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import Refused
from holdfast.ops import distributed


class State:
    """What one method remembers.

    `weights[slot][name]` are tensors shaped like the parameter `name` or broadcast to it;
    `tensors[slot][key]` are any other tensors; `numbers` is JSON. `cache` is anything that can be
    recomputed: it is not saved, and empty after loading. `generator` is the method's own.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.numbers: dict[str, Any] = {}
        self.cache: dict[str, Any] = {}

    def slot(self, name: str) -> dict[str, Tensor]:
        """The per-parameter tensors of slot `name`, created empty on first use."""
        return self.weights.setdefault(name, {})

    def remembered(self) -> Iterator[set[str]]:
        """The shared parameters that each slot, or the Gram matrices, are about, where there are
        some; those of a task's own head are left out."""
        for names in (*self.weights.values(), self.numbers.get("readers", {})):
            if shared := {name for name in names if "/" not in name}:
                yield shared

    def bytes(self) -> int:
        """The memory held by this rank, in bytes."""
        slots = [*self.weights.values(), *self.tensors.values()]
        every = [distributed.local(t) for slot in slots for t in slot.values()]
        return sum(t.numel() * t.element_size() for t in every)


def pack(
    states: Mapping[str, State], *, without: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors keyed ``method/kind/slot/name``, not copied, and the numbers of each method.

    `without` names the methods whose `weights` are of a task that has ended.

    Sharded tensors are gathered one after another on the CPU of rank 0: every rank must call
    this, and ranks above 0 get no tensors.
    """
    tensors = {
        f"{method}/{kind}/{slot}/{name}": tensor
        for method, state in states.items()
        for kind, slots in (("weights", state.weights), ("tensors", state.tensors))
        if not (kind == "weights" and method in without)
        for slot, entries in slots.items()
        for name, tensor in entries.items()
    }
    if any(distributed.sharded(t) for t in tensors.values()):
        tensors = _whole(tensors)
    return tensors, {method: copy.deepcopy(state.numbers) for method, state in states.items()}


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {}
    for key, t in tensors.items():
        gathered = distributed.full(t)  # a collective: every rank must call it
        if distributed.rank() == 0:
            whole[key] = gathered.cpu()
    return whole


def unpack(
    states: Mapping[str, State],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Fill `states` with copies, each on the device and in the shards of its weight, if it has one.

    `tensors` are whole, as `pack` makes them, whatever the number of ranks that saved them; for
    sharded weights each rank keeps its part.
    """
    for method, state in states.items():
        state.weights, state.tensors, state.cache = {}, {}, {}
        state.numbers = copy.deepcopy(numbers[method])
    for key, tensor in tensors.items():
        method, kind, slot, name = key.split("/", 3)
        home = getattr(states[method], kind).setdefault(slot, {})
        copied = tensor.clone()
        home[name] = distributed.beside(copied, weights[name]) if name in weights else copied


def describe(weights: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Shape and type of each weight, as JSON."""
    return {k: [list(w.shape), str(w.dtype).removeprefix("torch.")] for k, w in weights.items()}


def check_fit(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse parameters that differ from those of the saved state, listing them."""
    wrong = [f"{k} is new" for k in now if k not in saved]
    wrong += [f"{k} was {saved[k]}, is {v}" for k, v in now.items() if saved.get(k, v) != v]
    wrong += [f"{k} is gone" for k in saved if k not in now]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
        raise Refused(f"the saved state does not fit the model: {shown}")
