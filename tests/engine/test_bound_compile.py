"""Compiled models: the same masks and sums as without, and one graph for all stages and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.methods import DPS, EWC, L2SP, Replay
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import Classifier, make_batch

STEPS, TASKS = 7, ("one", "two")
METHODS: dict[str, list[Method]] = {
    "dense": [DPS(stage=2)],
    "mix": [DPS(stage=2, mix=True)],
    "mix by weight": [DPS(stage=2, mix=True, noise="weight")],
    "mix by gradient": [DPS(stage=2, mix=True, freeze="gradient")],
    "retention": [DPS(stage=2, score="retention")],
    "ewc and l2sp": [EWC(), L2SP()],
    "replay": [Replay(memory=4, share=0.5)],
}


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None


class Model(Classifier):
    """The contract suite's classifier, returning a class that can be traced."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Output:  # type: ignore[override]
        logits = self.classifier(self.encoder(tokens))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(logits, loss)


@pytest.fixture(autouse=True)
def _no_code_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def learn(
    methods: list[Method], how: str, backend: str = "aot_eager"
) -> tuple[list[dict[str, Tensor]], Bound, Any]:
    """Both tasks; all weights and states after each step and task, and the compile counter.

    how: "eager", compiled "before" or "after" bind, or "in place" (`model.compile()`).
    """
    torch.manual_seed(0)
    model, counter = Model(), CompileCounterWithBackend(backend)
    model.eval().encoder.train()  # no dropout, which compiled code draws for itself
    for module in model.modules():
        module.train(not isinstance(module, nn.Dropout))
    called: Any = model
    if how == "in place":
        model.compile(backend=counter, fullgraph=True)
    elif how == "before":
        called = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(called.parameters(), lr=0.02, weight_decay=0.1)
    recipe = Recipe(methods=methods, max_grad_norm=1.0)
    bound = recipe.unbound()
    found = []
    for task in TASKS:
        bound.begin_task(task, optimizer, STEPS, model=called, shared=model)
        if how == "after" and task == "one":
            called = torch.compile(model, backend=counter, fullgraph=True)
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = make_batch(task, step)
            output = called(**batch)
            loss = output.loss
            if bound.has_penalty:
                loss = loss + bound.penalty(batch, output)
            loss.backward()
            optimizer.step()
            found.append(everything(model, bound))
        bound.end_task([make_batch(task, step) for step in range(3)])
        for module in model.modules():
            module.train(not isinstance(module, nn.Dropout))
        found.append(everything(model, bound))
    return found, bound, counter


def everything(model: nn.Module, bound: Bound) -> dict[str, Tensor]:
    found = {k: v.clone() for k, v in bound.state_dict()["tensors"].items()}
    return found | {f"model {k}": v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("how", ["before", "after", "in place"])
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_compiled_is_as_eager_and_compiled_once(methods: list[Method], how: str) -> None:
    eager, _, _ = learn(methods, "eager")
    compiled, bound, counter = learn(methods, how)
    for ours, theirs in zip(compiled, eager, strict=True):
        same(ours, theirs)  # the backend runs eager's own kernels: bit for bit
    # Four stages in each of two tasks, two Fisher passes, replayed rows: one graph.
    assert counter.frame_count == 1
    assert not [name for name in bound.weights if "_orig_mod" in name]


@pytest.mark.slow  # a C++ compiler at work for minutes
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_inductor_gives_the_masks_of_eager(methods: list[Method]) -> None:
    eager, _, _ = learn(methods, "eager")
    compiled, _, counter = learn(methods, "before", "inductor")
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name].isnan(), tensor.isnan()), name
            if tensor.is_floating_point():
                torch.testing.assert_close(
                    ours[name], tensor, atol=2e-6, rtol=1e-3, equal_nan=True, msg=name
                )
            else:
                assert torch.equal(ours[name], tensor), name
    assert counter.frame_count == 1


def test_evaluation_in_between_is_compiled_once_and_sees_the_weights() -> None:
    torch.manual_seed(0)
    model, counter = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), CompileCounterWithBackend(
        "aot_eager"
    )  # fmt: skip
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe(methods=[DPS(stage=2, mix=True)]).bind(compiled, optimizer, total_steps=9)
    x = torch.randn(5, 3)
    for _ in range(9):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        compiled.eval()
        plain = nn.functional.linear(x, *model[0].parameters())
        assert torch.equal(compiled(x), nn.functional.linear(plain, *model[1].parameters()))
        compiled.train()
    assert counter.frame_count == 2


def test_recomputed_activations_see_the_same_noise() -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(lambda z: self.two(torch.tanh(self.one(z))), x, use_reentrant=False)
            assert isinstance(y, Tensor)
            return y

    def gradients(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model: Any = Recomputing()
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Recipe(methods=[DPS(stage=2, mix=True)]).bind(model, optimizer, total_steps=9)
        found = []
        for step in range(4):
            optimizer.zero_grad()
            called(torch.full((2, 4), 1.0 + step)).square().sum().backward()
            found += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
        return found

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, theirs)
    assert any((g == 0).any() for g in gradients(False))
