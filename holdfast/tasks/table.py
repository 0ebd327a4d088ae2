"""What every reader makes of a file: numbered records of the columns that matter."""

from __future__ import annotations

import re
import string
from bisect import insort
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from holdfast.errors import Refused, meant
from holdfast.files import unpacked

MAX_TEXT = 20_000  # characters; a longer text is cut and counted
MAX_CELL = 32 * 2**20  # characters in one line or cell; longer ones are refused
MAX_CHARACTERS = 2**31  # in one file after decompression
MAX_RECORDS = 20_000_000
RECORD = 500  # bytes in memory that a record takes beside its characters
VALUE = 64  # bytes in memory of a value in a list, at least
WORDY = 100  # the first records, by which an unread column is known to hold running text
TOLD = 10  # bad rows that a refusal tells; the others are counted

TEXT = ("text", "sentence", "sentence1")
PAIR = ("pair", "sentence2")
LABEL = ("label",)
PROMPT = ("prompt", *TEXT)
ANSWER = ("answer", "completion")
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags")
SPANS = ("spans", "entities")
MESSAGES = "messages"  # conversations, as OpenAI and TRL write them

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """The columns to read. Without `text` the usual names are tried, for the pair too."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    answer: str | None = None  # of a generation: the text to write
    prompt: str | None = None  # of a generation: a text with columns in braces

    @property
    def wanted(self) -> frozenset[str]:
        """Every column that may turn out to be needed."""
        text = (*PROMPT, *PAIR, *WORDS, MESSAGES) if self.text is None else (self.text,)
        label = (*LABEL, *ANSWER, *TAGS, *SPANS) if self.label is None else (self.label,)
        named = [name for name in (self.pair, self.answer) if name is not None]
        blanks = [blank for _, blank in pieces(self.template or "") if blank]
        return frozenset((*text, *label, *named, *blanks))

    @property
    def template(self) -> str | None:
        """A text with columns in braces: the prompt, or what is named as the text."""
        text = self.text if self.text is not None and "{" in self.text else None
        return self.prompt if self.prompt is not None else text

    def generates(self, table: Table) -> bool:
        """Whether `table` has conversations, prompts by a template, or answers and no labels."""
        if self.answer is not None or self.label is not None or self.prompt is not None:
            return self.answer is not None or self.prompt is not None
        answers = {*ANSWER} & {*table.columns} or self.converses(table)
        return not {*LABEL} & {*table.columns} and bool(answers)

    def converses(self, table: Table) -> bool:
        """Whether `table` has conversations and no answers beside them, and none was named."""
        return self == Columns() and MESSAGES in table.columns and not {*ANSWER} & {*table.columns}

    def tags(self, table: Table) -> bool:
        """Whether `table` has a tag for each word, or spans, and neither labels nor answers."""
        others = {*LABEL, *ANSWER} & {*table.columns}
        return not (self.label or self.answer or others) and bool(
            {*TAGS, *SPANS} & {*table.columns}
        )

    def tags_among(self, table: Table) -> Columns:
        """Words and tags, or text and spans, as text and label."""
        label = self.label or only((*TAGS, *SPANS), table, "label")
        text = self.text or only(TEXT if label in SPANS else WORDS, table, "text")
        return Columns(text, None, label).check(table)

    def answers_among(self, table: Table) -> Columns:
        """Prompt and answer as text and label; without answers, labels are what is written."""
        prompt = self.texts_among(table, pairs=False, prompts=True)
        labelled = {*LABEL} & {*table.columns} and not {*ANSWER} & {*table.columns}
        answer = self.answer or self.label or only(LABEL if labelled else ANSWER, table, "answer")
        return replace(prompt, label=answer).check(table)

    def among(self, table: Table) -> Columns:
        """These columns with every name resolved; refuses a name that `table` lacks."""
        texts = self.texts_among(table)
        return replace(texts, label=self.label or only(LABEL, table, "label")).check(table)

    def texts_among(
        self, table: Table, *, pairs: bool | None = None, prompts: bool = False
    ) -> Columns:
        """As `among`, without a label; `pairs` says whether there must be a second text."""
        if not table.records and not table.columns:
            table.refuse_bad()
            raise table.nothing()
        text = self.text or only(PROMPT if prompts else TEXT, table, "text")
        pair, sought = self.pair, self.text is None if pairs is None else pairs
        if pair is None and sought:
            pair = only(PAIR, table, "pair", required=bool(pairs))
        return Columns(text, pair).check(table)

    def check(self, table: Table) -> Columns:
        """These columns, if `table` has them all."""
        names = [name for name in (self.text, self.pair, self.label) if name is not None]
        for name in names:
            if name not in table.columns and table.columns:
                raise Refused(
                    f"no column {shown(name)}; the columns are {listed(table.columns)}",
                    where=table.name,
                    remedy=meant(name, table.columns),
                )
        if len(set(names)) < len(names):
            raise Refused(f"one column cannot serve twice: {listed(names)}", where=table.name)
        return self


def pieces(template: str) -> list[tuple[str, str]]:
    """A template as texts, each with the name in braces that follows it, or an empty one."""
    try:
        found = [(text, name, form or way)
                 for text, name, form, way in string.Formatter().parse(template)]  # fmt: skip
    except ValueError:
        found = [("", "", None)]
    if any(more or (name is not None and not name.strip()) for _, name, more in found):
        raise Refused(f"prompt {shown(template)} is no text with columns in braces",
                      remedy="as prompt={text} Sentiment:")  # fmt: skip
    return [(text, name or "") for text, name, _ in found]


def only(
    candidates: tuple[str, ...], table: Table, role: str, *, required: bool = True
) -> str | None:
    """The column of these names that `table` has; `Refused` if it has several, or needs one."""
    found = [name for name in candidates if name in table.columns]
    if len(found) == 1 or (not found and not required):
        return found[0] if found else None
    if found:
        what = f"{listed(found)} could each be the {role}"
    else:
        what = f"no column {listed(candidates)}; the columns are {listed(table.columns)}"
    raise Refused(what, where=table.name, remedy=f"name it: {role}=COLUMN")


@dataclass
class Table:
    """Records of one file. `name` and `unit` say where a record is, for messages.

    A bad row is no record, but counted, whether a reader finds it or who makes texts and labels of
    the records: so all bad rows of a file are refused, or skipped, at once.
    """

    name: str
    wanted: frozenset[str]
    unit: str = "line"
    columns: list[str] = field(default_factory=list)
    records: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    cut: int = 0  # records with a text above MAX_TEXT
    wordy: set[str] = field(default_factory=set)  # unread columns that hold running text
    notes: list[str] = field(default_factory=list)  # what the reader guessed, to warn of
    characters: int = 0
    packed: int | None = None  # bytes of the file on disk, if it is packed
    bad: int = 0  # rows
    told: list[tuple[int, Refused]] = field(default_factory=list)  # the first of them
    skip: bool | None = None  # leave bad rows out, do not refuse them; None: it cannot be asked

    def at(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number}"

    def bad_row(self, number: int, why: Refused) -> None:
        """Count a row that cannot be used."""
        self.bad += 1
        insort(self.told, (number, why.with_traceback(None)), key=itemgetter(0))
        del self.told[TOLD:]

    def refuse_bad(self) -> None:
        """Refuse the file for its bad rows, if there are any and they are not to be skipped."""
        if self.skip or not self.bad:
            return
        if self.bad == 1:
            raise self.told[0][1]
        told = "; ".join(f"{self.unit} {number}: {why.what}" for number, why in self.told)
        more = f"; … and {self.bad - TOLD:,} more" if self.bad > TOLD else ""
        each = {why.remedy for _, why in self.told}
        remedies = [each.pop()] if len(each) == 1 else []
        remedies.append("mend them" + ", or --bad-rows skip" * (self.skip is not None))
        raise Refused(f"{self.bad:,} bad rows: {told}{more}", where=self.name,
                      remedy="; ".join(filter(None, remedies)))  # fmt: skip

    def warnings(self, *counts: tuple[int, str]) -> list[str]:
        """What to warn of: what was guessed, bad rows, `counts` of rows with what befell them, and
        texts that were cut."""
        cut = self.cut, f"with a text above {MAX_TEXT:,} characters cut"
        said = [*self.notes, *self.skipped()]
        said += [f"{counted(count)} {what}" for count, what in (*counts, cut) if count]
        return [f"{self.name}: {line}" for line in said]

    def skipped(self) -> list[str]:
        """A line for the warnings, if there are bad rows."""
        first = [f"{self.unit} {number}: {why.what}" for number, why in self.told[:1]]
        return [f"{counted(self.bad, 'bad ')} skipped, the first in {line}" for line in first]

    def nothing(self, without_text: int = 0) -> Refused:
        """That there are no rows, and why."""
        why = self.skipped()
        why += [f"{counted(without_text)} without text"] if without_text else []
        return Refused("no rows" + (f" ({', '.join(why)})" if why else ""), where=self.name)

    def check_growth(self, size: int, at: str | None = None) -> None:
        """Refuse a packed file that unpacks to `size` bytes, if that is out of all proportion."""
        if self.packed is not None and size > unpacked(self.packed):
            raise Refused(
                f"{self.packed:,} bytes unpack to more than {size:,}",
                where=at or self.name,
                remedy="if you trust it, unpack it yourself (Parquet: write it as .jsonl)",
            )

    def add(self, number: int, cells: dict[str, Any]) -> None:
        """Keep the wanted cells of one record, long texts cut."""
        kept, cut = {}, False
        for name, value in cells.items():
            if name not in self.wanted:
                if len(self.records) < WORDY and isinstance(value, str) and value.count(" ") > 1:
                    self.wordy.add(name)
                continue
            if isinstance(value, str):
                if not value.isascii() and _SURROGATE.search(value):
                    what = f"{shown(name)} holds half a character (a lone surrogate)"
                    remedy = "write the file again as UTF-8"
                    self.bad_row(number, Refused(what, where=self.at(number), remedy=remedy))
                    return
                if len(value) > MAX_TEXT:
                    value, cut = value[:MAX_TEXT], True
                self.characters += len(value)
            kept[name] = value
        self.cut += cut
        self.records.append((number, kept))
        self.check_growth(self.characters + RECORD * len(self.records), self.at(number))
        if len(self.records) > MAX_RECORDS or self.characters > MAX_CHARACTERS:
            raise Refused(
                f"more than {MAX_RECORDS:,} rows or {MAX_CHARACTERS:,} characters",
                where=self.name,
                remedy="take a part of it",
            )


def counted(count: int, kind: str = "") -> str:
    return f"{count} {kind}row{'' if count == 1 else 's'}"


def shown(value: object, limit: int = 60) -> str:
    """`value` as messages show it: quoted, on one line, short."""
    if isinstance(value, str) and len(value) > limit:
        return repr(value[:limit]) + "…"
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"a huge {type(value).__name__}"
    return text if len(text) <= limit + 2 else text[:limit] + "…"


def listed(names: list[str] | tuple[str, ...], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(shown(name) for name in names[:limit]) or "none") + more
