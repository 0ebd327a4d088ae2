"""What a `Bound` attaches to: an optimizer that can be served, and parameters by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from holdfast.errors import Refused
from holdfast.parts import named_parameters, parts
from holdfast.rates import Rates, param_groups

MARK = "_holdfast_bound"  # set on an optimizer while a Bound holds it


@dataclass(frozen=True)
class Attachment:
    """The parameters of one task's model by canonical name; those of its own head `task/name`."""

    weights: Mapping[str, nn.Parameter]  # that the optimizer holds
    shared: Mapping[str, nn.Parameter]  # those of them that all tasks share
    part_of: Mapping[str, str]  # of every parameter of the model
    group_of: Mapping[str, dict[str, Any]]  # the optimizer's group of each weight
    owners: Mapping[str, tuple[nn.Module, ...]]  # the modules that own each; several where tied

    @classmethod
    def of(
        cls,
        task: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        shared: nn.Module | None,
    ) -> Attachment:
        """`shared` is the module that tasks share (default: `default_shared`)."""
        named = named_parameters(model)
        common = {id(p) for p in (shared or default_shared(model) or model).parameters()}
        key_of = {n: n if id(p) in common else f"{task}/{n}" for n, p in named.items()}
        group_of = _groups(optimizer)
        strangers = group_of.keys() - {id(p) for p in named.values()}
        if strangers:
            raise Refused(
                f"the optimizer holds {len(strangers)} parameters that are not in the model",
                remedy="build it with recipe.param_groups(model, ...)",
            )
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module._parameters.values():
                if p is not None:
                    owners.setdefault(id(p), []).append(module)
        part_of = parts(model).names
        weights = {key_of[n]: p for n, p in named.items() if id(p) in group_of}
        return cls(
            weights=weights,
            shared={k: p for k, p in weights.items() if id(p) in common},
            part_of={key_of[n]: part_of[n] for n in named},
            group_of={k: group_of[id(p)] for k, p in weights.items()},
            owners={k: tuple(owners[id(p)]) for k, p in weights.items()},
        )


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The group of each parameter, by identity; one that stands twice is refused."""
    held = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    found = dict(held)
    if len(found) != len(held):
        raise Refused(
            f"the optimizer holds {len(held) - len(found)} parameters twice",
            remedy="build it with recipe.param_groups(model, ...)",
        )
    return found


def regroup_(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    rates: Rates,
    scheduler: Any = None,
) -> dict[str, dict[str, Any]]:
    """Group the optimizer's parameters by other rates, and return the new group of each weight.

    The base rate and all other options stay, as does the optimizer's state. Where a scheduler has
    set `initial_lr`, it is rewritten, with the scheduler's `base_lrs`, so that the schedule goes
    on. Raises `Refused` for groups that `param_groups` did not make, and for rates that would
    freeze or free a parameter.
    """
    before = optimizer.param_groups
    if any("base_lr" not in group for group in before):
        raise Refused("the optimizer's groups have no base rate", where="set_rates",
                      remedy="build it with recipe.param_groups(model, ...)")  # fmt: skip
    decay = max(group["weight_decay"] for group in before)
    after = param_groups(model, rates, lr=before[0]["base_lr"], weight_decay=decay)
    if {id(p) for g in after for p in g["params"]} != _groups(optimizer).keys():
        raise Refused("other rates may not freeze or free a parameter", where="set_rates")
    scheduled = "initial_lr" in before[0]
    factor = before[0]["lr"] / before[0]["initial_lr"] if scheduled else 1.0
    for group in after:
        if scheduled:
            group["initial_lr"] = group["lr"]
        group["lr"] *= factor
        for key, value in before[0].items():
            group.setdefault(key, value)
    optimizer.param_groups[:] = after
    if scheduler is not None:
        scheduler.base_lrs = [group["initial_lr"] for group in after]
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = [scheduler.lr_lambdas[0]] * len(after)
        scheduler._last_lr = [group["lr"] for group in after]
    by_id = _groups(optimizer)
    return {name: by_id[id(w)] for name, w in weights.items()}


def default_shared(model: nn.Module) -> nn.Module | None:
    """What tasks share: the encoder below a task head, or all of a model without one (None).

    A language model's head belongs to the pre-trained model; a classifier's does not. The two
    are told apart by whether the model names output embeddings.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return None
    outputs = getattr(model, "get_output_embeddings", None)
    return base if callable(outputs) and outputs() is None else None


def unwrap(optimizer: Any) -> tuple[torch.optim.Optimizer, Any]:
    """The torch optimizer, and the Accelerate wrapper around it if there is one."""
    wrapper = None
    while not hasattr(optimizer, "register_step_pre_hook") or hasattr(
        optimizer, "step_was_skipped"
    ):
        wrapper, optimizer = optimizer, getattr(optimizer, "optimizer", None)
        if optimizer is None:
            raise Refused(f"{type(wrapper).__name__} is no torch optimizer and wraps none")
    return optimizer, wrapper


def check_served(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what cannot be served, before anything is attached."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise Refused("LBFGS runs its closure several times a step", remedy="use AdamW")
    if getattr(optimizer, MARK, False):
        raise Refused("this optimizer is bound already", remedy="call unbind() of the other first")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise Refused("sparse gradients are not served", where=name, remedy="use sparse=False")
