"""What a task is: rows in three splits, the names of its labels, and one metric."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

GENERATED = ("likelihood", "exact_match", "token_f1", "rouge_l")  # of generated text
SEVERAL = ("f1_micro", "f1_macro", "accuracy")  # of rows with several labels
TAGGED = ("entity_f1", "accuracy")  # of a tag for each word
SINGLE = ("accuracy", "f1", "matthews", "spearman")  # of one label or number a row
METRICS = (*dict.fromkeys((*SINGLE, *SEVERAL, *TAGGED, *GENERATED)),)


class Prediction(NamedTuple):
    """What a model says of one row.

    label: its most probable label, the number that a regression gives, the text it generates, a
        tuple of labels (multilabel) or of `Span`s (tokens).
    probabilities: of each label, summing to 1 but for multilabel; else empty.
    out_of_domain: of a head of prototypes min_c d(z, c), the distance to the nearest class, from 0
        on: large for a row that is like none of them; else None.
    """

    label: Any
    probabilities: Mapping[str, float]
    out_of_domain: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One example; `pair` is the second text of a task about two texts."""

    text: str
    pair: str | None
    # An id, a number, the text to generate; ids of a row's labels, or of the tags of its words.
    label: Any

    @property
    def plain(self) -> tuple[str, str]:
        """Text and pair without case and spacing; rows that are equal in it are duplicates."""
        text = self.text or str(self.label)  # running text stands in the answer
        one = " ".join(text.casefold().split())
        return one, " ".join(self.pair.casefold().split()) if self.pair else ""


@dataclass(frozen=True)
class Task:
    """A task whose every row was checked when it was loaded.

    `selection` serves choosing (early stopping, search); `evaluation` serves reporting only.
    """

    name: str  # safe as a file name
    labels: tuple[str, ...] | None  # in id order; None: a regression, or text
    metric: str  # one of METRICS
    train: tuple[Row, ...]
    selection: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    source: str  # the spec it was loaded from
    synthetic: bool = False
    warnings: tuple[str, ...] = ()
    kind: str = "classification"  # of labels or numbers; or another of `holdfast.tasks.kinds`

    @property
    def regression(self) -> bool:
        return self.labels is None and self.kind == "classification"

    @property
    def running(self) -> bool:
        """Whether its rows are pieces of running text: answers to no prompt."""
        return self.kind == "generation" and bool(self.train) and not self.train[0].text

    @cached_property
    def pairs(self) -> bool:
        """Whether every row has a second text."""
        return bool(self.train) and self.train[0].pair is not None

    def renumbered(self, labels: Sequence[str]) -> Task:
        """The same task with its label ids in the order of `labels`, which hold its own."""
        if self.labels is None or tuple(labels) == self.labels:
            return self
        ids = [labels.index(label) for label in self.labels]

        def moved(label: Any) -> Any:
            return ids[label] if isinstance(label, int) else tuple(ids[each] for each in label)

        splits: dict[str, Any] = {
            split: tuple(replace(row, label=moved(row.label)) for row in getattr(self, split))
            for split in ("train", "selection", "evaluation")
        }
        return replace(self, labels=tuple(labels), **splits)

    @property
    def rows(self) -> dict[str, int]:
        return {
            "train": len(self.train),
            "selection": len(self.selection),
            "evaluation": len(self.evaluation),
        }

    @property
    def classes(self) -> dict[str, list[int]] | None:
        """Split -> how often each label stands in it, in id order; None without labels."""
        if self.labels is None:
            return None
        counts = {split: [0] * len(self.labels) for split in self.rows}
        for split, count in counts.items():
            for row in getattr(self, split):
                for label in row.label if isinstance(row.label, tuple) else (row.label,):
                    if label >= 0:  # not the tag of a word that is left out
                        count[label] += 1
        return counts

    @cached_property
    def hash(self) -> str:
        """SHA-256 over labels, metric and all rows in order: what a checkpoint remembers."""
        return self._digest("train", "selection", "evaluation")

    @cached_property
    def evaluation_hash(self) -> str:
        """SHA-256 over labels, metric and evaluation rows: equal for every seed of a comparison."""
        return self._digest("evaluation")

    def _digest(self, *splits: str) -> str:
        digest = hashlib.sha256()
        for line in self._lines(splits):
            digest.update(json.dumps(line).encode() + b"\n")
        return digest.hexdigest()

    def _lines(self, splits: Iterable[str]) -> Iterable[object]:
        plain = self.kind == "classification"  # as before there were kinds
        yield [self.labels, self.metric, *([] if plain else [self.kind])]
        for split in splits:
            yield split
            for row in getattr(self, split):
                yield [row.text, row.pair, row.label]


def slug(name: str) -> str:
    """`name` as a short name that is safe in a path, a log and a page.

    >>> slug("../../Amazon Reviews (5)")
    'amazon-reviews-5'
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    safe = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")[:64].rstrip("-")
    return safe or "task-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
