"""SAM against closed forms and a slow twin; how a loop weights its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, SAM, KLAnchor
from holdfast.recipe import Recipe

CONTRACT: list[tuple[Method, float]] = [(SAM(), 0), (SAM(radius=0.5), 0)]


CLIP = 5.0  # above the norm of some steps only: clipping would hide a factor


class Line(nn.Module):
    """Squares of a linear layer's errors, with a batch norm if asked."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.norm(self.a(x)) - y).square().sum(1).mean())


def rows(step: int, n: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {k: torch.randn(n, d, generator=draw).double() for k, d in (("x", 4), ("y", 3))}


def bind(model: nn.Module, method: SAM, lr: float = 0.1) -> Bound:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Recipe(methods=[method], max_grad_norm=CLIP).bind(model, optimizer, total_steps=9)


def learn(model: nn.Module, bound: Bound, steps: int, sizes: list[int], scaler: Any = None) -> None:
    """Micro-batches of these sizes, each weighted by its rows."""
    for step in range(steps):
        bound.optimizer.zero_grad()
        parts = zip(*(t.split(sizes) for t in rows(step, sum(sizes)).values()), strict=True)
        for x, y in parts:
            out = model(x=x, y=y)
            loss = (out.loss + bound.penalty({"x": x, "y": y}, out)) * (len(x) / sum(sizes))
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(bound.optimizer)
            scaler.update()
        else:
            bound.optimizer.step()


def twin(steps: int, radius: float) -> dict[str, Tensor]:
    """Two passes on the whole batch, by hand."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weights = list(model.parameters())
    for step in range(steps):
        batch = rows(step)
        grads = torch.autograd.grad(model(**batch).loss, weights)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        at = [w.detach() + radius * g / norm for w, g in zip(weights, grads, strict=True)]
        there = Line()
        for p, w in zip(there.parameters(), at, strict=True):
            p.data = w
        optimizer.zero_grad()
        found = torch.autograd.grad(there(**batch).loss, list(there.parameters()))
        for w, g in zip(weights, found, strict=True):
            w.grad = g
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
    return dict(model.named_parameters())


def test_one_step_on_a_quadratic_by_hand() -> None:
    """L = ½ Σ c w²: the gradient at w + ρ c w / ‖c w‖ is c w (1 + ρ c / ‖c w‖)."""

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, -1.0]).double())

        def forward(self, c: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=(c * self.w.square()).sum() / 2)

    model, c = Bowl(), torch.tensor([2.0, 0.5]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[SAM(radius=0.3)]).bind(model, optimizer, total_steps=1)
    out = model(c)
    (out.loss + bound.penalty({"c": c}, out)).backward()
    optimizer.step()
    w = torch.tensor([3.0, -1.0]).double()
    g = c * w
    expected = w - 0.1 * g * (1 + 0.3 * c / g.norm())
    torch.testing.assert_close(model.w.detach(), expected)
    assert model.w.grad is not None
    torch.testing.assert_close(model.w.grad, g * (1 + 0.3 * c / g.norm()))


@pytest.mark.parametrize("sizes", [[8], [4, 4], [5, 1, 2]])
@pytest.mark.parametrize("scaled", [False, True])
def test_trajectory_equals_the_twins_however_the_batch_is_split(
    sizes: list[int], scaled: bool
) -> None:
    """Momentum and clipping behind it; a GradScaler's factor is taken out again."""
    model = Line()
    bound = bind(model, SAM(radius=0.7))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    learn(model, bound, 5, sizes, scaler)
    for name, w in twin(5, 0.7).items():
        torch.testing.assert_close(model.get_parameter(name), w, msg=name)


def test_a_loop_that_adds_up_losses_gets_the_gradient_of_the_sum() -> None:
    """The factor is read from the loop, not assumed to be a mean."""
    torch.testing.assert_close(after_one(lambda loss: loss * 3), after_one(lambda loss: loss))


def test_a_loss_of_the_loops_own_is_computed_by_it_again() -> None:
    def own(model: nn.Module) -> Tensor:
        loss: Tensor = 3 * model(**rows(0)).loss
        return loss

    model = Line()
    bound = Recipe(methods=[SAM(radius=0.7)]).bind(model, sgd(model), total_steps=9)
    with pytest.raises(Refused, match="pass again="):
        bound.penalty(rows(0), model(**rows(0)), own(model))
    loss = own(model)
    (loss + bound.penalty(rows(0), None, loss, own)).backward()
    bound.optimizer.step()
    torch.testing.assert_close(model.a.weight.detach(), after_one(lambda loss: loss))


def sgd(model: nn.Module, lr: float = 0.1 / 3) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def after_one(weighted: Callable[[Tensor], Tensor]) -> Tensor:
    """The layer after one step, in which the rate makes up for how the loop weights the loss."""
    model, factor = Line(), float(weighted(torch.ones(())))
    bound = Recipe(methods=[SAM(radius=0.7)]).bind(model, sgd(model, 0.1 / factor), total_steps=9)
    out = model(**rows(0))
    weighted(out.loss + bound.penalty(rows(0), out)).backward()
    bound.optimizer.step()
    return model.a.weight.detach()


def test_batch_norms_count_the_first_pass_only() -> None:
    model, plain = Line(norm=True), Line(norm=True)
    bound = bind(model, SAM(radius=0.5), lr=0.0)
    learn(model, bound, 3, [8])
    for step in range(3):
        plain(**rows(step))
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_what_fails_in_the_second_pass_leaves_the_weights_as_they_were() -> None:
    class Once(Line):
        ran = 0

        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            self.ran += 1
            if self.ran == 2:
                raise RuntimeError("out of memory")
            return super().forward(x, y)

    model = Once()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="out of memory"):
        learn(model, bind(model, SAM()), 1, [8])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_second_gradient_that_is_not_finite_moves_nothing() -> None:
    class Cliff(Line):
        ran = 0

        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            self.ran += 1
            found = super().forward(x, y)
            found.loss = found.loss * (torch.inf if self.ran == 2 else 1.0)
            return found

    model = Cliff()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bound = bind(model, SAM())
    learn(model, bound, 1, [8])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert (bound.step, bound.skipped, bound.in_a_row) == (0, 1, 1)  # told, and in the end stopped
    learn(model, bound, 1, [8])
    assert not torch.equal(model.a.weight, before["a.weight"])
    assert (bound.step, bound.skipped, bound.in_a_row) == (1, 1, 0)


def test_what_it_cannot_stand_beside_is_refused() -> None:
    def beside(*methods: Method) -> None:
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Recipe(methods=methods).bind(model, optimizer, total_steps=9)

    for other in (EWC(), KLAnchor()):
        with pytest.raises(Refused, match=rf"sam: .*lack the penalty of {other.name}"):
            beside(SAM(), other)
    with pytest.raises(Refused, match="list sam before it"):
        beside(DPS(), SAM())
    beside(SAM(), DPS())


def test_a_penalty_that_is_left_out_of_the_loss_is_noticed() -> None:
    model = Line()
    bound = bind(model, SAM())
    out = model(**rows(0))
    bound.penalty(rows(0), out)
    out.loss.backward()
    with pytest.raises(Refused, match=r"add bound\.penalty"):
        bound.optimizer.step()
