"""What a comparison says of its terms: tuning runs, a shared first task, equal configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_records import record

from holdfast.report import as_text, comparison_table, find_records
from holdfast.report.facts import comparisons
from holdfast.report.page import render
from holdfast.report.terms import terms

SCORES: list[list[float | None]] = [[0.9, None], [0.7, 0.8]]
TUNED: dict[str, Any] = {
    "runs": 8, "chosen": 3, "score": 1.25, "rows": "selection", "seed": 1000, "diverged": 2,
    "values": {"rate": 2.1e-5, "dps.drop": 0.5}, "edges": {"rate": "low"},
    "ranges": {"rate": [2e-5, 5e-4, True], "dps.drop": [0.1, 0.9, False]},
}  # fmt: skip


def told(*records: Any) -> list[str]:
    (study,) = comparisons(records)
    return terms(study)


def test_the_table_and_the_page_say_what_was_chosen_of_how_many() -> None:
    records = [record(SCORES, recipe=name, extra={"tuned": TUNED}) for name in ("plain", "dps")]
    line = (
        "dps: number 4 of 8 tuning runs, by new plus old on selection rows (1.250, seed 1000): "
        "rate 2.1e-05 of 2e-05 to 0.0005 (log), dps.drop 0.5 of 0.1 to 0.9. 2 diverged. "
        "Chosen at an edge of its range: rate at its low end; better may lie beyond."
    )
    assert line in told(*records)
    table = " ".join(as_text(comparison_table(records)).split())  # its caption is wrapped
    assert line in render(records) and line in table
    plain = {**TUNED, "diverged": 0, "edges": {}}
    (line,) = told(record([[0.9]], recipe="plain", extra={"tuned": plain}))
    assert "by score on" in line and line.endswith("0.1 to 0.9.")


def test_one_that_was_not_tuned_beside_one_that_was_is_told() -> None:
    lines = told(record(SCORES, extra={"tuned": TUNED}), record(SCORES, recipe="dps"))
    assert lines[1:] == ["Not tuned: dps."]


@pytest.mark.parametrize(
    "tuned", [None, 3, {}, {**TUNED, "values": []}, {**TUNED, "ranges": {"rate": [1]}},
              {**TUNED, "runs": "<b>"}, {**TUNED, "score": "x"}],
)  # fmt: skip
def test_a_foreign_file_of_another_form_is_no_error(tuned: Any) -> None:
    assert not [line for line in told(record(SCORES, extra={"tuned": tuned})) if "runs" in line]


def test_seconds_that_were_not_spent_again() -> None:
    """Two seeds, three recipes: of each seed the second and the third are saved."""
    made = [
        record(SCORES, recipe=name, seed=seed, lr=lr,
               extra={"first": {"folder": f"c/first/k/seed-{seed}", "seconds": 10.0 + seed}})
        for name, lr in (("plain", 1e-4), ("dps", 1e-4), ("ewc", 2e-4)) for seed in (0, 1)
    ]  # fmt: skip
    (line,) = told(*made)
    assert "trained once a seed for plain, dps and ewc," in line
    assert "42 s were not spent again" in line  # 2 · 10 + 2 · 11
    assert not told(made[0], made[1])  # alone, it saved nothing


def test_two_names_of_one_configuration_are_told() -> None:
    lines = told(*[record(SCORES, recipe=name, lr=lr)
                   for name, lr in (("a", 1e-4), ("b", 1e-4), ("c", 2e-4))])  # fmt: skip
    assert lines == ["a and b are one configuration: their runs are the same."]


def test_runs_that_only_serve_a_comparison_are_not_beside_it(tmp_path: Path) -> None:
    for name, extra in (("plain/seed-0", {}), ("tuning/plain/0", {"serves": "tuning"}),
                        ("first/k/seed-0", {"serves": "first"})):  # fmt: skip
        record(SCORES, extra=extra).save(tmp_path / name / "record.json")
    assert len(find_records([tmp_path])) == 1
    assert len(find_records([tmp_path / "tuning"])) == len(find_records([tmp_path / "first"])) == 1
    (study,) = comparisons(find_records([tmp_path / "tuning"]))
    assert any("selection rows alone" in line for line in study.warnings)
    (study,) = comparisons(find_records([tmp_path]))
    assert not any("selection rows alone" in line for line in study.warnings)
