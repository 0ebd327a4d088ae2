"""A record survives its file, and a file that is not a record says so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import Refused
from holdfast.experiments import record as module
from holdfast.experiments.record import SCHEMA, Record, commit, scrub, without_secrets
from holdfast.experiments.scenario import scenario_of

NAMES = st.text(max_size=30)
NUMBERS = st.none() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
VALUES = st.recursive(
    NUMBERS | st.booleans() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    size = draw(st.integers(1, 3))

    def row(cell: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(cell, min_size=size, max_size=size))

    cell = st.none() | st.floats(-1, 1) | st.just(math.nan)
    tasks = [
        {"name": name, "rows": {"evaluation": draw(st.integers(0, 999))}} for name in row(NAMES)
    ]
    return Record(
        tasks=tasks,
        scores=[row(cell) for _ in range(size)],
        selection_scores=draw(st.none() | st.just([[0.5] * size] * size)),
        kind=draw(st.sampled_from(module.KINDS)),
        alone={task["name"]: draw(cell) for task in tasks},
        history=[{"learning": 0, "step": 3, "epoch": 0.5, "loss": math.nan, "scores": row(cell)}],
        recipe=draw(st.dictionaries(NAMES, VALUES, max_size=3)),
        settings=draw(st.dictionaries(NAMES, VALUES, max_size=3)),
        methods_state=draw(st.dictionaries(NAMES, VALUES, max_size=3)),
        warnings=draw(st.lists(NAMES, max_size=2)),
        seed=draw(st.none() | st.integers(0, 2**31)),
    )


@settings(max_examples=40)
@given(records())
def test_round_trip(record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        record.save(path)
        again = Record.load(path)
        assert again.to_dict() == record.to_dict()
        text = path.read_text(encoding="utf-8")
        again.save(path)
        assert path.read_text(encoding="utf-8") == text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the file")

    json.loads(text, parse_constant=refuse)


def made(**more: Any) -> Record:
    tasks = [{"name": "trec6", "metric": "accuracy"}, {"name": "snli", "metric": "accuracy"}]
    return Record(tasks=tasks, scores=[[0.9, None], [0.7, 0.8]], **more)


def test_metrics_are_computed_and_stored(tmp_path: Path) -> None:
    record = made(alone={"snli": 0.75})
    assert record.forgetting == pytest.approx(0.2)
    assert record.new_plus_old == pytest.approx(1.5)
    assert record.forward_transfer == pytest.approx(0.05)
    record.save(tmp_path / "record.json")
    stored = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["metrics"]
    assert stored == record.metrics
    assert stored["backward_transfer"] == pytest.approx(-0.2)
    record.scores[1][0] = 0.9
    assert record.forgetting == 0


def test_scores_left_out_are_empty_not_zero() -> None:
    record = Record(tasks=[{"name": "a"}, {"name": "b"}])
    assert record.scores == [[None, None], [None, None]]
    assert record.forgetting is None and record.names == ["a", "b"]


def test_a_record_from_before_scenarios_had_names() -> None:
    """A head each, but for text, where all tasks share the whole model."""
    body = made().to_dict()
    del body["scenario"]
    assert Record.from_dict(body).scenario == "task-incremental"
    text = [{**task, "kind": "generation", "labels": None} for task in body["tasks"]]
    assert Record.from_dict({**body, "tasks": text}).scenario == "domain-incremental"
    assert Record(tasks=[{"name": "a"}]).scenario is None


@pytest.mark.parametrize(
    ("labels", "own_heads", "scenario"),
    [
        ([["a", "b"], ["b", "a"]], False, "domain-incremental"),
        ([["a", "b"], ["b", "a"]], True, "task-incremental"),
        ([["a", "b"], ["a", "b"], ["b", "c"]], False, "class-incremental"),
        ([["a", "b"], ["a"]], False, "class-incremental"),
        ([None, None], False, "domain-incremental"),
        ([["a", "b"]], False, None),
    ],
)
def test_which_scenario(labels: Any, own_heads: bool, scenario: str | None) -> None:
    assert scenario_of([{"labels": each} for each in labels], own_heads=own_heads) == scenario


def test_what_is_learned_again_is_forgotten() -> None:
    record = made(
        selection_scores=[[0.9, None], [0.7, 0.8]], seconds=[3.0, 4.0], steps=[5, 5],
        skipped_steps=[0, 1], elapsed=2.5,
        history=[{"learning": i, "step": 5 * i, "scores": [0.5]} for i in range(2)],
        general={"base": {"nll": 3.0}, "after": {"trec6": {"nll": 3.1}, "snli": {"nll": 3.2}}},
    )  # fmt: skip
    record.forget_from(1)
    assert record.general == {"base": {"nll": 3.0}, "after": {"trec6": {"nll": 3.1}}}
    assert record.scores == record.selection_scores == [[0.9, None], [None, None]]
    assert (record.seconds, record.steps, record.skipped_steps) == ([3.0], [5], [0])
    assert [h["learning"] for h in record.history] == [0] and record.elapsed == 0
    assert Record.from_dict(record.to_dict()).to_dict() == record.to_dict()


def test_a_warning_stands_once() -> None:
    record = made()
    for line in ("a", "b", "a"):
        record.warn(line)
    assert record.warnings == ["a", "b"]


def test_numpy_and_paths_become_plain() -> None:
    import numpy as np

    settings_ = {"lr": np.float32(0.5), "steps": np.int64(3), "at": Path("a/b"), "on": np.True_}
    body = made(settings=settings_ | {"curve": np.array([1.0, np.nan])}).to_dict()
    assert body["settings"] == {
        "lr": 0.5,
        "steps": 3,
        "at": "a/b",
        "on": True,
        "curve": [1.0, None],
    }
    with pytest.raises(TypeError, match="cannot hold"):
        made(settings={"bad": object()}).to_dict()


def test_keys_of_a_newer_holdfast_are_kept(tmp_path: Path) -> None:
    body = made().to_dict() | {"carbon": {"grams": 3}}
    path = tmp_path / "record.json"
    path.write_text(json.dumps(body), encoding="utf-8")
    record = Record.load(path)
    record.save(path)
    assert json.loads(path.read_text(encoding="utf-8"))["carbon"] == {"grams": 3}


def test_a_run_folder_loads_its_record(tmp_path: Path) -> None:
    made(seed=3).save(tmp_path / "deep" / "record.json")
    assert Record.load(tmp_path / "deep").seed == 3


def test_an_unknown_schema_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(made().to_dict() | {"schema": SCHEMA + 1}), encoding="utf-8")
    with pytest.raises(Refused, match=r"schema 2, this holdfast reads 1; use the holdfast"):
        Record.load(path)


DAMAGE: dict[str, Any] = {
    "not a record": b'{"a": 1}',
    "a list": b"[]",
    "empty": b"",
    "half": b'{"schema": 1, "tasks": [',
    "not utf-8": b"\xff\xfe{}",
    "deep": b'{"schema": 1, "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "no tasks": {"tasks": []},
    "tasks without names": {"tasks": [{}, {}]},
    "rows": {"tasks": [{"name": "a", "rows": {"evaluation": "x"}}, {"name": "b"}]},
    "ragged": {"scores": [[0.1], [0.2, 0.3]]},
    "another size": {"scores": [[0.1]]},
    "text for a score": {"scores": [["0.9", None], [0.7, 0.8]]},
    "a huge number": {"scores": [[10**400, None], [0.7, 0.8]]},
    "alone": {"alone": {"snli": "x"}},
    "history": {"history": [3]},
    "history scores": {"history": [{"scores": ["x"]}]},
    "general": {"general": []},
    "general base": {"general": {"base": {"nll": "low"}}},
    "general after": {"general": {"after": {"snli": 3.0}}},
    "general reference": {"general": {"reference": "a.txt"}},
    "movement": {"movement": {"snli": 3.0}},
    "movement parts": {"movement": {"snli": {"parts": {"head": "far"}}}},
    "movement number": {"movement": {"snli": {"parts": -4}}},
    "recipe rates": {"recipe": {"rates": {"multipliers": True}}},
    "task metric": {"tasks": [{"name": "a", "metric": ["f1"]}, {"name": "b"}]},
    "movement overlap": {"movement": {"snli": {"overlap": "much"}}},
    "seconds": {"seconds": "fast"},
    "rates": {"rates": {"order": ["a"], "multiplier": [1, 2]}},
    "kind": {"kind": "search"},
    "scenario": {"scenario": "easy"},
    "status": {"status": ["done"]},
    "seed": {"seed": "zero"},
    "recipe": {"recipe": "dps"},
    "command": {"command": "holdfast sequence"},
    "task warnings": {"tasks": [{"name": "a", "warnings": 3}, {"name": "b"}]},
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    path, damage = tmp_path / "record.json", DAMAGE[fault]
    if isinstance(damage, dict):
        damage = json.dumps(made().to_dict() | damage).encode()
    path.write_bytes(damage)
    with pytest.raises(Refused, match=r"record\.json"):
        Record.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file"):
        Record.load(tmp_path / "nothing.json")


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(sorted(made().to_dict())), VALUES, max_size=3))
def test_only_refused_escapes_a_fuzzed_file(change: dict[str, Any]) -> None:
    body = made().to_dict() | change
    with suppress(Refused):
        Record.from_dict(body).to_dict()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_score_that_is_no_number_is_refused(tmp_path: Path, word: str) -> None:
    """It would be drawn as one that was not measured; no record is written with it."""
    text = json.dumps(made(alone={"snli": 0.125}).to_dict())
    (tmp_path / "record.json").write_text(text.replace("0.125", word))
    with pytest.raises(Refused, match=f"record.json: not JSON: {word} is no finite number"):
        Record.load(tmp_path)


def test_saving_over_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    target, path = tmp_path / "victim", tmp_path / "record.json"
    target.write_text("mine", encoding="utf-8")
    path.symlink_to(target)
    made().save(path)
    assert target.read_text(encoding="utf-8") == "mine"
    assert not path.is_symlink() and Record.load(path).names == ["trec6", "snli"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "record.json"
    made(seed=1).save(path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, Refused)):
        made(seed=2).save(path)
    assert Record.load(path).seed == 1
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


SECRETS = [
    "postgresql://ann:hunter2@db.example/runs",
    "postgresql://ann:hunt@er2@db.example/runs",
    "postgresql://ann:hun/hunter2@db.example/runs",
    "https://hunter2@host/data.csv",
    "https://host/data.csv?token=hunter2&rows=3",
    "https://host/data.csv?X-Amz-Signature=hunter2",
    "https://host/data?rows=3&api_key=hunter2#top",
    "hf_hunter2hunter2hunter2",
]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_never_reach_the_file(tmp_path: Path, text: str) -> None:
    record = made(command=["holdfast", "search", "--storage", text], settings={"storage": [text]})
    record.tasks[0]["source"] = text
    record.warnings.append(f"could not reach {text}")
    record.save(tmp_path / "record.json")
    written = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert "hunter2" not in written and "er2" not in written
    assert "***" in written


def test_secret_flags_and_keys_are_hidden() -> None:
    words = ["x", "--hub-token", "abc", "--password=abc", "--max-tokens", "5", "--token", "--seed"]
    hidden = ["x", "--hub-token", "***", "--password=***", "--max-tokens", "5", "--token", "--seed"]
    assert without_secrets(words) == hidden
    settings_ = {"hub_token": "abc", "pad_token": "[PAD]", "max_tokens": 5, "password": ""}
    kept = made(settings=settings_).to_dict()["settings"]
    assert kept == {"hub_token": "***", "pad_token": "[PAD]", "max_tokens": 5, "password": ""}


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/data@v1",
        "ann@example.org",
        "key=value",
        "C:\\data\\x",
        "a://b",
        "@",
        "?x=1",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub(text) == text


def test_scrubbing_is_quick_on_hostile_text() -> None:
    for text in ("://a:" * 20_000, "a" * 200_000 + "://", "?token" * 30_000, "&key=" * 30_000):
        scrub(text)


def test_no_torch_behind_a_record_or_a_report() -> None:
    code = (
        "import sys, holdfast.report, holdfast.experiments.record\n"
        "import holdfast.experiments.statistics\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'jinja2', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_holdfasts_own_commit_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed inside another repository, the package is not part of its commits."""
    home = tmp_path / "venv" / "holdfast"
    (home / "experiments").mkdir(parents=True)
    (home / "__init__.py").touch()
    monkeypatch.setattr(module, "__file__", str(home / "experiments" / "record.py"))

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "thesis.txt").touch()
    git("add", "thesis.txt")
    git("commit", "-m", "a stranger's")
    assert commit(home) is None
    git("add", "venv")
    git("commit", "-m", "now ours")
    assert len(commit(home) or "") == 40
    (home / "__init__.py").write_text("changed")
    assert (commit(home) or "").endswith("+changes")
