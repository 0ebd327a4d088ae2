"""What a `Bound` attaches to: a supported optimizer, and parameters by name."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import Refused
from holdfast.network.parts import named_parameters, parts

MARK = "_holdfast_bound"  # set on an optimizer while a Bound holds it
SCALING = "_step_supports_amp_scaling"  # torch's: GradScaler leaves unscaling to the optimizer


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
        overrides: Mapping[str, str] | None = None,
    ) -> Attachment:
        """`shared` is the module that tasks share (default: `default_shared`); `overrides` put
        parameters into other parts, see `holdfast.parts`."""
        named = named_parameters(model)
        common = {id(p) for p in (shared or default_shared(model) or model).parameters()}
        key_of = {n: n if id(p) in common else f"{task}/{n}" for n, p in named.items()}
        group_of = groups_by_id(optimizer, named)
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
        part_of = parts(model, overrides).names
        weights = {key_of[n]: p for n, p in named.items() if id(p) in group_of}
        return cls(
            weights=weights,
            shared={k: p for k, p in weights.items() if id(p) in common},
            part_of={key_of[n]: part_of[n] for n in named},
            group_of={k: group_of[id(p)] for k, p in weights.items()},
            owners={k: tuple(owners[id(p)]) for k, p in weights.items()},
        )


def groups_by_id(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter] | None = None
) -> dict[int, dict[str, Any]]:
    """The group of each parameter, by identity; one listed twice is refused, by its name."""
    held = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    found = dict(held)
    if len(found) != len(held):
        seen = Counter(key for key, _ in held)
        twice = [name for name, p in (named or {}).items() if seen[id(p)] > 1]
        raise Refused(
            f"the optimizer holds {len(held) - len(found)} parameters twice"
            + (f": {', '.join(twice[:5])}" if twice else ""),
            remedy="build it with recipe.param_groups(model, ...)",
        )
    return found


def default_shared(model: nn.Module) -> nn.Module | None:
    """What tasks share: the encoder below a task head, or all of a model without one (None).

    A language model's head belongs to the pre-trained model; a classifier's does not. Only the
    former has output embeddings. In a PEFT model the encoder and its adapters are shared; a head
    in `modules_to_save` is the task's own.
    """
    below = getattr(model, "get_base_model", None)
    inner = below() if callable(below) else model  # PEFT: the model that holds the adapters
    base = getattr(inner, "base_model", None)
    if not isinstance(base, nn.Module) or base is inner:
        return None
    outputs = getattr(inner, "get_output_embeddings", None)
    return base if callable(outputs) and outputs() is None else None


def unwrap(optimizer: Any) -> tuple[torch.optim.Optimizer, Any]:
    """The torch optimizer, and the Accelerate wrapper around it if there is one."""
    wrapper = None
    while not hasattr(optimizer, "register_step_pre_hook") or _wraps(optimizer):
        outer, optimizer = optimizer, getattr(optimizer, "optimizer", None)
        wrapper = outer if hasattr(outer, "step_was_skipped") else wrapper
        if optimizer is None:
            raise Refused(f"{type(outer).__name__} is no torch optimizer and wraps none")
    return optimizer, wrapper


def _wraps(optimizer: Any) -> bool:
    """Whether this is Accelerate's or Lightning's wrapper; the optimizer inside it is bound.

    Other classes with an `optimizer` (Lookahead) do work in their own step and are not unwrapped.
    """
    return hasattr(optimizer, "step_was_skipped") or any(
        kind.__name__ == "LightningOptimizer" for kind in type(optimizer).__mro__
    )


def check_served(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what is not supported, before anything is attached; docs/optimizers.md lists it."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise Refused("LBFGS runs its closure several times a step", remedy="use AdamW")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise Refused("SparseAdam takes sparse gradients only", remedy="use AdamW")
    if getattr(optimizer, MARK, False):
        raise Refused("this optimizer is bound already", remedy="call unbind() of the other first")
    if not getattr(type(optimizer).step, "hooked", False):
        raise Refused(
            f"the step() of {kind} runs no step hooks",
            remedy="derive it from torch.optim.Optimizer and call super().__init__",
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise Refused(
            f"{kind} evaluates other weights than it trains, and would move those held still",
            remedy="use AdamW and a schedule",
        )
    if "grad_scaler" in inspect.signature(type(optimizer).step).parameters:
        raise Refused(f"{kind} handles a GradScaler by itself", remedy="use AdamW(fused=True)")
    for option, why in (("maximize", "climbs penalties too"), ("differentiable", "keeps a graph")):
        if any(group.get(option) for group in optimizer.param_groups):
            raise Refused(f"{kind}({option}=True) {why}", remedy=f"leave {option} out")
    places = {p.device for group in optimizer.param_groups for p in group["params"]}
    mapped = {*getattr(model, "hf_device_map", {}).values()}
    if (many := max(len(places), len(mapped))) > 1:
        raise Refused(f"the weights lie on {many} devices", where="device_map",
                      remedy="load the model onto one")  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise Refused("sparse gradients are not served", where=name, remedy="use sparse=False")


# --- while it is bound ------------------------------------------------------------------------


def finite(optimizer: Any, norm: Tensor) -> Tensor:
    """Whether a step's gradients, of total norm `norm`, are finite, by GradScaler too: 0-dim bool.

    Also clears `found_inf`: optimizers that are not fused raise if it is set.
    """
    good, found = torch.isfinite(norm), getattr(optimizer, "found_inf", None)
    if found is not None:
        optimizer.found_inf = None
        good = good & (torch.as_tensor(found, device=norm.device) == 0)
    return good


class Held:
    """The optimizer's groups as last read, to detect changes at no cost per weight."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._read()

    def _read(self) -> None:
        self._groups = list(self._optimizer.param_groups)
        self._sizes = [len(group["params"]) for group in self._groups]

    def changed(self, weights: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]] | None:
        """The new group of each weight if the groups were replaced (after loading), else None.

        Raises `Refused` if a parameter was added or removed: methods' state would not match.
        """
        groups = self._optimizer.param_groups
        same = len(groups) == len(self._groups) and all(
            now is then and len(now["params"]) == size
            for now, then, size in zip(groups, self._groups, self._sizes, strict=True)
        )
        if same:
            return None
        by_id, ours = groups_by_id(self._optimizer), {id(w) for w in weights.values()}
        if by_id.keys() != ours:
            came, went = len(by_id.keys() - ours), len(ours - by_id.keys())
            raise Refused(
                f"{came} parameters were added to the bound optimizer and {went} removed",
                where="optimizer.param_groups",
                remedy="give the optimizer all of them before bind; requires_grad_(False) keeps "
                "one out until requires_grad_(True). Or begin_task anew",
            )
        self._read()
        return {name: by_id[id(w)] for name, w in weights.items()}


class Hooks:
    """The optimizer's step hooks: `before` runs once gradients are ready, `after` its update.

    A GradScaler is told that the optimizer undoes the scale itself, so that it calls step() even
    when gradients overflowed: otherwise it skips the step, and the skip could not be counted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._running: FrameType | None = None  # the call of torch's wrapper around step()
        self._handles = (
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        )
        self._own = {k: vars(optimizer)[k] for k in (SCALING,) if k in vars(optimizer)}
        setattr(optimizer, MARK, True)
        setattr(optimizer, SCALING, True)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        for name in (MARK, SCALING):
            delattr(self._optimizer, name)
        vars(self._optimizer).update(self._own)

    def _pre_step(self, _: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        caller = sys._getframe(1)
        if self._within(caller):
            return None  # the step() of a base class, which has hooks of its own
        self._running = caller
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._prepare()
            return None

        ran = False

        def wrapped() -> Any:
            nonlocal ran
            if ran:
                raise RuntimeError("this optimizer runs its closure more than once a step")
            ran = True
            loss = closure()
            self._prepare()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _prepare(self) -> None:
        try:
            if getattr(self._optimizer, "grad_scale", None) is not None and not self._own:
                self._check_scaled()
            self._before()
        except BaseException:
            self._running = None
            raise

    def _check_scaled(self) -> None:
        """Refuse float16 gradients, as GradScaler does when it unscales them itself."""
        held = (w for group in self._optimizer.param_groups for w in group["params"])
        if any(w.grad is not None and w.grad.dtype is torch.float16 for w in held):
            raise Refused(
                "a GradScaler does not serve float16 weights",
                remedy="keep them in float32 under autocast, or use bfloat16 without a scaler",
            )

    def _within(self, frame: FrameType | None) -> bool:
        """Whether the recorded step is still running; one that raised is not on the stack."""
        if self._running is None:
            return False
        while frame is not None and frame is not self._running:
            frame = frame.f_back
        return frame is not None

    def _post_step(self, *_: Any) -> None:
        if sys._getframe(1) is self._running:
            self._running = None
            self._after()
