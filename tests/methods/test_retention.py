"""DPS by retention: which entries move, from which score, and that the first task is plain."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.errors import Refused
from holdfast.methods.dps import DPS
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

STAGE, DROP = 3, 0.6
METHOD = DPS(score="retention", drop=DROP, stage=STAGE, fisher_labels="expected", fisher_rows=6)


def after_first_task() -> ToyTraining:
    toy = ToyTraining(METHOD)
    toy.begin("one")
    toy.learn()
    toy.end()
    return toy


def fisher(model: Classifier, names: list[str], task: str) -> dict[str, Tensor]:
    """E_x Σ_y p(y|x) (∂ log p(y|x) / ∂w)², row by row and class by class."""
    model.eval()
    total = {n: torch.zeros_like(model.get_parameter(n)) for n in names}
    tokens = make_batch(task, 0)["tokens"][:6]
    for row in tokens:
        for y in range(3):
            model.zero_grad()
            log_p = model(row[None]).logits.log_softmax(-1)[0]
            log_p[y].backward()
            for n in names:
                grad = model.get_parameter(n).grad
                assert grad is not None
                total[n] += log_p[y].exp().detach() * grad**2 / 6
    model.zero_grad()
    model.train()
    return total


def test_first_task_is_bit_for_bit_as_without_it() -> None:
    plain, ours = ToyTraining(None), ToyTraining(METHOD)
    for toy in (plain, ours):
        toy.begin("one")
        toy.learn()
    for name, w in plain.weights().items():
        assert torch.equal(ours.weights()[name], w), name


def test_fisher_is_summed_over_tasks() -> None:
    toy = after_first_task()
    slots = toy.bound.states["dps"].weights
    model = toy.models["one"]
    assert isinstance(model, Classifier)
    names = list(slots["fisher"])
    assert names == [f"encoder.layers.{i}.{m}.weight" for i in (0, 1) for m in ("up", "down")]
    first = fisher(model, names, "one")
    for n in names:
        torch.testing.assert_close(slots["fisher"][n], first[n])
    toy.begin("two")
    toy.learn()
    toy.end()
    model = toy.models["two"]
    assert isinstance(model, Classifier)
    # The rows of task two are those that `ToyTraining.end` offers: batches of "two".
    second = fisher(model, names, "two")
    for n in names:
        torch.testing.assert_close(slots["fisher"][n], first[n] + second[n])


def test_only_entries_of_highest_score_move() -> None:
    """score = Σ g² / (F + mean F) over the stage before, g before masking and clipping."""
    toy = after_first_task()
    remembered = {n: f.clone() for n, f in toy.bound.states["dps"].weights["fisher"].items()}
    toy.begin("two")
    at = dict(toy.model.named_parameters())
    sums = {n: torch.zeros_like(f) for n, f in remembered.items()}
    movable = {n: torch.zeros_like(f, dtype=torch.bool) for n, f in remembered.items()}
    for step in range(toy.steps):
        before = {n: p.detach().clone() for n, p in at.items()}
        toy.backward(step)
        for n in sums:
            grad = at[n].grad
            assert grad is not None
            sums[n] += grad**2
        toy.optimizer.step()
        for n, p in at.items():
            moved = p.detach() != before[n]
            if n not in movable:
                assert moved.any(), f"{n} is not covered"
            else:
                assert not moved[~movable[n]].any(), f"{n} in step {step}"
                if step >= STAGE:
                    assert moved[movable[n]].any()
        if (step + 1) % STAGE == 0:
            for n, f in remembered.items():
                score = sums[n] / (f + f.mean())
                rank = math.ceil(score.numel() * (1 - Fraction(str(DROP))))
                movable[n] = score >= score.flatten().sort(descending=True).values[rank - 1]
                sums[n] = torch.zeros_like(f)


def bind_two(momentum: float) -> tuple[nn.Linear, torch.optim.Optimizer, Bound]:
    """A linear model in its second task, with a Fisher that we choose."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    method = DPS(score="retention", drop=0.5, stage=1)
    bound = Recipe(methods=[method]).unbound()
    bound.states["dps"].weights["fisher"] = {"0.weight": torch.tensor([[0.0, 1.0], [3.0, 0.0]])}
    bound.begin_task("two", optimizer, 10, model=model)
    first = model[0]
    assert isinstance(first, nn.Linear)
    return first, optimizer, bound


def test_a_stage_as_long_as_the_task_is_refused() -> None:
    """Nothing that old tasks need would move in it."""
    for stage, steps, moves in ((3, 3, False), (4, 3, False), (2, 3, True), (0.5, 1, False)):
        model = Classifier()
        bound = Recipe(methods=[DPS(score="retention", stage=stage)]).unbound()
        for task in ("one", "two"):  # a task of one step, but nothing is learned in it
            bound.remember(task, model, [make_batch(task, 0)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        begin = functools.partial(bound.begin_task, "three", optimizer, steps, model=model)
        if moves:
            begin()
        else:
            with pytest.raises(Refused, match=rf"dps\.stage: in a task of {steps} steps nothing"):
                begin()


def test_score_by_hand() -> None:
    layer, optimizer, _ = bind_two(0.0)
    grad = torch.tensor([[1.0, 1.5], [4.0, 0.9]])
    # mean F = 1; scores 1/1, 2.25/2, 16/4, 0.81/1 → 1, 1.125, 4, 0.81: the middle two move.
    # (Without mean F the zeros would win; without F, the order is 4, 1.5, 1, 0.9, too; with g
    # unsquared, 1, .75, 1, .9: the first column would.)
    start = layer.weight.detach().clone()
    for _ in range(2):
        layer.weight.grad = grad.clone()
        optimizer.step()
    moved = layer.weight.detach() != start
    assert moved.tolist() == [[False, True], [True, False]]


def test_masking_is_of_the_stage_before_with_momentum_kept_out() -> None:
    layer, optimizer, bound = bind_two(0.9)
    for g in ([[0.0, 9.0], [9.0, 0.0]], [[9.0, 1.0], [1.0, 9.0]], [[9.0, 1.0], [1.0, 9.0]]):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.tensor(g)
        optimizer.step()
    moved = layer.weight.detach() != before
    # The second stage's gradients chose the diagonal; the others had momentum and yet stay.
    assert moved.tolist() == [[True, False], [False, True]]
    assert bound.views["dps"].moments("0.weight")["momentum_buffer"][0, 1] != 0


def test_optimizer_learns_nothing_of_what_is_held_in_the_first_stage() -> None:
    """Left out of the step, not fed zeros: Adam has no moments of these tensors yet."""
    toy = after_first_task()
    toy.begin("two")
    view = toy.bound.views["dps"]
    covered = view.state.numbers["covered"]
    toy.learn(0, STAGE)
    for name in view.weights:
        assert bool(view.moments(name)) is (name not in covered), name
    toy.learn(STAGE, STAGE + 1)
    assert all(view.moments(name) for name in covered)


def test_what_the_new_task_no_longer_pulls_at_stays() -> None:
    """With a threshold of zero every entry ties: only those with a gradient may move, whatever
    momentum the others have."""
    layer, optimizer, _ = bind_two(0.9)
    for g in (1.0, 1.0, 0.0, 0.0):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.tensor([[0.0, g], [2.0, 0.0]])
        optimizer.step()
    assert optimizer.state[layer.weight]["momentum_buffer"][0, 1] != 0
    assert (layer.weight.detach() != before).tolist() == [[False, False], [True, False]]


def test_the_head_of_a_model_without_heads_of_its_own_learns_at_once() -> None:
    """It is shared, and yet the new task's: held in the first stage, nothing could be learned."""
    _, optimizer, bound = bind_two(0.0)
    view = bound.views["dps"]
    assert view.parts["1.weight"] == "head" and "1.weight" in view.shared
    assert view.state.numbers["covered"] == ["0.weight"]
    before = {n: w.detach().clone() for n, w in view.weights.items()}
    for w in view.weights.values():
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert {n for n, w in view.weights.items() if not torch.equal(w, before[n])} == {"1.weight"}


def test_a_shared_layer_behind_the_blocks_is_covered_too() -> None:
    """A pooler is in the part "head", but all tasks read it."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=8)  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[METHOD]).bind(model, optimizer, total_steps=9, task="one")
    covered = METHOD.covered(bound.views["dps"])
    assert "bert.pooler.dense.weight" in covered
    assert not [n for n in covered if "classifier" in n]
