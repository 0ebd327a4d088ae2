"""Rows that cannot be used are told together or skipped; labels are mended on request."""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from holdfast.errors import Refused
from holdfast.tasks import Task, load_task
from holdfast.tasks.labels import Spelling, usual
from holdfast.tasks.rows import unlabelled
from holdfast.tasks.spec import parse, with_options

GOOD = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(60)]
FAULTS: dict[str, list[tuple[Any, str]]] = {  # a line or row of a file, and what is said of it
    "csv": [
        ("one cell", "1 cells where the header has 2"),
        ("a,b,c", "3 cells where the header has 2"),
        ("no label,", "no label"),
        ("blank label,  ", "no label"),
        ("caf\udce9,a", "byte 0xe9 is not UTF-8"),
        ('"two\nlines of caf\udce9",a', "byte 0xe9 is not UTF-8"),
        (f"long,{'x' * 300}", f"label '{'x' * 60}'… is longer than 200 characters"),
    ],
    "jsonl": [
        ('{"text": "x"', "not JSON (Expecting ',' delimiter: line 2 column 1 (char 13))"),
        ('{"text": "x", "label": NaN}', "NaN is no finite number"),
        ('{"text": "x", "label": 1e400}', "1e400 is no finite number"),
        ('{"text": "x", "text": "y"}', "key 'text' stands twice"),
        ("[1]", "a JSON object is wanted, not [1]"),
        ('{"text": "\\ud800", "label": "a"}', "'text' holds half a character (a lone surrogate)"),
        ('{"text": 3, "label": "a"}', "'text' is 3, a int and not a text"),
        ('{"text": "x", "label": []}', "label [] is a list"),
        ('{"text": "x"}', "no label"),
    ],
    "parquet": [
        ((b"caf\xe9", b"a"), "bytes that are not UTF-8"),
        ((b"x", b"caf\xe9"), "bytes that are not UTF-8"),
        ((b"x", None), "no label"),
        ((b"x", b" "), "no label"),
    ],
}


def written(path: Path, rows: list[Any]) -> list[int]:
    """Write rows, good ones as mappings and bad ones as they stand; gives each one's number."""
    kind = path.suffix[1:]
    if kind == "parquet":
        cells = [[row[c].encode() for c in ("text", "label")] if isinstance(row, dict) else row
                 for row in rows]  # fmt: skip
        texts = [pa.array([row[c] for row in cells], pa.binary()).view(pa.string()) for c in (0, 1)]
        pq.write_table(pa.table(texts, ["text", "label"]), path)
        return list(range(1, len(rows) + 1))
    lines = [] if kind == "jsonl" else ["text,label"]
    for row in rows:
        if isinstance(row, dict):
            row = json.dumps(row) if kind == "jsonl" else ",".join(row.values())
        lines.append(row)
    content = "\n".join(lines) + "\n"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    starts = [1 + sum(line.count("\n") + 1 for line in lines[:i]) for i in range(len(lines))]
    return starts[len(lines) - len(rows) :]


def refusal(spec: str | Path, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        load_task(spec, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def table(path: Path, *rows: tuple[str, str], heads: str = "text,label") -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heads.split(","), *rows])
    return str(path)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("count", [2, 10, 11, 37])
def test_all_bad_rows_are_told_at_once_or_skipped(tmp_path: Path, kind: str, count: int) -> None:
    """Whoever finds them, in order of the file; what is left is the file without them."""
    draw, bad, clean = random.Random(count), tmp_path / f"bad.{kind}", tmp_path / f"clean.{kind}"
    rows: list[Any] = [*GOOD]
    faults = [FAULTS[kind][i % len(FAULTS[kind])] for i in range(count)]
    for fault in faults:
        rows.insert(draw.randrange(len(rows) + 1), fault)
    whole = [row if isinstance(row, dict) else row[0] for row in rows]
    numbers = written(bad, whole)
    written(clean, [row for row in rows if isinstance(row, dict)])

    unit, expected = "row" if kind == "parquet" else "line", []
    for number, row in zip(numbers, rows, strict=True):
        if isinstance(row, tuple):
            number += "\n" in row[0] if kind == "csv" else 0  # the byte is in the second line
            expected.append(f"{unit} {number}: {row[1]}")
    line = refusal(bad)
    assert line.startswith(f"{bad}: {count} bad rows: " + "; ".join(expected[:10]))
    assert (f"; … and {count - 10} more; " in line) == (count > 10)
    assert line.endswith("mend them, or --bad-rows skip")

    task, whole_task = load_task(f"{bad}?bad_rows=skip"), load_task(clean)
    assert task.hash == whole_task.hash
    assert task.warnings[0] == f"{bad}: {count} bad rows skipped, the first in {expected[0]}"
    assert task.warnings[1:] == whole_task.warnings


def test_a_remedy_that_all_share_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    written(path, [*GOOD, "x,y,z", "z"])
    assert refusal(path).endswith(
        "line 63: 1 cells where the header has 2; quote a text that holds the delimiter; "
        "mend them, or --bad-rows skip"
    )


def test_what_is_wrong_with_the_whole_file_is_told_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    written(path, [*GOOD, "one cell", "x,", '"never closed,a'])
    for query in ("", "?bad_rows=skip"):
        assert "line 64: not proper CSV" in refusal(f"{path}{query}")
    written(path, [*GOOD, "one cell", "two"])
    assert "no column 'class'" in refusal(f"{path}?label=class&bad_rows=skip")
    assert "no column 'class'" in refusal(f"{path}?label=class")
    broken = tmp_path / "a.csv.gz"
    broken.write_bytes(gzip.compress(path.read_bytes())[:-9])
    assert "broken or truncated gzip" in refusal(f"{broken}?bad_rows=skip")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "text,label\nx,\ny,\n", "2 bad rows skipped, the first in line 2: no label"),
        ("a.csv", "text,label\nx\n ,a\n",
         "1 bad row skipped, the first in line 2: 1 cells where the header has 2, "
         "1 row without text"),
        ("a.jsonl", "[\n]\n", "2 bad rows skipped, the first in line 1: not JSON"),
    ],
)  # fmt: skip
def test_a_file_of_which_nothing_is_left_is_refused(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    for query in ("", "&type=regression", "&type=classification"):
        assert f"{name}: no rows ({said}" in refusal(f"{tmp_path / name}?bad_rows=skip{query}")


def test_evaluation_rows_are_told_and_skipped_by_themselves(tmp_path: Path) -> None:
    path, held = tmp_path / "a.csv", tmp_path / "held.csv"
    written(path, GOOD)
    written(held, [{"text": "new 1", "label": "a"}, "x,d", "y", {"text": "new 2", "label": "b"}])
    line = refusal(f"{path}?evaluation=held.csv")
    assert "held.csv: 2 bad rows: line 3: label 'd' is not among those of the training" in line
    task = load_task(f"{path}?evaluation=held.csv&bad_rows=skip")
    assert [row.text for row in task.evaluation] == ["new 1", "new 2"]
    assert len(task.warnings) == 1 and "held.csv: 2 bad rows skipped" in task.warnings[0]


@pytest.mark.parametrize(
    "meta, good, bad, said",
    [
        ({"labels": ["no", "yes"]}, 1, 2, "label 2 is outside 0 to 1"),
        ({"labels": None}, 0.5, "high", "label 'high' is not a finite number"),
        ({"kind": "generation"}, "an answer", [], "answer [] is a list"),
    ],
)
def test_every_kind_of_label_is_read_so(
    tmp_path: Path, meta: dict[str, Any], good: Any, bad: Any, said: str
) -> None:
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    name = "answer" if meta.get("kind") else "label"
    other = {1: 0, 0.5: 0.25}.get(good, "another answer") if name == "label" else "another"
    rows = [{"text": f"t{i}", name: (good, other)[i % 2]} for i in range(20)]
    for split in ("train", "validation"):
        lines = [*rows, {"text": "x", name: bad}, {"text": "y", name: bad}]
        content = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / f"{split}.jsonl").write_text(content)
    assert f"train.jsonl: 2 bad rows: line 21: {said}; line 22: {said}" in refusal(tmp_path)
    task = load_task(f"{tmp_path}?bad_rows=skip")
    assert task.rows == {"train": 18, "selection": 2, "evaluation": 20}
    assert sum("2 bad rows skipped, the first in line 21" in line for line in task.warnings) == 2


# Blanks and case


def labelled(path: Path, *labels: str, text: str = " Text ") -> str:
    return table(path, *((f"{text}{i}", label) for i, label in enumerate(labels)))


def test_spellings_of_one_label_are_counted_and_the_remedy_named(tmp_path: Path) -> None:
    spec = labelled(tmp_path / "a.csv", *["yes", "no", "no "] * 3, " yes", "Yes")
    line = refusal(spec)
    assert line == (
        f"{spec}: labels in several spellings: 'yes' (line 2, 3 rows), ' yes' (line 11, 1 row), "
        "'Yes' (line 12, 1 row), 'no' (line 3, 3 rows), 'no ' (line 4, 3 rows); "
        "write it one way, or say --strip: it mends blanks and case"
    )
    spec = labelled(tmp_path / "a.csv", *["yes", "no", "Yes"] * 3)
    said = "labels that differ only by case: 'Yes' (line 4, 3 rows), 'yes' (line 2, 3 rows)"
    assert load_task(spec).warnings[0] == f"{said}; --strip makes them one"
    for other in ("01", "True", "1.0"):  # not for --strip to mend
        spec = labelled(tmp_path / "a.csv", *["1", other, "2"] * 3)
        assert refusal(spec).endswith("write it one way")
        assert refusal(spec + "?strip=yes").endswith("write it one way")


def split(task: Task) -> Counter[tuple[str, str]]:
    rows = task.train + task.selection + task.evaluation
    return Counter((row.text, (task.labels or ())[int(row.label)]) for row in rows)


def test_strip_mends_labels_and_leaves_texts(tmp_path: Path) -> None:
    labels = ["yes", " yes", "Yes", "yes ", "NO", "no", "No ", "Maybe", "\tMaybe", "maybe"] * 2
    mended = ["yes"] * 4 + ["NO"] * 3 + ["Maybe"] * 3  # NO, No and no are as frequent
    spec = labelled(tmp_path / "a.csv", *labels)
    task = load_task(spec + "?strip=yes")
    assert task.labels == ("Maybe", "NO", "yes")
    assert split(task) == {(f" Text {i}", (mended * 2)[i]): 1 for i in range(20)}
    assert task.warnings[0] == f"{spec}: 14 rows with a label mended in blanks or case"
    clean = load_task(labelled(tmp_path / "b.csv", *mended * 2))
    assert clean.hash == task.hash


def test_strip_mends_labels_that_are_written_as_words(tmp_path: Path) -> None:
    spec = labelled(tmp_path / "a.csv", *["yes", " Yes", "yes ", "no"] * 5)
    labelled(tmp_path / "held.csv", "YES", " no", text="new ")
    task = load_task(f"{spec}?prompt={{text}} is&evaluation=held.csv&strip=yes")
    assert {row.label for row in task.train} == {"yes", "no"} and task.kind == "generation"
    assert [row.label for row in task.evaluation] == ["yes", "no"]
    assert task.warnings[0] == f"{spec}: 10 rows with a label mended in blanks or case"


def test_evaluation_labels_are_spelled_as_the_training_ones(tmp_path: Path) -> None:
    spec = labelled(tmp_path / "a.csv", *["yes", "no"] * 9)
    labelled(tmp_path / "held.csv", "YES", "YES", " No", "yes", text="new ")
    assert "3 bad rows" in refusal(spec + "?evaluation=held.csv")
    task = load_task(spec + "?evaluation=held.csv&strip=yes")
    assert [(task.labels or ())[int(row.label)] for row in task.evaluation] == [
        "yes", "yes", "no", "yes",
    ]  # fmt: skip
    assert len(task.warnings) == 1 and "held.csv: 3 rows with a label mended" in task.warnings[0]
    labelled(tmp_path / "held.csv", "YES", " perhaps ")
    line = refusal(spec + "?evaluation=held.csv&strip=yes")
    assert "held.csv, line 3: label 'perhaps' is not among" in line


def test_the_most_frequent_spelling_is_counted_without_blanks() -> None:
    rows = {" Yes": 3, "Yes": 1, "yes": 3, "STRASSE": 1, "straße": 1}
    mend = usual({name: Spelling("line 2", count) for name, count in rows.items()})
    assert [*map(mend, rows)] == ["Yes"] * 3 + ["STRASSE"] * 2
    assert mend(" new ") == "new"


@pytest.mark.parametrize("query", ["type=regression", "label=answer&type=generation", "x"])
def test_strip_leaves_what_are_no_names_of_classes(tmp_path: Path, query: str) -> None:
    rows = [(f"t{i}", f" {i % 3} ", f" Answer {i}") for i in range(30)]
    spec = table(tmp_path / "a.csv", *rows, heads="text,label,answer")
    query = {"x": "answer=answer"}.get(query, query.replace("label=answer", "answer=answer"))
    assert load_task(f"{spec}?{query}&strip=yes").hash == load_task(f"{spec}?{query}").hash


# The options


def test_options_are_added_where_they_mean_something(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    written(path, GOOD)
    more = {"bad_rows": "skip", "strip": "yes"}
    assert with_options(str(path), **more) == f"{path}?bad_rows=skip&strip=yes"
    assert with_options(f"{path}?strip=yes", **more) == f"{path}?strip=yes&bad_rows=skip"
    assert with_options("owner/name", strip="yes") == "owner/name?strip=yes"
    assert with_options(str(tmp_path), strip="yes") == f"{tmp_path}?strip=yes"
    assert with_options("builtin:intents", **more) == "builtin:intents"
    assert with_options(f"{path}?name=x") == f"{path}?name=x"
    assert parse(with_options("glue/mrpc", **more)).options.bad_rows == "skip"
    task = load_task(with_options(str(path), **more))
    assert task.source == f"{path}?bad_rows=skip&strip=yes"
    assert task.hash == load_task(path).hash
    for query in ("bad_rows=drop", "strip=no", "strip=yes&strip=yes"):
        refusal(f"{path}?{query}")
    assert "no option 'strip'" in refusal("builtin:intents?strip=yes")


# Rows without labels


def test_rows_to_label_are_told_together(tmp_path: Path) -> None:
    rows = [("1", "a film"), ("2", ""), ("3", "a book"), ("4", " ")]
    spec = table(tmp_path / "new.csv", *rows, heads="id,body")
    with Path(spec).open("a") as file:
        file.write("5\n")
    with pytest.raises(Refused) as caught:
        unlabelled(spec + "?text=body", pairs=False)
    assert str(caught.value) == (
        f"{spec}: 3 bad rows: line 3: no text in 'body'; line 5: no text in 'body'; "
        "line 6: 1 cells where the header has 2; mend them"
    )
    table(tmp_path / "new.csv", *rows[:3], heads="id,body")
    with pytest.raises(Refused, match="line 3: no text in 'body'; leave the row out"):
        unlabelled(spec + "?text=body", pairs=False)
    with pytest.raises(Refused, match="bad_rows is for rows to learn from"):
        unlabelled(spec + "?text=body&bad_rows=skip", pairs=False)
    table(tmp_path / "new.csv", rows[0], rows[2], heads="id,body")
    found = unlabelled(spec + "?text=body", ["id"], pairs=False)
    assert found == (["a film", "a book"], None, [{"id": "1"}, {"id": "3"}], 0)
    found = unlabelled(spec + "?text=body&pair=id", pairs=True)
    assert found[:2] == (["a film", "a book"], ["1", "3"])
    (tmp_path / "new.jsonl").write_text("[\n]\n")
    with pytest.raises(Refused) as caught:
        unlabelled(str(tmp_path / "new.jsonl"), pairs=False)
    assert re.search("2 bad rows: line 1: not JSON.*; mend them$", str(caught.value))
    (tmp_path / "new.txt").write_text("a film\n")
    with pytest.raises(Refused, match="is no CSV, TSV, JSONL or Parquet file"):
        unlabelled(str(tmp_path / "new.txt"), pairs=False)
