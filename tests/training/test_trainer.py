"""`with_recipe` around Trainer, Seq2SeqTrainer and TRL's SFTTrainer, on tiny models."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import models
import pytest
import torch
import transformers
from models import arguments, bert, collate, distance, rows, same, weights
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

import holdfast
from holdfast import DPS, EWC, SAM, Rates, Recipe, Refused, Replay, with_recipe
from holdfast.engine.head_first import HeadFirst
from holdfast.engine.method import Method, View
from holdfast.errors import TrainingDiverged
from holdfast.network.groups import param_groups
from holdfast.recipe import PRESETS

SERVED = ["plain", "bertcl", "dps", "dps_mix", "ewc", "l2sp", "replay"]


class Extended(holdfast.Trainer):  # type: ignore[misc]
    """A user's own class on top of ours."""


def trained(out: Path, model: nn.Module, data: list[Any], cls: Any = None, **more: Any) -> Any:
    """A trainer after `train()`; keywords of TrainingArguments come in `args`."""
    args = arguments(out, **more.pop("args", {}))
    cls = cls or holdfast.Trainer
    trainer = cls(model=model, args=args, train_dataset=data, data_collator=collate, **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


# --- the class -----------------------------------------------------------------------------------


def test_the_class_is_made_once() -> None:
    assert with_recipe(transformers.Trainer) is holdfast.Trainer
    assert with_recipe(Seq2SeqTrainer) is with_recipe(Seq2SeqTrainer)
    assert with_recipe(holdfast.Trainer) is holdfast.Trainer
    assert with_recipe(Extended) is Extended
    assert issubclass(with_recipe(Seq2SeqTrainer), Seq2SeqTrainer)


@pytest.mark.parametrize("wrong", [nn.Linear, "Trainer", None])
def test_what_is_no_trainer_is_refused(wrong: Any) -> None:
    with pytest.raises(Refused, match="no Trainer class"):
        with_recipe(wrong)


@pytest.mark.parametrize("cls", [holdfast.Trainer, with_recipe(Seq2SeqTrainer), Extended])
def test_the_class_pickles_to_the_very_same_class(cls: type) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(cls, protocol)) is cls  # noqa: S301


def test_the_class_unpickles_in_a_fresh_process() -> None:
    data = pickle.dumps(with_recipe(Seq2SeqTrainer))
    code = (
        "import pickle, sys; cls = pickle.loads(sys.stdin.buffer.read());"
        "import holdfast, transformers;"
        "assert cls is holdfast.with_recipe(transformers.Seq2SeqTrainer)"
    )
    subprocess.run([sys.executable, "-c", code], input=data, check=True, timeout=120)


# --- every recipe, several trainers --------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_trainer_takes_every_recipe_through_two_tasks(name: str, tmp_path: Path) -> None:
    """Two tasks over one encoder: methods that remember come into play in the second."""
    recipe, first = PRESETS[name](), bert()
    one = trained(tmp_path, first, rows(), recipe=recipe, task="one", shared=first.base_model)
    one.end_task()
    second = bert(seed=1, num_labels=3)
    second.bert = first.bert
    before = weights(second)
    two = trained(
        tmp_path,
        second,
        rows(seed=1),
        recipe=recipe,
        task="two",
        shared=second.base_model,
        bound=one.bound,
    )
    assert two.bound is one.bound and two.bound.finished == ["one"]
    assert two.bound.step == two.state.global_step == 6
    assert distance(before, weights(second)) > 1e-4
    assert all(torch.isfinite(w).all() for w in second.parameters())
    assert type(second.bert.encoder.layer[0].output.dense) is nn.Linear  # unbound afterwards
    assert not two.bound.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", ["plain", "dps_mix", "replay"])
def test_seq2seq_trainer_generates_and_learns(name: str, tmp_path: Path) -> None:
    data = rows(8, labels="tokens")
    args = Seq2SeqTrainingArguments(
        **arguments(tmp_path).to_dict()
        | {
            "predict_with_generate": True,
            "eval_strategy": "epoch",
            "logging_strategy": "no",
        }
    )
    trainer = with_recipe(Seq2SeqTrainer)(
        model=models.t5(),
        args=args,
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=collate,
        recipe=PRESETS[name](),
        compute_metrics=lambda p: {"width": p.predictions.shape[1]},
    )
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["eval_width"] > 1
    assert distance(before, weights(trainer.model)) > 1e-4


def sft(
    out: Path, recipe: Recipe | None, make: Callable[..., nn.Module] = models.llama, **more: Any
) -> Any:
    """An SFTTrainer with default settings; a bare one where the recipe is None."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = ["the film was good", "a poor dull film", "who is the man ?", "the river was not cold"]
    plain = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    keep = {k: more.pop(k) for k in ("resume", "callbacks", "task") if k in more}
    cls = SFTTrainer if recipe is None else with_recipe(SFTTrainer)
    trainer = cls(
        model=more.pop("model", None) or make(),
        args=SFTConfig(output_dir=str(out), **plain | more),
        train_dataset=Dataset.from_dict(
            {"text": [f"{t} {w}" for w in ["red", "blue"] for t in texts]}
        ),
        processing_class=models.tokenizer(template=False),
        callbacks=keep.get("callbacks"),
        **({} if recipe is None else {"recipe": recipe}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=keep.get("resume"))
    return trainer


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
@pytest.mark.filterwarnings("ignore")
def test_sft_with_a_plain_recipe_is_the_bare_sft(make: Any, tmp_path: Path) -> None:
    """Also with dropout: an extra forward pass for outputs would draw random numbers."""
    own = {"attention_dropout": 0.2} if make is models.llama else {"resid_pdrop": 0.2}
    ours = sft(tmp_path, Recipe(), model=make(**own), max_grad_norm=0.1, weight_decay=0.0)
    bare = sft(tmp_path, None, model=make(**own), max_grad_norm=0.1, weight_decay=0.0)
    assert ours.args.gradient_checkpointing and ours.model.is_gradient_checkpointing
    assert same(weights(ours.model), weights(bare.model))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(rates=Rates.bertcl()),
        PRESETS["dps"](),
        Recipe(methods=[DPS(mix=True, stage=2)]),
        Recipe(methods=[EWC(labels="true")]),
        PRESETS["l2sp"](),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sft_takes_recipes(recipe: Recipe, tmp_path: Path) -> None:
    plain = sft(tmp_path, Recipe())
    trainer = sft(tmp_path, recipe)
    trainer.end_task()
    assert trainer.bound.step == 6 and trainer.bound.finished == ["task"]
    if not any(m.name == "ewc" for m in recipe.methods):  # EWC acts from the second task on
        assert not same(weights(trainer.model), weights(plain.model))
    assert all(torch.isfinite(w).all() for w in trainer.model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_sft_replay_runs_the_model_no_more_than_it_must(tmp_path: Path) -> None:
    """TRL runs the model again for outputs that are asked of it."""
    calls = []

    class Counting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            model.register_forward_hook(lambda *_: calls.append(1))

    sft(tmp_path, PRESETS["replay"](), callbacks=[Counting()])
    assert len(calls) == 6  # nothing is kept yet, so replay adds none either


@pytest.mark.filterwarnings("ignore")
def test_sft_accumulates_and_its_own_averages_stay_its_own(tmp_path: Path) -> None:
    """How accumulation is weighed is found out without a trace in TRL's running averages."""
    ours, bare = (
        sft(
            tmp_path,
            recipe,
            gradient_accumulation_steps=2,
            max_steps=2,
            per_device_train_batch_size=1,
        )
        for recipe in (Recipe(), None)
    )
    assert distance(weights(ours.model), weights(bare.model)) < 1e-6
    assert ours._total_train_tokens == bare._total_train_tokens
    assert ours._metrics["eval"] == bare._metrics["eval"] == {}


# --- rates, logs, keywords -----------------------------------------------------------------------


def test_learning_rates_follow_the_recipe_and_are_logged_by_part(tmp_path: Path) -> None:
    rates = Rates.from_list([0.0, 0.5, 2.0, 3.0])
    args = {"lr_scheduler_type": "constant", "weight_decay": 0.1}
    trainer = trained(tmp_path, bert(), rows(8), recipe=Recipe(rates=rates), args=args)
    named = dict(trainer.model.named_parameters())
    wanted = {
        id(p): (g["lr"], g["weight_decay"])
        for g in param_groups(trainer.model, rates, lr=1e-2, weight_decay=0.1)
        for p in g["params"]
    }
    found = {
        id(p): (g["lr"], g["weight_decay"])
        for g in trainer.bound.optimizer.param_groups
        for p in g["params"]
    }
    assert found == wanted
    assert found[id(named["bert.encoder.layer.0.output.dense.weight"])] == (0.005, 0.1)
    assert found[id(named["classifier.bias"])] == (0.03, 0.0)
    assert id(named["bert.embeddings.word_embeddings.weight"]) not in found
    logged = trainer.state.log_history[0]
    lrs = {k: v for k, v in logged.items() if k.startswith("holdfast/")}
    assert lrs == {f"holdfast/rate/{part}": lr for part, lr in
                   (("layer.0", 0.005), ("layer.1", 0.02), ("head", 0.03))}  # fmt: skip


def test_flat_rates_log_no_rate_by_part(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bert(), rows(4), recipe=PRESETS["dps"]())
    assert not [k for k in trainer.state.log_history[0] if k.startswith("holdfast/")]


def test_rates_beside_a_given_optimizer_are_refused(tmp_path: Path) -> None:
    model = bert()
    mine = torch.optim.SGD(model.parameters(), lr=0.1), None
    with pytest.raises(Refused, match="need an optimizer of their own"):
        holdfast.Trainer(
            model=model,
            args=arguments(tmp_path),
            optimizers=mine,
            recipe=Recipe(rates=Rates.bertcl()),
        )
    trainer = trained(tmp_path, model, rows(8), optimizers=mine, recipe=PRESETS["dps"]())
    assert trainer.bound.optimizer is mine[0] and trainer.bound.step == 2


def test_an_optimizer_over_the_recipes_groups_is_served(tmp_path: Path) -> None:
    """As the refusal of another one says."""
    model, recipe = bert(), Recipe(rates=Rates.bertcl())
    mine = torch.optim.SGD(recipe.param_groups(model, lr=0.1)), None
    trainer = trained(tmp_path, model, rows(8), optimizers=mine, recipe=recipe)
    assert trainer.bound.optimizer is mine[0] and trainer.bound.step == 2


def test_a_loss_outside_of_training_is_trainers_own(tmp_path: Path) -> None:
    """Before `train()` and after it: no recipe is at work then, and none is missing."""
    trainer = trained(tmp_path, bert(), rows(8), recipe=PRESETS["dps"]())
    fresh = holdfast.Trainer(model=bert(), args=arguments(tmp_path), recipe=PRESETS["dps"]())
    for one in (fresh, trainer):
        batch = collate(rows(4))
        loss = one.compute_loss(one.model.train(), batch)
        assert loss.requires_grad
        assert loss.item() == pytest.approx(one.model(**batch).loss.item())


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "adafactor", "sgd"])
def test_optimizers_that_group_for_themselves_are_refused(optim: str, tmp_path: Path) -> None:
    run = {"args": {"optim": optim}, "recipe": PRESETS["dps"]()}
    if optim in {"adafactor", "sgd"}:
        assert trained(tmp_path, bert(), rows(8), **run).bound.step == 2
        return
    with pytest.raises((Refused, ImportError, ValueError)):
        trained(tmp_path, bert(), rows(8), **run)


def test_a_keyword_that_nobody_knows_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="recipes"):
        holdfast.Trainer(model=bert(), args=arguments(tmp_path), recipes=Recipe())


def test_end_task_before_training_is_refused(tmp_path: Path) -> None:
    trainer = holdfast.Trainer(model=bert(), args=arguments(tmp_path))
    with pytest.raises(Refused, match="call train"):
        trainer.end_task()


@dataclass(frozen=True, kw_only=True)
class Widened(Method):
    """Puts a parameter more into the network."""

    name: ClassVar[str] = "widened"

    def prepare(self, model: nn.Module) -> nn.Module:
        model.register_parameter("extra", nn.Parameter(torch.zeros(3)))
        return model


def test_prepare_comes_before_the_optimizer(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bert(), rows(4), recipe=Recipe(methods=[Widened()]))
    assert "task/extra" in trainer.bound.weights


@pytest.mark.parametrize(
    "other",
    [
        None,
        Recipe(methods=[EWC(strength=2.0)]),
        Recipe(methods=[EWC()], head_first=HeadFirst()),
        Recipe(methods=[EWC()], parts={"*.pooler.*": "layer.1"}),
    ],
)
def test_a_bound_of_another_recipe_is_refused(other: Recipe | None, tmp_path: Path) -> None:
    """The bound's methods would run, and those of the recipe would not, in silence."""
    bound, model = Recipe(methods=[EWC()]).unbound(), bert()
    with pytest.raises(Refused, match="recipe: the bound was made by a recipe of other"):
        holdfast.Trainer(model=model, args=arguments(tmp_path), recipe=other, bound=bound)
    again = Recipe(methods=[EWC()], rates=Rates.bertcl(), max_grad_norm=0.5)
    holdfast.Trainer(model=model, args=arguments(tmp_path), recipe=again, bound=bound)


# --- Trainer's own features ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dps", "dps_mix", "ewc"])
def test_trainers_own_features_keep_working(name: str, tmp_path: Path) -> None:
    seen: list[str] = []

    class Seeing(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append("step")

        def on_evaluate(self, *_: Any, metrics: Any = None, **__: Any) -> None:
            seen.append("evaluation")
            assert 0 <= metrics["eval_accuracy"] <= 1

    data = rows()
    args = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "save_total_limit": 1,
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "warmup_steps": 1,
        "lr_scheduler_type": "cosine",
    }
    trainer = trained(
        tmp_path,
        bert(),
        data,
        recipe=PRESETS[name](),
        eval_dataset=data[:8],
        args=args,
        callbacks=[Seeing()],
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )
    assert seen.count("step") == 6 and seen.count("evaluation") == 3
    best = trainer.state.best_model_checkpoint
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(best)
    assert same(weights(saved), weights(trainer.model))
    assert "loss" in trainer.state.log_history[0]


def test_methods_may_ask_for_an_evaluation(tmp_path: Path) -> None:
    trainer = trained(tmp_path, bert(), rows(8), eval_dataset=rows(4, seed=3), recipe=Recipe())
    assert "eval_loss" in trainer.bound.views.get("none", View(trainer.bound, None)).evaluate()  # type: ignore[arg-type]


# --- plain is plain ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 0.0},
        {"optim": "sgd", "weight_decay": 0.1},
        {"bf16": True},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 3},
    ],
    ids=str,
)
def test_a_plain_recipe_is_the_bare_trainer_bit_for_bit(args: Any, tmp_path: Path) -> None:
    """With dropout, so that a random number too many or too few would show."""
    data, dropout = rows(), {"hidden_dropout_prob": 0.2}
    ours = trained(tmp_path, bert(**dropout), data, args=args)
    bare = trained(tmp_path, bert(**dropout), data, transformers.Trainer, args=args)
    assert same(weights(ours.model), weights(bare.model))
    norms = [[h.get("grad_norm") for h in t.state.log_history] for t in (ours, bare)]
    assert norms[0] == norms[1]


# --- accumulation --------------------------------------------------------------------------------

HEADS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "classification": (lambda: bert(num_labels=2), {"labels": "class"}),
    "regression": (lambda: bert(num_labels=1), {"labels": "number"}),
    "multi-label": (
        lambda: bert(num_labels=3, problem_type="multi_label_classification"),
        {"labels": "several"},
    ),
    "token classification": (lambda: bert("TokenClassification", num_labels=2), {"labels": "tags"}),
    "question answering": (
        lambda: bert("QuestionAnswering"),
        {"start_positions": "position", "end_positions": "position"},
    ),
    "masked LM": (lambda: bert("MaskedLM"), {"labels": "tokens"}),
    "causal LM": (models.gpt2, {"labels": "tokens"}),
    "causal LM (llama)": (models.llama, {"labels": "tokens"}),
    "seq2seq": (models.t5, {"labels": "tokens"}),
    "own module": (models.Plain, {"labels": "class"}),
}


EPSILON = 1e-3


def by_hand(model: nn.Module, data: list[dict[str, Any]], optim: str) -> None:
    """The reference: full batches of eight in Trainer's order, loss = mean over what counts."""
    from transformers.trainer_utils import set_seed

    groups = param_groups(model, Rates.flat(), lr=1e-2)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1e-2)
    if optim == "adamw_torch":
        optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=EPSILON)
    set_seed(0)
    order = list(
        transformers.Trainer(
            model=model,
            args=arguments("unused", per_device_train_batch_size=8, lr_scheduler_type="constant"),
            train_dataset=data,
            data_collator=collate,
        ).get_train_dataloader()
    )
    model.train()
    for batch in order:
        optimizer.zero_grad()
        # Called with the whole batch and nothing else, every head returns a mean over all labels
        # that count in it, which is what accumulation must equal.
        out = model(**batch)
        loss: Tensor = out["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("head", HEADS)
def test_two_times_four_rows_equal_eight(head: str, optim: str, tmp_path: Path) -> None:
    """22 rows: windows of 4+4, 4+4 and, at the end, 4+2."""
    make, labels = HEADS[head]
    data = rows(22, **labels)
    # Where a gradient is zero but for rounding (biases of keys), Adam would make steps of it.
    args = {"optim": optim, "lr_scheduler_type": "constant", "adam_epsilon": EPSILON}
    split = trained(tmp_path, make(), data, args=args | {"gradient_accumulation_steps": 2})
    whole = trained(tmp_path, make(), data, args=args | {"per_device_train_batch_size": 8})
    assert split.state.global_step == whole.state.global_step == 3
    assert distance(weights(split.model), weights(whole.model)) < 1e-6
    reference = make()
    by_hand(reference, data, optim)
    assert distance(weights(whole.model), weights(reference)) < 1e-6
    assert distance(weights(make()), weights(reference)) > 1e-4


@pytest.mark.parametrize("head", ["classification", "token classification", "masked LM"])
def test_the_bare_trainer_gets_accumulation_wrong(head: str, tmp_path: Path) -> None:
    """What we mend: these heads ignore `num_items_in_batch`, so that gradients are k times larger.

    Fails on the day that Transformers mends it; then the weighting can go.
    """
    make, labels = HEADS[head]
    args = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    split, whole = (
        trained(tmp_path, make(), rows(22, **labels), transformers.Trainer, args=args | more)
        for more in ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8})
    )
    assert distance(weights(split.model), weights(whole.model)) > 1e-3


class Weighted(transformers.Trainer):
    """The usual way to weigh classes: a loss of one's own, which ignores the number of items."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 3.0])
        each = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = (each * weight[labels]).mean()
        return (loss, outputs) if return_outputs else loss


class Counted(Weighted):
    """A loss of one's own that does use the number of items."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        count = len(inputs["labels"])
        loss = super().compute_loss(model, inputs)
        return loss if num_items_in_batch is None else loss * count / num_items_in_batch


@pytest.mark.parametrize("cls", [Weighted, Counted])
def test_accumulation_with_a_loss_of_ones_own(cls: type, tmp_path: Path) -> None:
    """It is the loss of the Trainer class that counts, not that of the model."""
    args = {"optim": "sgd", "lr_scheduler_type": "constant"}
    split, whole = (
        trained(tmp_path, bert(), rows(), with_recipe(cls), args=args | more)
        for more in ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8})
    )
    assert distance(weights(split.model), weights(whole.model)) < 1e-6


@pytest.mark.parametrize("head", ["token classification", "own module"])
def test_a_window_without_labels_is_survived(head: str, tmp_path: Path) -> None:
    """Its loss is a mean over nothing; the bare trainer goes on."""
    make, labels = HEADS[head]
    data = rows(24, **labels)
    for row in data[1:]:
        row["labels"] = [-100] * 8 if isinstance(row["labels"], list) else -100
    args = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer = trained(tmp_path, make(), data, args=args)
    assert trainer.bound.step + trainer.bound.skipped == 6


def test_finding_out_whether_items_count_leaves_modes_alone(tmp_path: Path) -> None:
    """Two passes find it out in evaluation mode; what was in it stays in it."""
    model, seen = bert(), []

    class Frozen(transformers.Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            model.bert.pooler.eval()
            result = super().compute_loss(model, *args, **kwargs)
            seen.append(model.bert.pooler.training)
            return result

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().training_step(*args, **kwargs)
            seen.append(model.bert.pooler.training)
            return result

    trained(tmp_path, model, rows(8), with_recipe(Frozen), args={"gradient_accumulation_steps": 2})
    assert seen and not any(seen)


def test_accumulation_with_label_smoothing(tmp_path: Path) -> None:
    args = {"optim": "sgd", "lr_scheduler_type": "constant", "label_smoothing_factor": 0.1}
    split, whole = (
        trained(tmp_path, bert(), rows(), args=args | more)
        for more in ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8})
    )
    assert distance(weights(split.model), weights(whole.model)) < 1e-6


def test_one_accumulator_update_a_step(tmp_path: Path) -> None:
    """DPS sums the square of the whole window's gradient, not one square a micro-batch."""
    recipe = Recipe(methods=[DPS(stage=100)])
    args = {"optim": "sgd", "lr_scheduler_type": "constant"}
    split, whole = (
        trained(tmp_path, bert(), rows(), recipe=recipe, args=args | more)
        for more in ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8})
    )
    sums = [t.bound.states["dps"].weights["sum"] for t in (split, whole)]
    for name, total in sums[0].items():
        torch.testing.assert_close(total, sums[1][name], rtol=1e-4, atol=1e-9)


@dataclass(frozen=True, kw_only=True)
class Pulling(Method):
    """A penalty with a known gradient: 1 for every entry."""

    name: ClassVar[str] = "pulling"

    def penalty(self, view: View) -> Tensor:
        return torch.stack([w.sum() for w in view.weights.values()]).sum()


@pytest.mark.parametrize("head", ["classification", "question answering", "causal LM"])
def test_a_penalty_weighs_the_same_however_rows_are_split(head: str, tmp_path: Path) -> None:
    make, labels = HEADS[head]
    args = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    run = {"recipe": Recipe(methods=[Pulling()])}
    split, whole = (
        trained(tmp_path, make(), rows(22, **labels), **run, args=args | more)
        for more in ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8})
    )
    assert distance(weights(split.model), weights(whole.model)) < 1e-6
    plain = trained(
        tmp_path, make(), rows(22, **labels), args=args | {"per_device_train_batch_size": 8}
    )
    assert distance(weights(plain.model), weights(whole.model)) > 0.029  # 3 steps of 0.01 · 1


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.3}])
@pytest.mark.parametrize("head", ["classification", "causal LM"])
def test_what_runs_a_batch_twice_takes_the_trainers_own_loss(
    head: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """SAM's second pass: however rows are split, and without an excursion it is plain."""
    make, labels = HEADS[head]
    args = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **more}

    def ran(size: dict[str, int], radius: float | None) -> dict[str, Tensor]:
        recipe = Recipe(methods=[] if radius is None else [SAM(radius=radius)])
        data = rows(22, **labels)
        return weights(trained(tmp_path, make(), data, recipe=recipe, args=args | size).model)

    split, whole = {"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 8}
    assert distance(ran(split, 0.5), ran(whole, 0.5)) < 1e-6
    for size in (split, whole):
        assert distance(ran(size, 1e-6), ran(size, None)) < 1e-6
    assert distance(ran(whole, 0.5), ran(whole, None)) > 1e-5


@dataclass(frozen=True, kw_only=True)
class Looking(Method):
    """Reads what the model returned: it must be of this pass, with a gradient."""

    name: ClassVar[str] = "looking"

    def penalty(self, view: View) -> Tensor:
        assert view.outputs.logits.requires_grad
        assert len(view.outputs.logits) == len((view.inputs or {})["labels"])
        return 0.0 * view.outputs.logits.sum()


def test_a_penalty_sees_the_training_pass_from_the_first_micro_batch_on(tmp_path: Path) -> None:
    """Two passes without gradients find out there whether the loss ignores its items."""
    trained(tmp_path, bert(), rows(22), recipe=Recipe(methods=[Looking()]),
            args={"gradient_accumulation_steps": 2})  # fmt: skip


# --- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "used"),
    [(None, 1.0, 1.0), (None, 0.3, 0.3), (None, 0.0, None), (0.5, 1.0, 0.5), (0.5, 0.5, 0.5)],
)
def test_which_clipping_holds(ours: Any, theirs: float, used: Any, tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, bert(), rows(4), recipe=Recipe(max_grad_norm=ours), args={"max_grad_norm": theirs}
    )
    assert trainer.bound.max_grad_norm == used


@pytest.mark.parametrize("theirs", [0.0, 0.3, 2.0])
def test_two_clippings_are_refused(theirs: float, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"clips at 0\.5"):
        holdfast.Trainer(
            model=bert(),
            args=arguments(tmp_path, max_grad_norm=theirs),
            recipe=Recipe(max_grad_norm=0.5),
        )


def test_the_logged_norm_is_unclipped_and_the_step_is_clipped(tmp_path: Path) -> None:
    args = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    model = bert()
    before = weights(model)
    trainer = trained(tmp_path, model, rows(4), recipe=Recipe(max_grad_norm=0.01), args=args)
    moved = torch.cat([(w - before[n]).flatten() for n, w in weights(model).items()]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-3, atol=0)
    assert trainer.state.log_history[0]["grad_norm"] > 0.05


@dataclass(frozen=True, kw_only=True)
class OnlyHead(Method):
    """Leaves every tensor but the head out of the step."""

    name: ClassVar[str] = "only_head"

    def before_step(self, view: View) -> None:
        for name in view.grads:
            if view.parts[name] != "head":
                view.grads[name] = None


def test_clipping_follows_the_masks(tmp_path: Path) -> None:
    """Were the norm taken before, the head would move by less than the limit."""
    args = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    model = bert()
    before = weights(model)
    recipe = Recipe(methods=[OnlyHead()], max_grad_norm=0.01)
    trained(tmp_path, model, rows(4), recipe=recipe, args=args)
    after = weights(model)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved and all("bert.encoder" not in n for n in moved)
    length = torch.cat([(after[n] - before[n]).flatten() for n in moved]).norm()
    torch.testing.assert_close(length, torch.tensor(0.01), rtol=1e-3, atol=0)


# --- steps that are left out ---------------------------------------------------------------------


class Poisoned(models.Plain):
    """Its loss is not finite on rows that begin with a question mark."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = super().forward(input_ids, labels)
        poisoned = bool((input_ids[:, 0] == models.SIZE - 1).any())
        return {**out, "loss": out["loss"] * (torch.inf if poisoned else 1.0)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["plain", "dps", "dps_mix"])
def test_a_step_that_is_not_finite_changes_nothing(
    name: str, accumulation: int, tmp_path: Path
) -> None:
    data = rows(24)
    for row in data[:1]:
        row["input_ids"][0] = models.SIZE - 1
    at: list[Any] = []

    class Watching(TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            self.before = weights(model), optimizer.param_groups[0]["lr"], bound().step
            self.state = {k: t.clone() for k, t in bound().state_dict()["tensors"].items()}

        def on_step_end(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            after = weights(model), optimizer.param_groups[0]["lr"], bound().step
            tensors = bound().state_dict()["tensors"]
            kept = {k: t for k, t in tensors.items() if k in self.state and k != "generator"}
            at.append(
                (
                    same(self.before[0], after[0]),
                    self.before[1] == after[1],
                    self.before[2] == after[2],
                    all(torch.equal(self.state[k], t) for k, t in kept.items()),
                )
            )

    def bound() -> Any:
        return trainer.bound

    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, num_train_epochs=1)
    trainer = holdfast.Trainer(
        model=Poisoned(),
        args=args,
        train_dataset=data,
        data_collator=collate,
        recipe=PRESETS[name](),
        callbacks=[Watching()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    left_out = [i for i, step in enumerate(at) if step == (True, True, True, True)]
    assert len(left_out) == 1 and trainer.bound.skipped == 1
    assert not any(step[0] for i, step in enumerate(at) if i not in left_out)
    steps = 6 // accumulation
    assert trainer.bound.step == steps - 1 and trainer.state.global_step == steps
    assert trainer.lr_scheduler.last_epoch == steps - 1
    assert trainer.state.log_history[-2]["holdfast/skipped_steps"] == 1
    assert all(torch.isfinite(w).all() for w in trainer.model.parameters())


def test_the_norm_is_measured_anew_where_a_scaler_left_out_a_step(tmp_path: Path) -> None:
    """GradScaler passes over `optimizer.step`, hooks and all: the next step must not be skipped."""
    model = models.Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe().bind(model, optimizer, total_steps=3)
    batch = collate(rows(4))
    model(**batch)["loss"].mul(torch.inf).backward()
    assert not torch.isfinite(bound.gradient_norm())  # as _clip_grad_norm asks; no step follows
    optimizer.zero_grad()
    model(**batch)["loss"].backward()
    assert torch.isfinite(bound.gradient_norm())
    optimizer.step()
    assert (bound.step, bound.skipped) == (1, 0)


def test_replay_is_part_of_the_loss(tmp_path: Path) -> None:
    """A second task with no gradient of its own still learns the first one's rows."""
    first = bert()
    recipe = Recipe(methods=[Replay(memory=8, share=1.0)])
    one = trained(tmp_path, first, rows(8), recipe=recipe, task="one", shared=first.base_model)
    one.end_task()
    second = bert(seed=1, num_labels=2)
    second.bert = first.bert
    head = weights(first.classifier)

    class Silent(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().compute_loss(*args, **kwargs)
            return (out[0] * 0, out[1]) if isinstance(out, tuple) else out * 0

    def loss_of_one() -> float:
        with torch.no_grad():
            return float(first.eval()(**collate(rows(8))).loss)

    before = loss_of_one()
    trained(
        tmp_path,
        second,
        rows(22, seed=5),
        with_recipe(Silent),
        recipe=recipe,
        task="two",
        shared=second.base_model,
        bound=one.bound,
        args={"num_train_epochs": 3},
    )
    assert loss_of_one() < before
    assert same(head, weights(first.classifier))  # the old head is not trained further


# --- nothing to learn from ------------------------------------------------------------------------


class Exploding(models.Plain):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = super().forward(input_ids, labels)
        return {k: v * float("nan") if self.training else v for k, v in found.items()}


def unlearned(out: Path, model: Any, data: Any, own: Any = None, **more: Any) -> Any:
    return holdfast.Trainer(model=model, args=arguments(out, **more), train_dataset=data,
                            data_collator=collate, recipe=Recipe(methods=[DPS(stage=2)]),
                            **(own or {}))  # fmt: skip


def test_gradients_that_are_never_finite_stop_a_trainer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended as if it had learned, with a loss of 0 (faults N3)."""
    trainer = unlearned(tmp_path, Exploding(), rows(120))
    with pytest.raises(TrainingDiverged, match="the gradients of 20 steps in a row"):
        trainer.train()
    assert trainer.bound.skipped == 20 and caplog.text.count("gradients are not finite") == 1
    fewer = unlearned(tmp_path, Exploding(), rows(120), own={"max_skipped": 3})
    with pytest.raises(TrainingDiverged, match="3 steps"):
        fewer.train()
    unlearned(tmp_path, Exploding(), rows(120), own={"max_skipped": None}).train()
    with pytest.raises(TrainingDiverged, match="no gradient of 2 steps was finite"):
        unlearned(tmp_path, Exploding(), rows(8)).train()
    with pytest.raises(Refused, match="max_skipped: must be above 0"):
        unlearned(tmp_path, Exploding(), rows(8), own={"max_skipped": 0})


@pytest.mark.parametrize(("count", "steps"), [(16, 4), (120, 20)])
def test_labels_that_are_all_ignored_are_no_training(
    count: int, steps: int, tmp_path: Path
) -> None:
    """They counted as steps of loss 0 (faults D12)."""
    ignored = [dict(row, labels=-100) for row in rows(count)]
    trainer = unlearned(tmp_path, bert(), ignored)
    with pytest.raises(Refused, match=f"all labels of {steps} steps are -100"):
        trainer.train()


def test_some_steps_without_labels_are_told_and_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = [dict(row, labels=-100) for row in rows(4)] + rows(8)
    unlearned(tmp_path, bert(), some, train_sampling_strategy="sequential").train()
    assert "all labels of a step are -100" in caplog.text


@pytest.mark.parametrize("kind", ["class", "number"])
@pytest.mark.parametrize("told", [None, "regression"])
def test_classes_are_not_taken_for_a_regression_in_silence(
    kind: str, told: str | None, tmp_path: Path
) -> None:
    """Transformers does so where the configuration has one label (faults D2)."""
    model = bert(num_labels=1, problem_type=told)
    before, data = weights(model), rows(8, labels=kind)
    if told is None and kind == "class":
        for _ in range(2):  # also when tried again
            with pytest.raises(Refused, match=r'num_labels: .*problem_type = "regression"'):
                unlearned(tmp_path, model, data).train()
        assert same(weights(model), before)
    else:
        unlearned(tmp_path, model, data).train()
        assert not same(weights(model), before)
