"""One-sided K-FAC EWC against autograd of the explicit sum over tasks, layers, rows, positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from pulls import bind, pulled, wander
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.grams import Structure
from holdfast.engine.method import Method
from holdfast.methods import KfacEWC, Merge
from holdfast.ops.moments import Blocks, LowRank, Moment
from holdfast.recipe import Recipe
from holdfast.testing.toy import TASKS, Batch, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (KfacEWC(rows=20), 8),
    (KfacEWC(strength=0.1, every=1, rows=5, width=4), 8),
    (KfacEWC(every=3, rows=24, structure="low_rank", width=1, rank=3), 8),
]

Seen = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def learn(bound: Bound, tasks: int) -> Seen:
    """Tasks one after another: the weights when each ended, and what every layer was given."""
    model, found = bound.models["one"].eval(), []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for task in range(tasks):
        wander(bound)
        bound.step += 1
        batch = make_batch(TASKS[task % 2], 50 + task, rows=5)
        inputs = given(model, layers, batch)
        found.append(({n: w.detach().clone() for n, w in bound.shared.items()}, inputs))
        bound.end_task([batch])
    wander(bound)
    return found


def given(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda _, x: found.update({name: x[0].detach()})

    handles = [m.register_forward_pre_hook(see(n)) for n, m in layers.items()]
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def explicit(bound: Bound, found: Seen, strength: float) -> dict[str, Tensor]:
    """∂/∂θ Σ_t λ/2 · 1/rows · Σ_layers Σ_positions ‖y(θ) − y(θ_t)‖², y of one layer alone."""
    w, total = bound.shared, torch.zeros((), dtype=torch.float64)
    for then, inputs in found:
        for layer, x in inputs.items():
            weight, bias = f"{layer}.weight", f"{layer}.bias"
            if weight not in w:
                continue  # the head
            if bias in w:
                change = x @ (w[weight] - then[weight]).T + (w[bias] - then[bias])
            else:
                change = (w[weight] - then[weight])[x]
            total = total + strength / 2 * change.square().sum() / 5
    names = [n for n in w if "norm" not in n]
    return dict(zip(names, torch.autograd.grad(total, [w[n] for n in names]), strict=True))


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_it_is_the_sum_over_tasks_each_with_its_own_weights(tasks: int) -> None:
    bound = bind(KfacEWC(strength=0.3, every=1))
    found = learn(bound, tasks)
    ours, theirs = pulled(bound), explicit(bound, found, 0.3)
    for n, expected in theirs.items():
        torch.testing.assert_close(ours[n], expected, atol=1e-4, rtol=1e-4, msg=n)
    free = {n for n, g in ours.items() if not g.any()}
    assert free == {n for n in bound.weights if "norm" in n or "classifier" in n}
    # However many tasks there were: W*, from the second on R, the Gram matrices, the counts.
    sizes = {n: w.numel() for n, w in bound.shared.items() if "norm" not in n}
    grams = 2 * (7**2 + 9**2) + 11
    expected = 8 * sum(sizes.values()) + 4 * (tasks > 1) * sum(sizes.values()) + 4 * grams
    state = bound.states["kfac_ewc"]
    assert state.bytes() == expected


def test_where_the_task_ended_nothing_pulls() -> None:
    bound = bind(KfacEWC(strength=1e6, every=1))
    wander(bound)
    bound.end_task([make_batch("one", 0)])
    assert not any(g.any() for g in pulled(bound).values())


def test_the_change_is_taken_before_the_product() -> None:
    """λ (W G − B) would lose a small change of large weights in float32."""
    bound = bind(KfacEWC(strength=1.0, every=1), dtype=torch.float32)
    name = "encoder.layers.0.up.weight"
    with torch.no_grad():
        bound.weights[name].add_(100)
    anchor = bound.weights[name].detach().clone()
    bound.end_task([make_batch("one", 0)])
    with torch.no_grad():
        bound.weights[name].add_(1e-3 * torch.randn_like(anchor))
    moved = (bound.weights[name] - anchor).detach().double()
    gram = bound.states["kfac_ewc"].tensors["gram"][name][0].double()
    expected = moved @ gram[:-1, :-1]
    torch.testing.assert_close(pulled(bound)[name].double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("every", [1, 3])
def test_every_kth_step_pulls_k_fold(every: int) -> None:
    """So that the mean pull over steps is the same; never in a task's first step of several."""
    bound = bind(KfacEWC(strength=0.5, every=every))
    learn(bound, 2)
    pulls = []
    for bound.step in range(6):
        pulls.append(pulled(bound))
    once = bind(KfacEWC(strength=0.5, every=1))
    learn(once, 2)
    with torch.no_grad():
        for n, w in once.weights.items():
            w.copy_(bound.weights[n])
    alone = pulled(once)
    for step, pull in enumerate(pulls):
        share = every if step % every == every - 1 else 0
        for n, g in pull.items():
            torch.testing.assert_close(g, share * alone[n], atol=1e-9, rtol=1e-6)
    assert any(g.any() for g in pulls[-1].values())


@pytest.mark.parametrize("structure", ["full", "block", "low_rank"])
def test_any_structure_is_its_dense_matrix(structure: Structure) -> None:
    """∂P/∂W = λ (W − W*) G with G as the structure has it."""
    bound = bind(KfacEWC(strength=1.0, every=1, structure=structure, width=4, rank=5))
    first, _ = learn(bound, 1)[0]
    layer = "encoder.layers.1.down"
    state = bound.states["kfac_ewc"].tensors
    gram = dense(state, f"{layer}.weight", 9)
    w = bound.shared
    change = torch.cat([
        (w[f"{layer}.weight"] - first[f"{layer}.weight"]),
        (w[f"{layer}.bias"] - first[f"{layer}.bias"])[:, None],
    ], 1).detach()  # fmt: skip
    expected, ours = change @ gram, pulled(bound)
    torch.testing.assert_close(ours[f"{layer}.weight"], expected[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[f"{layer}.bias"], expected[:, -1], atol=1e-4, rtol=1e-4)


def dense(state: dict[str, dict[str, Tensor]], key: str, d: int) -> Tensor:
    if key in state.get("gram", {}):
        return torch.block_diag(*state["gram"][key])[:d, :d].double()
    factor = state["factor"][key].double()
    return factor.T @ factor + torch.diag(state["rest"][key].double())


@pytest.mark.parametrize(
    "moment",
    [
        Blocks(torch.arange(50.0).reshape(2, 5, 5), 9),
        LowRank(torch.arange(18.0).reshape(2, 9), torch.arange(9.0), 2),
    ],
    ids=["block", "low_rank"],
)
def test_a_product_is_the_dense_one(moment: Moment) -> None:
    whole = (
        torch.block_diag(*moment.matrix)[:9, :9]
        if isinstance(moment, Blocks)
        else moment.factor.T @ moment.factor + torch.diag(moment.rest)
    )
    x = torch.randn(3, 9)
    torch.testing.assert_close(moment.product(x), x @ whole, atol=1e-3, rtol=1e-5)


def test_strength_and_pace_may_change_between_tasks() -> None:
    toy = ToyTraining(KfacEWC(strength=0.1, every=2))
    toy.begin("one")
    toy.learn()
    toy.end()
    saved = toy.save()
    other = ToyTraining.load(saved, KfacEWC(strength=0.3, every=1), closed=True)
    for p in (toy, other):
        p.begin("two")
    with torch.no_grad():
        for w in toy.bound.shared.values():  # the encoder is one for both tasks
            w.add_(0.1)
        for n, w in other.bound.shared.items():
            w.copy_(toy.bound.shared[n])
    toy.bound.step = other.bound.step = 1
    ours, theirs = pulled(other.bound), pulled(toy.bound)
    for n in toy.bound.shared:
        torch.testing.assert_close(ours[n], theirs[n] * (0.3 * 1) / (0.1 * 2))
    assert any(g.any() for g in ours.values())


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_inputs_are_those_of_the_merged_network(first: bool) -> None:
    """Merging measures too: what it measured is of layers whose inputs it then changed."""

    def learned(rows: int) -> ToyTraining:
        toy, methods = ToyTraining(None), [KfacEWC(rows=rows), Merge(rows=24)]
        toy.recipe = Recipe(methods=methods if first else methods[::-1])
        toy.bound = toy.recipe.unbound(seed=7)
        return toy.learn_all()

    shared, alone = (learned(rows).bound.states["kfac_ewc"].tensors for rows in (24, 99))
    assert shared.keys() == alone.keys()
    for slot, held in alone.items():  # both are of all 24 rows there are
        for name, tensor in held.items():
            assert torch.equal(shared[slot][name], tensor), (slot, name)
