"""Dropout: every kind of it takes the rate, and gets its own back."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import Dropout
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import ToyTraining

CONTRACT: list[tuple[Method, float]] = [(Dropout(p=0.2), 0)]  # as plain has it: it draws as often
ACCUMULATES = False  # other entries are dropped in each micro-batch


class Kinds(nn.Module):
    """A module's rate, a plain number as Transformers' models keep it, and torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.channels = nn.Dropout1d(0.2)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.3, batch_first=True)
        self.attend = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)
        self.attention_dropout, self.layerdrop, self.use_dropout, self.p = 0.5, 0.6, True, 0.7
        self.out = nn.Linear(4, 1)

    def rates(self) -> list[float]:
        return [self.drop.p, self.channels.p, self.lstm.dropout, self.attend.dropout,
                self.attention_dropout]  # fmt: skip

    def forward(self, x: torch.Tensor) -> Any:
        x = self.lstm(self.channels(x))[0]
        x = nn.functional.dropout(x, self.attention_dropout, self.training)
        return self.out(self.drop(self.attend(x, x, x)[0]))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_all_kinds_take_the_rate_and_get_their_own_back(p: float) -> None:
    model = Kinds()
    own, x = model.rates(), torch.randn(8, 3, 4)
    assert not torch.equal(model(x), model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[Dropout(p=p)]).bind(model, optimizer, total_steps=2)
    assert model.rates() == [p] * 5
    assert (model.layerdrop, model.use_dropout, model.p) == (0.6, True, 0.7)  # are no dropout
    assert torch.equal(model(x), model(x)) == (p == 0)
    bound.unbind()
    assert model.rates() == own


def test_a_published_model_trains_without_noise() -> None:
    model = models.bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    ids = torch.randint(5, 20, (2, 6))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe(methods=[Dropout()]).bind(model, optimizer, total_steps=2)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_resumed_run_has_it_too_and_gives_the_first_rates_back() -> None:
    toy = ToyTraining(Dropout())
    toy.begin("one")
    toy.learn(0, 4)
    again = ToyTraining.load(toy.save(), Dropout(), closed=False)
    for one in (toy, again):
        one.learn(4)
        one.end()
        one.begin("two")
        one.bound.unbind()
        assert {m.p for m in one.model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    same(again.weights(), toy.weights())


def test_a_network_without_dropout_is_told() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe(methods=[Dropout()]).bind(model, optimizer, total_steps=1).unbind()
    with pytest.raises(Refused, match="dropout: the network has none"):
        Recipe(methods=[Dropout(p=0.1)]).bind(model, optimizer, total_steps=1)
