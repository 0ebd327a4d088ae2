"""SAM: sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv 2010.01412).

    ε = ρ g / ‖g‖,  g = ∇L(w),  the norm over all weights;       the step at w with ∇L(w + ε)

Every micro-batch of the step is run a second time at w + ε, with new dropout from the method's own
generator, weighted as the loop weighted it the first time: a term of value 0 in the loss tells the
factor by its gradient. Statistics of batch norms are those of the first pass. Several ranks average
the second gradients as DDP does the first; ε is equal on all (the paper's workers each take their
own). Under a GradScaler the factors are divided by their sum, so a step's losses count as a mean,
and a step whose second gradient alone overflows moves nothing.

SAM optimizers of other packages (pytorch-optimizer's) run a closure twice inside their own step,
where no hook of a recipe sees the second gradient: they are refused, hence this method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.engine.batches import Whole, loss_of, rows_in
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common.order import earlier
from holdfast.ops import distributed


@dataclass(frozen=True, kw_only=True)
class SAM(Method):
    """Step with the gradient at the worst place nearby, to first order.

    radius: ρ > 0, the length of ε over all trained weights.
    """

    name: ClassVar[str] = "sam"
    summary: ClassVar[str] = "steps with the gradient at the worst place nearby"
    paper: ClassVar[str] = "Foret et al., ICLR 2021, arXiv 2010.01412"
    bytes_per_weight: ClassVar[str] = (
        "0; within a step 8 (the weights as they were, the first gradient)"
    )
    group: ClassVar[str] = "sharpness"
    cost: ClassVar[str] = "one more forward and backward pass"
    use: ClassVar[str] = "few rows, large batches"
    ranges: ClassVar[Mapping[str, Range]] = {"radius": Range(0.005, 0.5, log=True)}

    radius: Annotated[float, Field(gt=0)] = 0.05

    def begin_task(self, view: View) -> None:
        others = [m for m in view.bound.methods if m is not self]
        if adding := [m.name for m in others if m.defines("penalty") or m.defines("penalty_grad_")]:
            raise Refused(f"the second gradient would lack the penalty of {', '.join(adding)}",
                          where="sam", remedy="leave one of them out")  # fmt: skip
        if masking := [m.name for m in earlier(view, self) if m.defines("before_step")]:
            raise Refused(f"it would replace the gradient that {', '.join(masking)} changed",
                          where="sam", remedy="list sam before it")  # fmt: skip
        if any(map(distributed.sharded, view.weights.values())):
            raise Refused("weights in shards are not moved and put back", where="sam",
                          remedy="train with DistributedDataParallel")  # fmt: skip

    def penalty(self, view: View) -> Tensor:
        """0, whose gradient is the factor by which the loop multiplies this micro-batch's loss."""
        if view.inputs is None:
            raise Refused("sam runs the micro-batch twice", where="bound.penalty",
                          remedy="call bound.penalty(batch, outputs)")  # fmt: skip
        device = next(iter(view.weights.values())).device
        factor = torch.zeros((), device=device, requires_grad=True)
        kind = device.type
        precision = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        batches = view.scratch.setdefault("batches", [])
        if all(w.grad is None for w in view.weights.values()):
            # Micro-batches whose gradients were thrown away belong to no step.
            batches[:] = [each for each in batches if each[1].grad is None]
        batches.append((_again(view), factor, precision))
        return factor

    def before_step(self, view: View) -> None:
        batches = view.scratch.pop("batches")
        factors = [factor.grad for _, factor, _ in batches if factor.grad is not None]
        held = {n: w for n, w in view.weights.items() if w.grad is not None}
        if not held:
            return
        if not factors:
            raise Refused("the penalty took no part in the backward pass", where="sam",
                          remedy="add bound.penalty(...) to the loss")  # fmt: skip
        # It leaves this attribute while it steps; gradients are unscaled by now.
        scale = torch.stack(factors).sum() if hasattr(view.bound.optimizer, "found_inf") else None
        with self._ahead(view, held), torch.enable_grad(), _no_statistics(view):
            for batch, factor, precision in batches:
                if factor.grad is not None:
                    with precision:
                        loss = loss_of(view.forward(batch))
                    (loss * factor.grad).backward()
        grads = []
        for name, w in view.weights.items():
            if name not in held:
                w.grad = None
            else:
                w.grad = torch.zeros_like(w) if w.grad is None else w.grad
                grads.append(w.grad)
        distributed.reduce_(grads)
        torch._foreach_div_(grads, distributed.world())
        if scale is not None:
            torch._foreach_div_(grads, scale)
        if not bool(torch.isfinite(view.bound.gradient_norm())):
            view.bound.leave_out()

    @contextlib.contextmanager
    def _ahead(self, view: View, held: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within the block the weights are w + ε, and their gradients empty."""
        weights: list[Tensor] = list(held.values())
        kept = [w.detach().clone() for w in weights]
        steps = [w.grad for w in weights if w.grad is not None]
        try:
            torch._foreach_mul_(steps, self.radius / (view.bound.gradient_norm() + 1e-12))
            for w, step in zip(weights, steps, strict=True):
                w.add_(step)
            torch.clear_autocast_cache()  # it holds low-precision copies of w
            del steps
            for w in weights:
                w.grad = None
            yield
        finally:
            torch._foreach_copy_(weights, kept)
            torch.clear_autocast_cache()


def _again(view: View) -> Mapping[str, Any]:
    """The micro-batch as `view.forward` takes it to return `view.loss` once more."""
    assert view.inputs is not None
    compute: Callable[[nn.Module], Tensor] | None = view.again
    if compute is not None:
        run = compute  # mypy forgets that it is not None
        return Whole(
            view.inputs, rows_in(view.inputs), lambda model, _: SimpleNamespace(loss=run(model))
        )
    if view.loss is None or view.loss is not getattr(view.outputs, "loss", None):
        raise Refused("sam computes the loss twice, and the model's outputs have another",
                      where="bound.penalty", remedy="pass again=, see bound.penalty")  # fmt: skip
    return view.inputs


@contextlib.contextmanager
def _no_statistics(view: View) -> Iterator[None]:
    """Within the block batch norms leave their running statistics alone."""
    modules = view.bound.models[view.task].modules()
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
