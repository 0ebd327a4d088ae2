"""Weights that the forward pass sees in place of the trained ones: DPS Mix, Mixout, extrapolation.

Mixing swaps weights for those of an anchor W* by chance:

    W̃ = W* + N (W − W*) / (1 − drop),   N ~ Bernoulli(1 − drop),   so that E[W̃] = W

What is drawn is drawn once a step, so that accumulation equals a large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.engine.method import View
from holdfast.errors import Refused
from holdfast.methods.common.importance import wide
from holdfast.network.layers import conv1d
from holdfast.ops.distributed import local

Noise = Literal["column", "weight"]


def mixed(
    w: Tensor, base: Tensor, keep: Tensor | None, drop: float, *, gain: float | None = 1.0
) -> Tensor:
    """W̃, whose gradient with respect to W is taken as gain · N · ∂L/∂W̃.

    `keep` is N, (rows, columns), (1, columns) or (rows, 1); None if W = W* wherever N = 0. The
    derivative is that of gain 1 / (1 − drop); with None the caller multiplies by N later, once for
    all micro-batches.
    """
    found: Tensor = _Mix.apply(w, base, keep, drop, gain)
    return found


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, base: Tensor, keep: Tensor | None, drop: float, gain: float | None
    ) -> Tensor:
        ctx.save_for_backward(*[keep] if keep is not None and gain is not None else [])
        ctx.gain = gain
        now, scale = w.to(base.dtype), 1 / (1 - drop)
        if keep is None:
            return torch.lerp(base, now, scale).to(w.dtype)
        share = keep.view(torch.uint8).to(base.dtype).mul_(scale)  # of W in W̃; 0 gives W* exactly
        return torch.lerp(base, now, share).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        for keep in ctx.saved_tensors:
            grad = keep.view(torch.uint8).to(grad.dtype) * grad
            grad = grad if ctx.gain == 1 else grad.mul_(ctx.gain)
        return grad, None, None, None, None


@torch.inference_mode(False)  # autograd cannot save inference tensors
def draw(view: View, name: str, drop: float, noise: Noise) -> Tensor:
    """N ~ Bernoulli(1 − drop) for a weight, True where the trained one is used."""
    return uniform(view, name, noise_shape(view, name, noise)) >= drop


def uniform(view: View, name: str, shape: Iterable[int]) -> Tensor:
    """U(0, 1) of `shape` on the device of a weight, equal on all ranks."""
    device = local(view.weights[name]).device
    return torch.rand([*shape], generator=generator_on(view, device), device=device)


def generator_on(view: View, device: torch.device) -> torch.Generator:
    """The method's generator; on an accelerator one seeded by it, once a step."""
    if device.type == "cpu":
        return view.generator
    if "draws" not in view.scratch:
        seed = int(torch.randint(2**62, (), generator=view.generator))
        view.scratch["draws"] = torch.Generator(device).manual_seed(seed)
    made: torch.Generator = view.scratch["draws"]
    return made


def noise_shape(view: View, name: str, noise: Noise) -> list[int]:
    """The weight's own shape, or one entry for each of a layer's inputs."""
    w = view.weights[name]
    if noise == "weight" or w.ndim < 2:
        return list(w.shape)
    axis = 0 if all(map(conv1d, view.modules[name])) else 1  # the axis of a layer's inputs
    return [w.shape[axis] if i == axis else 1 for i in range(w.ndim)]


def drawn(
    view: View, names: Iterable[str], make: Callable[[View, str], Tensor]
) -> dict[str, Tensor]:
    """What this step draws for each name, in the model's order."""
    if "noise" not in view.scratch:
        chosen = {*names}
        view.scratch["noise"] = {n: make(view, n) for n in view.weights if n in chosen}
    noise: dict[str, Tensor] = view.scratch["noise"]
    return noise


def refuse_unseen(view: View, names: Iterable[str], *, where: str, what: str) -> None:
    """In `before_step`: refuse gradients of a forward pass that called `weights` for none of these
    names. What was seen is told by `view.scratch["mixed"]`."""
    if "mixed" not in view.scratch and any(view.grads.get(n) is not None for n in names):
        raise Refused(f"{what} for a model in evaluation mode", where=where,
                      remedy="call model.train() before the forward pass")  # fmt: skip


def widened(w: Tensor) -> Tensor:
    """A copy in at least float32, which represents narrower types exactly."""
    return w.detach().to(wide(w.dtype), copy=True)
