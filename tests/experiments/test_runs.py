"""One folder a run: its configuration, its lease, room on the disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from holdfast.errors import Refused, TrainingDiverged
from holdfast.experiments.lease import LEASE
from holdfast.experiments.origin import FromRun
from holdfast.experiments.record import Record
from holdfast.experiments.runs import (
    CONFIG,
    RECORD,
    check_disk,
    digest,
    ended,
    how_diverged,
    note_diverged,
    open_run,
    runs_below,
    setting_of,
)
from holdfast.experiments.settings import Settings
from holdfast.experiments.verify import verify
from holdfast.training.manifest import commit


def test_the_name_depends_on_content_and_not_on_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 12


def test_a_process_may_come_back(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run(tmp_path, {"a": 1}):
            pass
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path, {"a": 1}):
        raise KeyboardInterrupt
    mine = pytest.raises(Refused, match=f"process {os.getpid()}")
    with open_run(tmp_path, {"a": 1}), mine, open_run(tmp_path, {"a": 1}):
        pass


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    with open_run(tmp_path, {"model": "a", "seed": 0, "tasks": {"x": "1"}}):
        (tmp_path / RECORD).write_text("{}")
    with (
        pytest.raises(Refused) as refusal,
        open_run(tmp_path, {"model": "a", "seed": 1, "tasks": {"x": "2" * 99}}),
    ):
        pass
    assert "seed: 0 → 1" in str(refusal.value) and 'tasks.x: "1" → "222' in str(refusal.value)
    assert "model" not in str(refusal.value) and "2" * 80 not in str(refusal.value)
    assert json.loads((tmp_path / CONFIG).read_text())["seed"] == 0


def test_a_setting_that_was_left_at_its_default_shows_it(tmp_path: Path) -> None:
    """Configurations are compared without defaults: `lr: null → 0.001` would tell nothing."""
    with open_run(tmp_path, {"settings": {"lr": 2e-4}}):
        (tmp_path / RECORD).write_text("{}")
    said = pytest.raises(Refused, match=r"\(settings\.lr: 0\.0002 → 0\.001\)")
    with said, open_run(tmp_path, {"settings": {"lr": 1e-3}}):
        pass


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path) -> None:
    """Such as one whose model could not be loaded."""
    with pytest.raises(OSError), open_run(tmp_path, {"model": "wrong"}):
        raise OSError
    with open_run(tmp_path, {"model": "right"}):
        assert json.loads((tmp_path / CONFIG).read_text()) == {"model": "right"}


def test_what_was_only_begun_may_be_corrected(tmp_path: Path) -> None:
    """Folders, half a checkpoint and the record of a first epoch are no loss."""
    with open_run(tmp_path, {"lr": 0}):
        half = tmp_path / "tasks" / "1-mood.training" / "checkpoint-3"
    half.mkdir(parents=True)
    (half / "optimizer.pt").touch()
    for config in ({"lr": 1}, {"lr": 2}):
        with open_run(tmp_path, config):
            assert json.loads((tmp_path / CONFIG).read_text()) == config
            assert not (tmp_path / RECORD).exists()
            (tmp_path / RECORD).write_text('{"seconds": [], "elapsed": 3}')
    with open_run(tmp_path, {"lr": 2}):
        assert (tmp_path / RECORD).exists()  # of the same configuration: it goes on


@pytest.mark.parametrize("sign", ["a checkpoint", "a finished task"])
def test_what_was_trained_is_not_given_away(sign: str, tmp_path: Path) -> None:
    with open_run(tmp_path, {"lr": 1}):
        if sign == "a checkpoint":
            (tmp_path / "tasks" / "1-mood.training" / "checkpoint-3").mkdir(parents=True)
            commit(tmp_path / "tasks" / "1-mood.training" / "checkpoint-3")
        else:
            (tmp_path / RECORD).write_text('{"seconds": [1.5]}')
    with pytest.raises(Refused, match="other settings"), open_run(tmp_path, {"lr": 2}):
        pass
    with open_run(tmp_path, {"lr": 1}):
        pass


def test_names_and_wishes_are_no_other_settings(tmp_path: Path) -> None:
    one = {"recipe": {"name": "a", "rates": "flat"}, "settings": {"lr": 1, "alone": False}}
    two = {"recipe": {"name": "b", "rates": "flat"}, "settings": {"lr": 1, "alone": True}}
    assert digest(one) == digest(two)
    for config in (one, two):
        with open_run(tmp_path, config):
            (tmp_path / RECORD).write_text("{}")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        None,
        "[1]",
        "5",
        '"x"',
        "null",
        "[" * 100_000,
        '{"settings": 5}',
        '{"recipe": null}',
    ],
    ids=lambda content: str(content)[:9],
)
def test_a_damaged_configuration_is_refused(content: str | None, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")
    if content is not None:
        (tmp_path / CONFIG).write_text(content)
    with pytest.raises(Refused, match=r"run\.json"), open_run(tmp_path, {}):
        pass
    Record(tasks=[{"name": "a"}]).save(tmp_path / RECORD)
    assert [status for *_, status in runs_below(tmp_path)] == ["run.json is missing or damaged"]
    with pytest.raises(Refused, match="missing or damaged"):
        FromRun(tmp_path)
    told: list[str] = []
    assert verify([tmp_path], told.append) == (content is not None)
    assert content is None or any(CONFIG in line and "damaged" in line for line in told)
    assert setting_of(tmp_path, "bf16", "auto") == "auto"


@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (tmp_path / ({CONFIG, RECORD} - {name}).pop()).write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(Refused, match=r"run\.json|other settings"), open_run(tmp_path, {"a": 1}):
        pass
    (status,) = (status for *_, status in runs_below(tmp_path))
    assert "damaged" in status or "not" in status


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]"], ids=["deep", "list"])
def test_a_damaged_record_counts_as_work(content: str, tmp_path: Path) -> None:
    with open_run(tmp_path, {"a": 1}):
        (tmp_path / RECORD).write_text(content)
    with pytest.raises(Refused, match="other settings"), open_run(tmp_path, {"a": 2}):
        pass


def test_a_run_that_diverged_is_over_and_says_so(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {"tasks": []}):
        (tmp_path / "run" / "tasks").mkdir()
    assert [status for _, _, status in runs_below(tmp_path)] == ["stopped"]
    assert not ended(tmp_path / "run")
    note_diverged(tmp_path / "run", TrainingDiverged("no gradient was finite", where="mood"))
    assert [status for _, _, status in runs_below(tmp_path)] == ["diverged"]
    assert ended(tmp_path / "run") and not (tmp_path / "run" / "tasks").exists()
    assert how_diverged(tmp_path / "run") == "mood: no gradient was finite"


def test_tuples_and_numbers_of_like_value_are_no_difference(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / CONFIG).write_text('{"a": [1, 2]}')
    with open_run(tmp_path, {"a": (1, 2)}):
        pass


@pytest.mark.parametrize(
    "place", [LEASE, CONFIG, "tasks", "tasks/2-mood", "tasks/1-mood/model.safetensors", "alone/x"]
)
@pytest.mark.parametrize("there", [True, False])
def test_a_planted_link_is_not_followed(place: str, there: bool, tmp_path: Path) -> None:
    """Faults S14: nothing is written, not even the lease."""
    target = tmp_path / "precious"
    if there:
        target.write_text("kept")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused, match="symbolic link") as refusal, open_run(tmp_path / "run", {}):
        pass
    assert str(refusal.value).startswith(str(link))
    assert sorted(tmp_path.rglob("*")) == before
    assert not there or target.read_text() == "kept"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with open_run(tmp_path / "run", {}):
        assert (tmp_path / "disk" / f"{LEASE}.1").exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"), open_run(tmp_path / "file" / "run", {}):
        pass


def test_too_little_room_is_refused(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(Refused, match="GB free") as refusal:
        check_disk(tmp_path / "not" / "there", 2**60)
    assert "--out" in str(refusal.value)
    assert not (tmp_path / "not").exists()


def test_a_setting_that_came_later_than_the_run_has_its_default(tmp_path: Path) -> None:
    before = {k: v for k, v in Settings(lr=1e-4).to_dict().items() if k != "bf16_eval"}
    with open_run(tmp_path, {"settings": before}) as folder:
        (folder / RECORD).write_text('{"seconds": [1.0]}')
    with open_run(tmp_path, {"settings": Settings(lr=1e-4).to_dict()}):
        pass
    other = Settings(lr=1e-4, bf16_eval=True).to_dict()
    with pytest.raises(Refused, match="other settings"), open_run(tmp_path, {"settings": other}):
        pass


STRANGE = {
    "final/thesis.txt": "final",
    "tasks/todo.txt": "tasks/todo.txt",
    "tasks/1-intro/notes.txt": "tasks/1-intro",
    "tasks": "tasks",
    "report.html": "report.html",
    "run.json": "run.json",
}


@pytest.mark.parametrize("name", STRANGE)
def test_files_that_no_run_wrote_are_left_alone(name: str, tmp_path: Path) -> None:
    """A run deletes `tasks/` and `final/` of one that was killed: they must be a run's."""
    precious = tmp_path / name
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("precious")
    before = {*tmp_path.rglob("*")}
    said = re.escape(f"holds files that no run wrote ({STRANGE[name]}); choose another --out")
    for _ in range(2):  # the first refusal leaves nothing that would let a second try in
        with pytest.raises(Refused, match=said), open_run(tmp_path, {"tasks": []}):
            pass
    made = {*tmp_path.rglob("*")} - before
    assert precious.read_text() == "precious" and all(LEASE in path.name for path in made)


@pytest.mark.parametrize("name", ["tasks/todo.txt", "tasks/mine/a.txt", "final/thesis.txt"])
def test_files_put_beside_a_run_that_never_began_are_left_alone(name: str, tmp_path: Path) -> None:
    with open_run(tmp_path, {"lr": 1}):
        pass
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("precious")
    for lr in (1, 2):
        with pytest.raises(Refused, match="no run wrote"), open_run(tmp_path, {"lr": lr}):
            pass


def test_a_folder_with_other_files_takes_a_run(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "tasks").mkdir()
    with open_run(tmp_path, {"lr": 1}):
        assert (tmp_path / "README.md").read_text() == "mine"
