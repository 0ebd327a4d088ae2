"""What methods remember, keyed by names, and how it becomes tensors and JSON and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from holdfast.errors import Refused


class State:
    """What one method remembers.

    `weights[slot][name]` are tensors shaped like the parameter `name` or broadcast to it;
    `tensors[slot][key]` are any other tensors; `numbers` is JSON.
    """

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.numbers: dict[str, Any] = {}

    def slot(self, name: str) -> dict[str, Tensor]:
        """The per-parameter tensors called `name`, made empty on first use."""
        return self.weights.setdefault(name, {})

    def bytes(self) -> int:
        """The memory held, in bytes."""
        every = [*self.weights.values(), *self.tensors.values()]
        return sum(t.numel() * t.element_size() for slot in every for t in slot.values())


def pack(states: Mapping[str, State]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors keyed ``method/kind/slot/name``, not copied, and the numbers of each method."""
    tensors = {
        f"{method}/{kind}/{slot}/{name}": tensor
        for method, state in states.items()
        for kind, slots in (("weights", state.weights), ("tensors", state.tensors))
        for slot, entries in slots.items()
        for name, tensor in entries.items()
    }
    return tensors, {method: copy.deepcopy(state.numbers) for method, state in states.items()}


def unpack(
    states: Mapping[str, State],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Fill `states` with copies, each beside the weight of its name where there is one."""
    for method, state in states.items():
        state.weights, state.tensors = {}, {}
        state.numbers = copy.deepcopy(numbers[method])
    for key, tensor in tensors.items():
        method, kind, slot, name = key.split("/", 3)
        home = getattr(states[method], kind).setdefault(slot, {})
        home[name] = tensor.to(
            weights[name].device if name in weights else tensor.device, copy=True
        )


def describe(weights: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Shape and type of each weight, as JSON."""
    return {k: [list(w.shape), str(w.dtype).removeprefix("torch.")] for k, w in weights.items()}


def check_fit(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse parameters that are not those of the saved state, with the list."""
    wrong = [f"{k} is new" for k in now if k not in saved]
    wrong += [f"{k} was {saved[k]}, is {v}" for k, v in now.items() if saved.get(k, v) != v]
    wrong += [f"{k} is gone" for k in saved if k not in now]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
        raise Refused(f"the saved state does not fit the model: {shown}")
