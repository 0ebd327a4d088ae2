"""EWC against autograd of the explicit sum over tasks."""

from __future__ import annotations

import pytest
import torch
from pulls import bind, pulled, wander
from torch import Tensor

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.methods import EWC, L2SP
from holdfast.testing.toy import ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (EWC(rows=5), 8),
    (EWC(online=True, decay=0.5, labels="expected", rows=3), 8),
    (EWC(strength=0.0, labels="true", rows=3), 8),
]


def fishers(monkeypatch: pytest.MonkeyPatch, bound: Bound, tasks: int) -> list[dict[str, Tensor]]:
    """Let `end_task` meet Fisher values of our choice, many of them zero."""
    made = []
    for _ in range(tasks):
        f = {n: torch.rand_like(w).pow(4) * 10 for n, w in bound.shared.items()}
        made.append({n: x.detach() * (torch.rand_like(x) > 0.4) for n, x in f.items()})
    queue = iter(made)
    monkeypatch.setattr(
        "holdfast.methods.ewc.diagonal_fisher",
        lambda *_, **__: {n: x.clone() for n, x in next(queue).items()},
    )
    return made


def explicit(
    bound: Bound, anchors: list[dict[str, Tensor]], fisher: list[dict[str, Tensor]], strength: float
) -> dict[str, Tensor]:
    """∂/∂θ Σ_t λ/2 Σ_i F_ti (θ_i − θ_ti)² by autograd."""
    names = list(bound.shared)
    total = torch.zeros((), dtype=torch.float64)
    for anchor, f in zip(anchors, fisher, strict=True):
        for n in names:
            total = total + strength / 2 * (f[n] * (bound.shared[n] - anchor[n]) ** 2).sum()
    grads = torch.autograd.grad(total, [bound.shared[n] for n in names])
    return dict(zip(names, grads, strict=True))


def learn_three(bound: Bound) -> list[dict[str, Tensor]]:
    anchors = []
    for _ in range(3):
        wander(bound)
        bound.step += 1
        anchors.append({n: w.detach().clone() for n, w in bound.shared.items()})
        bound.end_task([])
    wander(bound)
    return anchors


def test_separate_anchors_are_the_sum_over_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bind(EWC(strength=7.0))
    fisher = fishers(monkeypatch, bound, 3)
    anchors = learn_three(bound)
    ours, theirs = pulled(bound), explicit(bound, anchors, fisher, 7.0)
    for n, expected in theirs.items():
        torch.testing.assert_close(ours[n], expected, atol=1e-10, rtol=1e-10)
    # However many tasks there were, two tensors a weight remain.
    assert bound.states["ewc"].bytes() == 2 * 8 * sum(w.numel() for w in bound.shared.values())


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_online_decays_the_past_and_anchors_at_the_latest(
    decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = bind(EWC(strength=2.0, online=True, decay=decay))
    f = fishers(monkeypatch, bound, 3)
    anchors = learn_three(bound)
    # F ← decay·F + F_t, thrice
    total = {n: decay**2 * f[0][n] + decay * f[1][n] + f[2][n] for n in f[0]}
    ours, theirs = pulled(bound), explicit(bound, anchors[2:], [total], 2.0)
    for n, expected in theirs.items():
        torch.testing.assert_close(ours[n], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("method", [EWC(rows=4), L2SP(head_strength=0.0)], ids=["ewc", "l2sp"])
def test_heads_are_never_anchored(method: Method) -> None:
    toy = ToyTraining(method)
    for task in ("one", "two"):
        toy.begin(task)
        toy.learn(0, 3)
        toy.end()
        wander(toy.bound)
        grads = pulled(toy.bound)
        for n in (f"{task}/classifier.weight", f"{task}/classifier.bias"):
            assert not grads[n].any()
        assert grads["encoder.embeddings.weight"].any()
    for slot in toy.bound.states[method.name].weights.values():
        assert not [n for n in slot if "classifier" in n]


def test_fisher_of_the_finished_task_enters_with_its_weights() -> None:
    """End to end on one task: F from its own rows, anchored where it ended."""
    bound = bind(EWC(strength=3.0, labels="true", rows=8))
    batch = make_batch("one", 0)
    model = bound.models["one"].eval()
    by_hand = {n: torch.zeros_like(w) for n, w in bound.shared.items()}
    for i in range(8):
        loss = model(**{k: v[i : i + 1] for k, v in batch.items()}).loss
        grads = torch.autograd.grad(loss, list(bound.shared.values()))
        for n, g in zip(by_hand, grads, strict=True):
            by_hand[n] += g**2 / 8
    anchor = {n: w.detach().clone() for n, w in bound.shared.items()}
    bound.end_task([batch])
    assert not any(g.any() for g in pulled(bound).values())  # nothing has moved yet
    wander(bound)
    ours = pulled(bound)
    for n, f in by_hand.items():
        expected = 3.0 * f * (bound.shared[n].detach() - anchor[n])
        torch.testing.assert_close(ours[n], expected, atol=1e-12, rtol=1e-9)


def test_rows_are_asked_for() -> None:
    bound = bind(EWC())
    with pytest.raises(ValueError, match=r"ewc reads the rows.*pass data="):
        bound.end_task()
