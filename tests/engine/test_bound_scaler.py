"""Precisions and loss scales: what is remembered depends on neither; what overflows is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import METHODS, adamw, bind, net
from torch import nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, L2SP, LNSR, SMART
from holdfast.ops.gradients import total_norm
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import TASKS, ToyTraining, make_batch

NOISY: list[Method] = [SMART(epsilon=0.1, start=0.1, rate=0.1, proximal=1.0), LNSR()]
Ask = Callable[[Any, torch.optim.Optimizer, Bound], Any]
# What a loop may do between the backward pass and scaler.step().
ASKS: dict[str, Ask] = {
    "nothing": lambda scaler, optimizer, bound: None,
    "unscale_": lambda scaler, optimizer, bound: scaler.unscale_(optimizer),
    "norm": lambda scaler, optimizer, bound: bound.gradient_norm(),
    "unscale_ and norm": lambda scaler, optimizer, bound: (
        scaler.unscale_(optimizer),
        bound.gradient_norm(),
    ),
}


def learn(
    method: Method,
    scale: float | None,
    *,
    fused: bool = False,
    ask: Ask = ASKS["nothing"],
    overflow: bool = False,
) -> tuple[dict[str, Any], Bound]:
    """Both tasks under bfloat16 autocast; all that is remembered afterwards."""
    toy = ToyTraining(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for task in TASKS:
        toy.begin(task)
        if fused:
            toy.bound.unbind()
            groups = toy.optimizer.param_groups[0]["params"]
            toy.optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, fused=True)
            toy.bound.begin_task(task, toy.optimizer, toy.steps, model=toy.model)
        for step in range(toy.steps):
            for bad in (True, False) if overflow else (False,):
                torch.manual_seed(step)  # dropout
                toy.optimizer.zero_grad()
                batch = make_batch(task, step)
                with torch.autocast("cpu", torch.bfloat16):
                    output = toy.model(**batch)
                    loss = output.loss
                    if toy.bound.has_penalty:
                        loss = loss + toy.bound.penalty(batch, output)
                scaler.scale(loss).backward()
                if bad:
                    next(p.grad for p in toy.model.parameters()).view(-1)[0] = float("inf")
                ask(scaler, toy.optimizer, toy.bound)
                scaler.step(toy.optimizer)
                scaler.update()
        toy.end()
    return toy.everything(), toy.bound


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("method", [*METHODS, *NOISY], ids=repr)
def test_states_do_not_depend_on_the_loss_scale(method: Method, ask: Ask, fused: bool) -> None:
    """Masks, sums, Fisher information, weights: bit for bit, for powers of two scale exactly."""
    plain, _ = learn(method, None, fused=fused)
    for scale in (1.0, 65536.0):
        ours, bound = learn(method, scale, fused=fused, ask=ask)
        same(ours, plain)
        assert bound.norm is not None and bound.norm < 1000 and bound.skipped == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", [*METHODS, *NOISY], ids=repr)
def test_overflows_are_counted_and_leave_no_trace(method: Method, fused: bool) -> None:
    """As if they had not been, noise and replayed rows included, whoever would skip the step."""
    plain, _ = learn(method, None, fused=fused)
    for ask in (ASKS["nothing"], ASKS["unscale_ and norm"]):
        ours, bound = learn(method, 65536.0, fused=fused, ask=ask, overflow=True)
        same(ours, plain)
        assert (bound.step, bound.skipped) == (9, 18)  # of one task, of both


def test_a_scheduler_waits_for_the_step_that_a_scaler_left_out() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, accelerator = net(), accelerate.Accelerator(cpu=True)
    inner = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    scheduler = accelerator.prepare_scheduler(
        torch.optim.lr_scheduler.LambdaLR(inner, lambda n: 1 / (n + 1))
    )
    scheduler.optimizers = [optimizer]
    bound = bind(model, optimizer, L2SP())
    for value, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value) * scaler.scale(torch.ones(()))
        optimizer.step()
        scheduler.step()
        assert optimizer.step_was_skipped is (value > 1)
        assert scheduler.scheduler.last_epoch == bound.step == steps
    assert bound.skipped == 1 and scaler.get_scale() == 2.0


@pytest.mark.parametrize("fused", [False, True])
def test_what_the_scaler_found_stands(fused: bool) -> None:
    """As torch has it, also where a loop has mended the gradients since unscale_."""
    model = net()
    optimizer = adamw(model, fused=fused)
    bound = bind(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    model[2].bias.grad.fill_(float("inf"))
    scaler.unscale_(optimizer)
    model[2].bias.grad.zero_()
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    same(model.state_dict(), before)
    assert (bound.step, bound.skipped) == (0, 1)


def test_unbinding_gives_the_scaler_back_its_way() -> None:
    for fused in (False, True):
        model = net()
        optimizer = adamw(model, fused=fused)
        before = set(vars(optimizer))
        bound = bind(model, optimizer)
        assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
        bound.unbind()
        assert set(vars(optimizer)) == before
        assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused


def test_a_step_that_raised_is_over() -> None:
    """The next one is a step of its own, not a part of it."""
    model = net()

    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    optimizer = Fails(model.parameters(), lr=0.1)
    bound = bind(model, optimizer, L2SP())
    for fails in (True, False, True, False):
        optimizer.fails = fails
        model(torch.ones(1, 3)).sum().backward()
        if fails:
            with pytest.raises(MemoryError):
                optimizer.step()
        else:
            optimizer.step()
    assert bound.step == 2


# --- narrow weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_stage_is_summed_without_loss(dtype: torch.dtype) -> None:
    """In the weights' own type a sum of ones ends at 256 or 2,048."""
    model = nn.Linear(2, 2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bound = bind(model, optimizer, DPS(stage=3000), total_steps=3000)
    for _ in range(2500):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    total = bound.states["dps"].weights["sum"]["weight"]
    assert total.dtype is torch.float32 and torch.equal(total, torch.full((2, 2), 2500.0))


def test_float16_weights_are_refused_under_a_scaler_as_torch_does() -> None:
    """Unless the optimizer is fused, where torch serves them."""
    for fused in (False, True):
        model = net().half()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        bound = bind(model, optimizer, DPS())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(torch.ones(1, 3).half()).sum()).backward()
        if fused:
            scaler.step(optimizer)
            assert bound.norm is not None and bound.step == 1
            expected = net()
            expected(torch.ones(1, 3)).sum().backward()
            grads = [p.grad for p in expected.parameters() if p.grad is not None]
            assert bound.norm.item() == pytest.approx(total_norm(grads).item(), rel=1e-2)
            continue
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(Refused, match=r"float16 weights.*autocast"):
            scaler.step(optimizer)
        same(model.state_dict(), before)


def test_the_norm_of_narrow_gradients_is_neither_coarse_nor_infinite() -> None:
    many = torch.full((100, 101), 1.37, dtype=torch.bfloat16)
    large = torch.full((100, 100), 1000.0, dtype=torch.float16)
    mixed = [many, large, torch.full((3,), 2.0)]
    expected = sum(float(g.double().square().sum()) for g in mixed) ** 0.5
    assert total_norm(mixed).item() == pytest.approx(expected, rel=1e-5)
    assert total_norm([many]).item() == pytest.approx(float(many.double().norm()), rel=1e-5)
    assert total_norm([large]).item() == pytest.approx(1e5, rel=1e-5)
    model = nn.Linear(100, 100, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bound = Recipe(max_grad_norm=1.0).bind(model, optimizer, total_steps=2)
    before = copy.deepcopy(model.weight.detach())
    model.weight.grad = large.clone()
    optimizer.step()
    assert bound.skipped == 0
    moved = before - model.weight
    torch.testing.assert_close(moved, torch.full_like(large, 0.01), atol=1e-3, rtol=0)
