"""What methods remember, keyed by names, and how it becomes tensors and JSON and back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.errors import NotFinite, Refused
from holdfast.ops import distributed

if TYPE_CHECKING:
    from holdfast.engine.method import Method

SCHEMA = 1  # of saved states and checkpoints


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

    def copy(self) -> State:
        """A state of the same tensors in containers of its own."""
        made = State()
        made.take(self)
        return made

    def take(self, other: State) -> None:
        """Hold what `other` holds; nothing that is cached."""
        self.weights = {slot: dict(held) for slot, held in other.weights.items()}
        self.tensors = {slot: dict(held) for slot, held in other.tensors.items()}
        self.numbers, self.cache = copy.deepcopy(other.numbers), {}

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


def refuse_not_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """`NotFinite`, on every rank, if a tensor is not finite, naming the first such."""
    if not tensors:
        return
    here = [distributed.local(t) for t in tensors.values()]
    finite = torch.stack([t.sum().isfinite() for t in here])  # faster; finite sums tell
    if not finite.all():  # a sum may overflow
        finite = torch.stack([t.isfinite().all() for t in here])
    every = distributed.gather(finite.int().tolist(), finite.device)
    bad = [name for name, good in zip(tensors, map(all, zip(*every, strict=True)), strict=True)
           if not good]  # fmt: skip
    if bad:
        raise NotFinite(what, where=bad[0], remedy="look for rows or weights that are not")


def check_schema(body: Mapping[str, Any], what: str, where: str | None = None) -> None:
    """Refuse what another version of holdfast has written in another form."""
    found = body.get("schema")
    if found != SCHEMA:
        newer = isinstance(found, int) and found > SCHEMA
        raise Refused(f"{what} of schema {found!r}, this holdfast reads {SCHEMA}", where=where,
                      remedy="pip install --upgrade holdfast" if newer
                      else "load it with the holdfast that wrote it")  # fmt: skip


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


def ended(meta: Mapping[str, Any]) -> bool:
    """Whether a saved state is of a task that `end_task` has closed."""
    last: bool = meta.get("ended", meta["finished"][-1:] == [meta["task"]])
    return last


def saved_by(meta: Mapping[str, Any], methods: Sequence[Method]) -> bool:
    """Whether a saved state is of these methods; between tasks, but for `tunable` settings."""
    between = ended(meta)
    loose = {m.name: m.tunable if between else () for m in methods}
    ours = {m.name: m.to_dict() for m in methods}
    return _firm(meta["methods"], loose) == _firm(ours, loose)


def _firm(
    methods: Mapping[str, Mapping[str, Any]], loose: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The settings of each method that must match: all but the `loose` ones."""
    return {
        name: {k: v for k, v in settings.items() if k not in loose.get(name, ())}
        for name, settings in methods.items()
    }
