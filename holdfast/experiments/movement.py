"""How far a task took the network from where it began, measured once the task is learned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdfast.engine.peft import folded
from holdfast.experiments.serving import described
from holdfast.network.parts import named_parameters, parts
from holdfast.training.manifest import MANIFEST

if TYPE_CHECKING:
    from holdfast.experiments.learner import Learner


@torch.no_grad()
def movement(learner: Learner, index: int) -> dict[str, Any]:
    """How far a task took each part that tasks share, and which entries it changed.

    parts: ‖w − w₀‖ / ‖w₀‖ of each part, with w₀ the weights as the task began; None where those
    are 0. For a recipe whose methods choose entries (`covered` in their state), of these entries:
    changed, the share with w ≠ w₀; overlap, |A ∩ B| / |A ∪ B| of those that this task changed and
    those that the task before did, where there is one. Weights before are read from the disk,
    so that nothing is held while training; {} where they are not kept.
    """
    before, model = _after(learner, index), learner.models[index]
    if before is None:
        return {}
    part_of = parts(model, learner.recipe.parts).names
    shared = {id(p) for p in learner.kind.shared(model).parameters()}
    with folded(model):
        now = {n: w for n, w in named_parameters(model).items()
               if id(w) in shared and n in before and w.shape == before[n].shape}  # fmt: skip
        sums: dict[str, list[float]] = {}
        for name, w in now.items():
            start = before[name].to(w.device, torch.float32)
            for i, values in enumerate((w.float() - start, start)):
                total = sums.setdefault(part_of[name], [0.0, 0.0])
                total[i] += float(values.square().sum(dtype=torch.float64))
        found: dict[str, Any] = {
            "parts": {p: math.sqrt(a / b) if b else None for p, (a, b) in sums.items()}
        }
        chosen = now.keys() & _chosen(learner)
        if chosen:
            a = {n: now[n].cpu() != before[n] for n in chosen}
            found["changed"] = _share(a.values())
            if index and (first := _after(learner, index - 1)):
                b = {n: before[n] != first[n] for n in chosen}
                found["overlap"] = _share([a[n] & b[n] for n in a], [a[n] | b[n] for n in a])
    return found


def _share(some: Iterable[Tensor], of: Iterable[Tensor] | None = None) -> float | None:
    """How many entries are True, as a share of those that are in `of` (default: of all)."""
    some = list(some)
    total = sum(m.numel() for m in some) if of is None else sum(int(m.sum()) for m in of)
    return sum(int(m.sum()) for m in some) / total if total else None


def _chosen(learner: Learner) -> set[str]:
    """The names among whose entries a method of the recipe chooses."""
    assert learner.bound is not None
    return {n for s in learner.bound.states.values() for n in s.numbers.get("covered", ())}


def _after(learner: Learner, tasks: int) -> dict[str, nn.Parameter] | None:
    """The weights after so many tasks, by name; None where no folder has them."""
    kind = learner.kind
    if tasks == 0:
        net = kind.load_model(learner.source, learner.tasks[0], seed=learner.seed)
        return named_parameters(net)
    if not ((home := learner.home(tasks - 1)) / MANIFEST).is_file():
        return None
    return named_parameters(kind.open_saved(str(home), described(home)["tasks"][-1]))
