"""The trainers of other libraries on tiny models: `TRAINERS[name](recipe, out)` makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import torch
import transformers
from datasets import Dataset

from holdfast import Recipe, with_recipe

TEXTS = ["the film was good", "a poor dull film", "who is the man ?", "the river was not cold"]
GOOD = [" great", " fine", " warm", " good"]
BAD = [" bad", " poor", " cold", " dull"]


def plain(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "max_steps": 4, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "dataloader_pin_memory": False,
    } | more  # fmt: skip


def made(cls: Any, recipe: Recipe | None, more: dict[str, Any], **how: Any) -> Any:
    """With the recipe, or the bare class where there is none."""
    trainer = cls(**how) if recipe is None else with_recipe(cls)(**how, **more, recipe=recipe)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trl(name: str, recipe: Recipe | None, out: Path, model: Any = None, **more: Any) -> Any:
    import trl as library

    preferred = {"prompt": TEXTS * 2, "chosen": GOOD * 2, "rejected": BAD * 2}
    rated = {"prompt": TEXTS * 2, "completion": GOOD + BAD, "label": [True] * 4 + [False] * 4}
    rows: dict[str, dict[str, Any]] = {
        "SFT": {"text": [t + g for t, g in zip(TEXTS * 2, GOOD + BAD, strict=True)]},
        "DPO": preferred, "Reward": preferred, "KTO": rated,
        "GRPO": {"prompt": TEXTS * 2}, "RLOO": {"prompt": TEXTS * 2},
    }  # fmt: skip
    own: dict[str, Any] = {}
    how: dict[str, Any] = {}
    if name in ("GRPO", "RLOO"):
        own = {"num_generations": 2, "max_completion_length": 4}
        how = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    models.llama().save_pretrained(out / "model")  # some load the model a second time
    head = "SequenceClassification" if name == "Reward" else "CausalLM"
    torch.manual_seed(0)
    load = getattr(transformers, f"LlamaFor{head}").from_pretrained
    return made(
        getattr(library, f"{name}Trainer"), recipe, more,
        model=load(out / "model", num_labels=1) if model is None else model,
        args=getattr(library, f"{name}Config")(**plain(out, **own)),
        train_dataset=Dataset.from_dict(rows[name]),
        processing_class=models.tokenizer(template=False), **how,
    )  # fmt: skip


def sentences(name: str, recipe: Recipe | None, out: Path, model: Any = None, **more: Any) -> Any:
    import sentence_transformers as library

    folder = out / "model"
    masked = name == "SparseEncoder"
    models.bert("MaskedLM").save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    if model is None:
        own = {"num_labels": 1} if name == "CrossEncoder" else {}
        model = getattr(library, name)(str(folder), device="cpu", **own)
    if name == "CrossEncoder":
        loss = library.cross_encoder.losses.BinaryCrossEntropyLoss(model)
    elif masked:
        inner = library.sparse_encoder.losses.SparseMultipleNegativesRankingLoss(model)
        loss = library.sparse_encoder.losses.SpladeLoss(
            model, inner, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3
        )
    else:
        loss = library.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    pairs = {
        "anchor": TEXTS * 2,
        "positive": [t + g for t, g in zip(TEXTS * 2, GOOD * 2, strict=True)],
    }
    if name == "CrossEncoder":
        pairs["label"] = [1.0, 0.0] * 4
    return made(
        getattr(library, f"{name}Trainer"), recipe, more, model=model, loss=loss,
        args=getattr(library, f"{name}TrainingArguments")(**plain(out)),
        train_dataset=Dataset.from_dict(pairs),
    )  # fmt: skip
