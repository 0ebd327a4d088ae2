"""GPM by hand: which directions it holds, and that old outputs stay where it says they do."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.engine.bound import Bound
from holdfast.engine.grams import Structure
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import (
    DPS,
    GPM,
    HFT,
    LISA,
    SIFT,
    ChildTuning,
    DynamicSubset,
    Mixout,
    MoFO,
    gpm,
)
from holdfast.methods.gpm import widened
from holdfast.ops.moments import Blocks, LowRank
from holdfast.recipe import Recipe
from holdfast.testing.toy import Batch, Classifier, ToyTraining

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (GPM(rows=20), 0),
    (GPM(rows=5, threshold=0.9, project="gradient", others="train"), 0),
    (GPM(rows=20, threshold=0.8, width=4), 0),
    (GPM(rows=24, threshold=0.8, structure="low_rank", width=1, rank=3, others="train"), 0),
]

# --- which directions -----------------------------------------------------------------------------


def turned(*eigenvalues: float) -> tuple[Tensor, Tensor]:
    """A matrix of these eigenvalues, and its eigenvectors as rows."""
    draw = torch.Generator().manual_seed(1)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
    return ((q.T * torch.tensor(eigenvalues).double()) @ q).float(), q.float()


def whole(gram: Tensor) -> Blocks:
    return Blocks(gram[None], len(gram))


def same_span(u: Tensor, rows: Tensor) -> None:
    """Orthonormal rows u span what orthonormal `rows` span."""
    torch.testing.assert_close(u @ u.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    torch.testing.assert_close(u.T @ u, rows.T @ rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.94, 3), (0.96, 4), (1.0, 4)]
)
def test_the_fewest_leading_directions_that_hold_the_share(threshold: float, kept: int) -> None:
    gram, q = turned(50, 30, 15, 5, 0)
    same_span(widened(whole(gram), None, threshold)[0], q[:kept])


def test_what_is_held_already_counts_and_only_new_directions_are_added() -> None:
    _, q = turned(50, 30, 15, 5)
    old = q[None, :1]
    second = whole((q.T * torch.tensor([60.0, 25, 10, 5])) @ q)
    assert torch.equal(widened(second, old, 0.6), widened(second, old, 0.3))
    same_span(widened(second, old, 0.6)[0], q[:1])  # held: .60
    same_span(widened(second, old, 0.8)[0], q[:2])  # .60 + .25
    # An input between an old direction and a new one: half of it is held, the rest is q1.
    between = (q[0] + q[1]) / 2**0.5
    slanted = whole(torch.outer(between, between))
    same_span(widened(slanted, old, 0.49)[0], q[:1])
    same_span(widened(slanted, old, 0.51)[0], q[:2])


def test_in_blocks_directions_compete_for_one_trace() -> None:
    first, p = turned(40, 1)
    second, q = turned(30, 29)
    u = widened(Blocks(torch.stack([first, second]), 4), None, 0.98)
    same_span(u[0, :1], p[:1])  # of 100 in all, the 1 is left out
    same_span(u[1], q)
    assert u.shape == (2, 2, 2) and not u[0, 1].any()


def test_low_rank_is_its_dense_matrix_where_it_has_its_directions() -> None:
    draw = torch.Generator().manual_seed(2)
    factor = torch.randn(3, 7, generator=draw)
    held = LowRank(factor, torch.zeros(7), 3)
    old = torch.linalg.qr(torch.randn(7, 2, generator=draw))[0].T[None]
    for before in (None, old):
        for threshold in (0.4, 0.7, 0.9, 1.0):
            ours = widened(held, before, threshold)[0]
            same_span(ours, widened(whole(factor.T @ factor), before, threshold)[0])
    # What is left on the diagonal counts in the trace, but has no direction of its own.
    assert len(widened(LowRank(factor, torch.full((7,), 100.0), 3), None, 0.9)[0]) == 3


# --- one layer ------------------------------------------------------------------------------------


class One(nn.Module):
    """A head on one layer, whose inputs are given as they are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(layer, nn.Flatten())
        self.classifier = nn.LazyLinear(2)

    @property
    def base_model(self) -> nn.Module:
        return self.encoder

    def get_output_embeddings(self) -> None:
        """None: the head is the task's own."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.classifier(self.encoder(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def second_task(
    method: GPM, layer: nn.Module, old: Tensor, optimizer: Callable[..., torch.optim.Optimizer]
) -> tuple[Bound, torch.optim.Optimizer, One]:
    """A network that has learned task one, on inputs `old`, and begins task two."""
    model = One(layer)
    model(old)
    bound = Recipe(methods=[method]).unbound()
    bound.remember("one", model, [{"x": old}])
    stepper = optimizer(model.parameters())
    bound.begin_task("two", stepper, 100, model=model)
    return bound, stepper, model


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_inside_the_old_span_nothing_moves_and_outside_everything(project: Any) -> None:
    layer = nn.Linear(4, 3)
    old = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0]])
    bound, optimizer, _ = second_task(
        GPM(threshold=1.0, project=project), layer, old, lambda p: torch.optim.SGD(p, lr=1.0)
    )
    x = nn.functional.pad(old, (0, 1), value=1.0)  # x̃
    gradient = torch.stack([
        3 * x[0] - 2 * x[1],  # inside
        torch.tensor([0, 0, 5.0, -7, 0]),  # orthogonal to both
        torch.tensor([1, 1, 1.0, 1, 1]),  # both
    ])  # fmt: skip
    outside = gradient - gradient @ torch.linalg.pinv(x) @ x
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    layer.weight.grad, layer.bias.grad = gradient[:, :-1].clone(), gradient[:, -1].clone()
    optimizer.step()
    moved = torch.cat([layer.weight, layer.bias[:, None]], 1).detach() - before
    torch.testing.assert_close(moved, -outside, atol=1e-6, rtol=0)
    assert moved[0].abs().max() < 1e-6 and moved[2].abs().max() > 0.5
    torch.testing.assert_close(moved[1], -gradient[1], atol=1e-6, rtol=0)
    assert bound.states["gpm"].bytes() == 4 * 2 * 5  # two directions of five entries


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "without bias": (lambda: nn.Linear(6, 3, bias=False), (6,)),
    "transposed": (lambda: Conv1D(3, 6), (6,)),
    "convolution": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 4)),
    "two dimensions": (lambda: nn.Conv2d(2, 3, 2), (2, 3, 3)),
}


@pytest.mark.parametrize("width", [4096, 4])
@pytest.mark.parametrize("frozen", [(), ("bias",), ("weight",)], ids=["", "bias", "weight"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_on_old_inputs_stay(kind: str, frozen: Collection[str], width: int) -> None:
    """Of any layer, also where only its weight or only its bias takes part in the steps."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer: Any = make()
    # One row, a convolution's unfolded inputs being several: without the 1 it spans another line.
    old = torch.randn(1, *shape)
    method = GPM(threshold=1.0, width=width, structure="full" if width > 4 else "block")
    bound, optimizer, model = second_task(
        method, layer, old, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3)
    )
    for name in frozen:
        if getattr(layer, name) is not None:
            getattr(layer, name).requires_grad_(False)
    new = torch.randn(16, *shape)
    start, before = {n: w.detach().clone() for n, w in layer.named_parameters()}, layer(old)
    learn(model, bound, optimizer, [{"x": new, "labels": new.flatten(1)[:, 0].gt(0).long()}], 10)
    torch.testing.assert_close(layer(old), before, atol=2e-6, rtol=0)
    moves = "weight" not in frozen and not (width == 4 and kind != "linear")
    if moves:
        assert (layer.weight - start["weight"]).abs().max() > 0.01
    if "weight" in frozen:  # every old input has the appended 1
        assert all(torch.equal(w, start[n]) for n, w in layer.named_parameters())


def learn(
    model: nn.Module, bound: Bound, optimizer: torch.optim.Optimizer, rows: list[Batch], steps: int
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(**rows[step % len(rows)]).loss.backward()
        optimizer.step()
    assert bound.step == steps


# --- a network ------------------------------------------------------------------------------------


def rows(tokens: Collection[int], seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    known = torch.tensor(list(tokens))
    picked = known[torch.randint(len(known), (6, 4), generator=draw)]
    return [{"tokens": picked, "labels": picked.sum(1) % 3}]


def sequence(method: GPM, tasks: list[list[Batch]]) -> tuple[list[list[Tensor]], Bound]:
    """Encoder outputs on the rows of every task so far, after each task."""
    torch.manual_seed(0)
    encoder, bound, found = Classifier().encoder, Recipe(methods=[method]).unbound(), []
    for i, batches in enumerate(tasks):
        model = Classifier(encoder=encoder).train(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        bound.begin_task(f"task{i}", optimizer, 20, model=model)
        learn(model, bound, optimizer, batches, 20)
        bound.end_task(batches)
        found.append([encoder(b[0]["tokens"]).detach() for b in tasks[: i + 1]])
    return found, bound


TASKS = [rows([0, 1], 0), rows([2], 1), rows(range(3, 11), 2)]


def drifts(**settings: Any) -> list[float]:
    """How far each old task's outputs are at the end from where they were when it ended."""
    found, _ = sequence(GPM(threshold=1.0, **settings), TASKS)
    return [float((found[-1][i] - found[i][i]).abs().max()) for i in range(2)]


def test_after_twenty_steps_of_adamw_old_outputs_are_what_they_were() -> None:
    """Of two old tasks, each of few tokens, through two blocks with norms."""
    assert max(drifts()) < 2e-5


@pytest.mark.parametrize("settings", [{"project": "gradient"}, {"others": "train"}], ids=str)
def test_as_published_or_with_other_weights_free_they_are_not(settings: dict[str, Any]) -> None:
    """Momentum of the first steps and weight decay, or norms and embeddings, move them."""
    assert max(drifts(**settings)) > 1e-2


def test_weights_that_are_mixed_are_projected_too() -> None:
    """Layers are found while their `weight` is a stand-in."""
    found, bound = {}, Recipe(methods=[Mixout(), GPM(threshold=1.0)]).unbound()
    torch.manual_seed(0)
    encoder = Classifier().encoder
    for i, batches in enumerate(TASKS[:2]):
        model = Classifier(encoder=encoder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        bound.begin_task(f"task{i}", optimizer, 20, model=model)
        learn(model, bound, optimizer, batches, 20)
        bound.end_task(batches)
        found[i] = encoder.train(False)(TASKS[0][0]["tokens"]).detach()
        encoder.train()
    assert (found[1] - found[0]).abs().max() < 2e-5


@pytest.mark.parametrize("others", ["train", "freeze"])
def test_others_stand_still_or_train_from_the_second_task_on(others: Any) -> None:
    bound, encoder = Recipe(methods=[GPM(threshold=0.8, others=others)]).unbound(), None
    for task in ("one", "two"):
        model = Classifier(encoder=encoder)
        encoder = model.encoder
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        bound.begin_task(task, optimizer, 20, model=model)
        before = {n: w.detach().clone() for n, w in bound.weights.items()}
        learn(model, bound, optimizer, rows(range(11), 3), 3)
        still = {n for n, w in bound.weights.items() if torch.equal(w, before[n])}
        bound.end_task(rows(range(11), 3))
        apart = {n for n in bound.shared if "norm" in n or "embeddings" in n}
        assert still == (apart if others == "freeze" and task == "two" else set())


def test_only_what_is_projected_is_copied_before_a_step() -> None:
    class Watched(GPM):
        def after_step(self, view: Any) -> None:
            kept.append(set(view.previous))
            super().after_step(view)

    linear = {f"encoder.layers.{i}.{w}.{k}" for i in (0, 1) for w in ("up", "down")
              for k in ("weight", "bias")}  # fmt: skip
    for project, expected in (("update", linear), ("gradient", set())):
        kept: list[set[str]] = []
        sequence(Watched(project=project), TASKS[:2])  # type: ignore[arg-type]
        assert kept == 20 * [set()] + 20 * [expected]


@pytest.mark.parametrize("structure", ["full", "block", "low_rank"])
def test_of_a_network_only_directions_are_kept(structure: Structure) -> None:
    method = GPM(threshold=1.0, structure=structure, width=4, rank=5)
    _, bound = sequence(method, TASKS[:1])
    state = bound.states["gpm"]
    bases = state.tensors["basis"]
    # Two tokens: two directions of each input (a block each), of 7 and 9 entries.
    ks = {u.shape[1] for u in bases.values()}
    assert ks == {2} and set(state.tensors) == {"basis"} and not state.weights
    assert state.bytes() == sum(4 * u.numel() for u in bases.values())


def test_layers_that_share_other_inputs_than_before_are_refused() -> None:
    _, bound = sequence(GPM(), TASKS[:1])
    readers = bound.states["gpm"].numbers["readers"]
    first, second, *_ = readers
    readers[second] = first
    bound.step += 1
    with pytest.raises(Refused, match="keep the network's structure"):
        bound.end_task(TASKS[0])


@pytest.mark.parametrize(
    "other", [ChildTuning(), DPS(stage=2), DynamicSubset(), MoFO(), SIFT()], ids=lambda m: m.name
)
def test_methods_that_hold_entries_are_refused_in_any_order(other: Method) -> None:
    """After it they would put a part of a projected step back, so that the rest changes old
    outputs; before it, what they hold would be moved."""
    for methods in ([GPM(), other], [other, GPM()]):
        with pytest.raises(Refused, match=f"gpm cannot stand beside {other.name}"):
            Recipe(methods=methods)


@pytest.mark.parametrize("other", [HFT(), LISA()], ids=lambda m: m.name)
def test_methods_that_leave_out_tensors_keep_old_directions(other: Method) -> None:
    toy = ToyTraining(None, dropout=False)
    toy.recipe = Recipe(methods=[GPM(threshold=0.7), other])
    toy.bound = toy.recipe.unbound(seed=7)
    toy.begin("one")
    toy.learn()
    toy.end()
    toy.begin("two")
    before = {name: w.detach().clone() for name, w in toy.bound.shared.items()}
    toy.learn()
    view, moved = toy.bound.views["gpm"], False
    for layer in gpm._covered(view):
        change = {n: toy.bound.shared[n].detach() - before[n] for n in layer.names}
        free = gpm._projected(view, layer, change)
        for name, c in change.items():
            moved |= bool(c.any())
            torch.testing.assert_close(c, free[name], rtol=0, atol=1e-6)
    assert moved
