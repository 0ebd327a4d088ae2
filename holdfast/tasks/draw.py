"""Seeded choices for the templates, the same in every version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Words(NamedTuple):
    """A vocabulary in two disjoint parts: for training and for evaluation rows."""

    seen: tuple[str, ...]
    held: tuple[str, ...]


def words(seen: str, held: str) -> Words:
    """Two parts from texts whose entries are separated by commas."""
    return Words(*(tuple(word.strip() for word in part.split(",")) for part in (seen, held)))


class Draw:
    """Choices from a seed, through `random.Random.random()` alone."""

    def __init__(self, seed: str, *, held: bool) -> None:
        self._random = random.Random(f"holdfast {seed}").random
        self.held = held

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def chance(self, share: float) -> bool:
        return self._random() < share

    def of(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def other(self, choices: Sequence[T], *not_these: T) -> T:
        return self.of([choice for choice in choices if choice not in not_these])

    def word(self, vocabulary: Words) -> str:
        return self.of(vocabulary.held if self.held else vocabulary.seen)

    def words(self, vocabulary: Words, count: int) -> list[str]:
        """`count` different words."""
        part = vocabulary.held if self.held else vocabulary.seen
        return [part[index] for index in self.order(len(part))[:count]]

    def order(self, count: int) -> list[int]:
        """A permutation of `range(count)`."""
        rank = [self._random() for _ in range(count)]
        return sorted(range(count), key=rank.__getitem__)
