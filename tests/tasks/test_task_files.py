"""The readers: every byte string is either a table or one line saying why not."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdfast.errors import Refused
from holdfast.tasks import files
from holdfast.tasks.table import MAX_TEXT, Table

WANTED = frozenset({"text", "pair", "label"})
FORMATS = ("csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def written(path: Path, content: bytes | str) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def dump(path: Path, rows: list[dict[str, str]]) -> Path:
    """`rows` in the format of `path`, by the format's own writer."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".jsonl" in path.suffixes:
        written(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", newline="", encoding="utf-8") as file:
            delimiter = "\t" if ".tsv" in path.suffixes else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


def refused(path: Path, content: bytes | str) -> str:
    with pytest.raises(Refused) as caught:
        files.read(written(path, content), WANTED)
    line = str(caught.value)
    assert path.name in line and "\n" not in line
    return line


@pytest.mark.parametrize("ending", FORMATS)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
@example(rows=[('"', ","), ("a\r\nb", "\t"), ("\r", "\n"), ("NA", "null"), ("None", "nan")])
@example(rows=[("\0", "\x1a"), ("\u2028", "\x85"), ("\ufeff", "\x0c"), ("=1+1", "")])
def test_any_text_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, ending: str, rows: list[tuple[str, str]]
) -> None:
    expected = [{"text": text, "label": label} for text, label in rows]
    path = dump(tmp_path_factory.getbasetemp() / f"round.{ending}", expected)
    assert [cells for _, cells in files.read(path, WANTED).records] == expected


@pytest.mark.parametrize("ending", FORMATS)
@given(content=st.binary(max_size=200))
@example(content=b"PAR1" + bytes(20) + b"PAR1")
@example(content=b"text,label\n\xed\xa0\x80,1\n")
@example(content=b'{"text": ' + b"[" * 100_000)
@example(content=b'{"label": ' + b"9" * 5000 + b"}\n")
@example(content=b"\x1f\x8b\x08\x00")
def test_nothing_but_refused_leaves_a_reader(
    tmp_path_factory: pytest.TempPathFactory, ending: str, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{ending}"
    path.write_bytes(content)
    try:
        assert isinstance(files.read(path, WANTED), Table)
    except Refused as refusal:
        assert str(refusal).isprintable()


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz", "csv.gz"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path, ending: str) -> None:
    whole = dump(tmp_path / f"whole.{ending}", [{"text": "a b", "label": "x"}] * 3).read_bytes()
    cut = tmp_path / f"cut.{ending}"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(Refused, match=f"cut.{ending}"):
            if not files.read(cut, WANTED).records:
                raise Refused("no rows", where=str(cut))  # a cut before the first byte of content


def test_a_flipped_byte_in_parquet_is_refused_or_read(tmp_path: Path) -> None:
    whole = dump(tmp_path / "whole.parquet", [{"text": "a b", "label": "x"}] * 3).read_bytes()
    path = tmp_path / "flipped.parquet"
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            files.read(path, WANTED)
        except Refused as refusal:
            assert "flipped.parquet" in str(refusal)


def test_quoted_newlines_count_as_physical_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = 'text,label\n"one,\ntwo",x\nshort\n'
    assert "a.csv, line 4: 1 cells where the header has 2" in refused(path, rows)
    table = files.read(written(path, 'text,label\n"one,\ntwo",x\n"say ""no""",y\n'), WANTED)
    assert table.records == [
        (2, {"text": "one,\ntwo", "label": "x"}),
        (4, {"text": 'say "no"', "label": "y"}),
    ]


@pytest.mark.parametrize(
    "content, said",
    [
        ("text,label\na,b,c\n", "line 2: 3 cells"),
        ("text,label,text\n", "line 1: column 'text' stands twice"),
        ('text,label\n"a" b,1\n', "line 2: not proper CSV"),
        ('text,label\nok,1\n"never closed,1\n', "line 3: not proper CSV"),
        (b"text,label\nok,1\ncaf\xe9,1\n", "line 3: byte 0xe9 is not UTF-8"),
        ("text,label\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("", "an empty file"),
        ("\n\n", "an empty file"),
    ],
)
def test_csv_refusals_name_the_line(tmp_path: Path, content: bytes | str, said: str) -> None:
    assert said in refused(tmp_path / "bad.csv", content)


@pytest.mark.parametrize(
    "line, said",
    [
        ("[1, 2]", "a JSON object is wanted, not [1, 2]"),
        ('"text"', "a JSON object is wanted"),
        ('{"text": "a", "text": "b"}', "key 'text' stands twice"),
        ('{"text": "a", "extra": {"x": 1, "x": 2}}', "key 'x' stands twice"),
        ('{"text": "a", "label": NaN}', "NaN is no finite number"),
        ('{"text": "a", "label": -Infinity}', "-Infinity is no finite number"),
        ('{"text": "a"', "not JSON"),
        ('{"text": "\\ud800", "label": 1}', "'text' holds half a character"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_jsonl_refusals_name_the_line(tmp_path: Path, line: str, said: str) -> None:
    whole = refused(tmp_path / "bad.jsonl", '{"text": "fine", "label": 0}\n\n' + line + "\n")
    assert f"line 3: {said}" in whole and len(whole) < 300


def test_an_emoji_in_two_escapes_is_one_character(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00", "label": 1}\n')
    assert files.read(path, WANTED).records[0][1]["text"] == "\U0001f600"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "csv.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, ending: str) -> None:
    content = "text,label\na,1\n" if "csv" in ending else '{"text": "a", "label": "1"}\n'
    table = files.read(written(tmp_path / f"a.{ending}", "\ufeff" + content), WANTED)
    assert table.columns == ["text", "label"]
    assert table.records == [(2 if "csv" in ending else 1, {"text": "a", "label": "1"})]


@pytest.mark.parametrize("ending", FORMATS)
def test_five_megabytes_are_cut_and_counted(tmp_path: Path, ending: str) -> None:
    rows = [{"text": "word " * 2**20, "label": "x"}, {"text": "short", "label": "y"}]
    path = dump(tmp_path / f"long.{ending}", rows)
    table = files.read(path, WANTED)
    assert len(table.records[0][1]["text"]) == MAX_TEXT and table.cut == 1
    assert table.records[1][1]["text"] == "short"


def test_cutting_bounds_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for _ in range(12):
            file.write(json.dumps({"text": "x" * 5_000_000, "label": 1}) + "\n")
    tracemalloc.start()
    files.read(path, WANTED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # 60 MB pass through


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_time_is_in_proportion_to_the_columns(tmp_path: Path, kind: str) -> None:
    """Each name was sought among all: 60,000 took half a minute."""
    names = ["text", *(f"c{i}" for i in range(5_000 if kind == "parquet" else 60_000))]
    path = tmp_path / f"wide.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({name: ["0"] for name in names}), path)
    elif kind == "csv":
        path.write_text(",".join(names) + "\n" + "," * (len(names) - 1))
    else:  # one key twice, the last
        path.write_text(json.dumps(dict.fromkeys(names, 0))[:-1] + f', "{names[-1]}": 1}}')
    begun = time.process_time()
    with contextlib.suppress(Refused):
        files.read(path, WANTED)
    assert time.process_time() - begun < 5


def test_a_bomb_of_values_in_lists_is_refused(tmp_path: Path) -> None:
    """A million equal values are a few bytes in the file, and many a piece in memory."""
    path, count = tmp_path / "bomb.parquet", 2_000_000
    lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(["ab"] * count))
    pq.write_table(pa.table({"text": ["a"], "label": lists}), path, compression="zstd")
    with pytest.raises(Refused, match="unpack to more than"):
        files.read(path, WANTED)
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"text": "a", "label": [' + "{}," * count + "1]}\n")
    with pytest.raises(Refused, match=r"line 1: .* unpack to more than"):
        files.read(path, WANTED)
    tags = [["O", "B-X"] * 10] * 20_000  # what people have: 400,000 tags in a few bytes
    pq.write_table(pa.table({"text": ["a"] * 20_000, "label": tags}), tmp_path / "tags.parquet")
    assert len(files.read(tmp_path / "tags.parquet", WANTED).records) == 20_000


def test_a_bomb_of_one_endless_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(40):
            file.write(b" " * 2**20)
    with pytest.raises(Refused, match=r"bomb.jsonl.gz, line 1: too large"):
        files.read(path, WANTED)


def test_tsv_with_ordinary_quotes_is_read_on_request(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'text\tlabel\n"Yes" he said\t1\n')
    with pytest.raises(Refused, match="quotes=none"):
        files.read(path, WANTED)
    assert files.read(path, WANTED, quotes=False).records[0][1]["text"] == '"Yes" he said'


def test_rows_that_two_quotes_of_a_tsv_may_have_eaten_are_told(tmp_path: Path) -> None:
    """Quotes that are ordinary characters open in one row and close in a later one."""
    path = written(tmp_path / "a.tsv", 'text\tlabel\na\t1\n"b\t0\nc\t1\nd"\t0\n')
    table = files.read(path, WANTED)
    assert [cells["text"] for _, cells in table.records] == ["a", "b\t0\nc\t1\nd"]
    (note,) = table.notes
    assert note.startswith("1 cells hold tabs and line ends") and note.endswith("add quotes=none")
    for plain in ('text\tlabel\n"two\nlines"\t1\n', 'text\tlabel\n"a\ttab"\t1\n'):
        assert not files.read(written(tmp_path / "b.tsv", plain), WANTED).notes


@pytest.mark.parametrize(
    "header, mark",
    [
        ("text{}label", ";"),
        ("text{}label", "\t"),
        ("text{}label", "|"),
        ('"text"{}label{}"a, b"', ";"),  # a comma within quotes is none
        ("text{}label{}x|y", ";"),  # what separates most
        ("x|y;z{}text{}label", "\t"),
        ("text{}label{}x;y|z", ","),  # a comma is always the separator
        ("a;b{}text{}label", ","),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_a_separator_is_told_by_the_header_line(
    tmp_path: Path, header: str, mark: str, ending: str
) -> None:
    names = next(csv.reader([header.replace("{}", mark)], delimiter=mark))
    row = {"text": "one; two | three, four\tfive", "label": "a;b"}
    path, cells = tmp_path / f"a.{ending}", [row.get(name, "x") for name in names]
    file = io.StringIO(newline="")
    file.write(header.replace("{}", mark) + "\r\n")
    csv.writer(file, delimiter=mark).writerows([cells] * 2)
    table = files.read(written(path, file.getvalue()), WANTED)
    assert table.columns == names and table.records == [(2, row), (3, row)]
    guessed = [f"no comma in the header line: separated by {mark!r}"]
    assert table.notes == (guessed if mark != "," else [])


def test_a_separator_that_is_named_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "text;label,pair\na,b;c,d\n")
    assert files.read(path, WANTED, separator=";").columns == ["text", "label,pair"]
    path = written(tmp_path / "a.tsv", "text^label\na\tb^c\n")
    table = files.read(path, WANTED, separator="^")
    assert table.records == [(2, {"text": "a\tb", "label": "c"})] and table.notes == []
    path = written(tmp_path / "b.csv", "text;label\n")  # one column, as it is said
    assert files.read(path, WANTED, separator=",").columns == ["text;label"]
    path = written(tmp_path / "c.csv", '"text;label\n"a;b"\n')  # nor are quotes always quotes
    assert files.read(path, WANTED, quotes=False).columns == ['"text', "label"]


def test_without_quotes_a_comma_in_quotes_separates(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", '"text,label";pair\na,b;c\n')
    assert files.read(path, WANTED).columns == ["text,label", "pair"]
    assert files.read(path, WANTED, quotes=False).columns == ['"text', 'label";pair']


def test_the_csv_modules_own_limit_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    dump(tmp_path / "a.csv", [{"text": "a", "label": "b"}])
    files.read(tmp_path / "a.csv", WANTED)
    assert csv.field_size_limit() == before


def test_only_wanted_columns_are_kept(tmp_path: Path) -> None:
    for ending in FORMATS:
        path = dump(tmp_path / f"a.{ending}", [{"text": "a", "label": "b", "note": "long it is"}])
        table = files.read(path, WANTED)
        assert table.columns == ["text", "label", "note"] and table.wordy == {"note"}
        assert table.records[0][1] == {"text": "a", "label": "b"}


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no reader for a file ending in '\.xlsx'"):
        files.read(tmp_path / "a.xlsx", WANTED)
    written(tmp_path / "reviews.csv", "text,label\n")
    with pytest.raises(Refused, match=r"did you mean 'reviews\.csv'"):
        files.must_exist(tmp_path / "review.csv")
    with pytest.raises(Refused, match="not an ordinary file"):
        files.must_exist(Path("/dev/null"))
