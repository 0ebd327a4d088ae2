"""Linear layers in any form: their weights as one matrix, and their inputs as rows.

A convolution is a linear layer on its unfolded inputs, a norm one on (x̂_i, 1) for each feature i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.errors import Refused
from holdfast.ops import distributed


@dataclass(frozen=True)
class Layer:
    """A layer y = W x + b, and its weights as one matrix (outputs, inputs + 1)."""

    module: nn.Module
    weight: str
    bias: str | None

    @property
    def lora(self) -> bool:
        """Whether it is one of a pair of LoRA factors in PEFT, which are merged together."""
        return ".lora_A." in self.weight or ".lora_B." in self.weight

    @property
    def transposed(self) -> bool:
        return conv1d(self.module)

    @property
    def convolution(self) -> bool:
        return isinstance(self.module, nn.Conv1d | nn.Conv2d)

    @property
    def alike(self) -> object:
        """A key: layers that share it make the same rows from the same tensor."""
        return self.weight if self.convolution else self.d

    @property
    def has_one(self) -> bool:
        """Whether the column of the appended 1, the bias, can change."""
        return self.bias is not None

    @property
    def d(self) -> int:
        w = cast(Tensor, self.module.weight)
        return (w.shape[0] if self.transposed else math.prod(w.shape[1:])) + 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def require_rows(self, weights: Mapping[str, Tensor]) -> None:
        """`Refused` unless this rank holds whole rows of `matrix`, so that it can work alone."""
        w = weights[self.weight]
        shared = distributed.sharded(w) and distributed.local(w).shape != w.shape
        if shared and (self.transposed or distributed.local(w).shape[1:] != w.shape[1:]):
            raise Refused("the inputs of an output lie on several ranks", where=self.weight,
                          remedy="shard weights by their outputs, or replicate them")  # fmt: skip

    def matrix(self, weights: Mapping[str, Tensor]) -> Tensor:
        """W and b from `weights`, as (outputs, inputs + 1); a missing bias is 0."""
        w = distributed.full(weights[self.weight]).float()
        w = w.T if self.transposed else w.flatten(1)
        if self.bias is None:
            return functional.pad(w, (0, 1))
        return torch.cat([w, distributed.full(weights[self.bias]).float()[:, None]], 1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of `matrix`: weights by name, in their shapes."""
        w, b = matrix[:, :-1], matrix[:, -1]
        shape = tuple(cast(Tensor, self.module.weight).shape)[1:]  # also for this rank's rows alone
        found = {self.weight: w.T if self.transposed else w.reshape(len(w), *shape)}
        return found if self.bias is None else {**found, self.bias: b}

    def inputs(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The layer's inputs, one row per position, with a 1 appended: (n, inputs + 1).

        mask (rows, positions) is False for padding.
        """
        if self.convolution:
            x = _unfolded(cast(Any, self.module), x.detach().float())
            if mask is not None and isinstance(self.module, nn.Conv1d) and len(x) == mask.numel():
                x = x[mask.flatten()]
        else:
            x = _present(x.detach(), mask).float()
        return functional.pad(x, (0, 1), value=1.0)


class Norm(Layer):
    """A norm y_i = g_i x̂_i + b_i: its matrix is the row (g_1, b_1, g_2, b_2, …)."""

    @property
    def alike(self) -> object:
        return self.weight

    @property
    def has_one(self) -> bool:
        return True  # a norm without bias has no appended 1

    @property
    def d(self) -> int:
        return cast(Tensor, self.module.weight).numel() * len(self.names)

    def matrix(self, weights: Mapping[str, Tensor]) -> Tensor:
        columns = [distributed.full(weights[n]).float() for n in self.names]
        return torch.stack(columns, 1).view(1, -1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, matrix.view(-1, len(self.names)).unbind(1), strict=True))

    def inputs(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x, eps = _present(x.detach(), mask).float(), _eps(self.module)
        rms = not isinstance(self.module, nn.LayerNorm)
        normed = (functional.rms_norm if rms else functional.layer_norm)(x, x.shape[-1:], eps=eps)
        if self.bias is None:
            return normed
        return torch.stack([normed, torch.ones_like(normed)], 2).flatten(1)


def _present(x: Tensor, mask: Tensor | None) -> Tensor:
    """(…, d) as (n, d), without padding."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    x = x.reshape(-1, x.shape[-1])
    return x[mask.flatten()] if mask is not None and len(x) == mask.numel() else x


def _eps(module: Any) -> float:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return torch.finfo(torch.float32).eps if eps is None else float(eps)


def _unfolded(layer: Any, x: Tensor) -> Tensor:
    """(rows, channels, …) as (rows · positions, channels · kernel)."""
    two = isinstance(layer, nn.Conv2d)
    padding: Any = 0
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    else:
        padding = layer.padding if two else (0, *layer.padding)
    x = x if two else x[:, :, None]
    one: tuple[int, ...] = () if two else (1,)
    return functional.unfold(
        x,
        (*one, *layer.kernel_size),
        dilation=(*one, *layer.dilation),
        padding=padding,
        stride=(*one, *layer.stride),
    ).transpose(1, 2).flatten(0, 1)  # fmt: skip


# --- finding them ---------------------------------------------------------------------------------

Owners = Mapping[str, tuple[nn.Module, ...]]


def layers_of(
    weights: Mapping[str, nn.Parameter], owners: Owners
) -> tuple[list[Layer], dict[str, nn.Embedding]]:
    """The linear layers of some weights, and their embeddings by the weight's name.

    A weight tied between an embedding and a layer counts as the embedding's. Grouped
    convolutions and weights of other modules are in neither.
    """
    linear: list[Layer] = []
    embeddings: dict[str, nn.Embedding] = {}
    for name, own in _by_weight(weights, owners).items():
        embedding = next((m for m in own if isinstance(m, nn.Embedding)), None)
        layer = next((m for m in own if _linear(m)), None)
        if embedding is not None:
            embeddings[name] = embedding
        elif layer is not None:
            linear.append(Layer(layer, name, _bias(layer, weights)))
    return linear, embeddings


def norms_of(weights: Mapping[str, nn.Parameter], owners: Owners) -> list[Norm]:
    """The norms over the last dimension that own some weights: LayerNorm, and RMSNorm by name."""
    return [
        Norm(own[0], name, _bias(own[0], weights))
        for name, own in _by_weight(weights, owners).items()
        if weights[name].ndim == 1
        and (isinstance(own[0], nn.LayerNorm) or type(own[0]).__name__.endswith(RMS))
    ]


RMS = ("RMSNorm", "T5LayerNorm")


def _by_weight(weights: Mapping[str, nn.Parameter], owners: Owners) -> dict[str, list[nn.Module]]:
    """For each name the modules that hold it as their `weight`.

    Not by the attribute: while weights are mixed, it is a stand-in.
    """
    found = {n: [m for m in owners[n] if m._parameters.get("weight") is w]
             for n, w in weights.items()}  # fmt: skip
    return {name: modules for name, modules in found.items() if modules}


def _bias(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> str | None:
    own = module._parameters.get("bias")
    return next((n for n, p in weights.items() if p is own), None)


def _linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear) or conv1d(module)


def conv1d(module: nn.Module) -> bool:
    """Whether a module is Transformers' Conv1D, which keeps its weight as (inputs, outputs)."""
    return any(k.__name__ == "Conv1D" for k in type(module).__mro__)


def linear(w: Tensor, owners: tuple[nn.Module, ...]) -> bool:
    """Whether a parameter is the matrix of linear layers, and of no embedding tied to them."""
    return w.ndim == 2 and all(isinstance(m, nn.Linear) or conv1d(m) for m in owners)
