"""The n-th call that writes fails: a command ends as undisturbed, or says why not in a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest

from holdfast import files
from holdfast.errors import Refused
from holdfast.testing.faults import counter
from holdfast.testing.faults.counter import Counter, Fault, How, Job, failing, sweep
from holdfast.testing.faults.place import Place
from holdfast.testing.faults.suite import Wrong, quiet


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Counter:
    home = tmp_path_factory.mktemp("counter")
    with quiet():
        place = Place(home / "try", home)
        place.folder.mkdir()
        return Counter("train", place)


def test_calls_in_the_folder_are_counted_and_the_nth_fails(tmp_path: Path) -> None:
    """Reading is none, nor is what lies elsewhere; once, and from then on."""

    def write(name: str) -> None:
        files.write_text_atomic(tmp_path / "in" / name, "x")

    (tmp_path / "in").mkdir()
    with failing(tmp_path / "in", None) as calls:
        write("a")
        (tmp_path / "in" / "a").read_text()
        (tmp_path / "b").write_text("elsewhere")
    whole = len(calls) - 1
    assert calls[-1].strip() == "fsync"  # of the folder, which some file systems cannot do
    assert whole >= 3 and {c.split()[0] for c in calls} == {"open", "fsync", "replace"}
    for at in range(1, whole + 1):
        with failing(tmp_path / "in", Fault("EIO", at)):
            with pytest.raises(Refused, match="Input/output error"):
                write("c")
            write("d")
        with failing(tmp_path / "in", Fault("ENOSPC", at, good=True)):
            for _ in range(2):
                with pytest.raises(Refused, match="No space left"):
                    write("e")


def test_a_command_survives_a_sample_of_them(train: Counter) -> None:
    """A full disk while a checkpoint is renamed, a kill between two files of it."""
    middle = next(i for i, call in enumerate(train.calls, 1)
                  if call.startswith("replace") and "checkpoint" in call)  # fmt: skip
    with quiet():
        assert train.tried(Fault("ENOSPC", middle, good=True)).startswith("refused, then as un")
        assert train.tried(Fault("kill", middle + 2)) == "killed, then as undisturbed"


def test_what_ends_otherwise_is_lost(train: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence, a traceback, another result: each is told from a survival."""

    def instead(code: int, said: str) -> Any:
        answers = iter([(code, said, []), (0, "", [])])

        def ended(given: Any, out: Path, fault: Any) -> Any:
            out.mkdir(parents=True, exist_ok=True)
            return next(answers)

        return ended

    for code, said in ((1, "Traceback (most recent call last)"), (2, "killed"), (139, "")):
        monkeypatch.setattr(counter, "carried_out", instead(code, said))
        with pytest.raises(AssertionError, match="exit code"):
            train.tried(Fault("EIO", 1))
    monkeypatch.setattr(counter, "carried_out", instead(0, ""))
    with pytest.raises(Wrong, match="told as done"):
        train.tried(Fault("EIO", 1))
    monkeypatch.setattr(counter, "carried_out", instead(2, "holdfast: no space left"))
    with pytest.raises(Wrong, match="then again"):
        train.tried(Fault("EIO", 1))


@pytest.mark.slow
@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("job", get_args(Job))
def test_a_command_survives_all_of_them(job: Job, how: How) -> None:
    """COUNTER_EVERY=10 takes each tenth call."""
    count, lost = sweep(job, how, every=int(os.environ.get("COUNTER_EVERY", "1")))
    assert count > 5 and not lost, "\n".join(lost)
