"""What a resumed run takes of a saved optimizer, and what of its own: moments, options, rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.engine.bound import Bound
from holdfast.errors import Refused


def refuse_other_optimizer(told: Sequence[str], *, where: str) -> None:
    """Refuse the moments of another class, however inexact the resume: it has no use for them.

    told: what `changed` found.
    """
    if kinds := [line for line in told if line.startswith("optimizer: ")]:
        raise Refused(f"was saved with another {kinds[0]}", where=where, remedy="set it back, "
                      "or begin a new training from its weights")  # fmt: skip


def check_groups(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Refuse moments of other groups than these: torch matches them by position."""
    file = checkpoint / "optimizer.pt"
    groups = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    before = [len(group["params"]) for group in groups]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if before != now:
        raise Refused(f"its optimizer has groups of {before} parameters, not {now}",
                      where=str(checkpoint), remedy="use flat rates")  # fmt: skip


def exact_moments_(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Restore the moments that torch cast to the parameter's dtype on loading (faults N10)."""
    if not file.is_file():
        return
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state"]
    held = [w for group in optimizer.param_groups for w in group["params"]]
    for index, entries in saved.items():
        now = optimizer.state[held[index]]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and now[key].dtype != value.dtype:
                now[key] = value.to(now[key].device, copy=True)


def take_options_(
    bound: Bound,
    schedule: Any,
    ours: Sequence[Mapping[str, Any]],
    rates: Sequence[float] | None,
    plan: Mapping[str, Any],
) -> None:
    """Go on with the options of now, not with those that were loaded with the moments.

    ours, rates: the groups' options and the schedule's base rates before loading; plan: that of
    the checkpoint. A schedule goes on from where it was: where it had come to a share of the old
    rate, it goes on from that share of the new one.
    """
    groups = bound.optimizer.param_groups
    for group, options in zip(groups, ours, strict=True):
        group |= {k: v for k, v in options.items() if k not in ("params", "lr")}
    if rates is not None and hasattr(schedule, "base_lrs"):
        schedule.base_lrs = list(rates)
    if rates is not None and hasattr(schedule, "lr_lambdas"):
        for group, rate, share in zip(groups, rates, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * share(schedule.last_epoch)
    else:
        for i, (group, began) in enumerate(zip(groups, _began(bound, plan), strict=True)):
            rate = ours[i].get("initial_lr", ours[i]["lr"])
            if began and began != rate:
                group["lr"] = rate * (group["lr"] / began)
    if hasattr(schedule, "_last_lr"):
        schedule._last_lr = [group["lr"] for group in groups]  # which Trainer logs


def _began(bound: Bound, plan: Mapping[str, Any]) -> list[float | None]:
    """The rate that each group began with, by a plan; None where it does not say."""
    names = {id(w): name for name, w in bound.weights.items()}
    told: Any = plan.get("options", {}).get("lr")
    groups = bound.optimizer.param_groups
    first = [min((names.get(id(w), "") for w in g["params"]), default="") for g in groups]
    return [told.get(name) if isinstance(told, Mapping) else told for name in first]
