"""Forward weights: give a module another weight than the one it owns, while it trains.

The module gets a per-instance subclass whose property shadows the parameter. The parameter
stays registered under its own name, so that state_dict, names and `save_pretrained` do not change
(`parametrize` renames them), and recomputation under activation checkpointing sees the same
weight (`functional_call` gives wrong gradients there, without an error).

Under `torch.compile` the stand-in is one opaque operator in the graph, which looks up its value at
run time: the graph depends neither on the stage nor on the step's noise, and is compiled once.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from holdfast.errors import Refused

Mix = Callable[[str, Tensor], Tensor]

_SHOWN: dict[str, Callable[[Tensor], Tensor]] = {}  # the stand-ins by key, while installed
_NEXT = itertools.count()
# Each module's plain class, its subclass and the key of each attribute: kept for the next task,
# because compiled code is guarded by the class.
_KINDS: weakref.WeakKeyDictionary[nn.Module, tuple[type, type, dict[str, str]]]
_KINDS = weakref.WeakKeyDictionary()


def install(
    weights: Mapping[str, nn.Parameter], owners: Mapping[str, tuple[nn.Module, ...]], mix: Mix
) -> Callable[[], None]:
    """Let `mix(name, w)` stand in for each of `weights` while the modules that own it train.

    Returns the function that undoes it. Raises `Refused` for a module that bypasses the attribute
    to read its parameters (recurrent layers), where a stand-in would be ignored, and where another
    stand-in is installed: they could be undone in reverse order only.
    """
    attributes: dict[nn.Module, dict[str, str]] = {}
    for name, w in weights.items():
        for module in owners[name]:
            if isinstance(module, nn.RNNBase):
                raise Refused(
                    f"the weights of {type(module).__name__} cannot be mixed",
                    where=name,
                    remedy="leave it out of the method's modules",
                )
            if module in _KINDS and type(module) is _KINDS[module][1]:
                raise Refused("another Bound mixes it", where=name, remedy="unbind that one first")
            for attribute, parameter in module._parameters.items():
                if parameter is w:
                    attributes.setdefault(module, {})[attribute] = name
    originals = {module: type(module) for module in attributes}
    keys: list[str] = []
    for module, names in attributes.items():
        known = _KINDS.get(module)
        if known is None or known[0] is not type(module) or known[2].keys() != names.keys():
            known = _KINDS[module] = _subclass(type(module), list(names))
        for attribute, name in names.items():
            key = known[2][attribute]
            _SHOWN[key] = functools.partial(mix, name)
            keys.append(key)
        module.__class__ = known[1]

    def remove() -> None:
        for module, kind in originals.items():
            module.__class__ = kind
        for key in keys:
            _SHOWN.pop(key, None)

    return remove


def _subclass(kind: type, attributes: list[str]) -> tuple[type, type, dict[str, str]]:
    """`kind`, its subclass with a property for each attribute, and the properties' keys."""
    keys = {attribute: str(next(_NEXT)) for attribute in attributes}
    body = {attribute: _stand_in(attribute, key) for attribute, key in keys.items()}
    more = {"__module__": kind.__module__, "__reduce_ex__": _plain(kind)}
    return kind, type(kind.__name__, (kind,), body | more), keys


def _plain(kind: type) -> Callable[[nn.Module, Any], Any]:
    """`__reduce_ex__` of a mixed module: it copies and pickles as its plain class."""

    def reduce(module: nn.Module, protocol: Any) -> Any:
        # The old protocol names the class as a plain argument; newer ones insist on type(module).
        rebuild, (_, *rest), *state = cast(Any, object.__reduce_ex__(module, 1))
        return rebuild, (kind, *rest), *state

    return reduce


def _stand_in(attribute: str, key: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[attribute]
        # What is switched off has no gradient to mix, and `requires_grad_()` has to reach it.
        if not module.training or parameter is None or not parameter.requires_grad:
            return parameter
        if torch.compiler.is_compiling():
            return cast(Tensor, _shown(parameter, key))
        return _SHOWN[key](parameter)

    return property(read)


# --- in a compiled graph ------------------------------------------------------------------------


def _shown_now(w: Tensor, key: str) -> Tensor:
    """The stand-in of `key` for `w`, of its shape and type."""
    return _apart(_SHOWN[key](w), w)


def _pulled_back(w: Tensor, grad: Tensor, key: str) -> Tensor:
    """The gradient of `w`, given that of its stand-in; both shaped like `w`."""
    # Operators run below autograd: re-enable it, so that methods need no backward formula.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        leaf = w.detach().requires_grad_()
        return _apart(torch.autograd.grad(_SHOWN[key](leaf), leaf, grad)[0], grad)


def _apart(result: Tensor, given: Tensor) -> Tensor:
    """`result` in memory of its own: an operator may not return its argument."""
    shared = result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return result.clone() if shared else result


def _like(w: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(w)


def _remember(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.key = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _pulled(ctx.saved_tensors[0], grad, ctx.key), None


# Recorded CUDA graphs would replay the stand-in of the step that was recorded.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
_shown = torch.library.custom_op("holdfast::shown", _shown_now, mutates_args=(), tags=_UNSAFE)
_pulled = torch.library.custom_op(
    "holdfast::pulled_back", _pulled_back, mutates_args=(), tags=_UNSAFE
)
_shown.register_fake(_like)
_pulled.register_fake(_like)
_shown.register_autograd(_backward, setup_context=_remember)
