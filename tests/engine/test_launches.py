"""What a step launches and waits for on an accelerator: counted here, with its code on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models import bert, collate, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast import DPS, EWC, GPM, L2SP, LwF, Merge, Recipe, Replay
from holdfast.engine.bound import Bound
from holdfast.methods.common.anchor import pull_
from holdfast.ops import blocks
from holdfast.ops.masks import hold_, mark_, zero_
from holdfast.recipe import PRESETS

WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select")
# Views, and what only allocates or asks about types, launch nothing.
VIEWS = {"view", "detach", "alias", "split", "split_with_sizes", "reshape", "_unsafe_view", "t"}
STILL = VIEWS | {"empty_like", "promote_types"}
BATCHES = [collate(rows(4, seed=i)) for i in range(4)]


@pytest.fixture(autouse=True)
def bunched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "IN_BLOCKS", frozenset())


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = call.overloadpacket.__name__
        if name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1]):
            name = "nonzero"  # the size of the result has to be known
        if name == "_local_scalar_dense" and args[0].dtype is torch.int64:
            name = "seed"  # drawn on the CPU, on any device
        self.calls[name] += 1
        return call(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return sum(self.calls[name] for name in WAITS)

    @property
    def launches(self) -> int:
        return sum(n for call, n in self.calls.items() if call not in STILL) - self.waits


def begun(recipe: Recipe, layers: int, task: str, bound: Bound | None = None) -> Any:
    model = bert(num_hidden_layers=layers, num_labels=2)
    if bound is not None:
        model.bert = bound.models["one"].bert
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=1e-3), fused=True)
    bound = bound or recipe.unbound()
    bound.begin_task(task, optimizer, 12, model=model, data=BATCHES)
    return model, optimizer, bound


def steps(model: Any, optimizer: Any, bound: Bound) -> list[tuple[Counting, Counting]]:
    """For each of twelve steps what the penalty and what the optimizer's step call."""
    found = []
    for i in range(12):
        batch, asked, stepped = BATCHES[i % 4], Counting(), Counting()
        outputs = model.train()(**batch)
        loss = outputs.loss
        if bound.has_penalty:
            with asked:
                loss = loss + bound.penalty(batch, outputs)
        loss.backward()
        with stepped:
            optimizer.step()
        optimizer.zero_grad()
        found.append((asked, stepped))
    return found


def second_task(recipe: Recipe, layers: int) -> list[tuple[Counting, Counting]]:
    model, optimizer, bound = begun(recipe, layers, "one")
    steps(model, optimizer, bound)
    bound.end_task(BATCHES)
    return steps(*begun(recipe, layers, "two", bound))


RECIPES = {
    "plain": Recipe(),
    "clip": Recipe(max_grad_norm=1.0),
    "dps": Recipe(methods=[DPS(drop=0.5, stage=4)]),
    "retention": Recipe(methods=[DPS(score="retention", drop=0.8, stage=4)]),
    "ewc": Recipe(methods=[EWC()]),
    "l2sp": Recipe(methods=[L2SP()]),
    "replay": Recipe(methods=[Replay(memory=4)]),
    "lwf": Recipe(methods=[LwF()]),
    "merge": Recipe(methods=[Merge()]),
    **{name: PRESETS[name]() for name in ("default", "kl_anchor", "wise")},
    "together": Recipe(methods=[EWC(), L2SP(), DPS(stage=4)], max_grad_norm=0.1),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_launches_no_more_for_more_tensors_and_waits_once(name: str) -> None:
    """It waits to know whether the gradients are finite, which decides about the step."""
    small, large = (second_task(RECIPES[name], layers) for layers in (2, 4))
    inside = [i for i in range(12) if i % 4 not in (0, 3)]  # not where a stage of four begins, ends
    for i in inside:
        assert small[i][1].launches == large[i][1].launches, large[i][1].calls - small[i][1].calls
    assert {each.waits for run in (small, large) for _, each in run} == {1}


@pytest.mark.parametrize(("name", "waits"), [("kl_anchor", 3), ("lwf", 1), ("default", 1)])
def test_a_penalty_waits_only_to_refuse_rows_without_answers(name: str, waits: int) -> None:
    """KL anchor also to pick the positions that count."""
    assert {asked.waits for asked, _ in second_task(RECIPES[name], 2)} == {waits}


def test_what_launches_per_tensor_is_known() -> None:
    """Mix mixes each weight in the forward pass; GPM projects layer by layer."""
    for method in (DPS(mix=True, stage=4), GPM()):
        found = [second_task(Recipe(methods=[method]), layers) for layers in (2, 4)]
        assert found[0][1][1].launches < found[1][1][1].launches
        assert {each.waits for run in found for _, each in run} == {1}


SHAPES = [(), (5,), (3, 7), (40, 30), (2, 3, 4), (0, 4), (7,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 16, 1 << 22])
def test_bunches_give_what_blocks_give(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BUNCH", most)
    torch.manual_seed(0)

    def made(kind: torch.dtype = dtype) -> dict[str, Tensor]:
        return {str(s): torch.randn(s).to(kind) for s in SHAPES} | {"wide": torch.randn(9).double()}

    grads, weights, anchor, fisher, held = made(), made(), made(), made(torch.float32), made()
    for each in held.values():
        mark_(each, torch.rand(each.shape) < 0.5)

    def work(g: dict[str, Tensor], w: dict[str, Tensor]) -> Mapping[str, Tensor]:
        total = {n: t.clone() for n, t in fisher.items()}
        pull_(g, w, anchor, 3.0)
        pull_(g, w, anchor, 3.0, fisher)
        blocks.add_squares_(list(total.values()), list(g.values()))
        zero_(g, held)
        hold_(w, held)
        return total

    found = []
    for kinds in (frozenset(), frozenset({"cpu"})):
        monkeypatch.setattr(blocks, "IN_BLOCKS", kinds)
        g, w = ({n: t.clone() for n, t in given.items()} for given in (grads, weights))
        found.append((g, w, work(g, w)))
    for one, two in zip(*found, strict=True):
        for name in one:
            assert one[name].dtype is two[name].dtype
            assert torch.equal(one[name], two[name]), name


def test_a_bunch_is_bounded_and_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BUNCH", 10)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 50, 2)] + [torch.zeros(2).double()]
    assert [[len(t) for t in ts] for (ts,) in blocks.bunches(tensors)] == [
        [4, 6],
        [1],
        [50],
        [2],
        [2],
    ]
    assert list(blocks.bunches([])) == []
