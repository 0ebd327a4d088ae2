"""Squared gradients of single examples from one backward pass per batch, layer by layer.

With x the input and δ the output gradient of a layer, both of shape (N, T, ·) for N examples of T
positions, the gradient of example n is

    linear      G_n = Σ_t δ_nt x_ntᵀ        bias  Σ_t δ_nt
    layer norm  G_n = Σ_t δ_nt ⊙ x̂_nt       bias  Σ_t δ_nt
    embedding   G_n[i] = Σ_{t: x_nt = i} δ_nt

and Σ_n G_n² is added up. The slow reference, one backward pass per row, is in `importance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import Refused

Call = tuple[nn.Module, Tensor, Tensor]  # a layer, its input, its output


class Layers:
    """The layers that own a set of weights, each of a kind whose equation is known."""

    def __init__(self, names: Mapping[nn.Module, Mapping[str, str]]) -> None:
        self.names = names  # layer -> its attribute ("weight", "bias") -> the weight's name
        self._calls: list[Call] = []

    @classmethod
    def owning(
        cls, weights: Mapping[str, nn.Parameter], owners: Mapping[str, tuple[nn.Module, ...]]
    ) -> Layers | None:
        """The layers of `weights`; None if one is tied or its layer's kind is not known here."""
        names: dict[nn.Module, dict[str, str]] = {}
        for name, w in weights.items():
            if len(owners[name]) != 1 or _equation(owners[name][0]) is None:
                return None
            layer = owners[name][0]
            attribute = next((a for a, p in layer._parameters.items() if p is w), None)
            if attribute is None:
                raise Refused("was replaced in its module since the task began", where=name,
                              remedy="write into it, as load_state_dict does, or begin the task "
                              "anew")  # fmt: skip
            names.setdefault(layer, {})[attribute] = name
        return cls(names)

    def run(self, forward: Callable[[], Any], size: int) -> tuple[Any, list[Call] | None]:
        """`forward()`, and what each layer saw of its `size` examples.

        None in place of the latter if a layer was called twice or mixed its examples.
        """
        calls: list[Call] = []

        def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if len(output) == 1 < size:
                output = output.expand(size, *output.shape[1:])  # positions, shared by the batch
            output = output.clone() if output.requires_grad else output.detach().requires_grad_()
            calls.append((layer, inputs[0].detach(), output))
            return output.view_as(output)  # later code may change it in place

        handles = [layer.register_forward_hook(see) for layer in self.names]
        try:
            result = forward()
        finally:
            for handle in handles:
                handle.remove()
        once = len({layer for layer, *_ in calls}) == len(calls)
        apart = all(len(y) == size and len(x) in (1, size) for _, x, y in calls)
        return result, calls if once and apart else None

    def add_squares_(
        self, total: Mapping[str, Tensor], objective: Tensor, calls: list[Call], *, keep: bool
    ) -> None:
        """Add Σ_n (∂ objective_n / ∂w)² to `total`; the objective is a sum over examples."""
        outputs = [y for *_, y in calls]
        grads = torch.autograd.grad(objective, outputs, retain_graph=keep, allow_unused=True)
        for (layer, x, _), delta in zip(calls, grads, strict=True):
            if delta is not None:
                equation = _equation(layer)
                assert equation is not None
                mine = {a: total[name] for a, name in self.names[layer].items()}
                equation(layer, x, delta.to(next(iter(mine.values())).dtype), mine)


def _linear(layer: nn.Module, x: Tensor, delta: Tensor, total: dict[str, Tensor]) -> None:
    delta, x = _positions(delta), _positions(x.to(delta.dtype))
    if "weight" in total:
        for d, a in zip(delta, x, strict=True):  # one example's matrix at a time stays in cache
            g = d.T @ a
            total["weight"].addcmul_(g, g)
    _bias(delta, total)


def _conv1d(layer: nn.Module, x: Tensor, delta: Tensor, total: dict[str, Tensor]) -> None:
    flipped = {a: t.T if a == "weight" else t for a, t in total.items()}
    _linear(layer, x, delta, flipped)


def _layer_norm(layer: Any, x: Tensor, delta: Tensor, total: dict[str, Tensor]) -> None:
    normal = nn.functional.layer_norm(x.to(delta.dtype), layer.normalized_shape, eps=layer.eps)
    if "weight" in total:
        total["weight"].add_(_positions(delta * normal).sum(1).square().sum(0))
    _bias(_positions(delta), total)


def _embedding(layer: Any, x: Tensor, delta: Tensor, total: dict[str, Tensor]) -> None:
    delta = _positions(delta)
    ids = x.expand(len(delta), *x.shape[1:]).reshape(len(delta), -1)
    example = torch.arange(len(ids), device=ids.device)[:, None]
    pairs, place = torch.unique(example * layer.num_embeddings + ids, return_inverse=True)
    sums = delta.new_zeros(len(pairs), delta.shape[-1])
    sums.index_add_(0, place.flatten(), delta.flatten(0, 1))
    rows = pairs % layer.num_embeddings
    if layer.padding_idx is not None:
        sums[rows == layer.padding_idx] = 0  # torch gives padding no gradient
    total["weight"].index_add_(0, rows, sums.square_())


def _bias(delta: Tensor, total: dict[str, Tensor]) -> None:
    if "bias" in total:
        total["bias"].add_(delta.sum(1).square().sum(0))


def _positions(x: Tensor) -> Tensor:
    """(N, …, D) as (N, T, D)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _equation(layer: nn.Module) -> Callable[..., None] | None:
    # A subclass may compute something else, so the class name decides; mixing keeps that name.
    kind = type(layer)
    if kind.__name__ == "Conv1D" and not isinstance(layer, nn.Conv1d):
        return _conv1d
    known = {"Linear": _linear, "LayerNorm": _layer_norm, "Embedding": _embedding}
    base = getattr(nn, kind.__name__, None)
    if kind.__name__ not in known or base is None or not isinstance(layer, base):
        return None
    if kind is not base and "forward" in kind.__dict__:
        return None
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return None
    if isinstance(layer, nn.Embedding) and (layer.max_norm or layer.scale_grad_by_freq):
        return None
    return known[kind.__name__]
