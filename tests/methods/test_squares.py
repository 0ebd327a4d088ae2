"""One backward pass a batch gives the same Fisher information as one a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from holdfast.engine.bound import Bound
from holdfast.methods.common.importance import diagonal_fisher
from holdfast.methods.common.squares import Layers

SMALL = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "num_labels": 3}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_hidden_layers=2, **SMALL))


def gpt2() -> nn.Module:
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0)
    )


def albert() -> nn.Module:
    return AlbertForSequenceClassification(
        AlbertConfig(vocab_size=40, embedding_size=8, num_hidden_layers=2, **SMALL)
    )


def batches() -> list[dict[str, Any]]:
    """Rows of several lengths, with repeated tokens and padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 12, (10, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 5, 3, 7, 2, 6, 7, 4, 7, 7)):
        ids[row, length:] = 0
        mask[row, length:] = 0
    return [
        {"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, 10, 4)
    ]


def both(make: Any, labels: Any, rows: int | None) -> tuple[dict, dict, bool]:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Bound(())
    bound.begin_task("a", optimizer, 1, model=model)
    found = [
        diagonal_fisher(
            lambda b: model(**b), batches(), bound.weights, modules=modules, labels=labels,
            rows=rows, generator=torch.Generator().manual_seed(1),
        )
        for modules in (None, bound.owners)
    ]  # fmt: skip
    return *found, Layers.owning(bound.weights, bound.owners) is not None


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("labels", ["sampled", "expected"])
@pytest.mark.parametrize("make", [bert, gpt2, albert])
def test_a_batch_at_once_equals_row_by_row(make: Any, labels: Any, rows: int | None) -> None:
    slow, fast, _ = both(make, labels, rows)
    assert slow.keys() == fast.keys()
    for name, f in slow.items():
        assert torch.allclose(fast[name], f, rtol=1e-9, atol=1e-14), name
    assert sum(float(f.sum()) for f in slow.values()) > 0


def test_the_layers_of_bert_and_gpt2_are_all_known() -> None:
    assert both(bert, "sampled", 4)[2] and both(gpt2, "sampled", 4)[2]


def test_a_layer_of_another_kind_is_not_guessed_at() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).tanh()

    layer = Odd(2, 2)
    assert Layers.owning({"w": layer.weight}, {"w": (layer,)}) is None
    assert Layers.owning({"w": (conv := nn.Conv1d(2, 2, 1)).weight}, {"w": (conv,)}) is None
    tied = nn.Linear(2, 2)
    assert Layers.owning({"w": tied.weight}, {"w": (tied, tied)}) is None


def test_layers_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    model = bert().eval()
    grads = [p.grad for p in model.parameters()]
    both(bert, "sampled", 4)
    assert grads == [None] * len(grads)
    assert not any(m._forward_hooks for m in model.modules())
