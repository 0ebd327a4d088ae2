"""Tasks written by our own templates: they need no file, no network and no licence.

They are made to be hard enough to tell methods apart: rows whose loudest words point to the
wrong class, words in the evaluation rows that no training row has, and labels that are wrong
on purpose (a share of the training rows, a smaller one of the evaluation rows), so that
no model scores 1. The rows depend on the task's name alone; a run's seed only chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from holdfast.errors import Refused
from holdfast.tasks import inference, intents, sentiment
from holdfast.tasks.draw import Draw
from holdfast.tasks.task import Row

TRAIN, EVALUATION = 3000, 600  # rows
TRAIN_NOISE, EVALUATION_NOISE = 0.08, 0.04  # shares of wrong labels


class Generated(NamedTuple):
    """Rows with noisy labels; `clean`: the labels before the noise, in row order."""

    labels: tuple[str, ...]
    train: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    clean: tuple[tuple[int, ...], tuple[int, ...]]


Write = Callable[[Draw, int], tuple[str, str | None]]

_TASKS: dict[str, tuple[tuple[str, ...], Write]] = {
    "inference": (inference.LABELS, inference.write),
    "intents": (intents.LABELS, intents.write),
    "sentiment": (sentiment.LABELS, sentiment.write),
}
BUILTIN = tuple(_TASKS)


@lru_cache(maxsize=len(_TASKS))
def make(name: str) -> Generated:
    """The task called `name`, always the same rows."""
    labels, write = _TASKS[name]
    seen: set[tuple[str, str | None]] = set()
    train, clean_train = _rows(name, write, len(labels), TRAIN, TRAIN_NOISE, False, seen)
    evaluation, clean = _rows(name, write, len(labels), EVALUATION, EVALUATION_NOISE, True, seen)
    return Generated(labels, train, evaluation, (clean_train, clean))


def _rows(
    name: str,
    write: Write,
    classes: int,
    count: int,
    noise: float,
    held: bool,
    seen: set[tuple[str, str | None]],
) -> tuple[tuple[Row, ...], tuple[int, ...]]:
    """`count` new rows, the classes in turn, exactly a share of `noise` labels wrong."""
    draw = Draw(f"{name} {'evaluation' if held else 'train'}", held=held)
    texts: list[tuple[str, str | None]] = []
    tries = 0
    while len(texts) < count:
        tries += 1
        if tries > 20 * count:
            raise Refused(f"the templates of {name} repeat themselves")
        made = write(draw, len(texts) % classes)
        if made not in seen:
            seen.add(made)
            texts.append(made)
    clean = [index % classes for index in range(count)]
    wrong = set(draw.order(count)[: round(noise * count)])
    shift = [1 + draw.below(classes - 1) for _ in range(count)]
    rows, labels = [], []
    for index in draw.order(count):
        label = clean[index]
        noisy = (label + shift[index]) % classes if index in wrong else label
        rows.append(Row(*texts[index], noisy))
        labels.append(label)
    return tuple(rows), tuple(labels)
