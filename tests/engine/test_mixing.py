"""Stand-in weights: seen in training only, by every user of the weight, and without a trace."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine import mixing
from holdfast.errors import Refused
from holdfast.methods import DPS
from holdfast.recipe import Recipe

transformers = pytest.importorskip("transformers")


def install(model: nn.Module, mix: Any) -> Any:
    weights = dict(model.named_parameters())
    owners = {
        n: tuple(m for m in model.modules() for q in m._parameters.values() if q is p)
        for n, p in weights.items()
    }
    return mixing.install(weights, owners, mix)


def double(name: str, w: Tensor) -> Tensor:
    return 2 * w


def test_training_sees_the_stand_in_and_evaluation_the_weight() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    plain = model(x).detach()
    remove = install(model, double)
    torch.testing.assert_close(model(x), 2 * plain)
    assert torch.equal(model.eval()(x), plain)
    assert torch.equal(model.state_dict()["weight"], model._parameters["weight"])
    model.train()
    remove()
    assert type(model) is nn.Linear and torch.equal(model(x), plain)


def test_gradients_flow_through_the_stand_in() -> None:
    model = nn.Linear(3, 2, bias=False)
    install(model, lambda name, w: w * w)
    weight = model._parameters["weight"]
    assert weight is not None
    model(torch.ones(1, 3)).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_tied_weights_are_replaced_in_every_module() -> None:
    table, out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    out.weight = table.weight
    model = nn.ModuleList([table, out])
    names: list[str] = []

    def mix(name: str, w: Tensor) -> Tensor:
        names.append(name)
        return 0 * w

    remove = install(model, mix)
    assert not table(torch.tensor([1])).any() and not out(torch.ones(1, 3)).any()
    assert names == ["0.weight", "0.weight"]
    remove()
    assert table.weight is out.weight


def test_recurrent_layers_are_refused() -> None:
    with pytest.raises(Refused, match="weights of GRU cannot be mixed"):
        install(nn.GRU(3, 3), double)


def test_weights_can_still_be_assigned_moved_and_loaded() -> None:
    model = nn.Linear(3, 2, bias=False)
    install(model, double)
    model.weight = nn.Parameter(torch.ones(2, 3))
    assert torch.equal(model.weight, torch.full((2, 3), 2.0))
    model.load_state_dict({"weight": torch.full((2, 3), 5.0)})
    assert torch.equal(model.double().weight, torch.full((2, 3), 10.0, dtype=torch.float64))


def test_copies_and_pickles_are_plain() -> None:
    """A copied teacher must not go on mixing: it belongs to nobody's recipe."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Embedding(4, 2))
    x = torch.randn(4, 3)
    plain = model[0](x).detach()
    install(model, double)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for reference in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in reference] == [nn.Linear, nn.Embedding]
        assert torch.equal(reference[0](x), plain)
        assert reference[0].weight is not model._modules["0"]._parameters["weight"]
    torch.testing.assert_close(model[0](x), 2 * plain)  # and the model goes on


def bert(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, **more,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


BATCH = {"input_ids": torch.arange(12).view(3, 4), "labels": torch.tensor([0, 1, 1])}


def gradients(checkpointing: dict[str, bool] | None) -> list[dict[str, Tensor]]:
    """Of steps in an accumulating and a masking stage under Mix, with dropout."""
    model = bert()
    if checkpointing is not None:
        # Transformers renamed it; versions that have both warn of the old name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)(checkpointing)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    bound = Recipe(methods=[DPS(mix=True, stage=2)]).bind(model, optimizer, total_steps=9)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(**BATCH).loss.backward()
        found.append({n: p.grad.clone() for n, p in bound.weights.items() if p.grad is not None})
        optimizer.step()
    return found


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain = gradients(None)
    for reentrant in (False, True):
        checkpointed = gradients({"use_reentrant": reentrant})
        for step, expected in enumerate(plain):
            assert checkpointed[step].keys() == expected.keys()
            for name, grad in expected.items():
                torch.testing.assert_close(
                    checkpointed[step][name], grad, msg=f"{name}, step {step}, {reentrant=}"
                )
    assert any((plain[0][n] == 0).any() for n in plain[0])  # noise was at work


def test_saving_a_mixed_model(tmp_path: Path) -> None:
    model = bert()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Recipe(methods=[DPS(mix=True, stage=2)]).bind(model, optimizer, total_steps=9)
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    batch = {"input_ids": BATCH["input_ids"]}
    assert torch.equal(model.eval()(**batch).logits, again.eval()(**batch).logits)
