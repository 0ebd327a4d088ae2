"""The demo, whole: minutes long, so only `make test-slow` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.experiments.record import Record


@pytest.mark.slow
def test_demo_forgets_plainly_and_less_with_the_default_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    records = [Record.load(p) for p in sorted((tmp_path / "demo").glob("*/*/record.json"))]
    assert [(r.recipe["name"], r.seed) for r in records] == [
        ("default", 0), ("default", 1), ("plain", 0), ("plain", 1),
    ]  # fmt: skip
    assert all(task["synthetic"] for r in records for task in r.tasks)
    assert all(max(s for row in r.scores for s in row if s is not None) < 1 for r in records)
    kept, lost = (
        sum(r.forgetting or 0 for r in records if r.recipe["name"] == name)
        for name in ("default", "plain")
    )
    assert kept < lost
    assert "synthetic" in capsys.readouterr().out
    assert (tmp_path / "demo" / "report.html").is_file()
