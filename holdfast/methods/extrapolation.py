"""Extrapolation: the gradient is taken a little ahead (Lin et al., ICML 2020, arXiv 2006.05720).

    x̃ = x − γ̂ ζ,     g = ∇L(x̃),     x ← the optimizer's step at x with g

ζ is the gradient of the step before, so that no pass is added: forward and backward see x̃, the
optimizer and evaluation see x. The method is meant for large batches, whose trajectories it
smooths.

`direction` says what ζ is: the last "gradient" as the optimizer took it (clipped); the direction of
"adam", m̂ / (√v̂ + ε) from the optimizer's own moments; or "noise", a control: a Gaussian of the
last gradient's norm in each tensor. The first step of a task is plain, and so is one after a step
that left a tensor out, for that tensor.

The paper's workers extrapolate each along its own last gradient. Here all ranks take the mean
gradient, so that what is remembered is equal on all and a run can be resumed. There is no
published code; from memory, not read again: the Adam direction, and that γ̂ is of the order of the
learning rate of a small batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common.importance import wide
from holdfast.methods.common.mixing import drawn, generator_on, refuse_unseen


@dataclass(frozen=True, kw_only=True)
class Extrapolation(Method):
    """Take each gradient ahead of the weights, along the last one.

    rate: γ̂ ≥ 0, in weight per unit of ζ: of the last gradient, or for "adam" of a step of rate 1.
    direction: ζ is the last "gradient", "adam"'s direction, or "noise" of the gradient's norm.
    """

    name: ClassVar[str] = "extrapolation"
    summary: ClassVar[str] = "takes gradients ahead of the weights, along the last gradient"
    paper: ClassVar[str] = "Lin et al., ICML 2020, arXiv 2006.05720"
    bytes_per_weight: ClassVar[str] = "4 (the last gradient); 0 with adam and, between steps, noise"
    group: ClassVar[str] = "sharpness"
    cost: ClassVar[str] = "one pass over the weights, and a copy of the gradients"
    use: ClassVar[str] = "large batches"
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"rate": Range(1e-6, 1.0, log=True)}

    rate: Annotated[float, Field(ge=0)] = 0.01
    direction: Literal["gradient", "adam", "noise"] = "gradient"

    def begin_task(self, view: View) -> None:
        view.state.weights.clear()

    def weights(self, view: View, name: str, w: Tensor) -> Tensor:
        view.scratch["mixed"] = True
        ahead = self._ahead(view, name)
        if ahead is None:
            return w
        return torch.sub(w, ahead, alpha=self.rate).to(w.dtype)

    def _ahead(self, view: View, name: str) -> Tensor | None:
        """ζ for this step, None in the first."""
        if self.direction == "gradient":
            return view.state.slot("last").get(name)
        if self.direction == "noise":
            return drawn(view, view.state.slot("norm"), self.draw).get(name)
        moments = view.moments(name)
        return None if not moments else _adam(view, name, moments)

    @torch.inference_mode(False)
    def draw(self, view: View, name: str) -> Tensor:
        """Gaussian noise whose expected square norm is that of the tensor's last gradient."""
        w, norm = view.weights[name], view.state.slot("norm")[name]
        made = torch.randn(w.shape, generator=generator_on(view, w.device), device=w.device,
                           dtype=wide(w.dtype))  # fmt: skip
        return made.mul_(norm / w.numel() ** 0.5)

    def before_step(self, view: View) -> None:
        refuse_unseen(view, view.weights, where="extrapolation", what="there is no looking ahead")

    def after_step(self, view: View) -> None:
        if self.direction == "adam":
            return
        last, norms = view.state.slot("last"), view.state.slot("norm")
        for name in view.weights:
            grad = view.grads[name]
            if grad is None:
                last.pop(name, None)
                norms.pop(name, None)
            elif self.direction == "noise":
                kind = wide(grad.dtype)
                norms[name] = torch.linalg.vector_norm(grad.detach(), dtype=kind)
            elif name in last:
                last[name].copy_(grad)
            else:
                last[name] = grad.detach().to(wide(grad.dtype), copy=True)


def _adam(view: View, name: str, moments: Mapping[str, Tensor]) -> Tensor:
    """m̂ / (√v̂ + ε), the step that Adam made last but for its rate."""
    group = view.bound.group_of[name]
    if not {"exp_avg", "exp_avg_sq", "step"} <= moments.keys() or "betas" not in group:
        raise Refused(f"{type(view.bound.optimizer).__name__} has not Adam's moments",
                      where="extrapolation.direction", remedy="gradient, or AdamW")  # fmt: skip
    steps = moments["step"].to(moments["exp_avg"].device, torch.float64)
    first, second = (1 - beta**steps for beta in group["betas"])
    below = (moments["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
    return (moments["exp_avg"] / first).div_(below)
