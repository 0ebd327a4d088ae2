"""Stopped and gone on with equals never stopped, bit for bit; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import arguments, bert, collate, rows, same, weights
from test_trainer import sft
from torch import Tensor

import holdfast
from holdfast import (
    DPS,
    EWC,
    L2SP,
    PEFT,
    HeadFirst,
    KLAnchor,
    LoRA,
    Merge,
    Rates,
    Recipe,
    Refused,
    Replay,
)
from holdfast.testing.faults.place import StopAt
from holdfast.training.checkpoints import META, TENSORS, load_state, save_state
from holdfast.training.manifest import newest_complete

RECIPES = {
    "plain": Recipe(rates=Rates.bertcl()),
    "dps": Recipe(methods=[DPS(stage=4)]),
    "dps_mix": Recipe(methods=[DPS(mix=True, stage=4)]),
    "retention": Recipe(methods=[DPS(score="retention", drop=0.8, stage=3)]),
    "ewc": Recipe(methods=[EWC(strength=100.0)]),
    "replay": Recipe(methods=[Replay(memory=6)]),
    "together": Recipe(methods=[EWC(), L2SP(), Replay(memory=4), DPS(stage=3)], max_grad_norm=0.5),
    "ia3": Recipe(peft=PEFT("ia3"), methods=[EWC(), L2SP(), Merge(rows=8)]),
    "ln_tuning": Recipe(
        peft=PEFT("ln_tuning", target_modules=["LayerNorm"]),
        methods=[Merge(rows=8, norms="solve"), DPS(stage=4, modules=("*LayerNorm*",))],
    ),
    "osf": Recipe(peft=PEFT("osf", effective_rank=8), methods=[EWC(strength=100.0)]),
    "shira, lora": Recipe(
        peft=[PEFT("shira", r=2), PEFT("lora", r=2, lora_dropout=0.2)],
        methods=[KLAnchor(anchor="base"), Merge(rows=8)],
        rates=Rates.bertcl(),
    ),
    "lora": Recipe(
        peft=LoRA(rank=2, dropout=0.2), methods=[EWC(strength=100.0), Merge(rows=8), DPS(stage=4)]
    ),
}
DROPOUT = {"hidden_dropout_prob": 0.2}


def everything(trainer: Any) -> dict[str, Tensor]:
    """Weights, moments and the methods' state."""
    found = dict(trainer.bound.state_dict()["tensors"]) | weights(trainer.model)
    for i, state in enumerate(trainer.bound.optimizer.state.values()):
        found |= {f"{i}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return found


def two_tasks(
    out: Path, recipe: Recipe, *, stop: int | None = None, resume: Any = None, **more: Any
) -> Any:
    """A first task without checkpoints, a second one that may stop or resume."""
    first = bert(**DROPOUT)

    def trainer(model: Any, seed: int, **own: Any) -> Any:
        made = holdfast.Trainer(
            model=model,
            train_dataset=rows(22, seed=seed),
            data_collator=collate,
            recipe=recipe,
            shared=model.base_model,
            **own,
        )
        made.remove_callback(transformers.PrinterCallback)
        return made

    one = trainer(first, 0, args=arguments(out / "one"), task="one")
    one.train()
    one.end_task()
    second = bert(seed=1, num_labels=2, **DROPOUT)
    second.bert = first.bert
    plan = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "data_seed": 3}
    two = trainer(
        second,
        1,
        args=arguments(out / "two", **plan | more),
        task="two",
        bound=one.bound,
        callbacks=[StopAt(stop)] if stop else None,
    )
    two.train(resume_from_checkpoint=resume)
    return two


@pytest.mark.parametrize("name", RECIPES)
def test_a_second_task_goes_on_in_the_middle(name: str, tmp_path: Path) -> None:
    """At step 5 of 9: mid-epoch, mid-stage, with accumulation and dropout."""
    whole = two_tasks(tmp_path / "whole", RECIPES[name])
    assert whole.bound.step == 9
    cut = two_tasks(tmp_path / "cut", RECIPES[name], stop=5)
    assert cut.bound.step == 5
    checkpoint = newest_complete(tmp_path / "cut" / "two")
    assert checkpoint is not None and checkpoint.name == "checkpoint-5"
    again = two_tasks(tmp_path / "cut", RECIPES[name], resume=str(checkpoint))
    assert same(everything(again), everything(whole))
    metas = [t.bound.state_dict()["meta"] for t in (again, whole)]
    assert metas[0] == metas[1]
    assert not same(weights(cut.model), weights(whole.model))


@pytest.mark.parametrize("name", ["together", pytest.param("dps_mix", marks=pytest.mark.slow)])
def test_a_new_process_goes_on(name: str, tmp_path: Path) -> None:
    """Nothing in memory helps: no cache, no generator, no module state."""
    whole = two_tasks(tmp_path / "whole", RECIPES[name])
    two_tasks(tmp_path / "cut", RECIPES[name], stop=4)
    checkpoint = tmp_path / "cut" / "two" / "checkpoint-4"
    code = f"""
        import sys, torch; sys.path[:0] = {sys.path!r}
        from pathlib import Path; from safetensors.torch import save_file
        from test_checkpoints import RECIPES, everything, two_tasks
        out, checkpoint = Path({str(tmp_path / "cut")!r}), {str(checkpoint)!r}
        again = two_tasks(out, RECIPES[{name!r}], resume=checkpoint)
        save_file({{k: v.clone() for k, v in everything(again).items()}}, {str(tmp_path / "end")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=200)
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "end"), everything(whole))


@pytest.mark.parametrize("name", ["dps", "dps_mix", "together"])
@pytest.mark.filterwarnings("ignore")
def test_sft_goes_on(name: str, tmp_path: Path) -> None:
    methods = [m for m in RECIPES[name].methods if m.name not in {"ewc"}]
    recipe = Recipe(methods=methods)
    own = {"save_strategy": "steps", "save_steps": 3}
    whole = sft(tmp_path / "whole", recipe, **own)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = sft(tmp_path / "again", recipe, resume=str(checkpoint), **own)
    assert same(everything(again), everything(whole))


def test_a_skipped_step_is_remembered(tmp_path: Path) -> None:
    bound = Recipe().unbound()
    bound.skipped = 3
    save_state(bound, tmp_path)
    other = Recipe().unbound()
    load_state(other, tmp_path)
    assert other.skipped == 3


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint at step 5 of the second task, under `dps`."""
    out = tmp_path_factory.mktemp("saved")
    two_tasks(out, RECIPES["dps"], stop=5)
    return out / "two" / "checkpoint-5"


@pytest.mark.parametrize("missing", [META, TENSORS])
def test_a_checkpoint_without_our_state_is_refused(
    missing: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / missing).unlink()
    said = "by a Trainer without a recipe" if missing == META else "saved with a recipe"
    with pytest.raises(Refused, match=said):
        two_tasks(tmp_path, RECIPES["dps"], resume=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 2 → 4"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 4 → 2"),
        ({"optim": "sgd"}, 'optimizer: "AdamW" → "SGD"'),
        ({"learning_rate": 5e-3}, "lr: 0.01 → 0.005"),
        ({"weight_decay": 0.1}, "weight_decay: 0.0 → "),
        ({"num_train_epochs": 2}, "steps: 9 → 6"),
        ({"max_grad_norm": 0.5}, "max_grad_norm: 1.0 → 0.5"),
    ],
)
def test_other_settings_are_refused(more: Any, named: str, saved: Path, tmp_path: Path) -> None:
    """Trainer itself would take the old rates silently, or stop inside torch."""
    with pytest.raises(Refused, match=named) as refusal:
        two_tasks(tmp_path, RECIPES["dps"], resume=str(saved), **more)
    # Parameters that decay and others become groups of their own: moments would change places.
    # Another optimizer has no use for these.
    possible = not more.keys() & {"weight_decay", "optim"}
    assert ("exact_resume=False" in str(refusal.value)) == possible


def test_other_rates_are_refused(saved: Path, tmp_path: Path) -> None:
    other = Recipe(rates=Rates.bertcl(), methods=RECIPES["dps"].methods)
    with pytest.raises(Refused, match=r"lr: 0\.01 → "):
        two_tasks(tmp_path, other, resume=str(saved))


def test_other_methods_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="was saved by"):
        two_tasks(tmp_path, Recipe(methods=[DPS(stage=4, drop=0.5)]), resume=str(saved))


def test_more_epochs_are_no_other_settings(saved: Path, tmp_path: Path) -> None:
    model = bert(seed=1, num_labels=2, **DROPOUT)
    plan = {"num_train_epochs": 4, "gradient_accumulation_steps": 2, "data_seed": 3}
    args = arguments(tmp_path, **plan)
    trainer = holdfast.Trainer(
        model=model,
        args=args,
        train_dataset=rows(22, seed=1),
        data_collator=collate,
        recipe=RECIPES["dps"],
        shared=model.base_model,
        task="two",
    )
    trainer.train(resume_from_checkpoint=str(saved))
    assert (trainer.bound.step, trainer.bound.total_steps) == (12, 12)


# --- checkpoints that no recipe saved ---------------------------------------------------------


def made(out: Path, cls: Any = holdfast.Trainer, **more: Any) -> Any:
    """Twelve steps with dropout, saved after four and eight."""
    args = arguments(out, save_strategy="steps", save_steps=4, max_steps=12)
    return cls(model=bert(num_labels=2, **DROPOUT), args=args, train_dataset=rows(22),
               data_collator=collate, **more)  # fmt: skip


def test_a_checkpoint_of_a_trainer_without_a_recipe_goes_on_when_asked_to(tmp_path: Path) -> None:
    bare = made(tmp_path, transformers.Trainer)
    bare.train()
    saved = tmp_path / "checkpoint-4"
    with pytest.raises(Refused, match="by a Trainer without a recipe; pass exact_resume=False"):
        made(tmp_path / "a").train(resume_from_checkpoint=str(saved))
    plain = made(tmp_path / "b", exact_resume=False, recipe=Recipe(head_first=HeadFirst()))
    with pytest.warns(UserWarning, match="without a recipe"):
        plain.train(resume_from_checkpoint=str(saved))
    assert same(weights(bare.model), weights(plain.model))  # its head was not fitted again
    masked = made(tmp_path / "c", exact_resume=False, recipe=RECIPES["dps"])
    with pytest.warns(UserWarning, match="without a recipe"):
        masked.train(resume_from_checkpoint=str(saved))
    assert masked.bound.step == 8 and not same(weights(bare.model), weights(masked.model))
    again = made(tmp_path / "e", recipe=RECIPES["dps"])  # from one of its own: exact again
    again.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-8"))
    assert again.bound.step == again.bound.total_steps == 8
    assert same(weights(again.model), weights(masked.model))
    rated = made(tmp_path / "d", exact_resume=False, recipe=Recipe(rates=Rates.bertcl()))
    with (
        pytest.warns(UserWarning, match="without a recipe"),
        pytest.raises(Refused, match="groups of"),
    ):
        rated.train(resume_from_checkpoint=str(saved))


@pytest.mark.parametrize("exact", [True, False])
def test_weights_alone_are_no_checkpoint_to_resume(exact: bool, tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    plan = {"train_dataset": rows(22), "data_collator": collate}
    holdfast.Trainer(model=bert(num_labels=2), args=args, **plan).train()
    one = holdfast.Trainer(model=bert(num_labels=2), args=args, exact_resume=exact, **plan)
    with pytest.raises(Refused, match="holds weights only; load them as the model"):
        one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_weights_saved_in_other_shards_go_on_when_asked_to(tmp_path: Path) -> None:
    whole = made(tmp_path / "a", recipe=RECIPES["dps"])
    whole.train()
    saved = tmp_path / "a" / "checkpoint-4"
    held = type(whole.model).from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    held.save_pretrained(saved, max_shard_size="5KB")
    with pytest.raises(Refused, match=r"model\.safetensors is missing"):
        made(tmp_path / "b", recipe=RECIPES["dps"]).train(resume_from_checkpoint=str(saved))
    again = made(tmp_path / "c", recipe=RECIPES["dps"], exact_resume=False)
    with pytest.warns(UserWarning, match=r"model\.safetensors is missing"):
        again.train(resume_from_checkpoint=str(saved))
    assert same(weights(whole.model), weights(again.model))


# --- the newest whole checkpoint -----------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_found(saved: Path, tmp_path: Path) -> None:
    for step in (5, 9, 10):
        shutil.copytree(saved, tmp_path / f"checkpoint-{step}")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-10"  # by number, not by name
    assert newest_complete(tmp_path / "nowhere") is None


@pytest.mark.parametrize("again", [False, True])
def test_the_json_is_written_last(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two files, the state counts as absent; also of a folder written anew."""
    if again:
        save_state(Recipe(methods=[DPS()]).unbound(), tmp_path)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.training.checkpoints.write_text_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        save_state(Recipe(methods=[DPS()]).unbound(), tmp_path)
    with pytest.raises(Refused, match="missing"):
        load_state(Recipe(methods=[DPS()]).unbound(), tmp_path)


def test_types_survive_to_the_bit(tmp_path: Path) -> None:
    """Masks stay bool, large integers and half-precision values exact (faults N10)."""
    model = models.Plain()
    recipe = Recipe(methods=[L2SP()])
    bound = recipe.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=2)
    state = bound.states["l2sp"]
    odd = {
        "mask": torch.tensor([True, False]),
        "count": torch.tensor([300000001], dtype=torch.int32),
        "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    }
    state.tensors["odd"] = odd
    state.numbers["told"] = [1, 0.1, "x"]
    save_state(bound, tmp_path)
    other = recipe.unbound()
    load_state(other, tmp_path)
    loaded = other.states["l2sp"].tensors["odd"]
    assert {k: v.dtype for k, v in loaded.items()} == {k: v.dtype for k, v in odd.items()}
    assert same(loaded, odd)
    assert other.states["l2sp"].numbers["told"] == [1, 0.1, "x"]
    assert json.loads((tmp_path / META).read_text())["schema"] == 1
