"""PEFT's methods on a model: what learns, what is folded in and taken out, what is refused."""

from __future__ import annotations

import copy
import re
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
from holdfast import GPM, PEFT, LoRA, Recipe, RecipeCallback, Refused
from holdfast.engine.forwarding import adapters, without_adapters
from holdfast.engine.peft import adapt, folded
from holdfast.errors import tell_once
from holdfast.training.checkpoints import ADAPTERS, BEFORE, load_adapters, save_adapters

MAKERS: dict[str, Callable[..., Any]] = {
    "bert": models.bert, "gpt2": models.gpt2, "llama": models.llama, "t5": models.t5,
}  # fmt: skip

# A name, the methods, how far they move what the model answers at first (by rounding: OSF adds
# U S V and subtracts it), and the weights that learn in a layer: (outputs, inputs) -> number.
TWO = ["query", "value", "q", "v", "q_proj", "v_proj"]
METHODS: dict[str, tuple[Any, float, Callable[[int, int], int]]] = {
    "lora": (PEFT("lora", r=2, lora_alpha=3), 0, lambda o, i: 2 * (o + i)),
    "dora": (PEFT("lora", r=2, use_dora=True), 0, lambda o, i: 2 * (o + i) + o),
    "rslora": (PEFT("lora", r=2, use_rslora=True), 0, lambda o, i: 2 * (o + i)),
    "ia3": (PEFT("ia3", target_modules="all-linear", feedforward_modules=[]), 0, lambda o, i: o),
    "osf": (PEFT("osf", effective_rank=4, target_modules="all-linear"), 2e-6,
            lambda o, i: (min(o, i) - 4) * (o + i + 1)),
    "shira": (PEFT("shira", r=2), 0, lambda o, i: 2 * (o + i)),
    "oft": (PEFT("oft", r=0, oft_block_size=4), 0, lambda o, i: i // 4 * 6),
    "boft": (PEFT("boft", boft_block_size=4), 0, lambda o, i: i // 4 * 16 + o),
    "shira, lora": ([PEFT("shira", r=2), PEFT("lora", r=2)], 0, lambda o, i: 4 * (o + i)),
}  # fmt: skip
LINEAR_ONLY = ("osf", "shira", "oft", "boft", "shira, lora")  # not for GPT-2's Conv1D
EACH = [(m, n) for m in METHODS for n in MAKERS if not (n == "gpt2" and m in LINEAR_ONLY)]


def inputs(name: str) -> dict[str, Any]:
    ids = torch.randint(5, models.SIZE, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}


def shaken(model: Any) -> Any:
    """Each weight that learns, but a head's, moved at random."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and not n.startswith("classifier"):
                p.add_(0.5 * torch.randn(p.shape, generator=draw).to(p.dtype))
    return model


def norms(name: str) -> PEFT:
    """`ln_tuning`: PEFT knows no BERT."""
    return PEFT("ln_tuning", **{"target_modules": ["LayerNorm"]} if name == "bert" else {})


@pytest.mark.parametrize(("method", "name"), EACH)
def test_a_fresh_adapter_changes_no_output_and_only_it_and_a_head_learn(
    method: str, name: str
) -> None:
    setting, apart, count = METHODS[method]
    plain, model = MAKERS[name]().eval(), adapt(MAKERS[name](), setting).eval()
    with torch.no_grad():  # which gradients are asked for decides on T5's attention kernel
        says, said = (m(**inputs(name)).logits for m in (model, plain))
    assert torch.equal(says, said) if not apart else (says - said).abs().max() < apart
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = {"classifier.weight", "classifier.bias"} if name == "bert" else set()
    assert {n for n in learning if re.search(r"classifier|lm_head", n)} == head
    # Each adapted layer, found in the plain model by its name, and what learns in it.
    found: dict[str, int] = {}
    for n, p in learning.items():
        if n not in head:
            layer = re.split(r"\.base_layer|\.(?:lora|ia3|osf|shira|oft|boft)_", n)[0]
            found[layer] = found.get(layer, 0) + p.numel()
    for layer, size in found.items():
        shape = plain.get_submodule(layer).weight.shape
        shape = shape[::-1] if name == "gpt2" else shape
        assert size == count(*shape), layer
    held = {n for g in Recipe(peft=setting).param_groups(model, lr=1.0) for n in g["param_names"]}
    assert len(held) == len(learning)


@pytest.mark.parametrize("name", MAKERS)
def test_norms_alone_learn(name: str) -> None:
    plain, model = MAKERS[name]().eval(), adapt(MAKERS[name](), norms(name)).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs(name)).logits, plain(**inputs(name)).logits)
    found = {n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
    of_norms = {n for n in plain.state_dict() if re.search(r"LayerNorm|norm|ln_", n)}
    assert {n.replace(".ln_tuning_layers.default", "") for n in found} <= of_norms and found


def test_lora_for_all_linear_layers_spares_the_output_layer() -> None:
    for name, make in MAKERS.items():
        plain, model = make(), adapt(make(), LoRA(rank=2))
        matrices = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)
                    or type(m).__name__ == "Conv1D"]  # fmt: skip
        spared = {"bert": {"classifier"}}.get(name, {"lm_head"})
        learning = [n for n, p in model.named_parameters() if p.requires_grad and "lora" in n]
        assert len(learning) == 2 * len({*matrices} - spared)


@pytest.mark.parametrize(("method", "name"), [*EACH, *(("ln_tuning", name) for name in MAKERS)])
def test_folded_it_is_the_plain_model_and_then_as_it_was(
    method: str, name: str, tmp_path: Path
) -> None:
    setting = norms(name) if method == "ln_tuning" else METHODS[method][0]
    model, batch, plain = adapt(MAKERS[name](), setting), inputs(name), MAKERS[name]().eval()
    model = shaken(model).eval()
    before, says = copy.deepcopy(model.state_dict()), model(**batch).logits
    close = {"atol": 2e-5, "rtol": 1e-5}
    with folded(model):
        assert list(model.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(model(**batch).logits, says, **close)
        model.save_pretrained(tmp_path)
    assert same(model.state_dict(), before) and torch.equal(model(**batch).logits, says)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, says, **close)
    assert (plain(**batch).logits - says).abs().max() > 1e-2
    with without_adapters(model):
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    with pytest.raises(ZeroDivisionError), folded(model):
        raise ZeroDivisionError
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("method", [*METHODS, "ln_tuning"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_adapters_are_in_the_part_of_their_layer(method: str, name: str) -> None:
    setting = norms(name) if method == "ln_tuning" else METHODS[method][0]
    there = holdfast.parts(MAKERS[name]()).names
    for n, part in holdfast.parts(adapt(MAKERS[name](), setting)).names.items():
        layer = re.split(r"\.(?:lora|ia3|osf|shira|oft|boft|ln_tuning)_", n)[0]
        assert part == there.get(n, there.get(f"{layer}.weight")), n


@pytest.mark.parametrize("method", [*METHODS, "ln_tuning"])
def test_bfloat16_is_folded_in_its_own_type(method: str) -> None:
    setting = norms("llama") if method == "ln_tuning" else METHODS[method][0]
    model = adapt(models.llama().to(torch.bfloat16), setting)
    with folded(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [*METHODS, "ln_tuning"])
def test_what_is_saved_of_adapters_is_all_of_them(method: str, tmp_path: Path) -> None:
    """Also what was drawn: masks and what OSF began with."""
    setting = norms("bert") if method == "ln_tuning" else METHODS[method][0]
    model = shaken(adapt(models.bert(), setting))
    for name, buffer in model.named_buffers():
        if "shira_indices" in name:  # another mask, as another version of torch might draw it
            buffer.copy_(buffer.flip(0))
    save_adapters(model, tmp_path, base=True)
    within = tuple(path for path, layer in model.named_modules() if layer in adapters(model))
    for file in (ADAPTERS, BEFORE):  # the latter as runs with `lora` wrote it
        if file == BEFORE:
            (tmp_path / ADAPTERS).rename(tmp_path / BEFORE)
        other = adapt(models.bert(seed=4), setting)
        load_adapters(other, tmp_path, base=True)
        mine, theirs = (m.state_dict() for m in (model, other))
        inside = [n for n in mine if n.startswith(within)]
        assert inside and all(torch.equal(mine[n], theirs[n]) for n in inside)


# --- in a Trainer ---------------------------------------------------------------------------------


def trainer(out: Path, recipe: Recipe, model: Any = None, **more: Any) -> Any:
    made = holdfast.Trainer(
        model=models.bert() if model is None else model, args=arguments(out, **more),
        train_dataset=rows(), eval_dataset=rows(8, seed=5), data_collator=collate, recipe=recipe,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


def test_what_a_trainer_saves_is_an_ordinary_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, Recipe(peft=LoRA(rank=2)), save_strategy="epoch")
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
        other = trainer(tmp_path, Recipe(peft=LoRA(rank=3)))
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

    made = trainer(tmp_path, Recipe(peft=LoRA(rank=2)), save_strategy="steps", save_steps=3,
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
        trainer(tmp_path, Recipe(peft=LoRA()), made.model)


@pytest.mark.parametrize(("peft", "told"), [(PEFT("ia3"), True), (LoRA(rank=2), False)])
def test_a_method_that_can_measure_no_layer_says_so(
    peft: PEFT, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell_once.cache_clear()
    made = trainer(tmp_path, Recipe(peft=peft, methods=[GPM(rows=8)]), max_steps=1)
    made.train()
    made.end_task()
    assert ("gpm: no weight that trains is in a linear layer" in caplog.text) == told


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "setting", "says"), [
    ("bert", {"type": "lora", "target_modules": ["querry"]}, "no layer 'querry'.*'query'"),
    ("bert", {"type": "lora", "target_modules": ["classifier"]}, "no layer 'classifier'"),
    ("gpt2", {"type": "lora", "target_modules": ["lm_head"]}, "shares its weight"),
    ("gpt2", {"type": "osf"}, "osf fits no layer of the model"),
    ("gpt2", {"type": "shira"}, "Conv1D.* is not supported"),
    ("bert", {"type": "ln_tuning"}, r"target_modules: PEFT knows no .*; name them"),
    ("bert", {"type": "lora", "init_lora_weights": "olora"}, "change the weights below"),
    ("bert", {"type": "poly"}, "cannot be folded"),
    ("bert", {"type": "lora", "r": 0}, "positive integer"),
])  # fmt: skip
def test_what_cannot_be_adapted(model: str, setting: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        adapt(MAKERS[model](), PEFT.from_dict(setting))


@pytest.mark.parametrize(("setting", "says"), [
    ({"type": "loraa"}, r"peft\.type: PEFT has no 'loraa'; did you mean 'lora'"),
    ({"type": "prefix_tuning"}, "no ordinary model could be saved"),
    ({"type": "p_tuning"}, "no ordinary model could be saved"),
    ({"type": "vera"}, "shares weights between layers"),
    ({"type": "adalora"}, "calls of its own after each step"),
    ({"type": "lora", "rr": 4}, r"'peft\.rr'; did you mean 'r'"),
    ({"type": "lora", "r": "4"}, r"peft\.r: Input should be a valid integer, not '4'"),
    ({"type": "lora", "modules_to_save": ["pooler"]}, r"peft\.modules_to_save: is not for a re"),
    ({"type": "lora", "init_lora_weights": "pisa"}, "Input should be 'gaussian'"),
    ({"type": "boft", "boft_block_num": 2}, "boft_block_size"),
    ({"r": 8}, "needs a type"), (8, "peft: {type: lora, r: 8}"), (True, "needs a type"),
])  # fmt: skip
def test_a_wrong_setting_is_told_before_there_is_a_model(setting: Any, says: str) -> None:
    with pytest.raises(Refused, match=says):
        Recipe.from_dict({"peft": setting})


def test_what_lies_around_other_adapters_must_not_depend_on_the_weight_below() -> None:
    """DoRA divides by the norm of W + B A: of W alone as it trains, of all that was folded in."""
    around = [PEFT("ia3"), PEFT("lora", use_dora=True)]
    with pytest.raises(Refused, match="cannot lie around other adapters"):
        adapt(models.bert(), around)
    model = shaken(adapt(models.bert(), around[::-1])).eval()
    says = model(**inputs("bert")).logits
    with folded(model):
        torch.testing.assert_close(model(**inputs("bert")).logits, says, atol=1e-5, rtol=1e-5)


def test_without_peft_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(Refused, match="pip install peft"):
        PEFT("ia3")


def test_a_model_that_was_not_prepared_is_not_trained_whole() -> None:
    recipe, model = Recipe(peft=PEFT("ia3")), models.bert()
    with pytest.raises(Refused, match=r"recipe\.prepare\(model\)"):
        recipe.bind(model, torch.optim.AdamW(model.parameters()), total_steps=1)
    with pytest.raises(Refused, match="was not prepared"):
        holdfast.Trainer(model=model, recipe=recipe, bound=recipe.unbound())
    with pytest.raises(Refused, match="use with_recipe"):
        RecipeCallback(recipe)
    with pytest.raises(Refused, match="must be a PEFT"):
        Recipe(peft={"type": "lora"})  # type: ignore[arg-type]


def test_the_setting_in_a_file(tmp_path: Path) -> None:
    one = PEFT("lora", r=4, target_modules=("query", "value"), use_dora=True)
    for given in (one, [PEFT("shira", r=2), one]):
        recipe = Recipe(peft=given)
        recipe.save(tmp_path / "r.yaml")
        assert Recipe.load(tmp_path / "r.yaml").peft == recipe.peft
        assert hash(recipe) == hash(Recipe.load(tmp_path / "r.yaml"))
    assert Recipe(peft=one).to_dict()["peft"] == {
        "type": "lora", "r": 4, "target_modules": ["query", "value"], "use_dora": True,
    }  # fmt: skip
    assert "peft" not in Recipe().to_dict()  # recipes written before keep their hash
    assert Recipe(peft=one) != Recipe(peft=PEFT("lora", r=4))


def test_what_recipes_called_lora_before_is_read() -> None:
    older = {"rank": 4, "alpha": 6.0, "dropout": 0.1, "targets": ["query"]}
    same = PEFT("lora", r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["query"])
    assert Recipe.from_dict({"lora": older}).peft == Recipe(peft=same).peft
    whole = PEFT("lora", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    assert Recipe.from_dict({"lora": True}).peft == (LoRA(),) == (whole,)
    for wrong, says in (
        ({"rnak": 4}, "did you mean 'rank'"), (8, r"peft: {type: lora, r: 8}"),
        ({"rank": 2.5, "alpha": "a"}, "valid integer"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=says):
            Recipe.from_dict({"lora": wrong})
    with pytest.raises(Refused, match="lora is peft now"):
        Recipe.from_dict({"lora": older, "peft": {"type": "ia3"}})


def test_a_module_of_ones_own_by_name() -> None:
    model = adapt(models.Plain(), LoRA(targets=("layer",)))
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"layer.lora_{x}.default.weight" for x in "AB"}
