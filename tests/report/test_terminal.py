"""The terminal shows the matrix itself, and nothing a name smuggles in."""

from __future__ import annotations

import pytest
from made_records import HOSTILE, record, study, two

from holdfast.report import as_text, comparison_table, matrix_table


def rows(text: str) -> list[list[str]]:
    lines = [line.strip("│┃ ") for line in text.splitlines() if line[:1] in "│┃"]
    return [[part.strip() for part in line.replace("┃", "│").split("│")] for line in lines]


def test_the_table_is_the_matrix() -> None:
    text = as_text(matrix_table(two(0.8, 0.952, 0.741)))
    assert rows(text) == [
        ["after learning", "trec6", "snli"],
        ["trec6", "0.952", "–"],
        ["snli", "0.741", "0.800"],
        ["metric", "accuracy", "accuracy"],
        ["rows", "500", "500"],
        ["noise of the last score", "± 0.020", "± 0.018"],
        ["forgetting", "+0.211", "–"],
    ]
    assert "task-incremental" in text
    assert "new plus old 1.541" in " ".join(text.split())


def test_a_notebook_gets_text_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There rich shows what it prints, whatever the file, and leaves that empty."""
    said = as_text(matrix_table(two(0.8, 0.952, 0.741)))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert as_text(matrix_table(two(0.8, 0.952, 0.741))) == said


def test_a_single_task_has_no_forgetting_row() -> None:
    text = as_text(matrix_table(record([[0.9]], kind="train")))
    assert "forgetting" not in text and "0.900" in text


def test_recipes_side_by_side() -> None:
    text = as_text(comparison_table(study()), width=160)
    found = {line[0]: line[1:] for line in rows(text)}
    assert found["plain (control)"][:3] == ["3", "0.800±0.000", "0.950±0.000"]
    assert found["dps"][3:] == [
        "0.820±0.020",
        "+0.130±0.020",
        "1.610±0.020",
        "+0.100 [+0.075, +0.125]",
    ]


def test_names_cannot_drive_the_terminal() -> None:
    names = ["[red]a[/red]\x1b[31m\x1b]0;x\x07", "two\nlines", *HOSTILE[:2]]
    shown = as_text(matrix_table(record([[None] * 4] * 4, names=names)), width=300)
    assert "\x1b" not in shown and "\x07" not in shown
    assert "[red]a[/red]" in shown and "two lines" in shown
    hostile = [two(0.8, 0.9, 0.7, recipe="[bold]\x1b[2Jx", names=names[:2])]
    text = as_text(comparison_table(hostile), width=200)
    assert "[bold]x" in text and "\x1b" not in text


def test_synthetic_is_said() -> None:
    assert "trec6 (synthetic)" in as_text(matrix_table(two(0.8, 0.9, 0.7, synthetic=True)))


def test_general_ability_is_a_line_a_measure() -> None:
    told = {"base": {"arc acc": 0.3}, "after": {"trec6": {"arc acc": 0.2}}}
    text = " ".join(as_text(matrix_table(two(0.8, 0.9, 0.7, general=told))).split())
    assert "arc acc before 0.300, after trec6 0.200, after snli –" in text
