"""Where a study is kept: shared, moved, mistyped, torn, planted; and what is told of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import CONTROLS, finish, plan, take
from sqlalchemy.exc import DataError, OperationalError

from holdfast.errors import Refused
from holdfast.search import plan as plans
from holdfast.search import storage
from holdfast.search.study import Study


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_storages(kind: str, place: Path, tmp_path: Path) -> None:
    path = tmp_path / "there" / "log"
    path.parent.mkdir()
    url = f"journal:{path}" if kind == "journal" else f"sqlite:///{path}"
    study = Study(tmp_path / "out", plan(place), url)
    finish(take(study))
    claim = take(study)
    assert not claim.report(1, 0.25)
    claim.close()
    again = Study(tmp_path / "out", plan(place), url)
    assert again.counts() == {"complete": 1, "running": 1, "waiting": 5}
    assert again.trials()[1].intermediate_values == {1: 0.25}
    assert not (tmp_path / "out" / storage.DATABASE).exists()


def test_optunas_own_tools_read_the_study(place: Path, tmp_path: Path) -> None:
    """As optuna-dashboard does: a name, named parameters, a value to maximise."""
    study = Study(tmp_path, plan(place))
    finish(take(study))
    found = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert found.study_name.startswith("holdfast-") and found.direction.name == "MAXIMIZE"
    assert found.best_params.keys() == study.plan.space.ranges.keys()
    assert found.best_value == 1.5 and found.user_attrs["title"] == study.plan.title


def test_a_relative_sqlite_file_is_one_from_everywhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finish(take(Study(tmp_path / "out", plan(place), "sqlite:///s.db?timeout=50")))
    monkeypatch.chdir(tmp_path / "there")
    url = f"sqlite:///{tmp_path / 'here' / 's.db'}?timeout=50"
    assert Study(tmp_path / "out", plan(place), url).counts()["complete"] == 1
    with pytest.raises(Refused, match="storage"):
        Study(tmp_path / "out", plan(place), "sqlite:///s.db?timeout=50")
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("given", [None, "journal:{}/log"])
def test_a_folder_may_be_moved_study_and_all(
    given: str | None, place: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finish(take(Study(one, plan(place), given and given.format(one))))
    one.rename(two)
    assert Study(two, plan(place), given and given.format(two)).counts()["complete"] == 1


def test_dropped_connections_are_opened_anew(place: Path, tmp_path: Path) -> None:
    """A database may be restarted while a trial is trained."""
    storage_: Any = Study(tmp_path, plan(place)).storage
    assert storage_.engine.pool._pre_ping


def test_sqlite_on_a_network_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n"
        "tmpfs /home/my\\040disk tmpfs rw 0 0\nshort line\n"
    )
    kinds = {"/tmp/a": "ext4", "/home/ann/a": "nfs4", "/home/my disk/a": "tmpfs", "/homes": "ext4"}
    assert {path: storage.file_system(Path(path), mounts) for path in kinds} == kinds
    assert storage.file_system(tmp_path, tmp_path / "none") == ""
    monkeypatch.setattr(storage, "file_system", lambda _: "nfs4")
    for url in (None, f"sqlite:///{tmp_path / 'x.db'}"):
        with pytest.raises(Refused, match=r"lies on nfs4.*postgresql://"):
            Study(tmp_path / "out", plan(place), url)
    Study(tmp_path / "out", plan(place), f"journal:{tmp_path / 'log'}")


def test_a_password_is_neither_told_nor_kept_in_the_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"--storage nosuch://\*\*\*@host") as refusal:
        Study(tmp_path, plan(place), "nosuch://ann:secret@host/name")
    assert "secret" not in str(refusal.value)
    opened = storage.open_storage
    monkeypatch.setattr(storage, "open_storage", lambda _: opened(f"sqlite:///{tmp_path / 'db'}"))
    url = "postgresql://ann:secret@host/name"
    finish(take(Study(tmp_path / "out", plan(place), url)))
    text = (tmp_path / "out" / plans.FILE).read_text()
    assert "postgresql://***@host/name" in text and "secret" not in text
    body = json.loads(text)  # and another search in the same database
    body["config"]["rungs"] = [1.0]
    (tmp_path / "out" / plans.FILE).write_text(json.dumps(body))
    with pytest.raises(Refused, match=r"postgresql://\*\*\*@host/name: .*rungs") as refusal:
        Study(tmp_path / "out", plan(place, rungs=1), url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("after", ["CRET@host/x", "CR/ET@host/x", "CR:ET@host/x"])
def test_a_password_with_an_at_is_refused_untold(after: str, place: Path, tmp_path: Path) -> None:
    """Its end would be looked for as a host, and told as one that is not there."""
    with pytest.raises(Refused, match=r"--storage: .* write @ as %40") as refusal:
        Study(tmp_path, plan(place), f"postgresql://ann:SE@{after}")
    assert not re.search("SE|CR|ET", str(refusal.value))
    for hard in ("ann:SE CRET@host/x", "ann:12/SECRET@host/x"):  # which no report could hide
        with pytest.raises(Refused, match="a space as %20"):
            storage.address(f"postgresql://{hard}", tmp_path)
    for mistyped in ("postgres//ann:SECRET@host/x", "ann:SECRET@host/x"):
        with pytest.raises(Refused, match="--storage: is no URL; as"):
            storage.address(mistyped, tmp_path)
    whole = "postgresql://ann@firm:SE%40CR/ET@host:5432/x?sslmode=require"
    assert storage.address(whole, tmp_path) == whole


def test_a_storage_that_was_mistyped_leaves_no_trace(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be opened"):
        Study(tmp_path, plan(place), "sqlite:////no/such/folder/s.db")
    assert Study(tmp_path, plan(place)).counts() == {"waiting": CONTROLS}


@pytest.mark.parametrize("name", ["a{b}", "a?b", "a%41b"])
def test_a_folder_that_no_url_can_name_is_refused(name: str, place: Path, tmp_path: Path) -> None:
    """The database would lie elsewhere."""
    with pytest.raises(Refused, match="cannot stand in the path of a database"):
        Study(tmp_path / name, plan(place))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("planted", ["trials", "leases", "first", "final", "leases/0", "study.db"])
def test_planted_links_are_not_followed(planted: str, place: Path, tmp_path: Path) -> None:
    """Faults S14."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out" / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="is a symbolic link"):
        Study(tmp_path / "out", plan(place))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "url",
    ["file.db", "journal:", "journal:.", "sqlite://", "sqlite:///", "sqlite:///:memory:",
     "sqlite:///file:x?mode=memory&uri=true"],
)  # fmt: skip
def test_what_is_no_storage_is_refused(url: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--storage"):
        Study(tmp_path, plan(place), url)


# --- servers ------------------------------------------------------------------------------------


def lost(times: int, kind: type[Exception] = OperationalError) -> Any:
    """A call that is not answered so many times."""
    left = iter(range(times))

    def call() -> str:
        if next(left, None) is None:
            return "answer"
        error = kind("SELECT 1", {}, Exception("postgresql://ann:secret@h: closed\nunexpectedly"))
        raise optuna.exceptions.StorageInternalError("during the commit") from error

    return call


def test_a_server_is_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    monkeypatch.setattr(storage.time, "monotonic", lambda: sum(waits))
    assert storage.patiently(lost(4)) == "answer" and waits == [0.1, 0.2, 0.4, 0.8]
    waits.clear()
    with pytest.raises(Refused, match=r"does not answer.*the same command goes on") as refusal:
        storage.patiently(lost(10**6))
    assert 55 < sum(waits) <= storage.PATIENCE and "secret" not in str(refusal.value)
    for call in (lost(1, DataError), lambda: {}["no answer of a database"]):
        with pytest.raises((optuna.exceptions.StorageInternalError, KeyError)):
            storage.patiently(call)


def test_a_claim_whose_answer_was_lost_is_taken_by_the_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial was asked, its lease was taken: neither is lost, and no trial is asked twice."""
    study = Study(tmp_path, plan(place))
    monkeypatch.setattr(study, "url", "postgresql://h/x")
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    take_, once = study._take, lost(1)
    monkeypatch.setattr(study, "_take", lambda *a: (once(), take_(*a))[1])
    claim = take(study)
    assert claim.number == 0 and study.counts() == {"running": 1, "waiting": CONTROLS - 1}
    finish(claim)
    assert study.counts()["complete"] == 1


# --- journals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b'{"op_code": 5, "worker_i', b'{"op_code": 5, "worker_id": "a"}'])
def test_a_journal_with_a_torn_last_line_goes_on(
    tail: bytes, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk or a kill tears it; the next write would make the study unreadable for good.

    Also where all but the newline is there.
    """
    path = tmp_path / "log"
    study = Study(tmp_path, plan(place), f"journal:{path}")
    finish(take(study))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    again = Study(tmp_path, plan(place), f"journal:{path}")
    assert again.counts()["complete"] == 1 and "torn" in caplog.text
    assert (tmp_path / "log.torn").read_bytes() == whole + tail
    finish(take(again))
    assert Study(tmp_path, plan(place), f"journal:{path}").counts()["complete"] == 2


def test_a_worker_goes_on_where_another_one_tore_the_journal(place: Path, tmp_path: Path) -> None:
    """Its next line would be glued to the torn one, and no process could read on (faults P6)."""
    path = tmp_path / "log"
    one, two = (Study(tmp_path / "out", plan(place), f"journal:{path}") for _ in range(2))
    finish(take(one))
    with path.open("ab") as file:
        file.write(b'{"op_code":8,"worker_id":"a","trial')
    finish(take(two))
    finish(take(one))
    assert all(json.loads(line) for line in path.read_text().splitlines())
    again = Study(tmp_path / "out", plan(place), f"journal:{path}")
    assert again.counts()["complete"] == one.counts()["complete"] == 3


def test_a_whole_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert not storage.mend_journal(path)
    for data in (b"", b'{"op_code":0}\n{"op_code":1}\n'):
        path.write_bytes(data)
        assert not storage.mend_journal(path)
        assert path.read_bytes() == data and not list(tmp_path.glob("*.torn"))


@pytest.mark.parametrize("data", ["two lines\nof notes", '{"text": "a row"}\n', '{"a": 1}'])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(
    data: str, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text(data)
    with pytest.raises(Refused, match="is no journal") as refusal:
        Study(tmp_path / "out", plan(place), f"journal:{tmp_path / 'mine'}")
    assert "\n" not in str(refusal.value) and (tmp_path / "mine").read_text() == data
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "out"}


def test_without_optuna_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Refused, match=r"pip install 'holdfast\[search\]'"):
        storage.check("tpe")
