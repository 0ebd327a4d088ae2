"""Every optimizer that is served, and DPS Dense around any of them as a slow, obvious reference.

docs/optimizers.md lists the same ones; tests/test_served.py compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from tiny import net
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from holdfast.engine.bound import Bound
from holdfast.methods import DPS
from holdfast.recipe import Recipe

Make = Callable[[Iterable[Tensor]], Optimizer]
STAGE, STEPS = 3, 12


class Lion(Optimizer):
    """As people write their own: w ← w (1 − lr λ) − lr sign(0.9 m + 0.1 g), m ← 0.99 m + 0.01 g."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1  # counted in the group, gradients or not
            for w in group["params"]:
                if w.grad is not None:
                    m = self.state[w].setdefault("m", torch.zeros_like(w))
                    w.mul_(1 - group["lr"] * group["weight_decay"])
                    w.add_((0.9 * m + 0.1 * w.grad).sign(), alpha=-group["lr"])
                    m.lerp_(w.grad, 0.01)


class Slower(AdamW):
    """Derived from another one, whose step() it calls: both run the step hooks."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] *= 0.99
        return super().step(closure)


def _adafactor(params: Iterable[Tensor]) -> Optimizer:
    from transformers.optimization import Adafactor as HFAdafactor

    return HFAdafactor(  # type: ignore[no-any-return]
        params, lr=0.02, scale_parameter=False, relative_step=False, weight_decay=0.1, beta1=0.9
    )


def _eight_bit(params: Iterable[Tensor]) -> Optimizer:
    import bitsandbytes

    # Its smallest blocks would leave these weights in 32 bits.
    return bitsandbytes.optim.AdamW8bit(  # type: ignore[no-any-return]
        params, lr=0.02, weight_decay=0.1, min_8bit_size=1
    )


_ADAM: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
SERVED: dict[str, Make] = {
    "SGD": partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1),
    "SGD(nesterov=True)": partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD(fused=True)": partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": partial(Adam, **_ADAM),
    "Adam(fused=True)": partial(Adam, **_ADAM, fused=True),
    "AdamW": partial(AdamW, **_ADAM),
    "AdamW(foreach=True)": partial(AdamW, **_ADAM, foreach=True),
    "AdamW(fused=True)": partial(AdamW, **_ADAM, fused=True),
    "AdamW(amsgrad=True)": partial(AdamW, **_ADAM, amsgrad=True),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "Adagrad": partial(Adagrad, lr=0.05, weight_decay=0.1),
    "Adagrad(fused=True)": partial(Adagrad, lr=0.05, weight_decay=0.1, fused=True),
    "Adadelta": partial(Adadelta, lr=1.0, weight_decay=0.1),
    "Adamax": partial(Adamax, **_ADAM),
    "NAdam": partial(NAdam, **_ADAM, decoupled_weight_decay=True),
    "RAdam": partial(RAdam, **_ADAM, decoupled_weight_decay=True),
    "ASGD": partial(ASGD, lr=0.05, weight_decay=0.1),
    "Rprop": partial(Rprop, lr=0.01),
    "Adafactor": partial(Adafactor, **_ADAM),
    "Muon": partial(Muon, **_ADAM),
    "transformers.Adafactor": _adafactor,
    "bitsandbytes.AdamW8bit": _eight_bit,
    "one of your own": partial(Lion, lr=0.02, weight_decay=0.1),
    "one derived from another": partial(Slower, **_ADAM),
}


def trained(optimizer: str, model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given: all parameters, or the matrices."""
    return [p for p in model.parameters() if optimizer != "Muon" or p.ndim == 2]


def backward(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """The gradients of a step, a function of the weights and the step alone."""
    optimizer.zero_grad()
    w = next(model.parameters())
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step)).to(w.dtype)
    model(x).float().square().sum().backward()


class Learner:
    """The tiny net with an optimizer by its name, bound to DPS Dense (None: to nothing)."""

    def __init__(
        self, optimizer: str, method: DPS | None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = net().to(dtype)
        self.optimizer = SERVED[optimizer](trained(optimizer, self.model))
        self.method, self.bound = method, Bound([])
        if method is not None:
            recipe = Recipe(methods=[method])
            self.bound = recipe.bind(self.model, self.optimizer, total_steps=STEPS)

    def step(self, step: int) -> None:
        backward(self.model, self.optimizer, step)
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def frozen(self) -> dict[str, Tensor]:
        """Where each weight is held in this stage (True)."""
        assert self.method is not None
        return self.method.frozen(self.bound.views["dps"])


class Reference(Learner):
    """DPS Dense as it is written down, around the plain optimizer: nothing of holdfast runs."""

    def __init__(self, optimizer: str, drop: float, dtype: torch.dtype) -> None:
        super().__init__(optimizer, None, dtype)
        self.drop, self.held = drop, {}  # type: ignore[var-annotated]
        self.sums = {p: torch.zeros(p.shape) for p in trained(optimizer, self.model)}

    def step(self, step: int) -> None:
        masking = step // STAGE % 2 == 1
        if step % STAGE == 0:
            if masking:
                self.held = {p: s < self._rank(s) for p, s in self.sums.items()}
            self.sums = {p: torch.zeros(p.shape) for p in self.sums}
        backward(self.model, self.optimizer, step)
        before = {p: p.detach().clone() for p in self.sums}
        for p in self.sums:
            assert p.grad is not None
            if masking:
                p.grad[self.held[p]] = 0
            else:
                self.sums[p] += p.grad.float() ** 2
        self.optimizer.step()
        if masking:
            for p, old in before.items():
                p.data[self.held[p]] = old[self.held[p]]

    def _rank(self, sums: Tensor) -> float:
        ranked = sorted(sums.flatten().tolist(), reverse=True)
        return ranked[math.ceil(len(ranked) * (1 - Fraction(str(self.drop)))) - 1]  # type: ignore[no-any-return]
