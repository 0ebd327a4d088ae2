"""What merging leaves alone, copies, chooses and refuses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from layered import Net, batches, begin, copied, design, learn, merged, wander, weights_of
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.errors import Refused
from holdfast.methods import Merge
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import ToyTraining, make_batch


def test_only_shared_weights_change_and_no_moment() -> None:
    toy = ToyTraining(Merge(rows=20))
    toy.begin("one")
    toy.learn()
    toy.end()
    first = toy.weights()
    toy.begin("two")
    assert set(toy.weights()) > set(first)
    toy.learn()
    before = toy.everything()
    heads = toy.weights()
    toy.end()
    after = toy.everything()
    for key in before:
        if key.startswith("optimizer") or "classifier" in key:
            same({key: after[key]}, {key: before[key]})
    for key, w in toy.weights().items():
        assert torch.equal(w, heads[key]) == ("classifier" in key), key


def test_the_first_task_stays_as_it_was_learned() -> None:
    model = Net(nn.Linear(4, 3))
    bound, _, end = learn(Merge(), model, [batches(4, x=torch.randn(6, 4))])
    same(copied(model), end[0])
    assert "start" not in bound.states["merge"].weights


def test_a_start_that_the_caller_keeps_is_not_copied() -> None:
    torch.manual_seed(0)
    x, z, layer = torch.randn(9, 4), torch.randn(9, 4), nn.Linear(4, 3)
    found, held = [], []
    for keeps in (False, True):
        model = Net(copy.deepcopy(layer))
        bound = Recipe(methods=[Merge()]).unbound(seed=0)
        begin(bound, "one", model)
        bound.end_task(batches(4, x=x))
        kept = {n: w.clone() for n, w in copied(model).items() if n.startswith("encoder")}
        begin(bound, "two", model, start=functools.partial(dict, kept) if keeps else None)
        held.append(bound.states["merge"].bytes())
        wander(model)
        bound.end_task(batches(4, x=z))
        found.append({n: w for n, w in copied(model).items() if n.startswith("encoder")})
        assert "start" not in bound.states["merge"].weights
    same(found[0], found[1])
    assert held == [4 * (25 + 15), 4 * 25]  # G of (4 + 1)², and a copy of the layer


def test_a_start_that_nobody_kept_is_refused() -> None:
    toy = ToyTraining(Merge(rows=20))
    toy.begin("one")
    toy.learn()
    toy.end()
    toy.begin("two")
    toy.learn()
    toy.bound.states["merge"].weights.pop("start")  # as of a state that was saved with start=
    with pytest.raises(Refused, match=r"merge.*began with were not kept.*start="):
        toy.end()


def test_tasks_taken_over_are_not_merged_but_added_up() -> None:
    x, z, model = torch.randn(6, 4), torch.randn(5, 4), Net(nn.Linear(4, 3))
    bound = Recipe(methods=[Merge()]).unbound(seed=0)
    before = copied(model)
    for task, data in (("one", x), ("two", z)):
        bound.remember(task, model, batches(4, x=data), shared=model.encoder)
    same(copied(model), before)
    rows_ = [torch.cat([t, torch.ones(len(t), 1)], 1) for t in (x, z)]
    expected = sum(r.T @ r / len(r) for r in rows_)
    torch.testing.assert_close(bound.states["merge"].tensors["gram"]["encoder.weight"][0], expected)


def chosen(scores: list[float], choose: float) -> tuple[Bound, list[Tensor]]:
    """Merge with a bound that gives these scores in turn; the weights at each moment."""
    torch.manual_seed(0)
    x, z, model = torch.randn(20, 4), torch.randn(20, 4), Net(nn.Linear(4, 3))
    bound = Recipe(methods=[Merge(choose=choose, strength=2.0)]).unbound(seed=0)
    begin(bound, "one", model)
    bound.end_task(batches(5, x=x))
    begin(bound, "two", model)
    wander(model)
    seen: list[Tensor] = []
    queue: Iterator[float] = iter(scores)

    def evaluate() -> dict[str, float]:
        seen.append(copied(model)["encoder.weight"])
        return {"score": next(queue)}

    bound.evaluate = evaluate
    bound.end_task(batches(5, x=z))
    assert next(queue, None) is None
    return bound, [*seen, copied(model)["encoder.weight"]]


@pytest.mark.parametrize(
    ("scores", "strength"),
    [
        ([0.9, 0.88], 20.0),  # the largest costs no more
        ([0.9, 0.8, 0.88], 6.0),
        ([0.9, 0.8, 0.8799, 0.9], 2.0),
        ([0.9, 0.1, 0.1, 0.1, 0.1], 0.6),  # none is good enough: the smallest
    ],
)
def test_the_largest_strength_within_tolerance_is_chosen(
    scores: list[float], strength: float
) -> None:
    bound, seen = chosen(scores, 0.02)
    assert bound.states["merge"].numbers["strength"] == pytest.approx(strength)
    torch.manual_seed(0)
    x, z, model = torch.randn(20, 4), torch.randn(20, 4), Net(nn.Linear(4, 3))
    expected = Recipe(methods=[Merge(strength=strength)]).unbound(seed=0)
    begin(expected, "one", model)
    expected.end_task(batches(5, x=x))
    begin(expected, "two", model)
    wander(model)
    learned = copied(model)["encoder.weight"]
    expected.end_task(batches(5, x=z))
    assert torch.equal(seen[0], learned)  # scored before anything was merged
    # Of the learned weights, not of what a strength tried before has made of them.
    torch.testing.assert_close(seen[-1], copied(model)["encoder.weight"], rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_are_merged_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    x, z, layer = torch.randn(20, 4), torch.randn(20, 4), nn.Linear(4, 3)
    x, z = x.bfloat16(), z.bfloat16()
    model = Net(layer).bfloat16()
    _, start, end = learn(Merge(), model, [batches(7, x=x), batches(7, x=z)])
    before, after = (weights_of(layer, w[1]).float() for w in (start, end))
    reference = nn.Linear(4, 3)
    expected = merged(
        design(reference, x.float()), design(reference, z.float()), before, after, 1.0, 1e-4
    )
    found = weights_of(layer, copied(model))
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-8, atol=0)


def test_what_did_not_move_stays_bit_for_bit() -> None:
    """Also weights that float32 cannot hold."""
    x, model = torch.randn(6, 4), Net(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))).double()
    bound = Recipe(methods=[Merge()]).unbound(seed=0)
    for task in ("one", "two"):
        begin(bound, task, model)
        before = copied(model)
        bound.end_task(batches(4, x=x.double()))
    same(copied(model), before)


def test_a_layer_that_one_task_alone_calls_stays_as_that_task_left_it() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[-1] == 4 else self.b(x)

    model = Net(Either())
    tasks = [batches(4, x=torch.randn(6, n)) for n in (4, 5)]
    bound, start, end = learn(Merge(others=0.3), model, tasks)
    now = copied(model)
    assert torch.equal(now["encoder.a.weight"], start[1]["encoder.a.weight"])
    assert torch.equal(now["encoder.a.bias"], start[1]["encoder.a.bias"])
    assert torch.equal(now["encoder.b.weight"], end[1]["encoder.b.weight"])
    assert torch.equal(now["encoder.b.bias"], end[1]["encoder.b.bias"])
    assert bound.states["merge"].numbers["readers"].keys() == {"encoder.a.weight",
                                                               "encoder.b.weight"}  # fmt: skip


def test_inputs_that_are_not_finite_are_refused_before_anything_is_written() -> None:
    x, model = torch.randn(6, 4), Net(nn.Linear(4, 3))
    bound = Recipe(methods=[Merge()]).unbound(seed=0)
    begin(bound, "one", model)
    bound.end_task(batches(4, x=x))
    begin(bound, "two", model)
    wander(model)
    learned, held = copied(model), bound.states["merge"].tensors["gram"]["encoder.weight"].clone()
    with pytest.raises(Refused, match=r"encoder\.weight: the inputs of this layer are not finite"):
        bound.end_task(batches(4, x=torch.full((6, 4), torch.nan)))
    same(copied(model), learned)
    assert torch.equal(bound.states["merge"].tensors["gram"]["encoder.weight"], held)


def test_rows_are_asked_for() -> None:
    toy = ToyTraining(Merge())
    toy.begin("one")
    with pytest.raises(Refused, match=r"merge reads the rows.*pass data="):
        toy.bound.end_task()


@pytest.mark.parametrize("step", [0, 5])
def test_resumed_within_the_second_task(step: int) -> None:
    """Norms solved for: their sums and the start weights come back too."""
    method = Merge(norms="solve", rows=20)
    undisturbed, first = ToyTraining(method).learn_all(), ToyTraining(method)
    first.begin("one")
    first.learn()
    first.end()
    first.begin("two")
    first.learn(0, step)
    second = ToyTraining.load(first.save(), method, closed=False)
    second.learn(step)
    second.end()
    same(second.everything(), undisturbed.everything())


def test_batches_of_the_toy_are_what_is_measured() -> None:
    """End to end: the embedding's counts are those of the rows that the task ended with."""
    toy = ToyTraining(Merge(rows=20))
    toy.begin("one")
    toy.end()
    tokens = torch.cat([make_batch("one", i)["tokens"] for i in range(3)])[:20]
    expected = torch.bincount(tokens.flatten(), minlength=11) / 20
    state = toy.bound.states["merge"]
    torch.testing.assert_close(state.tensors["counts"]["encoder.embeddings.weight"], expected)
