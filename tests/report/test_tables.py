"""CSV that a spreadsheet opens without running it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from made_records import study, two

from holdfast.report import comparison_rows, run_rows, write_csv
from holdfast.report.tables import cell


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\tx", "\rx", " =1", "＝1", "-1+1"]
)
def test_formulas_become_text(text: str) -> None:
    assert cell(text) == "'" + text


@pytest.mark.parametrize("value", [-1.5, "-1.5", "+3", 1e-05, 0, "plain", "a=b", "–", "-1e-3"])
def test_numbers_and_words_stay(value: object) -> None:
    assert cell(value) == str(value)


def test_a_file_round_trips(tmp_path: Path) -> None:
    rows = [{"a,b": 'say "hi"\r\nthere\r=1', "n": -0.5}, {"=x": None, "n": None}]
    write_csv(rows, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["a,b", "n", "'=x"], ['say "hi"\nthere\n=1', "-0.5", ""], ["", "", ""]
        ]  # fmt: skip


def test_comparison_rows() -> None:
    plain, dps = comparison_rows(study())
    assert plain["control"] == "yes" and dps["seeds"] == "0 1 2"
    assert dps["old_after_minus_control_mean"] == pytest.approx(0.11)
    assert plain["old_after_minus_control_mean"] is None
    assert dps["tasks"] == "trec6 > snli"


def test_run_rows_are_the_matrix() -> None:
    rows = run_rows([two(0.8, 0.9, 0.7)])
    cells = [(row["learned"], row["tested"], row["score"]) for row in rows]
    assert cells == [
        ("trec6", "trec6", 0.9), ("trec6", "snli", None), ("snli", "trec6", 0.7),
        ("snli", "snli", 0.8),
    ]  # fmt: skip


def test_run_rows_tell_sequences_of_the_same_tasks_apart() -> None:
    back = two(0.8, 0.9, 0.7, tasks=list(reversed(two(0.8, 0.9, 0.7).tasks)))
    rows = run_rows([two(0.8, 0.9, 0.7), back])
    keys = [(row["recipe"], row["seed"], row["tasks"], row["learned"], row["tested"])
            for row in rows]  # fmt: skip
    assert len({*keys}) == len(keys) == 8
