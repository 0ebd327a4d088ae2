"""A tag for every word: from lists of words and tags, or from texts with spans of characters.

A row's text is its words joined by single spaces, and its label the id of each word's tag. Spans
are told over the words that `words_in` finds; a span covers every word that it touches.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import regex

from holdfast.errors import Refused
from holdfast.tasks import labels
from holdfast.tasks.table import Columns, Table, listed, shown
from holdfast.tasks.task import Row

OUTSIDE = "O"
_WORD = regex.compile(r"\w[\w\p{M}]*|[^\w\s]")  # with combining marks, as in Hindi
_TAG = re.compile(r"O|[BI]-\S(.*\S)?", re.DOTALL)  # "B-full name" too


class Span(NamedTuple):
    """An entity: characters `start` to `end` (exclusive) of a text."""

    start: int
    end: int
    label: str


def words_in(text: str) -> list[tuple[str, int, int]]:
    """Words and signs of a text, with where each begins and ends."""
    return [(found[0], found.start(), found.end()) for found in _WORD.finditer(text)]


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """First word, word after the last, and type of each run of BIO tags; I without B begins one.

    >>> entities(["B-LOC", "I-LOC", "O", "I-PER", "B-PER"])
    [(0, 2, 'LOC'), (3, 4, 'PER'), (4, 5, 'PER')]
    """
    found: list[tuple[int, int, str]] = []
    begun, kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        now = tag[2:] if tag != OUTSIDE else ""
        if kind and (tag[0] == "B" or now != kind):
            found.append((begun, place, kind))
            kind = ""
        if now and not kind:
            begun, kind = place, now
    return found


def chunked(names: Sequence[str]) -> bool:
    """Whether tags mark entities: O, B-x and I-x."""
    return all(_TAG.fullmatch(name) for name in names)


def tags_of(words: Sequence[tuple[str, int, int]], spans: Sequence[Span]) -> list[str]:
    """A BIO tag for each word that a span touches, and O for the others."""
    found = [OUTSIDE] * len(words)
    begins, ends = [a for _, a, _ in words], [b for _, _, b in words]
    for span in spans:
        first = bisect_right(ends, span.start)
        for i in range(first, bisect_left(begins, span.end)):
            found[i] = f"{'B' if i == first else 'I'}-{span.label}"
    return found


class Tagged:
    """The records of a table as words and tags, those without a word left out."""

    def __init__(self, table: Table, columns: Columns) -> None:
        assert columns.text is not None and columns.label is not None
        self.table, self.uneven, self.missing = table, 0, 0
        self.kept: list[tuple[int, list[str], list[Any]]] = []
        for number, cells in table.records:
            text, marks = cells.get(columns.text), cells.get(columns.label)
            if not text:
                self.missing += 1
                continue
            read = self._spans if isinstance(text, str) else self._lists
            try:
                words, tags = read(text, marks, table.at(number))
            except Refused as why:
                table.bad_row(number, why)
                continue
            if words:
                self.kept.append((number, words, tags))
            else:
                self.missing += 1

    def _lists(self, words: Any, tags: Any, where: str) -> tuple[list[str], list[Any]]:
        if not isinstance(words, list) or not isinstance(tags, list):
            raise Refused("words and tags are two lists", where=where,
                          remedy='as "tokens": ["In", "Rome"], "tags": ["O", "B-LOC"]')  # fmt: skip
        if len(words) != len(tags):
            raise Refused(f"{len(words)} words and {len(tags)} tags", where=where)
        if odd := [tag for tag in tags if not isinstance(tag, str | int)]:
            raise Refused(f"tag {shown(odd[0])} is a {type(odd[0]).__name__}", where=where)
        for word in words:
            if not isinstance(word, str) or not word or any(c.isspace() for c in word):
                raise Refused(f"{shown(word)} is no word", where=where,
                              remedy="words are texts without white space")  # fmt: skip
        return words, tags

    def _spans(self, text: str, marks: Any, where: str) -> tuple[list[str], list[Any]]:
        words = words_in(text)
        spans = sorted(_span(mark, text, where) for mark in _list(marks, where))
        for one, two in itertools.pairwise(spans):
            if two.start < one.end:
                raise Refused(f"the spans {one.label!r} and {two.label!r} overlap", where=where,
                              remedy="leave one; a word has one tag")  # fmt: skip
        starts = [a for _, a, _ in words]
        edges = {place for span in spans for place in (span.start, span.end)}
        # The last word that begins before an edge is the one that it can lie within.
        begun = ((edge, bisect_left(starts, edge) - 1) for edge in edges)
        self.uneven += any(at >= 0 and edge < words[at][2] for edge, at in begun)
        return [word for word, _, _ in words], tags_of(words, spans)

    def tags(self) -> Iterator[tuple[Any, str]]:
        """Every tag and where it stands for the first time."""
        said: set[Any] = set()
        for number, _, tags in self.kept:
            for tag in tags:
                if tag not in said:
                    said.add(tag)
                    yield tag, self.table.at(number)

    def rows(self, read: labels.Read, warnings: list[str]) -> list[Row]:
        """The rows, with tags by `read`, unless there are bad ones or none."""
        found = []
        for number, words, tags in self.kept:
            where = self.table.at(number)
            try:
                ids = tuple(read(tag, where) for tag in tags)
                if None in ids:
                    raise Refused(f"a tag {labels.IGNORED}", where=where)
            except Refused as why:
                self.table.bad_row(number, why)
            else:
                found.append(Row(" ".join(words), None, ids))
        self.table.refuse_bad()
        warnings += self.table.warnings(
            (self.missing, "without a word skipped"),
            (self.uneven, "with a span that ends within a word: the whole word is tagged"),
        )
        if not found:
            raise self.table.nothing(self.missing)
        return found


def names_of(cells: Iterator[tuple[Any, str]], where: str) -> tuple[str, ...]:
    """The tags of the training rows: O first, then each type's B and I."""
    found: set[str] = set()
    for tag, place in cells:
        if not isinstance(tag, str):
            raise Refused(f"tag {shown(tag)} is a number without a name", where=place,
                          remedy="write tags as texts, or name them in meta.json")  # fmt: skip
        if labels.ignored(name := labels.spelled(tag, place)):
            raise Refused(f"a tag {labels.IGNORED}", where=place, remedy=f"write {OUTSIDE}")
        found.add(name)
    alike: dict[str, list[str]] = {}  # but for blanks
    for name in sorted(found):
        alike.setdefault(" ".join(name.replace("-", "- ", 1).split()), []).append(name)
    if twice := [name for each in alike.values() if len(each) > 1 for name in each]:
        raise Refused(f"tags in several spellings: {listed(twice)}", where=where,
                      remedy="write each one way")  # fmt: skip
    if chunked(tuple(found)):  # B and I of every type, as another split may have the other one
        types = sorted({tag[2:] for tag in found} - {""})
        return (OUTSIDE, *(f"{begin}-{kind}" for kind in types for begin in "BI"))
    if len(found) > labels.MAX_CLASSES:
        raise Refused(f"{len(found):,} different tags", where=where)
    return tuple(sorted(found))


def _list(marks: Any, where: str) -> list[Any]:
    if marks is None:
        return []
    if not isinstance(marks, list):
        raise Refused(f"spans are a list, not {shown(marks)}", where=where,
                      remedy='as [{"start": 0, "end": 4, "label": "LOC"}]')  # fmt: skip
    return marks


def _span(mark: Any, text: str, where: str) -> Span:
    if isinstance(mark, dict):
        start, end, name = (mark.get(key) for key in ("start", "end", "label"))
        if (
            type(start) is type(end) is int and 0 <= start < end <= len(text)  # no bool
            and isinstance(name, str) and name.strip()
        ):  # fmt: skip
            return Span(start, end, labels.spelled(name, where))
    raise Refused(f"{shown(mark)} is no span of its text", where=where,
                  remedy='as {"start": 0, "end": 4, "label": "LOC"}, end exclusive')  # fmt: skip
