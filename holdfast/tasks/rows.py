"""From the records of a table to the rows of a task, under one label map."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import Refused, nearest, tell_once
from holdfast.tasks import files, labels, tagged
from holdfast.tasks.prompts import prompted
from holdfast.tasks.spec import Options, parse
from holdfast.tasks.table import ANSWER, PAIR, Columns, Table, counted, listed, pieces, shown
from holdfast.tasks.task import GENERATED, METRICS, SEVERAL, SINGLE, TAGGED, Row

_MARKED = re.compile(r"[A-Za-z][-_]")  # of an entity in some scheme, as b-loc, S-LOC or U_LOC


class Source(NamedTuple):
    """What any source yields, before rows are chosen by seed."""

    name: str
    labels: tuple[str, ...] | None
    metric: str
    pool: list[Row]
    evaluation: list[Row] | None
    warnings: list[str]
    kind: str = "classification"


def source_of(
    name: str,
    train: Table,
    evaluation: Table | None,
    options: Options,
    *,
    names: tuple[str, ...] | None = None,
    regression: bool = False,
) -> Source:
    """The rows of both tables under one label map."""
    warnings: list[str] = []
    for table in (train, evaluation):
        if table is not None:
            table.skip = options.bad_rows is not None
    if options.type == "generation" or (options.type is None and options.columns.generates(train)):
        return _generation(name, train, evaluation, options, names)
    if options.type == "tokens" or (options.type is None and options.columns.tags(train)):
        return _tokens(name, train, evaluation, options, names)
    train, columns = _templated(train, options.columns)
    columns = _unsaid(options, columns.among(train), train)
    several = options.type == "multilabel"
    if columns.pair is None and train.wordy:
        warnings.append(f"text not read in the column {listed(sorted(train.wordy))}")
    first = _Texts(train, columns, several=several)
    read: labels.Read
    mend: Callable[[str], str] | None = None
    if regression:
        names, read = None, labels.number
    elif names is not None:
        read = labels.by_id(names)
    else:
        fractions = options.type == "classification"
        first.read(first.spelled)
        train.refuse_bad()
        if options.strip is not None:
            mend = labels.usual(first.spellings())
            first.mend(mend)
        spellings = first.spellings()
        names = labels.names_of(spellings, train.name, fractions=fractions)
        read = labels.by_name(names)
        if clash := _differ_by_case(names):
            told = labels.told(clash, spellings)
            warnings.append(f"labels that differ only by case: {told}; --strip makes them one")
        if alike := labels.look_alike(names):
            told = ", ".join(f"{name!a} ({counted(spellings[name].rows)})" for name in alike)
            warnings.append(f"labels that look alike, each a class of its own: {told}")
        if joined := _joined(names, ",;" if several else labels.SEPARATOR):
            told = f"the label {shown(joined)} is one {'label' if several else 'class'}"
            write = f"write {labels.SEPARATOR} between them" if several else "say ?type=multilabel"
            warnings.append(f"{told}; for several labels a row {write}")
    if names == ():
        raise train.nothing(first.missing)
    if names is not None and len(names) < 2:
        raise Refused(
            f"one class only: {listed(names)}",
            where=train.name,
            remedy="a classification needs two",
        )
    read = labels.several(read) if several else read
    pool = first.rows(read, warnings)
    if names is None and (count := sum(row.label == labels.IGNORED for row in pool)):
        warnings.append(f"{counted(count)} labelled {labels.IGNORED}: a number like others here; "
                        "leave them out if it means no label")  # fmt: skip
    held = None
    if evaluation is not None:
        evaluation, _ = _templated(evaluation, options.columns)
        columns.check(evaluation)
        other = _Texts(evaluation, columns, paired=first.paired, several=several)
        if mend is not None:
            other.mend(mend)
        held = other.rows(read, warnings)
    if several:
        return Source(name, names, _metric(options, SEVERAL, name), pool, held, warnings,
                      "multilabel")  # fmt: skip
    usual = "spearman" if names is None else "accuracy"
    metric = check_metric(options.metric or usual, names, name)
    return Source(name, names, metric, pool, held, warnings)


def _unsaid(options: Options, columns: Columns, table: Table) -> Columns:
    """`columns`, if what is to be learned does not stand in a text that a template makes."""
    if columns.label in {blank for _, blank in pieces(options.columns.template or "")}:
        raise Refused(f"the column {shown(columns.label)} is what is to be learned, and stands in "
                      "the text", where=table.name, remedy="leave it out there")  # fmt: skip
    return columns


def _templated(table: Table, columns: Columns) -> tuple[Table, Columns]:
    """Texts by a template, if one was named."""
    return (table, columns) if columns.template is None else prompted(table, columns)


def _tokens(
    name: str, train: Table, evaluation: Table | None, options: Options,
    names: tuple[str, ...] | None,
) -> Source:  # fmt: skip
    """A tag for each word."""
    warnings: list[str] = []
    if options.strip is not None:
        raise Refused("strip is for labels, not for tags", where=name)
    columns = options.columns.tags_among(train)
    first, ids = tagged.Tagged(train, columns), names is not None
    train.refuse_bad()
    names = names or tagged.names_of(first.tags(), train.name)
    read = labels.by_name(names)
    if ids and any(isinstance(tag, int) for _, _, tags in first.kept[:1] for tag in tags):
        read = labels.by_id(names)
    if len(names) < 2:
        raise Refused(f"one tag only: {listed(names)}", where=train.name)
    pool, held = first.rows(read, warnings), None
    if evaluation is not None:
        held = tagged.Tagged(evaluation, columns.check(evaluation)).rows(read, warnings)
    metrics = TAGGED if tagged.chunked(names) else TAGGED[1:]
    if metrics is not TAGGED and options.metric is None and any(map(_MARKED.match, names)):
        warnings.append(f"tags {listed(names, 5)} are scored word by word: "
                        "entities are told by O, B-x and I-x")  # fmt: skip
    if clash := _differ_by_case(names):
        warnings.append(f"tags that differ only by case: {listed(clash)}")
    return Source(name, names, _metric(options, metrics, name), pool, held, warnings, "tokens")


def _metric(options: Options, known: tuple[str, ...], where: str) -> str:
    """The metric asked for, if it is among those that suit the kind; the first by default."""
    metric = options.metric or known[0]
    if metric not in known:
        raise Refused(f"metric {shown(metric)} does not suit", where=where,
                      remedy=nearest(metric, known))  # fmt: skip
    return metric


def _generation(
    name: str,
    train: Table,
    evaluation: Table | None,
    options: Options,
    names: tuple[str, ...] | None,
) -> Source:
    """Prompts and answers; `names` are what ids in a column of labels stand for."""
    warnings: list[str] = []
    if options.pair is not None and options.prompt is None:
        raise Refused("a generation has no second text", where=name,
                      remedy="put both into one: prompt={text} … {pair}")  # fmt: skip
    chat = options.columns.converses(train)
    train, columns = prompted(train, options.columns)
    columns = _unsaid(options, columns.answers_among(train), train)
    words = columns.label != options.answer and columns.label not in ANSWER
    read = labels.word(names) if words else labels.text
    first, mend = _Texts(train, columns), None
    if words and names is None and options.strip is not None:
        first.read(first.spelled)
        mend = labels.usual(first.spellings())
        first.mend(mend)
    pool, held = first.rows(read, warnings), None
    if evaluation is not None:
        evaluation, _ = prompted(evaluation, options.columns)
        columns.check(evaluation)
        other = _Texts(evaluation, columns)
        if mend is not None:
            other.mend(mend)
        held = other.rows(read, warnings)
    known = ("exact_match", *GENERATED) if words else GENERATED
    metric = _metric(options, known, name)
    return Source(name, None, metric, pool, held, warnings, "chat" if chat else "generation")


def unlabelled(
    spec: str,
    keep: Sequence[str] = (),
    *,
    pairs: bool,
    kind: str = "classification",
    beside: str | None = None,
) -> tuple[list[str], list[str] | None, list[dict[str, Any]], int]:
    """Texts of a file, their second texts if `pairs`, the cells to keep, how many texts were cut.

    spec: a file, and after a `?` the names of its columns: `rows.csv?text=body&pair=reply`.
    kind: of the task that they are for. beside: a column to keep too, if the file has it.
    """
    asked = parse(spec)
    if asked.kind != "file":
        raise Refused(
            "is no CSV, TSV, JSONL or Parquet file", where=spec, remedy="name such a file"
        )
    options, columns = asked.options, asked.options.columns
    if options.bad_rows is not None:
        raise Refused("bad_rows is for rows to learn from", where=spec,
                      remedy="leave them out of the file")  # fmt: skip
    for idle in ("evaluation", "labels", "metric", "per_class", "strip"):
        if getattr(options, idle) is not None:
            raise Refused(f"{idle} is for rows to learn from", where=spec, remedy="leave it out")
    path = files.must_exist(Path(asked.place))
    wanted = columns.wanted | {*keep, *([beside] if beside else [])}
    table = files.read(path, wanted, **options.written, collect=True)
    given = dict(table.records)  # a text that is made is called as a column may be
    if kind == "chat" or columns.template is not None:
        table, columns = prompted(table, columns, answered=False)
    columns = columns.texts_among(table, pairs=pairs, prompts=kind == "generation")
    if lacking := [name for name in keep if name not in table.columns]:
        raise Refused(f"no column {shown(lacking[0])}", where=table.name,
                      remedy=nearest(lacking[0], table.columns))  # fmt: skip
    keep = [*keep, beside] if beside in table.columns else keep
    for note in table.notes:
        tell_once(f"{table.name}: {note}")
    alone = kind in ("classification", "multilabel") and not pairs
    if alone and (second := {*PAIR} & {*table.columns} - {*keep}):
        tell_once(f"{table.name}: the column {shown(second.pop())} is not read: the task takes one "
                  "text of each row")  # fmt: skip
    read = [name for name in (columns.text, columns.pair) if name is not None]
    texts: list[list[str]] = []
    for number, cells in table.records:
        try:
            texts.append([_needed(table, number, cells, name) for name in read])
        except Refused as why:
            table.bad_row(number, why)
    table.refuse_bad()
    kept = [{name: given[number].get(name) for name in keep} for number, _ in table.records]
    pair = [text[1] for text in texts] if columns.pair else None
    return [text[0] for text in texts], pair, kept, table.cut


def _joined(names: tuple[str, ...], marks: str) -> str | None:
    """The first label that is made of other labels, with one of `marks` between them."""
    parts = ((name, {*map(str.strip, name.split(m))}) for name in names for m in marks)
    return next((name for name, each in parts if len(each) > 1 and each <= {*names}), None)


def _differ_by_case(names: tuple[str, ...]) -> list[str]:
    folded = [name.casefold() for name in names]
    return [name for name in names if folded.count(name.casefold()) > 1]


def check_metric(metric: str, names: tuple[str, ...] | None, where: str) -> str:
    """`metric`, if it suits one label of `names`, or one number, a row."""
    remedy = None
    if metric not in METRICS:
        remedy = nearest(metric, SINGLE)
    elif metric in SEVERAL and metric not in SINGLE:
        remedy = "it is for several labels a row: say type=multilabel"
    elif metric in TAGGED and metric not in SINGLE:
        remedy = "it is for tags of words: say type=tokens"
    elif (metric == "spearman") != (names is None):
        remedy = "spearman is for regression, the others for classes"
    elif metric in GENERATED:
        remedy = "it is for generated text: say type=generation"
    elif metric == "f1" and names is not None and len(names) != 2:
        remedy = "f1 is that of the second of two labels; take accuracy or matthews"
    if remedy:
        raise Refused(f"metric {shown(metric)} does not suit", where=where, remedy=remedy)
    return metric


_BAD = object()  # in place of a label that is refused


class _Texts:
    """The records of a table, without those that lack a text."""

    def __init__(
        self, table: Table, columns: Columns, *, paired: bool | None = None, several: bool = False
    ) -> None:
        assert columns.text is not None and columns.label is not None
        self.table, self.mended, self.several = table, 0, several
        self.spelled = labels.each_of(labels.spelled) if several else labels.spelled
        rows: list[tuple[int, Any, str | None, Any]] = []  # number, text, pair, label
        for number, cells in table.records:
            try:
                text = _text(table, number, cells, columns.text)
                pair = _text(table, number, cells, columns.pair) if columns.pair else None
            except Refused as why:
                table.bad_row(number, why)
            else:
                rows.append((number, text, pair, cells.get(columns.label)))
        found = next((number for number, _, pair, _ in rows if pair is not None), None)
        self.paired = found is not None if paired is None else paired
        if found is not None and not self.paired:
            raise Refused("a second text, which no training row has", where=table.at(found))
        self.kept = [
            row for row in rows if row[1] is not None and (row[2] is not None or not self.paired)
        ]
        self.labels: list[Any] = [row[3] for row in self.kept]
        self.missing = len(rows) - len(self.kept)

    def read(self, rule: labels.Read) -> None:
        """Put what `rule` says in place of every label; a row whose label it refuses is bad."""
        bad = self.table.bad
        known: dict[str, Any] = {}  # what a spelling that occurred before was read as

        def one(number: int, cell: Any) -> Any:
            try:
                label = rule(cell, self.table.at(number))
            except Refused as why:
                self.table.bad_row(number, why)
                return _BAD
            if cell.__class__ is str and len(known) < labels.MAX_CLASSES:
                known[cell] = label
            return label

        self.labels = [
            known[cell] if cell.__class__ is str and cell in known else one(row[0], cell)
            for row, cell in zip(self.kept, self.labels, strict=True)
        ]
        if self.table.bad > bad:
            good = [label is not _BAD for label in self.labels]
            self.kept, self.labels = [*compress(self.kept, good)], [*compress(self.labels, good)]

    def spellings(self) -> dict[str, labels.Spelling]:
        """The labels, which are texts, in the order of their first rows."""
        found, kept = self.labels, self.kept
        if self.several:
            kept = [row for row, each in zip(kept, found, strict=True) for _ in each]
            found = [label for each in found for label in each]
        first = dict(zip(reversed(found), reversed(kept), strict=True))
        unit, rows = self.table.unit, Counter(found)
        return {label: labels.Spelling(f"{unit} {first[label][0]}", rows[label]) for label in rows}

    def mend(self, rule: Callable[[str], str]) -> None:
        """Spell every label as `rule` says."""
        self.read(self.spelled)
        found = self.spellings()
        self.mended = sum(found[label].rows for label in found if rule(label) != label)

        def mended(cell: Any, _: str) -> Any:
            return rule(cell)

        self.read(labels.each_of(mended) if self.several else mended)

    def rows(self, rule: labels.Read, warnings: list[str]) -> list[Row]:
        """The rows, with labels by `rule`, unless there are bad ones or none."""
        self.read(rule)
        self.table.refuse_bad()
        found = [
            Row(text, pair, label)
            for (_, text, pair, _), label in zip(self.kept, self.labels, strict=True)
            if label is not None
        ]
        ignored = len(self.kept) - len(found)
        warnings += self.table.warnings(
            (self.missing, "without text skipped"),
            (ignored, f"labelled {labels.IGNORED} skipped"),
            (self.mended, "with a label mended in blanks or case"),
        )
        if not found:
            raise self.table.nothing(self.missing)
        return found


def _needed(table: Table, number: int, cells: dict[str, Any], column: str) -> str:
    if (text := _text(table, number, cells, column)) is None:
        raise Refused(f"no text in {shown(column)}", where=table.at(number),
                      remedy="leave the row out")  # fmt: skip
    return text


def _text(table: Table, number: int, cells: dict[str, Any], column: str) -> str | None:
    value = cells.get(column)
    if value is not None and not isinstance(value, str):
        raise Refused(
            f"{shown(column)} is {shown(value)}, a {type(value).__name__} and not a text",
            where=table.at(number),
        )
    return value if value is not None and value.strip() else None
