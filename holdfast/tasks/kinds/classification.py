"""Classes and numbers: each task a head of its own on a shared encoder; one text a row, or two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from holdfast.engine.forwarding import in_mode
from holdfast.errors import Refused, TrainingDiverged
from holdfast.tasks.kinds.packed import Packed, alike, lengths, values
from holdfast.tasks.kinds.pretrained import load_config, load_saved, load_tokenizer, padding_id
from holdfast.tasks.scores import score
from holdfast.tasks.task import Prediction, Row, Task

AUTO = AutoModelForSequenceClassification
HEADS = True  # each task has a head of its own


def check(source: str) -> None:
    """Any encoder or decoder gets a head."""


def load_model(source: str, task: Task, *, seed: int) -> nn.Module:
    """The pre-trained encoder below a fresh head for `task`; a classifier loses its old head."""
    torch.manual_seed(seed)
    config = load_config(source)
    deployed = has_head(config)
    more = {} if deployed else head_config(task.labels)
    if padding_id(config) is None:
        more["pad_token_id"] = load_tokenizer(source).pad_token_id
    model = load_saved(AUTO, source, **more)
    return add_head(model, task, seed=seed) if deployed else model


def open_saved(folder: str) -> Any:
    """A classifier as it was saved."""
    lacks = padding_id(load_config(folder)) is None
    more = {"pad_token_id": load_tokenizer(folder).pad_token_id} if lacks else {}
    return load_saved(AUTO, folder, **more)


def has_head(config: Any) -> bool:
    """Whether a model was saved as a classifier: its head is replaced by the task's."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def add_head(model: Any, task: Task, *, seed: int) -> nn.Module:
    """A fresh head for `task` on `model`'s own encoder: its weights are shared."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**model.config.to_dict(), **head_config(task.labels)})
    fresh = AUTO.from_config(config)
    share_encoder(model, fresh)
    return fresh


def share_encoder(model: Any, other: Any) -> None:
    """Put `model`'s encoder, the same object, in place of `other`'s."""
    setattr(other, str(other.base_model_prefix), model.base_model)


def head_config(labels: Sequence[str] | None) -> dict[str, Any]:
    """What a model's configuration says of a head for these labels; None is a regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {
        "num_labels": len(names),
        "problem_type": "single_label_classification",
        "id2label": names,
        "label2id": {label: i for i, label in names.items()},
    }


def shared(model: Any) -> nn.Module:
    """What all tasks share: the encoder."""
    return model.base_model


def save_head(model: Any, file: Path) -> None:
    """Write a model's tensors outside of its encoder."""
    inside = f"{model.base_model_prefix}."
    named = model.state_dict()
    save_file({k: v.detach().cpu().contiguous() for k, v in named.items()
               if not k.startswith(inside)}, file)  # fmt: skip


def with_head(model: Any, labels: Sequence[str] | None, file: Path) -> Any:
    """A model on `model`'s encoder, with the head that `save_head` wrote."""
    config = AutoConfig.for_model(**{**model.config.to_dict(), **head_config(labels)})
    with torch.device("meta"):  # without storage: the encoder is there, the head is read
        made: Any = AUTO.from_config(config)
    share_encoder(model, made)
    inside = f"{made.base_model_prefix}."
    try:
        lacking, unknown = made.load_state_dict(load_file(file), strict=False, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Refused(f"cannot be read ({str(error).splitlines()[0]})", where=str(file)) from None
    if unknown or any(not name.startswith(inside) for name in lacking):
        raise Refused("does not fit the model beside it", where=str(file),
                      remedy="run its sequence again")  # fmt: skip
    if left := [n for n, b in made.named_buffers() if b.is_meta]:
        raise Refused(f"a head with a buffer that is not saved ({left[0]})", where=str(file))
    return made.eval()


# --- rows -------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row], task: Task, tokenizer: Any, *, max_length: int, config: Any = None
) -> Packed:
    """Token ids and label of each row, cut at `max_length` tokens and not padded."""

    def few(rows: Sequence[Row]) -> list[dict[str, Any]]:
        fields = _tokens(rows, task, tokenizer, truncation=True, max_length=max_length)
        labels = [float(r.label) if task.regression else int(r.label) for r in rows]
        found = ({k: v[i] for k, v in fields.items()} for i in range(len(rows)))
        return [{**row, "labels": label} for row, label in zip(found, labels, strict=True)]

    return Packed.of(rows, few)


def count_cut(
    rows: Sequence[Row],
    encoded: Packed,
    task: Task,
    tokenizer: Any,
    *,
    max_length: int,
) -> int:
    """How many rows were cut: those at `max_length` tokens that have more when not cut."""
    sizes = zip(rows, encoded.lengths("input_ids"), strict=True)
    full = [row for row, size in sizes if size >= max_length]
    whole = _tokens(full, task, tokenizer)["input_ids"] if full else []
    return sum(len(ids) > max_length for ids in whole)


def _tokens(rows: Sequence[Row], task: Task, tokenizer: Any, **limit: Any) -> Any:
    pairs = [r.pair or "" for r in rows] if task.pairs else None
    return tokenizer([r.text for r in rows], pairs, **limit)


def collator(tokenizer: Any) -> Any:
    """Batches of encoded rows, padded to the longest."""
    return DataCollatorWithPadding(tokenizer)


def measure(
    model: nn.Module, rows: Sequence[dict[str, Any]], task: Task, collate: Any, *, batch: int = 64
) -> Any:
    """Label and prediction of each row: (rows, 2)."""
    found = np.full((len(rows), 2), math.nan)
    found[:, 0] = values(rows, "labels")
    for chosen, logits in outputs(model, rows, collate, batch=batch):
        said = logits[:, 0] if task.regression else logits.argmax(-1).float()
        # Marked, not asked for: the batch is waited for once.
        said = torch.where(logits.isfinite().all(-1), said, math.nan)
        for i, value in zip(chosen, said.tolist(), strict=True):
            if math.isnan(value):
                raise TrainingDiverged("diverged: the model's outputs are not finite",
                                       where=task.name, remedy="lower --lr")  # fmt: skip
            found[i, 1] = value
    return found


def total(task: Task, measured: Any) -> float:
    """The task's metric of these rows."""
    classes = None if task.labels is None else len(task.labels)
    return score(task.metric, measured[:, 0], measured[:, 1], classes=classes)


def predict(
    model: nn.Module, about: Mapping[str, Any], texts: Sequence[str],
    pairs: Sequence[str] | None, tokenizer: Any, *, max_length: int, batch: int,
) -> list[Prediction]:  # fmt: skip
    """What a model says of each text. about: the task's `labels`."""
    fields = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    rows = [{k: v[i] for k, v in fields.items()} for i in range(len(texts))]
    found: list[Any] = [None] * len(rows)
    for chosen, logits in outputs(model, rows, collator(tokenizer), batch=batch):
        for i, row in zip(chosen, logits, strict=True):
            found[i] = _prediction(row, about["labels"])
    return found


def _prediction(logits: Tensor, labels: Sequence[str] | None) -> Prediction:
    if labels is None:
        return Prediction(float(logits[0]), {})
    shares = logits.cpu().double().softmax(0).tolist()
    return Prediction(labels[int(logits.argmax())], dict(zip(labels, shares, strict=True)))


def outputs(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Any, *, batch: int = 64
) -> Iterator[tuple[list[int], Tensor]]:
    """Places of rows, and their logits in float32, (rows, classes), in evaluation mode.

    Draws no random numbers. Rows of similar length are batched together to save padding; the
    order changes no prediction.
    """
    device = next(model.parameters()).device
    with in_mode(model.modules(), training=False):
        for chosen in alike(lengths(rows), batch):
            inputs = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in chosen])
            # Not inference_mode: a model may cache tensors, and then fail to train.
            with torch.no_grad():
                logits = model(**inputs.to(device)).logits.float()
            yield chosen, logits
