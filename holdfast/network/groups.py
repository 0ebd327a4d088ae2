"""Optimizer parameter groups from the rates of parts, and regrouping while training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from holdfast.errors import Refused
from holdfast.network.parts import Parts, canonical, named_parameters
from holdfast.network.parts import parts as parts_of
from holdfast.network.rates import Rates, number
from holdfast.network.stacks import is_norm

# Of a module: names of its parameters that rates froze. A parameter would lose it when copied.
FROZEN = "_frozen_by_rates"
# Keys that follow from the rates; all others are options that the parameters keep.
PLACE = ("params", "param_names", "part_names", "multiplier", "lr", "initial_lr")


def param_groups(
    model: nn.Module,
    rates: Rates,
    *,
    lr: float,
    weight_decay: float = 0.0,
    parts: Parts | None = None,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer, one for each distinct (rate, decay), of rates that come in
    pieces for each (part, decay).

    Each has `params`, `param_names` (canonical, same order), `lr`, `weight_decay`, `part_names`,
    `multiplier` and `base_lr`, the rate without the multiplier.
    Biases and the vectors of norms are not decayed; `no_decay`, globs on canonical names, replaces
    that rule. A parameter whose multiplier is 0, or that does not require a gradient, is in no
    group, so that neither momentum nor decay moves it. A multiplier of 0 also turns
    `requires_grad` off, until this is called with rates that train the parameter: wrap the model
    in DistributedDataParallel afterwards, as it fixes which gradients to expect.
    """
    lr, weight_decay = number(lr, "lr"), number(weight_decay, "weight_decay")
    if isinstance(no_decay, str):
        raise Refused(f"no_decay is one text, {no_decay!r}", remedy=f"write [{no_decay!r}]")
    parameters = named_parameters(model)
    parts = parts_of(model) if parts is None else parts
    multiplier = rates.of(parts)
    spared, able = _spared(model, parameters, no_decay), learning(model)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        part = parts.names.get(name)
        if part is None:
            raise Refused("is in no part", where=name, remedy="make the parts from this model")
        if multiplier[part] == 0 or id(parameter) not in able:
            continue
        decay, times = 0.0 if name in spared else weight_decay, multiplier[part]
        fresh = {"params": [], "lr": lr * times, "weight_decay": decay, "base_lr": lr,
                 "multiplier": times}  # fmt: skip
        alone = part if rates.pieces else None  # parts may differ later
        group = groups.setdefault((alone, times, decay), fresh)
        group["params"].append(parameter)
        group.setdefault("param_names", []).append(name)
        group.setdefault("part_names", {})[part] = None
    if not groups:
        raise Refused(
            "no parameter is left to train",
            where=rates.name,
            remedy="give a part a multiplier above 0, or let a parameter require its gradient",
        )
    _freeze_(model, able - {id(p) for group in groups.values() for p in group["params"]})
    return _in_order(groups.values(), parts)


def learning(model: nn.Module) -> set[int]:
    """Ids of the parameters that require a gradient, or would if no rates had frozen them."""
    return {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad or name in getattr(module, FROZEN, ())
    }


def _freeze_(model: nn.Module, ids: set[int]) -> None:
    """Turn off the gradients of these parameters, and on again those of others frozen earlier."""
    for module in model.modules():
        frozen = set(getattr(module, FROZEN, ()))
        for name, p in module.named_parameters(recurse=False):
            if id(p) in ids:
                p.requires_grad_(False).grad = None
                frozen.add(name)
            elif name in frozen:
                p.requires_grad_(True)
                frozen.remove(name)
        if frozen or hasattr(module, FROZEN):
            setattr(module, FROZEN, frozen)


def follows_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `param_groups` made the optimizer's groups."""
    return all("multiplier" in group for group in optimizer.param_groups)


def _in_order(groups: Iterable[dict[str, Any]], parts: Parts) -> list[dict[str, Any]]:
    for group in groups:
        group["part_names"] = tuple(part for part in parts.order if part in group["part_names"])
    return list(groups)


def _spared(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], globs: Sequence[str] | None
) -> set[str]:
    """Names of the parameters without weight decay."""
    if globs is not None:
        exact = {name for name in globs if name in parameters}
        for glob in (globs := [g for g in globs if g not in exact]):
            if not any(fnmatchcase(name, glob) for name in parameters):
                raise Refused(f"no parameter matches {glob!r}", where="no_decay")
        return exact | {n for n in parameters if any(fnmatchcase(n, glob) for glob in globs)}
    # Direct parameters only: a block with norm in its name may hold matrices further down.
    norms = {
        canonical(f"{path}.{name}" if path else name)
        for path, module in model.named_modules()
        if is_norm(module)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim <= 1
    }
    return norms | {name for name in parameters if _is_bias(name)}


def _is_bias(name: str) -> bool:
    """`…bias` and a recurrent module's `bias_ih_l0`, not T5's relative_attention_bias.weight."""
    own = name.rpartition(".")[2]
    return own.endswith("bias") or own.startswith(("bias_ih_l", "bias_hh_l"))


# --- other rates while it trains ----------------------------------------------------------------


def factors(
    groups: Sequence[Mapping[str, Any]], rates: Rates, now: Rates, parts: Parts
) -> list[float]:
    """For each group the multiplier of its part in `now` / that in `rates`, which it was made by.

    Refused: groups that `param_groups` did not make of rates that come in pieces.
    """
    first, later, found = rates.of(parts), now.of(parts), []
    for group in groups:
        each = {later[part] / first[part] for part in group.get("part_names", ())}
        if len(each) != 1:
            raise Refused("rates that come in pieces need a group for each part",
                          where="recipe.rates",
                          remedy="build it with recipe.param_groups(model, ...)")  # fmt: skip
        found.append(each.pop())
    return found


def regroup_(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    rates: Rates,
    scheduler: Any = None,
    parts: Parts | None = None,
) -> None:
    """Group the optimizer's parameters by other rates, and let a scheduler continue with them.

    The base rate, weight decay and all other options stay, as does the optimizer's state. Raises
    `Refused`, and changes nothing, for groups that `param_groups` did not make, for rates that
    would freeze or unfreeze a parameter, and for a schedule that differs between groups.
    """
    before = optimizer.param_groups
    if not follows_rates(optimizer):
        raise Refused("the optimizer's groups have no base rate", where="set_rates",
                      remedy="build it with recipe.param_groups(model, ...)")  # fmt: skip
    parts = parts_of(model) if parts is None else parts
    multiplier = {name: rates.of(parts)[part] for name, part in parts.names.items()}
    held, able = {id(p) for group in before for p in group["params"]}, learning(model)
    for name, p in named_parameters(model).items():
        if (id(p) in held) is not (multiplier[name] != 0 and id(p) in able):
            raise Refused("other rates may not freeze or free a parameter", where="set_rates")
    schedulers = _every(scheduler)
    _check_schedule(schedulers, before)
    # The schedule's current factor; a minimum rate may keep it larger for some groups.
    rates_of = [(group["lr"], group["base_lr"] * group["multiplier"]) for group in before]
    share = min((now / first for now, first in rates_of if first), default=1.0)
    after: dict[Any, dict[str, Any]] = {}
    for group in before:
        options = {k: v for k, v in group.items() if k not in PLACE}
        for name, p in zip(group["param_names"], group["params"], strict=True):
            times = multiplier[name]
            rate = group["base_lr"] * times
            place = {"params": [], "param_names": [], "part_names": {}, "multiplier": times}
            place |= {"lr": rate * share, **({"initial_lr": rate} if "initial_lr" in group else {})}
            new = after.setdefault((times, repr(sorted(options.items()))), place | options)
            new["params"].append(p)
            new["param_names"].append(name)
            new["part_names"][parts.names[name]] = None
    before[:] = _in_order(after.values(), parts)
    for each in schedulers:
        for name in ("lr_lambdas", "min_lrs"):
            if values := getattr(each, name, None):
                setattr(each, name, values[:1] * len(before))
        if hasattr(each, "base_lrs"):
            each.base_lrs = [group["initial_lr"] for group in before]
        each._last_lr = [group["lr"] for group in before]


def _every(scheduler: Any) -> list[Any]:
    """A scheduler without Accelerate's wrapper, and those that it runs (SequentialLR)."""
    if scheduler is None:
        return []
    scheduler = getattr(scheduler, "scheduler", scheduler)
    return [scheduler, *(s for each in getattr(scheduler, "_schedulers", ()) for s in _every(each))]


def _check_schedule(schedulers: Sequence[Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse schedules with a different rate or function for each group."""
    for each in schedulers:
        own = hasattr(each, "max_lrs") or any("max_lr" in group for group in groups)
        for name in ("lr_lambdas", "min_lrs"):
            own |= any(value != getattr(each, name)[0] for value in getattr(each, name, ()))
        if own:
            raise Refused(f"{type(each).__name__} holds rates of its own for each group",
                          where="set_rates", remedy="use LambdaLR with one function")  # fmt: skip
