"""Forward weights: show a module another weight than the one it owns, while it trains.

The module gets a per-instance subclass whose property stands before the parameter. The parameter
stays registered under its own name, so that state_dict, names and `save_pretrained` do not change
(`parametrize` renames them), and recomputation under activation checkpointing sees the same
weight (`functional_call` gives wrong gradients there, without an error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from holdfast.errors import Refused

Mix = Callable[[str, Tensor], Tensor]


def install(
    weights: Mapping[str, nn.Parameter], owners: Mapping[str, tuple[nn.Module, ...]], mix: Mix
) -> Callable[[], None]:
    """Let `mix(name, w)` stand in for each of `weights` while the modules that own it train.

    Returns the function that undoes it. Raises `Refused` for a module that reads its parameters
    behind the attribute (recurrent layers), where a stand-in would be ignored.
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
            for attribute, parameter in module._parameters.items():
                if parameter is w:
                    attributes.setdefault(module, {})[attribute] = name
    originals = {module: type(module) for module in attributes}
    for module, kind in originals.items():
        properties = {a: _stand_in(a, name, mix) for a, name in attributes[module].items()}
        body = {**properties, "__module__": kind.__module__, "__reduce_ex__": _plain(kind)}
        module.__class__ = type(kind.__name__, (kind,), body)

    def remove() -> None:
        for module, kind in originals.items():
            module.__class__ = kind

    return remove


def _plain(kind: type) -> Callable[[nn.Module, Any], Any]:
    """How a mixed module copies and pickles: as what it is without mixing."""

    def reduce(module: nn.Module, protocol: Any) -> Any:
        # The old protocol names the class as a plain argument; newer ones insist on type(module).
        rebuild, (_, *rest), *state = cast(Any, object.__reduce_ex__(module, 1))
        return rebuild, (kind, *rest), *state

    return reduce


def _stand_in(attribute: str, name: str, mix: Mix) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[attribute]
        return mix(name, parameter) if module.training and parameter is not None else parameter

    return property(read)
