"""Trainer classes of other makers: abstract, with an optimizer, schedule or loop of their own."""

from __future__ import annotations

import abc
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import arguments, bert, collate, rows, same, t5, weights

import holdfast
from holdfast import (
    DPS,
    EWC,
    KfacEWC,
    KLAnchor,
    LwF,
    Merge,
    Rates,
    Recipe,
    Refused,
    Replay,
    with_recipe,
)

MASKED = Recipe(methods=[DPS(drop=0.5, stage=2)])


class Abstract(transformers.Trainer, abc.ABC):  # type: ignore[misc]
    """As the trainers of sentence encoders are."""


class Sgd(transformers.Trainer):  # type: ignore[misc]
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        return self.optimizer


class Unbinding(holdfast.Trainer):  # type: ignore[misc]
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        one = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda _: 1.0)
        self.lr_scheduler = one
        return one


class Uncounting(transformers.Trainer):  # type: ignore[misc]
    """Its loss is divided by itself, and it counts no items."""

    loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        return None


def made(cls: Any, out: Path, recipe: Recipe = MASKED, **args: Any) -> Any:
    trainer = cls(
        model=bert(), args=arguments(out, **{"max_steps": 4, **args}), train_dataset=rows(16),
        eval_dataset=rows(8), data_collator=collate, recipe=recipe,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def test_an_abstract_class_is_served_and_pickles(tmp_path: Path) -> None:
    cls = with_recipe(Abstract)
    assert issubclass(cls, Abstract) and pickle.loads(pickle.dumps(cls)) is cls  # noqa: S301
    one, two = made(cls, tmp_path / "a"), made(holdfast.Trainer, tmp_path / "b")
    one.train()
    two.train()
    assert same(weights(one.model), weights(two.model))


def test_an_optimizer_that_a_class_makes_is_the_one_that_trains(tmp_path: Path) -> None:
    """Ours in its place trained at another rate, and said nothing."""
    trainer = made(with_recipe(Sgd), tmp_path)
    trainer.train()
    assert isinstance(trainer.bound.optimizer, torch.optim.SGD)
    assert trainer.bound.states["dps"].weights  # and the recipe is at work on it
    with pytest.raises(Refused, match=r"rates: SgdWithRecipe makes an optimizer of its own"):
        made(with_recipe(Sgd), tmp_path, Recipe(rates=Rates.bertcl())).train()


def test_a_schedule_that_leaves_the_recipe_out_is_refused(tmp_path: Path) -> None:
    """Without clipping nothing else would have told that no method is at work."""
    trainer = made(Unbinding, tmp_path, max_grad_norm=0.0)
    before = weights(trainer.model)
    with pytest.raises(Refused, match=r"Unbinding: create_scheduler .*call super\(\)"):
        trainer.train()
    assert same(weights(trainer.model), before)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_without_an_initial_rate_are_saved_and_go_on(kind: str, tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2,
             "lr_scheduler_type": kind}  # fmt: skip
    whole = made(holdfast.Trainer, tmp_path / "whole", **every)
    whole.train()
    again = made(holdfast.Trainer, tmp_path / "again", **every)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))


def test_a_loss_without_a_count_of_items_accumulates(tmp_path: Path) -> None:
    made(with_recipe(Uncounting), tmp_path, gradient_accumulation_steps=2).train()


def test_batches_that_are_lists_weigh_nothing(tmp_path: Path) -> None:
    """TRL's online trainers are handed lists of prompts, and make rows of them later."""
    trainer = made(holdfast.Trainer, tmp_path)
    trainer.get_batch_samples(iter([[{"prompt": "a"}], [{"prompt": "b"}]]), 2, torch.device("cpu"))
    assert trainer._window is None


class Columns(Abstract):
    """As trainers of sentence encoders: batches by column, groups that hold the loss's weights."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **how: Any) -> Any:
        mine = {k.removeprefix("anchor_"): v for k, v in inputs.items()}
        return super().compute_loss(model, mine, *args, **how)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        cls, how = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, how | {"optimizer_dict": [{"params": list(self.model.parameters())}]}


class Positional(Columns):
    """Its loss calls the model by position, so that the mask has no name in the call."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **how: Any) -> Any:
        of = {k.removeprefix("anchor_"): v for k, v in inputs.items()}
        outputs = model(of["input_ids"], of["attention_mask"], labels=of["labels"])
        return outputs.loss


def padded(made_rows: list[Any]) -> dict[str, Any]:
    batch = collate(made_rows)
    ids = torch.nn.functional.pad(batch["input_ids"], (0, 3), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 3))
    return {"input_ids": ids, "attention_mask": mask, "labels": batch["labels"]}


def by_column(made_rows: list[Any]) -> dict[str, Any]:
    return {f"anchor_{k}": v for k, v in padded(made_rows).items()}


def test_batches_by_column_are_trained_on_and_refused_where_methods_would_run_them(
    tmp_path: Path,
) -> None:
    """Refused before the first step, not when a task that took hours ends."""
    trainer = made(with_recipe(Columns), tmp_path)
    trainer.data_collator = by_column
    trainer.train()
    assert len(trainer.bound.optimizer.param_groups) == 1  # theirs
    assert trainer.bound.states["dps"].weights
    for method in (Replay(), KfacEWC(), LwF(), KLAnchor(), EWC(labels="sampled")):
        recipe = Recipe(methods=[method])
        trainer = made(with_recipe(Columns), tmp_path, recipe)
        trainer.data_collator, before = by_column, weights(trainer.model)
        with pytest.raises(Refused, match=rf"{method.name} runs the model on rows.* of Columns"):
            trainer.train()
        assert same(weights(trainer.model), before)
    with pytest.raises(Refused, match="makes an optimizer of its own"):
        made(with_recipe(Columns), tmp_path, Recipe(rates=Rates.bertcl())).train()


@pytest.mark.parametrize(
    "method", [EWC(labels="true"), Merge(), DPS(score="retention", fisher_labels="true")]
)
def test_a_loss_of_whole_batches_gives_what_the_models_own_gives(
    method: Any, tmp_path: Path
) -> None:
    """One row per batch: nothing is averaged before it is squared. Padding counts in neither."""
    found = []
    for cls, collator in ((Columns, by_column), (Abstract, padded), (Positional, by_column)):
        trainer = made(with_recipe(cls), tmp_path, Recipe(methods=[method]),
                       per_device_eval_batch_size=1, learning_rate=0.0)  # fmt: skip
        trainer.data_collator = collator
        trainer.train()
        trainer.end_task()
        assert trainer._own_loss == (cls is not Abstract)
        found.append(trainer.bound.state_dict()["tensors"])
    assert all(each.keys() == found[0].keys() for each in found) and found[0]
    for key, tensor in found[0].items():
        near = {"rtol": 1e-3, "atol": 1e-2 * float(tensor.abs().max()) + 1e-12}
        for other in found[1:]:
            torch.testing.assert_close(tensor, other[key], **near)


def test_the_square_of_a_whole_batch_counts_for_each_of_its_rows(tmp_path: Path) -> None:
    """F = 1/rows · Σ over batches of (B · mean gradient)²: the mean over batches of B g²."""
    trainer = made(with_recipe(Columns), tmp_path, Recipe(methods=[EWC()]),
                   per_device_eval_batch_size=4, learning_rate=0.0)  # fmt: skip
    trainer.data_collator = by_column
    trainer.train()
    trainer.end_task()
    model, total = trainer.model.eval(), None
    for batch in trainer._batches(order=torch.Generator())():
        loss = model(**{k.removeprefix("anchor_"): v for k, v in batch.items()}).loss
        (grad,) = torch.autograd.grad(loss, [model.bert.pooler.dense.weight])
        total = 4**2 * grad.square() + (0 if total is None else total)
    fisher = trainer.bound.states["ewc"].weights["fisher"]
    (name,) = [n for n in fisher if n.endswith("pooler.dense.weight")]
    # Other batches than those of `end_task`, which draws its order: only the scale is the same.
    ratio = float(fisher[name].sum() / (total.sum() / 16))
    assert 0.5 < ratio < 2


SMALL = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8, "window_size": 2, "image_size": 16}
NETWORKS = {
    "bert": bert,
    "t5": lambda: t5(),
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SMALL)),
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)),
}  # fmt: skip


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_weights_decay_as_under_the_bare_class(make: Any, tmp_path: Path) -> None:
    """Also T5's position biases, Swin's tables and Mamba's states, and names that a class chose."""

    class Own(transformers.Trainer):  # type: ignore[misc]
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters()][::2]

    for cls in (transformers.Trainer, Own):
        found = []
        for each in (cls, with_recipe(cls)):
            trainer = each(model=make(), args=arguments(tmp_path, weight_decay=0.1))
            decay = {id(p): g["weight_decay"] for g in trainer.create_optimizer().param_groups
                     for p in g["params"]}  # fmt: skip
            found.append({n: decay[id(p)] for n, p in trainer.model.named_parameters()})
        assert found[0] == found[1] and {*found[0].values()} == {0.0, 0.1}


def test_a_model_made_anew_is_trained_anew(tmp_path: Path) -> None:
    """With `model_init` the second `train()` begins from the first weights, masks and noise."""
    recipe = Recipe(methods=[DPS(mix=True, stage=2)])
    trainer = holdfast.Trainer(
        model_init=lambda: bert(), args=arguments(tmp_path, max_steps=4), train_dataset=rows(16),
        data_collator=collate, recipe=recipe,
    )  # fmt: skip
    trainer.train()
    once = weights(trainer.model)
    trainer.train()
    assert same(once, weights(trainer.model))


def test_embeddings_keep_32_bits_in_an_optimizer_of_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Trainer does for its own bitsandbytes optimizer is done for ours."""
    told: list[Any] = []
    manager = SimpleNamespace(register_module_override=lambda *given: told.append(given))
    get = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=get))

    class Eight(torch.optim.SGD):
        __module__ = "bitsandbytes.optim"

        def __init__(self, groups: Any, lr: float, optim_bits: int) -> None:
            super().__init__(groups, lr)

    trainer = holdfast.Trainer(
        model=bert(), args=arguments(tmp_path),
        optimizer_cls_and_kwargs=(Eight, {"lr": 0.1, "optim_bits": 8}),
    )  # fmt: skip
    assert isinstance(trainer.create_optimizer(), Eight)
    modules = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Embedding)]
    assert [given[0] for given in told] == modules and len(modules) == 3
    assert trainer.optimizer_cls_and_kwargs[1] == {"lr": 0.1, "optim_bits": 8}


def test_several_devices_are_not_spread_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(Refused, match="over 2 devices by DataParallel; start it by torchrun"):
        made(holdfast.Trainer, tmp_path)


def test_weights_on_several_devices_are_refused() -> None:
    model, recipe = bert(), Recipe()
    model.hf_device_map = {"bert": 0, "classifier": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(Refused, match="device_map: the weights lie on"):
        recipe.bind(model, optimizer, total_steps=1)
    model = bert()
    model.classifier.to("meta")
    whole = bert()
    whole.hf_device_map = {"": "cpu"}
    recipe.bind(whole, torch.optim.SGD(whole.parameters(), lr=0.1), total_steps=1)
    with pytest.raises(Refused, match="the weights lie on 2 devices"):
        recipe.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1)
