"""Classes and numbers: one text a row, or two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from holdfast.engine.forwarding import in_mode
from holdfast.errors import NotFinite, Refused, TrainingDiverged
from holdfast.tasks.kinds.levi import LeviConfig
from holdfast.tasks.kinds.packed import Packed, alike, lengths, values
from holdfast.tasks.kinds.pretrained import check_length
from holdfast.tasks.kinds.sharing import Headed
from holdfast.tasks.kinds.stored import check_ids, check_texts
from holdfast.tasks.scores import score
from holdfast.tasks.task import Prediction, Row, Task


class Classification(Headed):
    """One class a row, or one number."""

    AUTO = AutoModelForSequenceClassification
    ENDING = "ForSequenceClassification"

    def check(self, source: str, *, max_length: int) -> None:
        """Any encoder or decoder gets a head."""
        if isinstance(self.load_config(source), LeviConfig):
            raise Refused("is an ensemble, learned with --head levi", where=source,
                          remedy="say --head levi, or name the model it began with")  # fmt: skip
        check_length(source, max_length)

    def head_config(self, labels: Sequence[str] | None) -> dict[str, Any]:
        """As for other heads; None is a regression."""
        if labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {**super().head_config(labels), "problem_type": "single_label_classification"}

    def encode(
        self,
        rows: Sequence[Row],
        task: Task,
        tokenizer: Any,
        *,
        max_length: int,
        config: Any = None,
    ) -> Packed:
        """Token ids and label of each row, cut at `max_length` tokens and not padded."""

        def few(rows: Sequence[Row]) -> list[dict[str, Any]]:
            fields = _tokens(rows, task, tokenizer, truncation=True, max_length=max_length)
            found = ({k: v[i] for k, v in fields.items()} for i in range(len(rows)))
            return [
                {**each, "labels": self.target(row, task)}
                for each, row in zip(found, rows, strict=True)
            ]

        made = Packed.of(rows, few)
        check_ids(made.largest("input_ids"), config, task.name)
        return made

    def target(self, row: Row, task: Task) -> Any:
        """What the model's loss compares with: a class, or a number."""
        return float(row.label) if task.regression else int(row.label)

    def count_cut(
        self, rows: Sequence[Row], encoded: Packed, task: Task, tokenizer: Any, *, max_length: int
    ) -> int:
        """How many rows were cut: those at `max_length` tokens that have more when not cut."""
        sizes = zip(rows, encoded.lengths("input_ids"), strict=True)
        full = [row for row, size in sizes if size >= max_length]
        whole = _tokens(full, task, tokenizer)["input_ids"] if full else []
        return sum(len(ids) > max_length for ids in whole)

    def collator(self, tokenizer: Any) -> Any:
        """Batches of encoded rows, padded to the longest."""
        return DataCollatorWithPadding(tokenizer)

    def measure(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], task: Task, collate: Any, *,
        batch: int = 64,
    ) -> Any:  # fmt: skip
        """Label and prediction of each row: (rows, 2)."""
        truth = values(rows, "labels")
        found = np.full((2, *np.shape(truth)), math.nan)
        found[0] = truth
        for chosen, logits in outputs(model, rows, collate, batch=batch):
            said = self.answers(logits, task)
            # Marked, not asked for: the batch is waited for once.
            said = torch.where(
                logits.isfinite().all(-1).view(-1, *[1] * (said.ndim - 1)), said, math.nan
            )
            found[1, chosen] = said.cpu().numpy()
            if np.isnan(found[1, chosen]).any():
                raise TrainingDiverged("diverged: the model's outputs are not finite",
                                       where=task.name, remedy="lower --lr")  # fmt: skip
        return np.concatenate(found.reshape(2, len(rows), -1), 1)

    def answers(self, logits: Tensor, task: Task) -> Tensor:
        """What logits (rows, outputs) say, to be compared with `target`."""
        return logits[:, 0] if task.regression else logits.argmax(-1).float()

    def total(self, task: Task, measured: Any) -> float:
        """The task's metric of these rows."""
        classes = None if task.labels is None else len(task.labels)
        return score(task.metric, measured[:, 0], measured[:, 1], classes=classes)

    def aligned(self, measured: Any, labels: Sequence[str] | None, ours: Sequence[str]) -> Any:
        """What was measured with ids in the order of `labels`, with ids in the order of `ours`.

        Labels that are not of `ours` have the ids after them.
        """
        if labels is None:
            return measured
        every = [*ours, *(n for n in labels if n not in ours)]
        return np.array([every.index(n) for n in labels])[measured.astype(int)]

    def predict(
        self, model: nn.Module, about: Mapping[str, Any], texts: Sequence[str],
        pairs: Sequence[str] | None, tokenizer: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """What a model says of each text. about: the task's `labels`."""
        fields = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        rows = [{k: v[i] for k, v in fields.items()} for i in range(len(texts))]
        check_texts(fields["input_ids"], model)
        return self.predictions(model, rows, self.collator(tokenizer), about["labels"], batch=batch)

    def predictions(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], collate: Any,
        labels: Sequence[str] | None, *, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """What a model says of encoded rows, in their order."""
        found: list[Any] = [None] * len(rows)
        for chosen, logits in outputs(model, rows, collate, batch=batch):
            check_finite(logits)
            for i, row in zip(chosen, logits, strict=True):
                found[i] = self.prediction(row, labels)
        return found

    def prediction(self, logits: Tensor, labels: Sequence[str] | None) -> Prediction:
        """One row's logits in words."""
        if labels is None:
            return Prediction(float(logits[0]), {})
        shares = logits.cpu().double().softmax(0).tolist()
        return Prediction(labels[int(logits.argmax())], dict(zip(labels, shares, strict=True)))


def check_finite(logits: Tensor) -> None:
    """Refuse outputs of which the largest is none: the first class would be the answer."""
    if not bool(logits.isfinite().all()):
        raise NotFinite("the model's outputs are not finite", remedy="train it again, --lr lower")


def _tokens(rows: Sequence[Row], task: Task, tokenizer: Any, **limit: Any) -> Any:
    pairs = [r.pair or "" for r in rows] if task.pairs else None
    return tokenizer([r.text for r in rows], pairs, **limit)


def outputs(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Any, *, batch: int = 64,
    dropout: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:  # fmt: skip
    """Places of rows, and their logits in float32, (rows, classes), in evaluation mode.

    Draws no random numbers, but with `dropout`. Rows of similar length are batched together to
    save padding; the order changes no prediction.
    """
    device = next(model.parameters()).device
    with in_mode(model.modules(), training=dropout):
        for chosen in alike(lengths(rows), batch):
            inputs = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in chosen])
            # Not inference_mode: a model may cache tensors, and then fail to train.
            with torch.no_grad():
                logits = model(**inputs.to(device)).logits.float()
            yield chosen, logits


KIND = Classification()
