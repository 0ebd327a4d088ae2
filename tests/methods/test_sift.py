"""SIFT: which entries it chooses, that no other moves, and what decay takes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from subnetworks import both_tasks, scripted
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods.bitfit import BitFit
from holdfast.methods.sift import SIFT
from holdfast.recipe import Recipe

CONTRACT: list[tuple[Method, float]] = [
    (SIFT(), 4),
    (SIFT(share=0.2, batches=2, modules="all", head=False, freeze="gradient", decay="none"), 4),
    (SIFT(score="random", share=0.3, batches=3, others="train", decay="none"), 4),
]


def test_chooses_by_the_size_of_the_summed_gradient() -> None:
    """By hand. The sum of sizes is 6 3 1 1 4 6, the last gradient 3 2 1 1 2 1: both choose
    others."""
    given = [[[3.0, -1.0, 0.0], [0.0, 2.0, -5.0]], [[-3.0, -2.0, 1.0], [1.0, 2.0, -1.0]]]

    def scripts(step: int, name: str, shape: torch.Size) -> Tensor:
        return torch.tensor(given[step]) if step < 2 else torch.ones(shape)

    model = nn.Linear(3, 2, bias=False)
    _, seen = scripted(SIFT(share=0.3, batches=2), 5, model=model, gradients=scripts)
    assert torch.equal(seen[2]["weight"], seen[0]["weight"])
    moved = seen[5]["weight"] != seen[0]["weight"]
    # ⌈6 · .3⌉ = 2 of 0 3 1 1 4 6
    assert moved.tolist() == [[False, False, False], [False, True, True]]


def test_of_ties_the_first_are_chosen() -> None:
    model = nn.Linear(3, 2, bias=False)
    _, seen = scripted(SIFT(share=0.5), 4, model=model, gradients=lambda t, n, s: torch.ones(s))
    moved = seen[4]["weight"] != seen[0]["weight"]
    assert moved.tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.parametrize("score", ["gradient", "random"])
def test_exactly_the_share_moves_and_the_rest_not_by_a_bit(score: str) -> None:
    method = SIFT.from_dict({"share": 0.13, "batches": 3, "score": score})
    for toy, seen in both_tasks(method):
        covered = toy.bound.states["sift"].numbers["covered"]
        assert covered == [f"encoder.layers.{i}.{m}.weight" for i in (0, 1) for m in ("up", "down")]
        for name, w in seen[-1].items():
            moved = w != seen[0][name]
            if name in covered:
                assert torch.equal(seen[3][name], seen[0][name])  # while it chooses
                assert moved.sum() == math.ceil(Fraction("0.13") * w.numel())
                kept = toy.optimizer.state[toy.bound.weights[name]]
                assert kept["step"] == 6  # of 9: no moments while it chose
                assert not kept["exp_avg"][~moved].any() and kept["exp_avg"][moved].all()
            elif name in toy.bound.shared:
                assert not moved.any()
                assert toy.bound.weights[name] not in toy.optimizer.state
            else:
                assert moved.all(), "the head trains whole"


def test_the_control_is_as_large_and_another() -> None:
    masks = {}
    for score in ("gradient", "random"):
        _, seen = scripted(SIFT.from_dict({"share": 0.3, "score": score}), 3)
        masks[score] = seen[3]["weight"] != seen[0]["weight"]
    assert masks["gradient"].sum() == masks["random"].sum() == 9
    assert not torch.equal(*masks.values())


@pytest.mark.parametrize("score", ["gradient", "random"])
def test_without_decay_it_is_as_adam_without_decay(score: str) -> None:
    plain = SIFT.from_dict({"share": 0.3, "score": score})
    none = SIFT.from_dict({"share": 0.3, "score": score, "decay": "none"})
    _, expected = scripted(plain, 8, lr=0.05, weight_decay=0.0)
    _, found = scripted(none, 8, lr=0.05, weight_decay=0.3)
    _, decayed = scripted(plain, 8, lr=0.05, weight_decay=0.3)
    for name, w in expected[8].items():
        torch.testing.assert_close(found[8][name], w, rtol=1e-12, atol=1e-12)
    moved = expected[8]["weight"] != expected[0]["weight"]
    assert (decayed[8]["weight"] != found[8]["weight"])[moved].all()


def test_a_zeroed_gradient_alone_does_not_hold_a_weight() -> None:
    _, seen = scripted(SIFT(share=0.3, freeze="gradient"), 3)
    assert (seen[3]["weight"] != seen[0]["weight"]).all()  # decay moves what was not chosen


def test_others_train_or_rest() -> None:
    for others, moves in (("train", True), ("freeze", False)):
        _, seen = scripted(SIFT.from_dict({"others": others}), 3)
        assert bool((seen[3]["bias"] != seen[0]["bias"]).all()) == moves


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(Refused, match=r"sift\.batches: in a task of 3 steps nothing would move"):
        scripted(SIFT(batches=3), 3)
    sgd = {"optimizer": torch.optim.SGD, "lr": 0.1}
    with pytest.raises(Refused, match="the weight decay of SGD is in its gradient"):
        scripted(SIFT(decay="none"), 3, **sgd, weight_decay=0.1)  # type: ignore[arg-type]
    scripted(SIFT(decay="none"), 3, **sgd)  # type: ignore[arg-type]


def test_beside_bitfit_nothing_of_the_encoder_would_train() -> None:
    with pytest.raises(Refused, match="sift cannot stand beside bitfit: each freezes"):
        Recipe(methods=[BitFit(), SIFT()])
