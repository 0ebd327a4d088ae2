"""ReInit: what begins anew, drawn how, and how often."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
import transformers
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.engine.peft import LoRA
from holdfast.errors import Refused
from holdfast.methods import ReInit
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier

CONTRACT: list[tuple[Method, float]] = [(ReInit(), 0), (ReInit(layers=1, pooler=False), 0)]


def bert(folder: Path, *, layers: int = 3) -> nn.Module:
    """A loaded model, whose tensors Transformers has marked as such, unlike any fresh one."""
    config = models.bert_config(
        num_hidden_layers=layers, hidden_size=64, num_attention_heads=2, initializer_range=0.02
    )
    with torch.no_grad():
        made = transformers.BertForSequenceClassification(config)
        for p in made.parameters():
            p.add_(7)
    made.save_pretrained(folder)
    found: nn.Module = transformers.BertForSequenceClassification.from_pretrained(folder)
    return found


def prepared(model: nn.Module, method: ReInit, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    assert Recipe(methods=[method]).prepare(model) is model
    return models.weights(model)


def changed(model: nn.Module, method: ReInit) -> set[str]:
    before = models.weights(model)
    after = prepared(model, method)
    return {n for n, w in after.items() if not torch.equal(w, before[n])}


@pytest.mark.parametrize(("layers", "pooler"), [(1, True), (2, False), (0, True), (3, False)])
def test_only_the_top_layers_and_the_pooler_begin_anew(
    layers: int, pooler: bool, tmp_path: Path
) -> None:
    model = bert(tmp_path)
    tops = [f".layer.{i}." for i in range(3 - layers, 3)] + [".pooler."] * pooler
    expected = {n for n, _ in model.named_parameters() if any(top in n for top in tops)}
    assert changed(model, ReInit(layers=layers, pooler=pooler)) == expected and expected


def test_values_have_the_spread_of_the_models_own_initialiser(tmp_path: Path) -> None:
    """Normal(0, 0.02), norms 1, biases 0: not torch's uniform of ±1 / √64."""
    model = bert(tmp_path)
    for name, w in prepared(model, ReInit(layers=1)).items():
        if ".layer.2." not in name and "pooler" not in name:
            continue
        if "LayerNorm.weight" in name:
            assert (w == 1).all()
        elif name.endswith("bias"):
            assert not w.any()
        else:
            assert w.std().item() == pytest.approx(0.02, rel=0.1) and w.abs().max() > 0.05
            assert w.mean().item() == pytest.approx(0, abs=0.002)


def test_a_network_without_an_initialiser_draws_as_its_modules_do() -> None:
    model = Classifier()
    assert changed(model, ReInit(layers=1)) == {
        f"encoder.layers.1.{n}" for n in ("up.weight", "up.bias", "down.weight", "down.bias")
    }  # the norm is 1 and 0 again
    weight = model.encoder.get_submodule("layers.1.up").weight
    assert isinstance(weight, Tensor) and weight.abs().max() <= 1 / 6**0.5


def test_a_weight_that_no_initialiser_knows_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.a = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(Scaled() for _ in range(2)))
    with pytest.raises(Refused, match=r"1\.1\.scale: no initialiser draws this weight"):
        ReInit(layers=1).prepare(model)


def test_the_seed_decides_and_torchs_random_state_is_kept(tmp_path: Path) -> None:
    one, same, other = (
        prepared(bert(tmp_path / str(i)), ReInit(), seed) for i, seed in enumerate((3, 3, 4))
    )
    name = "bert.encoder.layer.2.output.dense.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_torchs_random_state_stays_as_it_was() -> None:
    model = Classifier()
    state = torch.get_rng_state()
    ReInit().prepare(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_after_a_task_that_was_learned_elsewhere_nothing_is_asked_to_begin_anew() -> None:
    bound, model = Recipe(methods=[ReInit()]).unbound(), Classifier()
    bound.remember("one", model, [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound.begin_task("two", optimizer, 3, model=model)


def test_what_cannot_begin_anew_is_refused() -> None:
    with pytest.raises(Refused, match=r"reinit\.layers: the model has 2 layers, not 3"):
        ReInit(layers=3).prepare(Classifier())
    with pytest.raises(Refused, match="nothing begins anew"):
        ReInit(layers=0).prepare(Classifier())
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Refused, match=r"not prepared.*recipe\.prepare"):
        Recipe(methods=[ReInit()]).bind(model, optimizer, total_steps=3)
    recipe = Recipe(methods=[ReInit()], peft=LoRA(targets=("up",)))
    model = recipe.prepare(Classifier())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Refused, match="adapters would leave the new layers"):
        recipe.bind(model, optimizer, total_steps=3)
