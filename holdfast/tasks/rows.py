"""From the records of a table to the rows of a task, under one label map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.errors import Refused, nearest
from holdfast.tasks import files, labels
from holdfast.tasks.prompts import prompted
from holdfast.tasks.spec import Options, parse
from holdfast.tasks.table import ANSWER, MAX_TEXT, Columns, Table, listed, shown
from holdfast.tasks.task import GENERATED, METRICS, Row


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
    if options.type == "generation" or (options.type is None and options.columns.generates(train)):
        return _generation(name, train, evaluation, options, names)
    columns = options.columns.among(train)
    if columns.pair is None and train.wordy:
        warnings.append(f"text not read in the column {listed(sorted(train.wordy))}")
    first = _Texts(train, columns)
    read: labels.Read
    if regression:
        names, read = None, labels.number
    elif names is not None:
        read = labels.by_id(names)
    else:
        fractions = options.type == "classification"
        names = labels.names_of(first.cells(), train.name, fractions=fractions)
        read = labels.by_name(names)
        if clash := _differ_by_case(names):
            warnings.append(f"labels that differ only by case: {listed(clash)}")
    if names is not None and len(names) < 2:
        raise Refused(
            f"one class only: {listed(names)}" if names else "no rows",
            where=train.name,
            remedy="a classification needs two",
        )
    pool = first.rows(read, warnings)
    held = None
    if evaluation is not None:
        columns.check(evaluation)
        held = _Texts(evaluation, columns, paired=first.paired).rows(read, warnings)
    metric = options.metric or ("spearman" if names is None else "accuracy")
    _check_metric(metric, names, name)
    return Source(name, names, metric, pool, held, warnings)


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
    columns = columns.answers_among(train)
    words = columns.label != options.answer and columns.label not in ANSWER
    read = labels.word(names) if words else labels.text
    pool = _Texts(train, columns).rows(read, warnings)
    held = None
    if evaluation is not None:
        evaluation, _ = prompted(evaluation, options.columns)
        columns.check(evaluation)
        held = _Texts(evaluation, columns).rows(read, warnings)
    metric = options.metric or ("exact_match" if words else "likelihood")
    if metric not in GENERATED:
        raise Refused(f"metric {shown(metric)} does not suit", where=name,
                      remedy=nearest(metric, GENERATED))  # fmt: skip
    return Source(name, None, metric, pool, held, warnings, "chat" if chat else "generation")


def unlabelled(
    spec: str, keep: Sequence[str] = (), *, pairs: bool, kind: str = "classification"
) -> tuple[list[str], list[str] | None, list[dict[str, Any]], int]:
    """Texts of a file, their second texts if `pairs`, the cells to keep, how many texts were cut.

    spec: a file, and after a `?` the names of its columns: `rows.csv?text=body&pair=reply`.
    kind: of the task that they are for.
    """
    asked = parse(spec)
    if asked.kind != "file":
        raise Refused("is no file", where=spec, remedy="name a CSV, TSV, JSONL or Parquet file")
    columns, path = asked.options.columns, files.must_exist(Path(asked.place))
    table = files.read(path, columns.wanted | set(keep), quotes=asked.options.quotes != "none")
    if kind == "chat" or columns.prompt is not None:
        table, columns = prompted(table, columns, answered=False)
    columns = columns.texts_among(table, pairs=pairs, prompts=kind == "generation")
    if lacking := [name for name in keep if name not in table.columns]:
        raise Refused(f"no column {shown(lacking[0])}", where=table.name,
                      remedy=nearest(lacking[0], table.columns))  # fmt: skip
    found: list[list[str]] = [[], []]
    for number, cells in table.records:
        for place, column in enumerate(c for c in (columns.text, columns.pair) if c):
            if (text := _text(table, number, cells, column)) is None:
                raise Refused(f"no text in {shown(column)}", where=table.at(number),
                              remedy="leave the row out")  # fmt: skip
            found[place].append(text)
    kept = [{name: cells.get(name) for name in keep} for _, cells in table.records]
    return found[0], found[1] if columns.pair else None, kept, table.cut


def _differ_by_case(names: tuple[str, ...]) -> list[str]:
    folded = [name.casefold() for name in names]
    return [name for name in names if folded.count(name.casefold()) > 1]


def _check_metric(metric: str, names: tuple[str, ...] | None, where: str) -> None:
    remedy = None
    if metric not in METRICS:
        remedy = nearest(metric, METRICS)
    elif (metric == "spearman") != (names is None):
        remedy = "spearman is for regression, the others for classes"
    elif metric in GENERATED:
        remedy = "it is for generated text: say type=generation"
    elif metric == "f1" and names is not None and len(names) != 2:
        remedy = "f1 is that of the second of two labels; take accuracy or matthews"
    if remedy:
        raise Refused(f"metric {shown(metric)} does not suit", where=where, remedy=remedy)


def counted(count: int, kind: str = "") -> str:
    return f"{count} {kind}row{'' if count == 1 else 's'}"


class _Texts:
    """The records of a table, without those that lack a text."""

    def __init__(self, table: Table, columns: Columns, *, paired: bool | None = None) -> None:
        assert columns.text is not None and columns.label is not None
        self.table, self.label = table, columns.label
        texts = [_text(table, number, cells, columns.text) for number, cells in table.records]
        pairs: list[str | None] = [None] * len(texts)
        if columns.pair is not None:
            pairs = [_text(table, number, cells, columns.pair) for number, cells in table.records]
        found = next((index for index, pair in enumerate(pairs) if pair is not None), None)
        self.paired = found is not None if paired is None else paired
        if found is not None and not self.paired:
            raise Refused(
                "a second text, which no training row has",
                where=table.at(table.records[found][0]),
            )
        self.kept = [
            (number, text, pair, cells.get(self.label))
            for (number, cells), text, pair in zip(table.records, texts, pairs, strict=True)
            if text is not None and (pair is not None or not self.paired)
        ]

    def cells(self) -> Iterator[tuple[Any, str]]:
        """Every label, and where it stands for the first time."""
        said: set[str] = set()
        for number, _, _, label in self.kept:
            again = label.__class__ is str and label in said
            if label.__class__ is str:
                said.add(label)
            yield label, "" if again else self.table.at(number)

    def rows(self, read: labels.Read, warnings: list[str]) -> list[Row]:
        found, known = [], dict[str, Any]()  # what a spelling that occurred before was read as
        for number, text, pair, cell in self.kept:
            if cell.__class__ is str and cell in known:
                label = known[cell]
            else:
                label = read(cell, self.table.at(number))
                if cell.__class__ is str and len(known) < labels.MAX_CLASSES:
                    known[cell] = label
            if label is not None:
                found.append(Row(text, pair, label))
        missing, ignored = len(self.table.records) - len(self.kept), len(self.kept) - len(found)
        for count, why in (
            (missing, "without text skipped"),
            (ignored, f"labelled {labels.IGNORED} skipped"),
            (self.table.cut, f"with a text above {MAX_TEXT:,} characters cut"),
        ):
            if count:
                warnings.append(f"{self.table.name}: {counted(count)} {why}")
        if not found:
            raise Refused(
                "no rows" + (f" ({counted(missing)} without text)" if missing else ""),
                where=self.table.name,
            )
        return found


def _text(table: Table, number: int, cells: dict[str, Any], column: str) -> str | None:
    value = cells.get(column)
    if value is not None and not isinstance(value, str):
        raise Refused(
            f"{shown(column)} is {shown(value)}, a {type(value).__name__} and not a text",
            where=table.at(number),
        )
    return value if value is not None and value.strip() else None
