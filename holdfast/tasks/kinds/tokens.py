"""A tag for every word: entities, parts of speech. The loss is on each word's first token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from holdfast.errors import Refused, TrainingDiverged
from holdfast.tasks.kinds.classification import check_finite, outputs
from holdfast.tasks.kinds.packed import Packed
from holdfast.tasks.kinds.pretrained import check_length
from holdfast.tasks.kinds.sharing import Headed
from holdfast.tasks.kinds.stored import check_ids, check_texts
from holdfast.tasks.labels import IGNORED
from holdfast.tasks.tagged import OUTSIDE, Span, chunked, entities, words_in
from holdfast.tasks.task import Prediction, Row, Task

# Of an encoded row: every word's tag, also of those that were cut; the word that each token begins.
TAGS, WORDS = "tags", "words"


class Tokens(Headed):
    """Tags of words; one that was cut, or that the tokenizer leaves out, is answered by O."""

    AUTO = AutoModelForTokenClassification
    ENDING = "ForTokenClassification"

    def check(self, source: str, *, max_length: int) -> None:
        check_length(source, max_length)

    def encode(
        self,
        rows: Sequence[Row],
        task: Task,
        tokenizer: Any,
        *,
        max_length: int,
        config: Any = None,
    ) -> Packed:
        """Token ids, a label for each token (-100 but at a word's first), a tag for each word."""
        if not tokenizer.is_fast:
            raise Refused("its tokenizer does not tell words from tokens", where=task.name,
                          remedy="take a model with a fast one")  # fmt: skip

        def few(rows: Sequence[Row]) -> list[dict[str, Any]]:
            made = _split(tokenizer, [r.text.split(" ") for r in rows], max_length)
            found = []
            for i, row in enumerate(rows):
                words = _begun(made.word_ids(i))
                labels = [w if w == IGNORED else row.label[w] for w in words]
                found.append({**{k: v[i] for k, v in made.items()}, TAGS: list(row.label),
                              WORDS: words, "labels": labels})  # fmt: skip
            return found

        made = Packed.of(rows, few)
        check_ids(made.largest("input_ids"), config, task.name)
        return made

    def count_cut(
        self, rows: Sequence[Row], encoded: Packed, task: Task, tokenizer: Any, *, max_length: int
    ) -> int:
        """How many rows have a last word whose first token was cut."""
        return sum(
            size >= max_length and max(each[WORDS]) + 1 < len(each[TAGS])
            for size, each in zip(encoded.lengths("input_ids"), encoded, strict=True)
        )

    def collator(self, tokenizer: Any) -> Any:
        """Batches padded on the right, labels with -100."""
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return _Collator(right, label_pad_token_id=IGNORED)

    def measure(
        self, model: nn.Module, rows: Sequence[dict[str, Any]], task: Task, collate: Any
    ) -> Any:
        """How many are right, said and true in each row, entities or words: (rows, 3)."""
        names, found = task.labels or (), np.zeros((len(rows), 3))
        for chosen, logits in outputs(model, rows, collate):
            if not bool(logits.isfinite().all()):
                raise TrainingDiverged("diverged: the model's outputs are not finite",
                                       where=task.name, remedy="lower --lr")  # fmt: skip
            for i, said in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                tags = rows[i][TAGS]
                told = _by_word(said, rows[i][WORDS], len(tags))
                found[i] = _counts(told, tags, names, task.metric)
        return found

    def total(self, task: Task, measured: Any) -> float:
        """F1 = 2 · right / (said + true) over all rows, seqeval's micro average; or accuracy."""
        right, said, true = measured.sum(0)
        return float(2 * right / max(said + true, 1))

    def aligned(self, measured: Any, labels: Sequence[str] | None, ours: Sequence[str]) -> Any:
        return measured  # counts

    def predict(
        self, model: Any, about: Mapping[str, Any], texts: Sequence[str],
        pairs: Sequence[str] | None, tokenizer: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """The entities of each text, or its words if tags are not BIO, as `Span`s of characters."""
        words = [words_in(text) for text in texts]
        # A text without a word is read as a sign: some tokenizers would make no token of it.
        made = _split(tokenizer, [[w for w, _, _ in each] or ["?"] for each in words], max_length)
        rows = [{k: v[i] for k, v in made.items()} for i in range(len(texts))]
        check_texts(made["input_ids"], model)
        found: list[Any] = [None] * len(texts)
        for chosen, logits in outputs(model, rows, self.collator(tokenizer), batch=batch):
            check_finite(logits)
            for i, said in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                told = _by_word(said, _begun(made.word_ids(i)), len(words[i]) or 1)
                spans = _entities(told[: len(words[i])], about["labels"])
                found[i] = Prediction(
                    tuple(Span(words[i][a][1], words[i][b - 1][2], name) for a, b, name in spans),
                    {},
                )
        return found


class _Collator(DataCollatorForTokenClassification):
    def torch_call(self, features: Any) -> Any:
        return super().torch_call(
            [{k: v for k, v in row.items() if k not in (TAGS, WORDS)} for row in features]
        )


def _split(tokenizer: Any, words: list[list[str]], max_length: int) -> Any:
    return tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)


def _begun(words: Sequence[int | None]) -> list[int]:
    """The word that each token is the first of, -100 at others. words: of each token, its word."""
    before = (None, *words)
    return [
        IGNORED if word is None or word == last else word
        for word, last in zip(words, before, strict=False)
    ]


def _by_word(said: Sequence[int], words: Sequence[int], count: int) -> list[int | None]:
    """What was said of each of `count` words, at its first token; None of words without one."""
    told = dict(zip(words, said, strict=False))  # a batch is padded on the right
    return [told.get(word) for word in range(count)]


def _entities(said: Sequence[int | None], names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Entities, or where tags are not BIO every word that has one."""
    if chunked(names):
        return entities([OUTSIDE if i is None else names[i] for i in said])
    return [(word, word + 1, names[i]) for word, i in enumerate(said) if i is not None]


def _counts(
    said: Sequence[int | None], true: Sequence[int], names: Sequence[str], metric: str
) -> tuple[int, int, int]:
    """How many are right, said and true; words without a token count as O, or as wrong."""
    if metric == "accuracy":
        return sum(a == b for a, b in zip(said, true, strict=True)), len(true), len(true)
    one, two = ({*_entities(ids, names)} for ids in (said, true))
    return len(one & two), len(one), len(two)


KIND = Tokens()
