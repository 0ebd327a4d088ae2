"""The gate: verdicts by a paired bootstrap of two models' answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sequences import run

from holdfast.errors import Refused
from holdfast.experiments import gate
from holdfast.experiments.record import Record
from holdfast.tasks import Row, Task


def task(rows: int, **more: Any) -> Task:
    """Half its rows are of either class."""
    labels = {"labels": ("no", "yes"), "metric": "accuracy", **more}
    evaluation = tuple(Row(f"row {i}", None, i % 2) for i in range(rows))
    return Task(name="t", train=(), selection=(), evaluation=evaluation, source="", **labels)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Models that say what they are told to."""
    if "place" not in request.fixturenames:
        monkeypatch.setattr(gate, "_answers", lambda served, _: served)


def served(rows: int, wrong: set[int]) -> Any:
    """What a model that is right but for the rows given answers: truth and prediction."""
    truth = np.arange(rows) % 2
    said = [t ^ (i in wrong) for i, t in enumerate(truth)]
    return np.stack([truth, said], 1).astype(float)


def judged(rows: int, before: set[int], after: set[int], most: float = 0.02) -> gate.Verdict:
    (found,) = gate.judge(served(rows, before), served(rows, after), [task(rows)],
                          max_forgetting=most)  # fmt: skip
    return found


def test_the_interval_is_that_of_paired_answers() -> None:
    """Of the rows on which the models differ, not of two independent samples."""
    n, worse, better = 2000, 60, 20
    before = set(range(100, 300)) | set(range(worse, worse + better))
    after = set(range(100, 300)) | set(range(worse))
    found = judged(n, before, after)
    gap = (better - worse) / n
    # A difference per row of -1, 0 or 1: its variance is (worse + better) / n - gap².
    width = 1.645 * math.sqrt(((worse + better) / n - gap**2) / n)
    assert found.change == pytest.approx(gap) and found.rows == n
    assert found.high == pytest.approx(gap + width, abs=width / 8)
    assert found.low == pytest.approx(gap - width, abs=width / 8)
    unpaired = 1.645 * math.sqrt(2 * 0.13 * 0.87 / n)
    assert found.high - found.low < 1.5 * unpaired


@pytest.mark.parametrize(
    ("lost", "most", "verdict"),
    [(0, 0.0, "kept"), (4, 0.02, "kept"), (60, 0.02, "lost"), (60, 0.2, "kept"),
     (22, 0.02, "unclear")],
)  # fmt: skip
def test_verdicts(lost: int, most: float, verdict: str) -> None:
    found = judged(1000, set(), set(range(lost)), most)
    assert found.verdict == verdict
    assert (found.rows_needed is not None) == (verdict == "unclear")


def test_as_many_rows_as_it_says_would_tell() -> None:
    few = judged(200, set(), set(range(8)))
    assert few.verdict == "unclear" and few.rows_needed is not None
    times = math.ceil(1.3 * few.rows_needed / 200)  # the interval is itself an estimate
    more = judged(200 * times, set(), set(range(8 * times)))
    assert more.verdict == "lost"


def test_the_same_answers_have_no_noise() -> None:
    found = judged(10, {1, 2}, {1, 2}, 0.0)
    assert (found.change, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "kept")


def test_ranks_and_correlations_are_judged_too() -> None:
    for labels, metric in ((None, "spearman"), (("no", "yes"), "matthews")):
        about, half = task(400, labels=labels, metric=metric), set(range(0, 400, 3))
        (found,) = gate.judge(served(400, set()), served(400, half), [about],
                              max_forgetting=0.02)  # fmt: skip
        assert found.metric == metric and found.verdict == "lost"
        assert found.low < found.change < found.high < 0


def test_junit(tmp_path: Path) -> None:
    cases = [(set(), set()), (set(), set(range(60))), (set(), set(range(22)))]
    gate.write_junit([judged(1000, *c) for c in cases], tmp_path / "deep" / "x.xml")
    root = ElementTree.parse(tmp_path / "deep" / "x.xml").getroot()
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("3", "1", "1")
    inside = [[each.tag for each in case] for case in root]
    assert inside == [[], ["failure"], ["skipped"]]
    assert "accuracy 1.000 before, 0.940 after" in str(root[1][0].get("message"))


def test_junit_is_written_whole_and_through_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, file = tmp_path / "record.json", tmp_path / "x.xml"
    record.write_text("kept")
    file.symlink_to(record)
    gate.write_junit([judged(100, set(), set())], file)
    assert record.read_text() == "kept" and not file.is_symlink()
    before = file.read_bytes()
    assert ElementTree.parse(file).getroot().get("tests") == "1"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Refused, match="No space left on device"):
        gate.write_junit([judged(100, set(), set())] * 9, file)
    assert file.read_bytes() == before and len([*tmp_path.iterdir()]) == 2


def test_a_run_is_judged_by_what_it_had_just_learned(place: Path, tmp_path: Path) -> None:
    """As the record's matrix says, task by task, also where the old tasks came from elsewhere."""
    run(place, tmp_path / "a", seed=5, epochs=1.0)
    scores = Record.load(tmp_path / "a").scores
    found = gate.judge_run(tmp_path / "a", max_forgetting=0.02)
    assert [(v.before, v.after) for v in found] == [
        (pytest.approx(scores[j][j]), pytest.approx(scores[2][j])) for j in (0, 1)
    ]
