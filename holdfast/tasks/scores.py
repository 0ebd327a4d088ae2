"""Scores of predictions against the truth; higher is better. No torch."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from holdfast.errors import Refused, nearest
from holdfast.tasks.task import SINGLE

NO_CORRELATION = 0.05  # a correlation up to this is as good as none


def score(
    metric: str, truth: Sequence[float], predicted: Sequence[float], *, classes: int | None = None
) -> float:
    """One score of `predicted` (n,) against `truth` (n,): a metric of SINGLE.

    accuracy: share of equal labels. f1: of class 1 where there are two classes (0 and 1), else
    the unweighted mean over the classes that occur (macro). matthews: Matthews correlation of the
    labels. spearman: rank correlation of the values. `classes` is the task's number of classes,
    for an evaluation set that lacks some; by default it is read off the labels present. A
    prediction from there on is a class of other tasks: wrong, and no class of a mean.

    Constant predictions (or truth) carry no ranking, and their correlation is 0/0: matthews and
    spearman are 0.0 there, never NaN.
    """
    if metric not in SINGLE:
        raise Refused(f"no metric {metric!r}", remedy=nearest(metric, SINGLE))
    if len(truth) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} rows")
    if not len(truth):
        raise ValueError("no rows to score")
    import numpy as np

    wanted, given = np.asarray(truth), np.asarray(predicted)
    if wanted.ndim != 1 or given.ndim != 1:
        raise ValueError(f"expected one value a row, got {wanted.shape} and {given.shape}")
    for values in (wanted, given):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("cannot score values that are not finite")
    if metric == "accuracy":
        return float(np.mean(wanted == given))
    if metric == "f1":
        from sklearn.metrics import f1_score

        present = sorted({*np.unique(wanted).tolist(), *np.unique(given).tolist()})
        if classes == 2 or (classes is None and {*present} <= {0, 1}):
            return float(f1_score(wanted == 1, given == 1, zero_division=0.0))
        ours = [c for c in present if classes is None or c < classes]
        return float(f1_score(wanted, given, labels=ours, average="macro", zero_division=0.0))
    if len(np.unique(wanted)) == 1 or len(np.unique(given)) == 1:
        return 0.0
    if metric == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(wanted, given))
    from scipy.stats import spearmanr

    return float(spearmanr(wanted, given).statistic)


def constant_score(metric: str, labels: Sequence[Any], classes: int | None = None) -> float:
    """The best score of one answer for all rows: a run that is no better has learned nothing.

    accuracy: the share of the most frequent class. f1: of class 1 for all rows, `2s / (1 + s)` with
    its share s (macro: the best of any class). Correlations: `NO_CORRELATION`. exact_match: the
    share of the most frequent text. 0 where no constant answer is known to score: several labels
    or tags a row, other metrics of text.
    """
    if metric in ("matthews", "spearman"):
        return NO_CORRELATION
    if metric == "exact_match":
        return max(Counter(" ".join(_words(text)) for text in labels).values()) / len(labels)
    if classes is None or not all(isinstance(label, int) for label in labels):
        return 0.0
    return max(score(metric, labels, [c] * len(labels), classes=classes) for c in set(labels))


def several_score(metric: str, truth: Any, predicted: Any) -> float:
    """One score of labels (rows, labels) of 0 and 1: a metric of SEVERAL.

    f1_micro: F1 of all decisions together. f1_macro: the mean of each label's F1; one that neither
    occurs nor is said counts 0. accuracy: share of rows whose labels are all right.
    """
    if metric == "accuracy":
        return float((truth == predicted).all(1).mean())
    hits = (truth * predicted).sum(0)
    both = truth.sum(0) + predicted.sum(0)
    if metric == "f1_micro":
        hits, both = hits.sum(), both.sum()
    return float((2 * hits / both.clip(1)).mean())


def text_scores(metric: str, truth: Sequence[str], said: Sequence[str]) -> list[float]:
    """One score from 0 to 1 for each text.

    exact_match and token_f1 compare texts without case, punctuation and English articles, as SQuAD
    does (Rajpurkar et al., EMNLP 2016). rouge_l is the F measure over longest common subsequences,
    by the package rouge-score.
    """
    if metric == "rouge_l":
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise Refused("rouge_l needs the package rouge-score", where="metric",
                          remedy="pip install rouge-score, or take token_f1") from None  # fmt: skip
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        return [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(truth, said, strict=True)]
    pairs = [(_words(a), _words(b)) for a, b in zip(truth, said, strict=True)]
    if metric == "exact_match":
        return [float(a == b) for a, b in pairs]
    return [_overlap(a, b) for a, b in pairs]


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(one: list[str], two: list[str]) -> float:
    """2 · common / (words of both): F1 of precision and recall; two empty texts agree."""
    if not one and not two:
        return 1.0
    return 2 * sum((Counter(one) & Counter(two)).values()) / (len(one) + len(two))
