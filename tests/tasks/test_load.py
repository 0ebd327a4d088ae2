"""`load_task`: every mistake is one line that says where; every choice is by seed."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import files as plain
from holdfast.errors import Refused
from holdfast.tasks import Columns, Row, load_task, slug
from holdfast.tasks.load import pieces
from holdfast.tasks.table import MAX_TEXT

CSV = "text,label\n" + "".join(f"text {i},{'abc'[i % 3]}\n" for i in range(60))


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
        return str(path)

    return write


def folder(tmp_path: Path, meta: dict[str, Any] | str | None = None, **splits: list[Any]) -> str:
    """A task folder; rows are (text, pair, label) or whole lines."""
    path = tmp_path / "task"
    path.mkdir(exist_ok=True)
    meta = {"task": "toy", "labels": ["no", "yes"], "metric": "f1"} if meta is None else meta
    (path / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    for name, rows in splits.items():
        with gzip.open(path / f"{name}.jsonl.gz", "wt") as file:
            for row in rows:
                if isinstance(row, str):
                    file.write(row + "\n")
                else:
                    keys = ("sentence1", "sentence2", "label")
                    file.write(json.dumps(dict(zip(keys, row, strict=True))) + "\n")
    return str(path)


def toy(count: int, start: int = 0, pair: str | None = None) -> list[Any]:
    return [(f"text {start + i}", pair, i % 2) for i in range(count)]


def refusal(spec: str | Path, **options: Any) -> str:
    with pytest.raises(Refused) as caught:
        load_task(spec, **options)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 600
    return line


def with_labels(*labels: str) -> str:
    return "text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels))


# Folders


def test_a_folder_gives_its_map_metric_and_splits(tmp_path: Path) -> None:
    spec = folder(tmp_path, train=toy(100), validation=toy(20, 100), test=toy(8, 200))
    task = load_task(spec)
    assert (task.name, task.labels, task.metric) == ("toy", ("no", "yes"), "f1")
    assert task.rows == {"train": 90, "selection": 10, "evaluation": 20}
    assert task.evaluation[1] == Row("text 101", None, 1)
    assert not task.synthetic and task.source == spec and task.warnings == ()
    assert load_task(spec + "?evaluation=test").rows["evaluation"] == 8


@pytest.mark.parametrize(
    "label, said",
    [
        (2, "label 2 is outside 0 to 1"),
        (-1, "label -1 is outside 0 to 1"),
        (10**40, "is outside 0 to 1"),
        (True, "label True is a bool, not an id"),
        (1.0, "label 1.0 is a float, not an id"),
        ("yes", "label 'yes' is a str, not an id"),
        ([1], "label [1] is a list, not an id"),
        (None, "no label"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_label_outside_the_map_is_named(
    tmp_path: Path, label: Any, said: str, split: str
) -> None:
    rows = {"train": toy(20), "validation": toy(20, 100)}
    rows[split][6] = ("odd", None, label)
    line = refusal(folder(tmp_path, **rows))
    assert f"{split}.jsonl.gz, line 7: " in line and said in line


def test_rows_to_leave_out_are_counted(tmp_path: Path) -> None:
    odd = [(None, None, 0), ("", None, 1), (" \t", None, 0), ("x", None, -100)]
    line = '{"label": 1}'
    spec = folder(tmp_path, train=[*toy(40), *odd, line], validation=toy(10, 100))
    task = load_task(spec, selection=0)
    assert task.rows["train"] == 40
    assert [warning.split(": ")[1] for warning in task.warnings] == [
        "4 rows without text skipped",
        "1 row labelled -100 skipped",
    ]


def test_a_label_to_leave_out_may_be_written_as_pandas_writes_it(write) -> None:
    task = load_task(write("a.csv", CSV + "gone,-100.0\ngone, -100\ngone,-100\n"))
    assert task.labels == ("a", "b", "c") and sum(task.rows.values()) == 60
    assert task.warnings[0].endswith("a.csv: 3 rows labelled -100 skipped")


def test_ids_to_leave_out_may_be_floats(tmp_path: Path) -> None:
    spec = folder(tmp_path, train=[*toy(40), ("x", None, -100.0)], validation=toy(10, 100))
    assert load_task(spec, selection=0).rows["train"] == 40


def test_in_a_regression_it_is_a_number_and_told(write) -> None:
    numbers = [-100, -100.0, *(i / 8 for i in range(40))]
    path = write("a.csv", with_labels(*map(str, numbers)))
    task = load_task(path + "?type=regression")
    assert sum(task.rows.values()) == 42
    assert task.warnings[0].startswith("2 rows labelled -100: a number like others here")


def test_texts_with_labels_that_contradict_are_counted(write) -> None:
    """Of both splits, apart from case and spacing; equal rows do not contradict."""
    more = "text 0,a\n Text  1,a\nTEXT 1,c\n"
    path = write("d/train.csv", CSV + more)
    write("d/held.csv", "text,label\ntext 2,a\ntext 3,a\nnew,b\n")
    said = load_task(path + "?evaluation=held.csv").warnings
    assert said[0] == "5 rows with a text that other rows label otherwise"
    assert "otherwise" not in "".join(load_task(write("a.csv", CSV + "text 0,a\n")).warnings)


@pytest.mark.parametrize("twin", ["cafe\u0301", "caf\u00e9\u200b", "caf\u00ad\u00e9"])
def test_labels_that_look_alike_are_told_as_they_are_spelled(write, twin: str) -> None:
    one = "caf\u00e9"
    lines = "".join(f"t{i},{(one, twin, 'cafe')[i % 3]}\n" for i in range(30))
    task = load_task(write("a.csv", "text,label\n" + lines))
    assert task.labels is not None and len(task.labels) == 3
    told = ", ".join(f"{name!a} (10 rows)" for name in sorted([one, twin]))
    assert task.warnings[0] == f"labels that look alike, each a class of its own: {told}"


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl.gz", "parquet"])
def test_what_unpacks_to_far_more_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kilobyte of equal rows would take megabytes of memory (faults S6)."""
    path, count = tmp_path / f"a.{kind}", 10_000
    assert plain.SMALL == 2**26
    monkeypatch.setattr(plain, "SMALL", 2**21)
    if kind == "parquet":
        columns = {"text": ["good"] * count, "label": ["x"] * count}
        pq.write_table(pa.table(columns), path, compression="zstd")
    else:
        row = "good,x\n" if kind == "csv.gz" else '{"text": "good", "label": "x"}\n'
        head = "text,label\n" * (kind == "csv.gz")
        path.write_bytes(gzip.compress((head + row * count).encode()))
    assert path.stat().st_size < 4_000
    line = refusal(path)
    assert "bytes unpack to more than" in line and "unpack it yourself" in line


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    ignored = [("x", None, -100)] * 5
    assert "no rows" in refusal(folder(tmp_path, train=ignored, validation=toy(10)))
    assert "no rows" in refusal(folder(tmp_path, train=[], validation=toy(10)))
    assert "no rows" in refusal(folder(tmp_path, train=toy(10), validation=[]))
    empty = folder(tmp_path, train=[("", None, 1)] * 3, validation=toy(10))
    assert "no rows (3 rows without text)" in refusal(empty)


def test_two_rows_are_too_few_to_keep_one_back(tmp_path: Path) -> None:
    assert "too few" in refusal(folder(tmp_path, train=toy(2)))


def test_one_class_is_refused(tmp_path: Path) -> None:
    alone = [("x", None, 1), ("y", None, 1), ("z", None, 1)]
    line = refusal(folder(tmp_path, train=alone, validation=toy(4)))
    assert "every training row has the label 'yes'" in line


def test_a_pair_needs_both_its_texts(tmp_path: Path) -> None:
    rows = [*toy(20, pair="other"), ("alone", None, 1)]
    task = load_task(folder(tmp_path, train=rows, validation=toy(4, 90, pair="other")))
    assert task.pairs and "1 row without text skipped" in task.warnings[0]
    line = refusal(folder(tmp_path, train=toy(20), validation=toy(4, 90, pair="other")))
    assert "validation.jsonl.gz, line 1: a second text, which no training row has" in line


def test_a_text_must_be_a_text(tmp_path: Path) -> None:
    rows = [*toy(4), (12, None, 1)]
    line = refusal(folder(tmp_path, train=rows, validation=toy(4)))
    assert "line 5: 'sentence1' is 12, a int and not a text" in line


@pytest.mark.parametrize(
    "meta, said",
    [
        ("[]", "no 'labels'"),
        ("{", "not JSON"),
        ('{"labels": ["a", "b"], "labels": ["b", "a"]}', "key 'labels' stands twice"),
        ({"labels": ["a"]}, "needs two labels"),
        ({"labels": ["a", "a"]}, "name twice"),
        ({"labels": ["a", " "]}, "name twice or empty"),
        ({"labels": [0, 1]}, "list of names"),
        ({"labels": ["a", "\x1b[31m"]}, "cannot be printed"),
        ({"labels": ["a", "b"], "metrik": "f1"}, "unknown key 'metrik'; did you mean 'metric'?"),
        (
            {"labels": ["a", "b"], "eval": "f1"},
            "'eval' is not read, and says 'f1'; call it 'metric'",
        ),
        ({"labels": ["a", "b"], "type": "multilabel"}, "call it 'kind'"),
        ({"labels": ["a", "b"], "Task": "x"}, "unknown key 'Task'; did you mean 'task'?"),
        ({"labels": ["a", "b"], "metric": 3}, "are texts"),
        ({"labels": ["a", "b"], "metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"labels": ["a", "b"], "metric": "spearman"}, "spearman is for regression"),
        ({"labels": ["a", "b", "c"], "metric": "f1"}, "second of two labels"),
        ({"labels": None, "metric": "accuracy"}, "spearman is for regression"),
    ],
)
def test_a_wrong_meta_is_refused(tmp_path: Path, meta: Any, said: str) -> None:
    assert said in refusal(folder(tmp_path, meta, train=toy(20), validation=toy(10)))


def test_a_meta_may_say_more(tmp_path: Path) -> None:
    meta = {"labels": ["a", "b"], "metric": "f1", "metrics": ["f1"], "rows": {},
            "tags": ["short"], "unit": "tokens"}  # fmt: skip
    spec = folder(tmp_path, meta, train=toy(20), validation=toy(10, 50))
    assert load_task(spec).metric == "f1"


def test_missing_parts_of_a_folder(tmp_path: Path) -> None:
    spec = folder(tmp_path, train=toy(50))
    assert load_task(spec).rows["evaluation"] == 10
    assert "did you mean 'train.jsonl.gz'" in refusal(spec + "?evaluation=trian")
    assert "leads out of the folder" in refusal(spec + "?evaluation=../task/train")
    (tmp_path / "task" / "train.jsonl").write_text("")
    assert "both train.jsonl.gz and train.jsonl" in refusal(spec)
    (tmp_path / "task" / "meta.json").unlink()
    assert "meta.json: no such file" in refusal(spec)


# Single files


def test_a_csv_becomes_a_task(write) -> None:
    task = load_task(write("My Reviews.csv", CSV))
    assert task.name == "my-reviews" and task.labels == ("a", "b", "c")
    assert task.rows == {"train": 44, "selection": 4, "evaluation": 12}
    assert task.warnings == ("12 evaluation rows carved from the training rows",)
    assert Counter(row.label for row in task.evaluation) == {0: 4, 1: 4, 2: 4}
    texts = [row.text for part in (task.train, task.selection, task.evaluation) for row in part]
    assert len(set(texts)) == 60


def test_every_format_gives_the_same_rows(write, tmp_path: Path) -> None:
    lines = [line.split(",") for line in CSV.splitlines()[1:]]
    pq.write_table(
        pa.table({"text": [a for a, _ in lines], "label": [b for _, b in lines]}),
        tmp_path / "a.parquet",
    )
    write("a.tsv", CSV.replace(",", "\t"))
    write("a.jsonl", "".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in lines))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    write("a.csv", CSV)
    endings = ("csv", "tsv", "jsonl", "csv.gz", "parquet")
    assert len({load_task(tmp_path / f"a.{ending}").hash for ending in endings}) == 1


def test_the_separator_is_guessed_with_a_warning_or_named(write) -> None:
    task = load_task(write("a.csv", CSV))
    for mark, name in ((";", ";"), ("\t", "tab"), ("|", "%7C")):
        path = write("a.csv", CSV.replace(",", mark))
        assert load_task(path).hash == load_task(f"{path}?separator={name}").hash == task.hash
        guess = f"{path}: no comma in the header line: separated by {mark!r}"
        assert load_task(path).warnings == (guess, *task.warnings)
        assert load_task(f"{path}?separator={name}").warnings == task.warnings
    assert "no column 'text'" in refusal(f"{path}?separator=,")
    write("held.csv", "text|label\nnew 1|a\nnew 2|b\n")
    assert load_task(f"{path}?separator=|&evaluation=held.csv").rows["evaluation"] == 2


def test_columns_by_name_in_the_call_or_in_the_spec(write) -> None:
    content = "id,first,second,class\n" + "".join(f"{i},f {i},s {i},{i % 2}\n" for i in range(20))
    path = write("a.csv", content)
    task = load_task(path, columns=Columns(text="first", pair="second", label="class"))
    again = load_task(path + "?text=first&pair=second&label=class&metric=f1&name=My/Task")
    assert task.train == again.train and task.train[0].pair is not None
    assert (again.metric, again.name) == ("f1", "my-task")
    line = refusal(path)
    assert "no column 'text', 'sentence', 'sentence1'; the columns are 'id', 'first'" in line
    line = refusal(path + "?text=firts&label=class")
    assert "no column 'firts'" in line and "did you mean 'first'" in line
    assert "cannot serve twice" in refusal(path + "?text=first&label=first")
    assert "text is 'first' and 'second'" in refusal(
        path + "?text=second", columns=Columns(text="first")
    )


def test_two_columns_that_could_be_the_text_are_refused(write) -> None:
    line = refusal(write("a.csv", "text,sentence,label\na,b,1\n"))
    assert "'text', 'sentence' could each be the text; name it: text=COLUMN" in line


def test_an_unread_column_of_text_is_mentioned(write) -> None:
    content = "question,sentence,label\n" + "".join(
        f"is it the case that {i},it is {i},{i % 2}\n" for i in range(20)
    )
    assert "text not read in the column 'question'" in load_task(write("a.csv", content)).warnings


def test_an_evaluation_file_shares_the_label_map(write) -> None:
    path = write("d/train.csv", CSV)
    write("d/held.csv", "text,label\nnew 1,b\nnew 2,a\nText  3,c\n")
    task = load_task(path + "?evaluation=held.csv")
    assert [row.label for row in task.evaluation] == [1, 0, 2]
    assert task.warnings[-1] == "1 evaluation row also in the training rows"
    write("d/other.csv", "text,label\nnew 1,b\nnew 2,d\n")
    line = refusal(path + "?evaluation=other.csv")
    assert "other.csv, line 3: label 'd' is not among those of the training rows" in line
    assert "leads out of the folder" in refusal(path + "?evaluation=../d/held.csv")
    assert "did you mean 'held.csv'" in refusal(path + "?evaluation=hold.csv")
    write("d/short.csv", "text,labels\nnew 1,b\n")
    assert "no column 'label'" in refusal(path + "?evaluation=short.csv")


@pytest.mark.parametrize("word", ["NA", "None", "null", "nan", "NaN", "N/A"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_words_that_others_erase_stay(write, tmp_path: Path, word: str, ending: str) -> None:
    rows = [{"text": word if i == 4 else f"t{i}", "label": (word, "yes")[i % 2]} for i in range(20)]
    if ending == "csv":
        write("a.csv", "text,label\n" + "".join("{text},{label}\n".format(**row) for row in rows))
    elif ending == "jsonl":
        write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = load_task(tmp_path / f"a.{ending}", selection=0)
    assert set(task.labels or ()) == {word, "yes"}
    assert word in {row.text for row in task.train + task.evaluation}
    assert sum(task.rows.values()) == 20


def test_nulls_of_parquet_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [None if i == 4 else f"t{i}" for i in range(20)]
    pq.write_table(pa.table({"text": texts, "label": [i % 2 for i in range(20)]}), path)
    assert "1 row without text skipped" in load_task(path).warnings[0]
    labels = [None if i == 7 else i % 2 for i in range(20)]
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(20)], "label": labels}), path)
    assert "a.parquet, row 8: no label" in refusal(path)
    floats = [math.nan if i == 7 else float(i % 2) for i in range(20)]
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(20)], "label": floats}), path)
    assert "a.parquet, row 8: no label" in refusal(path)


def test_a_long_text_is_cut_and_counted(write) -> None:
    task = load_task(write("a.csv", CSV + "word " * 2**20 + ",a\n"), selection=0)
    assert max(len(row.text) for row in task.train + task.evaluation) == MAX_TEXT
    assert "1 row with a text above 20,000 characters cut" in task.warnings[0]


# Regression


def test_regression_is_asked_for(write) -> None:
    content = "text,label\n" + "".join(f"t{i},{i / 10}\n" for i in range(50))
    path = write("a.csv", content)
    assert "say type=regression" in refusal(path)
    task = load_task(path + "?type=regression")
    assert task.labels is None and task.metric == "spearman"
    assert {type(row.label) for row in task.train} == {float}
    assert "spearman is for regression" in refusal(path + "?type=regression&metric=accuracy")


@pytest.mark.parametrize("label", ["nan", "inf", "-Infinity", "1e999", "high", "1,5"])
def test_a_label_that_is_no_number_is_named(write, label: str) -> None:
    content = "text\tlabel\n" + "".join(f"t{i}\t{i}\n" for i in range(9)) + f"x\t{label}\n"
    line = refusal(write("a.tsv", content) + "?type=regression")
    assert f"a.tsv, line 11: label '{label}' is not a finite number" in line


def test_a_label_whose_square_float32_does_not_hold_is_refused(write) -> None:
    content = "text\tlabel\n" + "".join(f"t{i}\t{i}\n" for i in range(9))
    assert load_task(write("a.tsv", content + "x\t-1e15\n") + "?type=regression")
    line = refusal(write("a.tsv", content + "x\t-1e20\n") + "?type=regression")
    assert "line 11: label '-1e20' is beyond 1e+15" in line and "divide all labels" in line


def test_a_bool_or_a_huge_int_is_no_number(tmp_path: Path) -> None:
    meta = {"labels": None, "metric": "spearman"}
    for label in (True, 10**400):
        rows = [*[(f"t{i}", None, i / 3) for i in range(9)], ("x", None, label)]
        line = refusal(folder(tmp_path, meta, train=rows, validation=rows[:9]))
        assert "line 10: label" in line and "not a finite number" in line


def test_a_constant_regression_is_refused(write) -> None:
    content = "text,label\n" + "".join(f"t{i},2.5\n" for i in range(9))
    assert "every training row has the label 2.5" in refusal(
        write("a.csv", content) + "?type=regression"
    )


# Seeds and sizes


def test_the_seed_moves_selection_and_subset_only(tmp_path: Path) -> None:
    spec = folder(tmp_path, train=toy(200), validation=toy(60, 300))
    one, same, other = (
        load_task(spec, seed=seed, train_size=50, evaluation_size=20) for seed in (0, 0, 1)
    )
    assert one == same and one.hash == same.hash != other.hash
    assert one.evaluation == other.evaluation and len(one.evaluation) == 20
    assert set(one.selection) != set(other.selection) and set(one.train) != set(other.train)
    assert not set(one.selection) & set(one.train)
    assert Counter(row.label for row in one.train) == {0: 25, 1: 25}
    whole = load_task(spec, seed=0)
    assert whole.selection == one.selection and set(one.train) < set(whole.train)


def test_carved_evaluation_rows_ignore_the_seed(write) -> None:
    path = write("a.csv", CSV)
    assert load_task(path, seed=0).evaluation == load_task(path, seed=9).evaluation


def test_equal_texts_stay_on_one_side(write) -> None:
    """Apart from labels, case and spacing, as the warning of repeated rows counts them."""
    lines = [f"text number {i},{'ab'[i % 2]}\n" for i in range(100)]
    lines += [f" TEXT  number {i},{'ab'[i % 3 % 2]}\n" for i in range(100) for _ in range(2)]
    task = load_task(write("a.csv", "text,label\n" + "".join(lines)), selection=0.2)
    parts = [{row.plain for row in rows} for rows in (task.train, task.selection, task.evaluation)]
    assert sum(map(len, parts)) == 100 == len(set.union(*parts))
    kept = task.rows["evaluation"]  # texts of three rows each: two a class may be missing
    assert 56 <= kept <= 60 and 44 <= task.rows["selection"] <= 48
    assert task.warnings[-1] == f"{kept} evaluation rows carved from the training rows"


def test_train_size_has_bounds(write) -> None:
    path = write("a.csv", CSV)
    assert "train_size 2 is below the 3 classes" in refusal(path, train_size=2)
    assert "no count of rows" in refusal(path, train_size=0)
    assert "no count of rows" in refusal(path, train_size=0.5)
    task = load_task(path, train_size=500)
    assert task.rows["train"] == 44
    assert task.warnings[-1] == "train_size 500 takes all 44 training rows"


def test_per_class_takes_as_many_of_each_class(tmp_path: Path) -> None:
    rows = [(f"text {i}", None, int(i % 10 == 0)) for i in range(100)]  # 90 and 10
    spec = folder(tmp_path, train=rows, validation=toy(10, 300))
    one, same, other = (
        load_task(f"{spec}?per_class=7", seed=s, selection=0) for s in (0, 0, 1)
    )  # fmt: skip
    assert Counter(row.label for row in one.train) == {0: 7, 1: 7}
    assert one == same and set(one.train) != set(other.train)
    few = load_task(f"{spec}?per_class=20", selection=0)
    assert Counter(row.label for row in few.train) == {0: 20, 1: 10}
    assert few.warnings == ("fewer than 20 training rows of 1 of 2 classes",)
    for wrong in ("0", "-1", "1.5", "x"):
        assert "no count of rows" in refusal(f"{spec}?per_class={wrong}")


def test_per_class_needs_classes(write) -> None:
    content = "text,label\n" + "".join(f"text {i},{i}.5\n" for i in range(20))
    assert "no single class" in refusal(f"{write('a.csv', content)}?type=regression&per_class=2")


def test_labels_may_be_called_otherwise(tmp_path: Path, write) -> None:
    """In id order, which is that of the numbers: 10 comes after 9."""
    content = "text,label\n" + "".join(f"text {i},{(10, 9)[i % 2]}\n" for i in range(40))
    task = load_task(f"{write('a.csv', content)}?labels=nine|ten")
    assert task.labels == ("nine", "ten")
    assert all((row.label == 0) == (int(row.text.split()[1]) % 2 == 1) for row in task.train)
    spec = folder(tmp_path, train=toy(40))
    for wrong in ("a", "a|b|c", "a|a", "a|", "a| a"):
        assert "it has 'no', 'yes'; a name for each" in refusal(f"{spec}?labels={wrong}")


def test_a_text_may_be_made_of_columns(tmp_path: Path) -> None:
    lines = [json.dumps({"word": f"w{i}", "one": f"s {i}", "two": "t" if i else None,
                         "label": i % 2}) for i in range(40)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    task = load_task(f"{path}?text={{word}}: {{one}}&pair=two", selection=0)
    assert len(task.train) + len(task.evaluation) == 39  # one has no second text
    for row in (*task.train, *task.evaluation):
        number = row.text.partition(":")[0][1:]
        assert (row.text, row.pair, row.label) == (f"w{number}: s {number}", "t", int(number) % 2)
    assert "no column 'wrod'; did you mean 'word'" in refusal(f"{path}?text={{wrod}}")


def test_selection_is_a_share_or_a_count(write) -> None:
    path = write("a.csv", CSV)
    assert load_task(path, selection=9).rows["selection"] == 9
    assert load_task(path, selection=0).rows["selection"] == 0
    few = load_task(path, selection=0.01)
    assert sorted(row.label for row in few.selection) == [0, 1, 2]
    assert "an integer counts" in refusal(path, selection=1.0)
    assert "leaves no row" in refusal(path, selection=48)
    assert "evaluation_size 0" in refusal(path, evaluation_size=0)


def test_the_hash_covers_labels_metric_and_rows(write) -> None:
    base = load_task(write("a.csv", CSV))
    assert base.hash == load_task(write("b.csv", CSV)).hash
    assert len(base.hash) == 64
    for change in (
        CSV.replace("text 7,", "text seven,"),
        CSV.replace(",c\n", ",d\n"),
        CSV.replace("text 7,b", "text 7,c"),
    ):
        assert load_task(write("c.csv", change)).hash != base.hash
    assert load_task(write("a.csv", CSV) + "?metric=matthews").hash != base.hash


# Specs


@pytest.mark.parametrize(
    "query, said",
    [
        ("metrik=f1", "no option 'metrik'; did you mean 'metric'"),
        ("metric=f2", "metric 'f2'; did you mean 'f1'"),
        ("metric=f1&metric=f1", "stands twice"),
        ("metric", "is not option=value"),
        ("metric=", "option metric is empty"),
        ("type=numbers", "type 'numbers'"),
        ("revision=main", "no option 'revision'"),
        ("%ff=1", "is not option=value"),
        ("separator=;;", "separator ';;'; a character, or tab"),
        ("separator=x", "separator 'x'; a character, or tab"),
        ('separator="', "separator '\"'; a character, or tab"),
        ("separator=%0A", "separator '\\n'; a character, or tab"),
    ],
)
def test_wrong_options_are_refused(write, query: str, said: str) -> None:
    assert said in refusal(write("a.csv", CSV) + "?" + query)


@pytest.mark.parametrize(
    "spec",
    ["", " ", "a\0b.csv", "x" * 5000, "./no/such", "hub:", "hub:../x", "/dev/null", "no.csv"],
)
def test_strange_specs_are_refused_without_a_network(spec: str) -> None:
    refusal(spec)


def test_a_missing_path_names_the_nearest(write, tmp_path: Path, monkeypatch) -> None:
    write("data/trec6/meta.json", "{}")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'trec6'" in refusal("data/trec")
    assert "did you mean 'trec6'" in refusal(tmp_path / "data" / "trec")


def test_the_source_is_what_was_asked_for(write, tmp_path: Path, monkeypatch) -> None:
    write("a.csv", CSV)
    monkeypatch.chdir(tmp_path)
    assert load_task("a.csv?metric=matthews").source == "a.csv?metric=matthews"
    assert str(tmp_path) not in repr(load_task(Path("a.csv")))


@pytest.mark.parametrize(
    "name", ["../../x", "x" * 300, "a\0b", "\U0001f600", "", "Über Größe", "<script>", "\x1b[31m"]
)
def test_a_name_is_safe_anywhere(name: str) -> None:
    safe = slug(name)
    assert 0 < len(safe) <= 64 and safe.isascii()
    assert all(letter.isalnum() or letter in "-_" for letter in safe) and safe[0] != "-"


def test_numbers_beyond_any_precision_are_labels_too(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    path.write_text("".join(f'{{"text": "row {i}", "label": 1e+2{i % 2}8}}\n' for i in range(9)))
    assert len(load_task(path).labels or ()) == 2


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
@given(data=st.data())
def test_nothing_but_refused_leaves_load_task(
    tmp_path_factory: pytest.TempPathFactory, ending: str, data: st.DataObject
) -> None:
    cell = st.sampled_from(
        ["a", "b c", "1", "01", "-100", "nan", "", '"', "0.5", "True", "\r", "\0"]
    )
    if ending == "jsonl":
        value = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | cell
        rows = st.dictionaries(st.sampled_from(["text", "pair", "label"]), value).map(json.dumps)
        content = "\n".join(data.draw(st.lists(rows, max_size=12)))
    else:
        mark = "," if ending == "csv" else "\t"
        lines = data.draw(st.lists(st.tuples(cell, cell), max_size=12))
        content = "\n".join(mark.join(line) for line in [("text", "label"), *lines])
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    path.write_text(content, newline="")
    for query in ("", "?type=regression", "?type=classification", "?bad_rows=skip&strip=yes"):
        try:
            task = load_task(f"{path}{query}")
        except Refused as refusal:
            assert str(refusal).isprintable()
        else:
            assert task.train and task.evaluation
            assert all(math.isfinite(row.label) and row.text.strip() for row in task.train)


def test_importing_tasks_is_light() -> None:
    heavy = "torch", "transformers", "datasets", "sklearn", "pyarrow", "numpy", "pandas"
    code = f"import sys, holdfast.tasks; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Running text


@given(st.text(st.sampled_from("ab \n"), max_size=80), st.integers(2, 12))
def test_pieces_are_the_text(text: str, size: int) -> None:
    """None is longer than it may be; only white space is left out."""
    found = pieces(text, size)
    assert all(0 < len(piece) <= size and piece.strip() for piece in found)
    assert "".join("".join(found).split()) == "".join(text.split())


def test_pieces_end_where_the_text_rests() -> None:
    assert pieces("one two\n\nthree four five", 12) == ["one two\n\n", "three four ", "five"]
    assert pieces("one\ntwo three", 8) == ["one\ntwo ", "three"]
    assert pieces("abcdefgh", 3) == ["abc", "def", "gh"]


def test_running_text_is_a_task_of_answers_without_prompts(write, tmp_path: Path) -> None:
    text = "\r\n".join(f"line {i} of a text that goes on and on" for i in range(400))
    for name in ("book.txt", "book.txt.gz"):
        path = Path(write(name, "x")) if name.endswith("txt") else tmp_path / name
        data = ("\ufeff" + text).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        task = load_task(f"{path}?name=book")
        assert (task.kind, task.metric, task.labels, task.running) == (
            "generation", "likelihood", None, True)  # fmt: skip
        rows = [*task.train, *task.selection, *task.evaluation]
        said = pieces(text.replace("\r\n", "\n"))
        assert sorted(str(r.label) for r in rows) == sorted(said)
        assert {r.text for r in rows} == {""} and len(task.evaluation) >= 0.15 * len(rows)
    assert "too short to part" in refusal(write("short.txt", "a few words"))
    assert "no option 'text'" in refusal(str(path) + "?text=body")
    assert "did you mean 'book.txt" in refusal(tmp_path / "boook.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    assert "is not UTF-8" in refusal(tmp_path / "latin.txt")
