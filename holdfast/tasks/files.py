"""CSV, TSV, JSONL (each also gzipped) and Parquet files as tables; running text as it is.

These readers raise nothing but `Refused`, whatever the bytes are.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from holdfast import files
from holdfast.errors import Refused, meant
from holdfast.files import no_archive
from holdfast.tasks.table import (
    MAX_CELL,
    MAX_CHARACTERS,
    MAX_RECORDS,
    RECORD,
    VALUE,
    WORDY,
    Table,
    listed,
    shown,
)

SEPARATORS = (";", "\t", "|")  # what a .csv may have in place of commas

Torn = dict[int, Refused]  # lines or rows just read that are not UTF-8, by number


def read(
    path: Path,
    wanted: frozenset[str],
    *,
    name: str | None = None,
    quotes: bool = True,
    separator: str | None = None,
    collect: bool = False,
) -> Table:
    """The records of one file; `name` is what messages call it.

    quotes, separator: of CSV and TSV; without a separator, that of a .csv is told by its header.
    collect: bad rows are only counted, for the caller to refuse with others (`Table.refuse_bad`).
    """
    table = Table(name or label(path), wanted)
    _READERS[kind(path)](path, table, quotes, separator)
    if not collect:
        table.refuse_bad()
    return table


def kind(path: Path) -> str:
    """The format, by the ending of the name."""
    no_archive(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    found = last[0].removeprefix(".") if last else ""
    if found not in _READERS or (found == "parquet" and suffixes[-1] == ".gz"):
        raise Refused(
            f"no reader for a file ending in {shown(''.join(path.suffixes[-2:]))}",
            where=label(path),
            remedy="known are .csv, .tsv, .jsonl, .txt (each also .gz) and .parquet",
        )
    return found


def is_data_file(name: str) -> bool:
    """Whether `name` ends like a file that we read."""
    return name.lower().removesuffix(".gz").endswith(tuple(f".{known}" for known in _READERS))


def is_text(name: str) -> bool:
    """Whether `name` ends like running text."""
    return name.lower().removesuffix(".gz").endswith(".txt")


def text(path: Path) -> str:
    """Running text: a file that is UTF-8 and no table, whole; line ends become line feeds."""
    if is_data_file(must_exist(path).name):
        raise Refused("is a table, not running text", where=label(path), remedy="name a .txt file")
    torn: Torn = {}
    found = "".join(_lines(path, Table(label(path), frozenset()), torn, newline=None))
    for why in torn.values():
        raise why
    if not found.strip():
        raise Refused("no text", where=label(path))
    return found


def must_exist(path: Path) -> Path:
    """`path`, if it is an ordinary file; else refused with the nearest name beside it."""
    try:
        if path.is_file():
            return path
        there = path.exists()
        beside = sorted(entry.name for entry in path.parent.iterdir())[:10_000]
    except (OSError, ValueError):
        there, beside = False, []
    if there:
        raise Refused("not an ordinary file", where=label(path))
    raise Refused(
        "no such file or folder",
        where=label(path),
        remedy=meant(path.name, beside),
    )


def label(path: Path) -> str:
    """The path as messages show it."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 300 else shown(text, 300)


def _lines(path: Path, table: Table, torn: Torn, newline: str | None) -> Iterator[str]:
    """Decoded physical lines, BOM stripped, each checked and bounded."""
    gzipped = path.suffix.lower() == ".gz"
    opened = gzip.open if gzipped else open
    number = total = 0
    try:
        table.packed = path.stat().st_size if gzipped else None
        with (
            opened(path, "rb") as raw,
            io.TextIOWrapper(
                raw,
                encoding="utf-8-sig",
                errors="surrogateescape",
                newline=newline,
            ) as text,
        ):
            while line := text.readline(MAX_CELL + 1):
                number += 1
                total += len(line)
                table.check_growth(total + RECORD * number, table.at(number))
                if len(line) > MAX_CELL or total > MAX_CHARACTERS or number > MAX_RECORDS:
                    raise Refused(
                        f"too large: more than {MAX_CELL:,} characters in a line, "
                        f"{MAX_CHARACTERS:,} in all or {MAX_RECORDS:,} lines",
                        where=table.at(number),
                    )
                if not line.isascii():
                    _check_bytes(line, number, table, torn)
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(
            "a broken or truncated gzip file", where=table.name, remedy="fetch it again"
        ) from error
    except OSError as error:
        raise Refused(f"cannot be read ({error.strerror or error})", where=table.name) from error


def _check_bytes(line: str, number: int, table: Table, torn: Torn) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        torn[number] = Refused(
            f"byte 0x{ord(line[error.start]) - 0xDC00:02x} is not UTF-8",
            where=table.at(number),
            remedy="save the file as UTF-8",
        )


def _separator(header: str, quotes: bool) -> str:
    """The comma; if the header line has none outside quotes, the most frequent of `SEPARATORS`."""
    bare = re.sub('"[^"]*"', "", header) if quotes else header
    return "," if "," in bare else max((",", *SEPARATORS), key=bare.count)


def _csv(path: Path, table: Table, quotes: bool, separator: str | None) -> None:
    torn: Torn = {}
    lines = _lines(path, table, torn, newline="")
    limit = csv.field_size_limit(MAX_CELL)  # the csv module's own limit is global
    start, delimiter = 1, separator or ","
    try:
        first = next(lines, "")
        if separator is None and (delimiter := _separator(first, quotes)) != ",":
            table.notes.append(f"no comma in the header line: separated by {shown(delimiter)}")
        reader = csv.reader(
            chain([first], lines),
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        )
        header = next(reader, None)
        if torn:
            raise torn.popitem()[1]
        if not header:
            raise Refused("an empty file: no header line", where=table.name)
        if twice := _twice([column for column in header if column]):
            raise Refused(f"column {shown(twice)} stands twice", where=table.at(1))
        table.columns = header
        start = reader.line_num + 1
        read = [(at, name) for at, name in enumerate(header) if name in table.wanted]
        eaten = 0  # cells in which lines of cells stand
        for cells in reader:
            if delimiter == "\t" and reader.line_num > start:
                eaten += sum("\t" in cell and "\n" in cell for cell in cells)
            if torn:
                table.bad_row(*torn.popitem())
                torn.clear()
            elif cells and len(cells) != len(header):
                why = Refused(
                    f"{len(cells)} cells where the header has {len(header)}",
                    where=table.at(start),
                    remedy="quote a text that holds the delimiter",
                )
                table.bad_row(start, why)
            elif cells and len(table.records) < WORDY:
                table.add(start, dict(zip(header, cells, strict=True)))
            elif cells:
                table.add(start, {name: cells[at] for at, name in read})
            start = reader.line_num + 1
        if eaten:
            table.notes.append(f"{eaten} cells hold tabs and line ends between two quotes, and may "
                               "be several rows: if quotes are ordinary characters there, add "
                               "quotes=none")  # fmt: skip
    except csv.Error as error:
        raise Refused(
            f"not proper {'TSV' if delimiter == chr(9) else 'CSV'} ({error})",
            where=table.at(start),
            remedy="if quotes are ordinary characters there, add quotes=none" if quotes else None,
        ) from error
    finally:
        csv.field_size_limit(limit)
        lines.close()  # type: ignore[attr-defined]


def _twice(names: list[str]) -> str | None:
    """The first name that stands twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _tsv(path: Path, table: Table, quotes: bool, separator: str | None) -> None:
    _csv(path, table, quotes, separator or "\t")


def parse_json(line: str, where: str) -> Any:
    """One JSON value; a repeated key, NaN and too deep nesting are refused too."""
    try:
        return files.parse_json(line)
    except Refused as refusal:
        raise refusal.within(where) from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise Refused(f"not JSON ({reason})", where=where) from None


def _jsonl(path: Path, table: Table, *_: object) -> None:
    columns: dict[str, None] = {}
    torn: Torn = {}
    values = 0
    for number, line in enumerate(_lines(path, table, torn, newline="\n"), start=1):
        if not line.strip():
            continue
        values += line.count(",")  # as many as there can be: `{},` takes three bytes
        table.check_growth(VALUE * values, table.at(number))
        try:
            if torn:
                raise torn.pop(number)
            cells = _object(line, table.at(number))
        except Refused as why:
            table.bad_row(number, why)
            continue
        if len(columns) < 10_000:
            columns.update(dict.fromkeys(cells))
        table.add(number, cells)
    table.columns = list(columns)


def _object(line: str, where: str) -> dict[str, Any]:
    cells = parse_json(line, where)
    if not isinstance(cells, dict):
        raise Refused(
            f"a JSON object is wanted, not {shown(cells)}",
            where=where,
            remedy='one object a line, as {"text": "…", "label": 0}',
        )
    return cells


def _parquet(path: Path, table: Table, *_: object) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table.unit = "row"
    try:
        table.packed = path.stat().st_size
        schema = pq.read_schema(path)
        table.columns = list(schema.names)
        if (twice := _twice(table.columns)) is not None:
            raise Refused(f"column {shown(twice)} stands twice", where=table.name)
        found = [name for name in table.columns if name in table.wanted]
        flat = [f.name for f in schema if f.name in found and not pa.types.is_nested(f.type)]
        # Dictionary encoding is kept: a text repeated a million times is held once.
        with pq.ParquetFile(path, read_dictionary=flat) as file:
            _check_parquet(file.metadata, table)
            unread = (each for each in schema if each.name not in table.wanted)
            table.wordy.update(each.name for each in unread if pa.types.is_string(each.type))
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=found):
                step = min(map(_at_once, batch.columns), default=1)
                for at in range(0, batch.num_rows, step):
                    part = batch.slice(at, step)
                    torn: Torn = {}
                    columns = [_values(part.column(n), table, number + 1, torn) for n in found]
                    for cells in zip(*columns, strict=True):
                        number += 1
                        if number in torn:
                            table.bad_row(number, torn[number])
                        else:
                            table.add(number, dict(zip(found, cells, strict=True)))
    except Refused:
        raise
    except Exception as error:  # pyarrow raises many kinds on broken bytes
        raise Refused(
            f"a broken or truncated Parquet file ({type(error).__name__})",
            where=table.name,
            remedy="fetch or write it again",
        ) from error


def _at_once(column: Any) -> int:
    """How many rows to make into Python's values at once: all may hold the longest text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_nested(values.type):
        return 64
    long = pa.types.is_large_unicode(values.type) or pa.types.is_large_binary(values.type)
    text = long or pa.types.is_string(values.type) or pa.types.is_binary(values.type)
    longest = (pc.max(pc.binary_length(values)).as_py() or 1) if text else 1
    return max(1, min(4096, 2**24 // longest))


def _values(column: Any, table: Table, first: int, torn: Torn) -> list[Any]:
    """A column's values; `first` is the number of its first row."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    with contextlib.suppress(UnicodeDecodeError):
        return list(column.to_pylist())
    values = []
    for number, cell in enumerate(column, first):
        try:
            values.append(cell.as_py())
        except UnicodeDecodeError:
            values.append(None)
            torn[number] = Refused("bytes that are not UTF-8", where=table.at(number))
    return values


def _check_parquet(metadata: Any, table: Table) -> None:
    """Refuse a file that would not fit, by the figures in its footer, before reading it."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = [
        chunk
        for chunk in (group.column(i) for group in groups for i in range(group.num_columns))
        # Of lists the path goes on: messages.list.element.content.
        if {chunk.path_in_schema, chunk.path_in_schema.split(".")[0]} & table.wanted
    ]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    # A million equal values in a list are a few bytes uncompressed, and a million objects read.
    values = sum(chunk.num_values for chunk in chunks if "." in chunk.path_in_schema)
    table.check_growth(size + RECORD * metadata.num_rows + VALUE * values)
    if metadata.num_rows > MAX_RECORDS or size > MAX_CHARACTERS:
        raise Refused(
            f"{metadata.num_rows:,} rows, {size:,} bytes unpacked: too large",
            where=table.name,
            remedy=f"the columns read are {listed(sorted(table.wanted))}; take a part of the rows",
        )


_READERS: dict[str, Callable[[Path, Table, bool, str | None], None]] = {
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
