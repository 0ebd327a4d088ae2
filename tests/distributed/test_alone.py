"""One process pays nothing for ranks: it tells nobody anything and looks at no tensor for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed as dist

from holdfast.engine.method import Method
from holdfast.methods import DPS, EWC, L2SP, Replay
from holdfast.ops import distributed
from holdfast.testing.toy import ToyTraining

SENDING = ("all_reduce", "all_gather", "broadcast", "barrier")
LOOKING = ("fingerprint", "number_of")


@pytest.mark.parametrize(
    "method", [DPS(stage=2), DPS(stage=2, score="retention"), EWC(), L2SP(), Replay(memory=4)]
)
def test_nothing_is_told_or_looked_at(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **how: Any) -> Any:
        raise AssertionError("for one process this is work for nothing")

    toy = ToyTraining(method, steps=5)  # a number seeds what each method draws
    for name in SENDING:
        monkeypatch.setattr(dist, name, never)
    for name in LOOKING:
        monkeypatch.setattr(distributed, name, never)
    assert (distributed.world(), distributed.rank()) == (1, 0)
    toy.learn_all()


def test_plain_tensors_pass_through_as_they_are() -> None:
    t = torch.arange(6.0).reshape(2, 3)
    assert distributed.local(t) is t and distributed.full(t) is t
    assert distributed.like(t, t) is t and distributed.beside(t, t) is t
    assert distributed.placement(t) == () and distributed.mean(t) == 2.5
    weight = torch.nn.Parameter(t)
    assert not distributed.sharded(weight) and distributed.local(weight) is weight
