"""Searches whose model, rows or wishes change before they are over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import CONTROLS, curve, make_curve, make_result, plan, result, take

from holdfast.errors import Refused
from holdfast.search import plan as plans
from holdfast.search.final import FinalJob, Result
from holdfast.search.objective import Scores, Watch
from holdfast.search.rows import best, rows
from holdfast.search.run import search
from holdfast.search.study import Study
from holdfast.search.worker import Replicate, work


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Path:
    """A copy of the model and the tasks, to be changed."""
    return Path(shutil.copytree(place, tmp_path / "own"))


def change(file: Path, **more: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_of_another_configuration_or_tokenizer_is_another_search(
    name: str, own: Path, tmp_path: Path
) -> None:
    take(Study(tmp_path / "s", plan(own))).close()
    change(own / "bert" / name, mark=1)
    with pytest.raises(Refused, match=r"holds another search .model files"):
        Study(tmp_path / "s", plan(own))


def test_a_study_of_before_model_files_were_noted_goes_on(place: Path, tmp_path: Path) -> None:
    study = Study(tmp_path, plan(place))
    body = json.loads((tmp_path / plans.FILE).read_text())
    del body["config"]["model files"]
    (tmp_path / plans.FILE).write_text(json.dumps(body))
    study.study.set_user_attr("config", body["config"])
    Study(tmp_path, plan(place))
    with pytest.raises(Refused, match="seed: 0 → 1"):
        Study(tmp_path, plan(place, seed=1))


@pytest.mark.parametrize("when", ["trials", "final runs"])
def test_a_model_that_is_exchanged_while_a_search_runs_is_refused(
    when: str, own: Path, tmp_path: Path
) -> None:
    def train(job: Replicate, watch: Watch) -> Scores:
        if when == "trials":
            change(own / "bert" / "config.json", mark=1)
        return curve(job, watch)

    def evaluate(job: FinalJob) -> Result:
        assert when == "final runs", "of another model than the trials"
        change(own / "bert" / "config.json", mark=1)
        return result(job)

    tasks = [own / "mood.jsonl", own / "question.jsonl"]
    with pytest.raises(Refused, match=r"holds another search .model files"):
        search(str(own / "bert"), tasks, out=tmp_path / "s", progress=False, trials=CONTROLS + 1,
               parts=4, sampler="random", max_length=16, selection=12,
               train=lambda _: train, evaluate=lambda _: evaluate)  # fmt: skip
    assert not (tmp_path / "s" / "search.json").exists()


def test_rows_that_change_before_the_final_runs_are_refused(own: Path) -> None:
    made = plan(own)
    assert made.pair(7)[0].rows == made.tasks[0].rows
    file = own / "mood.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[0].replace('"text": "', '"text": "the ')]) + "\n")
    with pytest.raises(Refused, match=r"mood\.jsonl: its rows changed"):
        made.pair(7)


@pytest.mark.parametrize("fewer", [{"confirm": 0}, {"confirm": 2, "confirm_seeds": 2}])
def test_later_trials_are_confirmed_like_the_earlier_ones_or_refused(
    fewer: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """A trial with fewer further seeds never wins, however good it is."""

    def train(job: Replicate, watch: Watch) -> Scores:
        late = job.number >= CONTROLS + 1 + 6
        return Scores(0.99, 0.99, 0.99, 60, 1.0) if late else curve(job, watch)

    first = Study(tmp_path, plan(place, trials=CONTROLS + 7, confirm=2, confirm_seeds=3))
    work(first, train)
    with pytest.raises(Refused, match=r"confirmed with 3 further seeds.*--confirm-seeds 3"):
        Study(tmp_path, plan(place, trials=CONTROLS + 20, **fewer))
    made = plan(place, trials=CONTROLS + 15, confirm=2, confirm_seeds=3)
    longer = Study(tmp_path, made)
    work(longer, train)
    won = best(rows(longer.trials(), made.space))
    assert won is not None and won.value == pytest.approx(1.98)


def test_a_search_whose_files_stay_is_read_again(place: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "out": tmp_path, "progress": False, "trials": CONTROLS + 1, "parts": 4,
        "sampler": "random", "max_length": 16, "selection": 12,
        "train": make_curve, "evaluate": make_result,
    }  # fmt: skip
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    first = search(str(place / "bert"), tasks, **asked)
    assert search(str(place / "bert"), tasks, **asked)["final"] == first["final"]


@pytest.mark.parametrize("left", [0.5, None])
def test_a_database_that_is_damaged_is_told_with_a_remedy(
    left: float | None, place: Path, tmp_path: Path
) -> None:
    take(Study(tmp_path, plan(place))).close()
    file = tmp_path / "study.db"
    data = file.read_bytes()
    for beside in tmp_path.glob("study.db-*"):
        beside.unlink()
    file.write_bytes(b"no database " * 99 if left is None else data[: int(len(data) * left)])
    with pytest.raises(Refused, match=r"study\.db: cannot be opened: .*; put back a copy of it"):
        Study(tmp_path, plan(place))
