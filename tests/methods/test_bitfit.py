"""BitFit: biases and head move, nothing else by a bit, and the backward pass is cut and mended."""

from __future__ import annotations

import models
import pytest
import torch
from subnetworks import both_tasks
from torch import nn

from holdfast.engine.method import Method
from holdfast.engine.peft import LoRA
from holdfast.errors import Refused
from holdfast.methods.bitfit import BitFit
from holdfast.recipe import Recipe
from holdfast.testing.toy import ToyTraining

CONTRACT: list[tuple[Method, float]] = [(BitFit(), 0)]


def test_biases_and_head_train_and_nothing_else_has_moments() -> None:
    for toy, seen in both_tasks(BitFit()):
        for name, w in seen[-1].items():
            if name.endswith("bias") or name.startswith(f"{toy.bound.task}/"):
                assert (w != seen[0][name]).all(), name
            else:
                assert torch.equal(w, seen[0][name]), name
                assert toy.bound.weights[name] not in toy.optimizer.state


def test_a_table_that_is_called_bias_is_none() -> None:
    """T5's relative_attention_bias.weight."""
    model = nn.Module()
    model.relative_attention_bias, model.out = nn.Embedding(4, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[BitFit()]).bind(model, optimizer, total_steps=3)
    assert bound.states["bitfit"].numbers["out"] == ["relative_attention_bias.weight", "out.weight"]


def test_no_gradient_is_computed_that_is_not_needed_until_the_task_ends() -> None:
    frozen = "encoder.layers.0.up.weight"  # by the user: it stays so
    toy = ToyTraining(BitFit(), frozen={frozen})
    toy.begin("one")
    toy.backward(0)
    none = {n for n, w in toy.bound.weights.items() if w.grad is None}
    matrices = {f"encoder.layers.{i}.{m}.weight" for i in (0, 1) for m in ("up", "down", "norm")}
    assert none == matrices
    assert toy.bound.weights["encoder.embeddings.weight"].grad is not None
    toy.optimizer.step()
    for mend in (toy.end, toy.bound.unbind):
        mend()
        assert [n for n, w in toy.bound.weights.items() if not w.requires_grad] == [frozen]


def test_under_activation_checkpointing_every_bias_gets_its_gradient() -> None:
    """The reentrant kind computes none in a layer whose input needs none."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Recipe(methods=[BitFit()]).bind(model.train(), optimizer, total_steps=3)
        torch.manual_seed(1)
        ids = torch.arange(6).view(2, 3)
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if n.endswith("bias")})
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, msg=name)


def test_gradients_come_back_where_a_task_fails_to_begin() -> None:
    class Late(Method):
        name = "late"

        def begin_task(self, view: object) -> None:
            raise Refused("too late")

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Refused, match="too late"):
        Recipe(methods=[BitFit(), Late()]).bind(model, optimizer, total_steps=3)
    assert all(p.requires_grad for p in model.parameters())


def test_every_recurrent_bias_counts_and_none_is_refused() -> None:
    gru = nn.GRU(3, 4)
    optimizer = torch.optim.SGD(gru.parameters(), lr=0.1)
    bound = Recipe(methods=[BitFit()]).bind(gru, optimizer, total_steps=3)
    assert bound.states["bitfit"].numbers["out"] == ["weight_ih_l0", "weight_hh_l0"]
    plain = nn.Linear(3, 4, bias=False)
    with pytest.raises(Refused, match="no bias of the shared network trains; take sift"):
        Recipe(methods=[BitFit()]).bind(
            plain, torch.optim.SGD(plain.parameters(), lr=0.1), total_steps=3
        )


def test_beside_adapters_no_bias_trains() -> None:
    pytest.importorskip("peft")
    recipe = Recipe(methods=[BitFit()], peft=LoRA(rank=2))
    model = recipe.prepare(models.bert())
    optimizer = torch.optim.SGD(recipe.param_groups(model, lr=0.1))
    with pytest.raises(Refused, match="no bias of the shared network trains; leave out peft"):
        recipe.bind(model, optimizer, total_steps=3)
