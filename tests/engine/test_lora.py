"""LoRA on a model: what learns, what is folded in and taken out again, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import arguments, collate, rows, same, weights
from torch import nn

import holdfast
from holdfast import LoRA, Recipe, RecipeCallback, Refused
from holdfast.engine.lora import folded
from holdfast.training.checkpoints import ADAPTERS

MAKERS: dict[str, Callable[..., Any]] = {
    "bert": models.bert, "gpt2": models.gpt2, "llama": models.llama, "t5": models.t5,
}  # fmt: skip


def moved(name: str) -> tuple[Any, Any]:
    """A model with adapters that are not 0, and what it is called with."""
    model = LoRA(rank=2, alpha=3.0).prepare(MAKERS[name]()).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_B." in n:
                p.copy_(torch.randn(p.shape, generator=draw))
    ids = torch.randint(5, models.SIZE, (2, 6), generator=draw)
    return model, {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}


@pytest.mark.parametrize("name", MAKERS)
def test_a_fresh_adapter_changes_no_output_and_only_it_and_a_head_learn(name: str) -> None:
    plain = MAKERS[name]().eval()
    model = LoRA(rank=2).prepare(MAKERS[name]()).eval()
    ids = torch.arange(5, 11)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}
    with torch.no_grad():  # which gradients are asked for decides on T5's attention kernel
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {"classifier.weight", "classifier.bias"} if name == "bert" else set()
    assert {n for n in learning if ".lora_" not in n} == head
    matrices = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)
                or type(m).__name__ == "Conv1D"]  # fmt: skip
    spared = {"bert": {"classifier"}}.get(name, {"lm_head"})
    assert len(learning - head) == 2 * len({*matrices} - spared)
    held = {n for g in Recipe(lora=LoRA()).param_groups(model, lr=1.0) for n in g["param_names"]}
    assert len(held) == len(learning)


@pytest.mark.parametrize("name", MAKERS)
def test_folded_it_is_the_plain_model_and_then_as_it_was(name: str, tmp_path: Path) -> None:
    model, inputs = moved(name)
    before, says, plain = weights(model), model(**inputs).logits, MAKERS[name]().eval()
    with folded(model):
        assert list(model.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(model(**inputs).logits, says, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
    assert same(weights(model), before) and torch.equal(model(**inputs).logits, says)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, says, atol=1e-5, rtol=1e-5)
    assert (plain(**inputs).logits - says).abs().max() > 0.1
    with pytest.raises(ZeroDivisionError), folded(model):
        raise ZeroDivisionError
    assert same(weights(model), before)


def test_bfloat16_is_folded_in_its_own_type() -> None:
    model = LoRA(rank=2).prepare(models.llama().to(torch.bfloat16))
    with folded(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- in a Trainer ---------------------------------------------------------------------------------


def trainer(out: Path, recipe: Recipe, model: Any = None, **more: Any) -> Any:
    made = holdfast.Trainer(
        model=models.bert() if model is None else model, args=arguments(out, **more),
        train_dataset=rows(), eval_dataset=rows(8, seed=5), data_collator=collate, recipe=recipe,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


def test_what_a_trainer_saves_is_an_ordinary_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, Recipe(lora=LoRA(rank=2)), save_strategy="epoch")
    made.train()
    made.save_model(tmp_path / "end")
    batch = collate(rows(4))
    says = made.model.eval()(**batch).logits
    for folder in (tmp_path / "end", tmp_path / "checkpoint-6"):
        model, told = type(made.model).from_pretrained(folder, output_loading_info=True)
        assert not any(told.values())
        torch.testing.assert_close(model.eval()(**batch).logits, says, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "end" / ADAPTERS).exists()
    with pytest.raises(Refused, match="saved with other settings"):
        trainer(tmp_path, Recipe()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    with pytest.raises(Refused, match="lora_A"):
        other = trainer(tmp_path, Recipe(lora=LoRA(rank=3)))
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    plain = trainer(tmp_path / "plain", Recipe(), save_strategy="epoch")
    plain.train()
    with pytest.raises(Refused, match="go on with the recipe it was saved with"):
        other.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-6"))


def test_the_best_model_is_put_back_with_its_adapters(tmp_path: Path) -> None:
    seen: dict[int, Any] = {}

    class Falling(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            more["metrics"]["eval_loss"] = abs(state.global_step - 3.0)  # step 3 is the best
            seen[state.global_step] = weights(more["model"])

    made = trainer(tmp_path, Recipe(lora=LoRA(rank=2)), save_strategy="steps", save_steps=3,
                   eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)  # fmt: skip
    made.add_callback(Falling())
    made.train()
    assert same(weights(made.model), seen[3]) and not same(seen[3], seen[6])


def test_adapters_of_ones_own_are_left_to_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    made = trainer(tmp_path, Recipe(), peft.get_peft_model(models.bert(), config))
    made.train()
    made.save_model(tmp_path / "end")
    assert (tmp_path / "end" / "adapter_model.safetensors").is_file()
    with pytest.raises(Refused, match="has adapters already"):
        trainer(tmp_path, Recipe(lora=LoRA()), made.model)


# --- refused --------------------------------------------------------------------------------------


def test_what_cannot_be_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, setting, says in (
        (models.bert(), LoRA(targets=("querry",)), "no linear layer 'querry'.*'query'"),
        (models.gpt2(), LoRA(targets=("lm_head",)), "shares its weight"),
        (models.bert(), LoRA(targets=("classifier",)), "no linear layer 'classifier'"),
    ):
        with pytest.raises(Refused, match=says):
            setting.prepare(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Refused, match="pip install peft"):
        LoRA().prepare(models.bert())


def test_a_model_that_was_not_prepared_is_not_trained_whole() -> None:
    recipe, model = Recipe(lora=LoRA()), models.bert()
    with pytest.raises(Refused, match=r"recipe\.prepare\(model\)"):
        recipe.bind(model, torch.optim.AdamW(model.parameters()), total_steps=1)
    with pytest.raises(Refused, match="was not prepared"):
        holdfast.Trainer(model=model, recipe=recipe, bound=recipe.unbound())
    with pytest.raises(Refused, match="use with_recipe"):
        RecipeCallback(recipe)
    with pytest.raises(Refused, match="must be a LoRA"):
        Recipe(lora={"rank": 8})  # type: ignore[arg-type]


def test_the_setting_in_a_file(tmp_path: Path) -> None:
    recipe = Recipe(lora=LoRA(rank=4, targets=("query", "value")))
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml").lora == recipe.lora
    assert "lora" not in Recipe().to_dict()  # recipes written before keep their hash
    assert Recipe.from_dict({"lora": True}).lora == LoRA()
    for wrong, says in (
        ({"rank": 0}, "lora.rank"), ({"rnak": 4}, "did you mean 'rank'"), (8, "lora: {rank: 8}"),
        ({"targets": "query"}, r"\['query'\]"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=says):
            Recipe.from_dict({"lora": wrong})


def test_a_module_of_ones_own_by_name() -> None:
    model = LoRA(targets=("layer",)).prepare(models.Plain())
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"layer.lora_{x}.default.weight" for x in "AB"}
