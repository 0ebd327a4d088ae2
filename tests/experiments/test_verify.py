"""`holdfast verify`: whole or what is wrong, and nothing outside of the folder is opened."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import Refused
from holdfast.cli import main
from holdfast.experiments.record import Record
from holdfast.experiments.verify import verify
from holdfast.training import manifest
from holdfast.training.manifest import MANIFEST, commit


def checkpoint(folder: Path, content: bytes = b"weights") -> Path:
    (folder / "in").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "in" / "shard").write_bytes(content * 2)
    commit(folder)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As a comparison of two recipes leaves it, one of them still running."""
    root = tmp_path / "c"
    for run in ("a/seed-0", "b/seed-0"):
        checkpoint(root / run / "tasks" / "1-mood")
        task = {"name": "mood", "metric": "accuracy"}
        Record(tasks=[task], scores=[[0.5]]).save(root / run / "record.json")
        (root / run / "run.json").write_text("{}")
    checkpoint(root / "b/seed-0/tasks/2-colour.training/checkpoint-7")
    (root / "runs.csv").write_text("recipe\n")
    return root


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was said of each path."""
    *said, total = capsys.readouterr().out.splitlines()
    found = dict(line.split(": ", 1) for line in said)
    whole = sum(word == "whole" for word in found.values())
    assert total == f"{whole} whole, {len(found) - whole} damaged"
    return found


def test_a_whole_tree(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tree)]) == 0
    said = lines(capsys)
    runs = [f"{tree}/{run}/seed-0" for run in "ab"]
    expected = [f"{run}/{name}" for run in runs for name in ("record.json", "run.json")]
    expected += [f"{run}/tasks/1-mood" for run in runs]
    expected += [f"{runs[1]}/tasks/2-colour.training/checkpoint-7"]
    assert set(said.values()) == {"whole"} and sorted(said) == sorted(expected)
    assert main(["verify", str(tree / "a" / "seed-0" / "tasks" / "1-mood")]) == 0
    assert lines(capsys) == {f"{tree}/a/seed-0/tasks/1-mood": "whole"}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def resaved(file: Path, metric: str = "accuracy", **more: Any) -> None:
    """As a program would write it that measures wrongly: the checksum is right."""
    Record(tasks=[{"name": "mood", "metric": metric}], **more).save(file)


def recorded(config: Path, **other: Any) -> None:
    """A run.json that says something else than the record."""
    body: dict[str, Any] = {"seed": 1, "recipe": {"ewc": {"strength": 5}}, "settings": {"lr": 5.0}}
    resaved(config.with_name("record.json"), **body)
    config.write_text(json.dumps({"model": "m", "tasks": [], **body}))
    assert verify([config.parent], lambda _: None) == 0
    config.write_text(json.dumps({"model": "m", "tasks": [], **body, **other}))


HARMS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a bit": ("tasks/1-mood/in/shard", flip, "in/shard is not as it was written"),
    "cut": ("tasks/1-mood/model.safetensors", lambda p: p.write_bytes(b"we"), "has 2 bytes of 7"),
    "gone": ("tasks/1-mood/in/shard", Path.unlink, "in/shard is missing"),
    "manifest": ("tasks/1-mood/manifest.json", flip, "manifest.json"),
    "no manifest": ("tasks/1-mood/manifest.json", Path.unlink, "not written to its end"),
    "no JSON": ("record.json", lambda p: p.write_text("{"), "cannot be read"),
    "twice": ("record.json", lambda p: p.write_text('{"schema": 1, "schema": 1}'), "stands twice"),
    "NaN": ("run.json", lambda p: p.write_text('{"lr": NaN}'), "NaN is no finite number"),
    "deep": ("run.json", lambda p: p.write_text("[" * 200_000), "cannot be read"),
    "another seed": ("run.json", lambda p: recorded(p, seed=3), "seed: 1 → 3"),
    "other settings": (
        "run.json",
        lambda p: recorded(p, settings={"lr": 7.0, "alone": True}),
        "settings.lr: 5.0 → 7.0",
    ),
    "list": ("run.json", lambda p: p.write_text("[]"), "is no mapping"),
    "no record": ("record.json", lambda p: p.write_text("{}"), "not a holdfast record"),
    "no run.json": ("run.json", Path.unlink, "is missing: the run cannot go on"),
    "score": ("record.json", lambda p: resaved(p, scores=[[5.0]]), "bounds of accuracy: 5.0"),
    "correlation": (
        "record.json",
        lambda p: resaved(p, metric="matthews", scores=[[-1.1]]),
        "bounds of matthews: -1.1",
    ),
    "huge": ("record.json", lambda p: replaced(p, '"elapsed": 0.0', '"elapsed": 1e999'), "1e999"),
    "digit": ("record.json", lambda p: replaced(p, "0.5", "0.7"), "its checksum differs"),
    "letter": ("record.json", lambda p: replaced(p, "mood", "mooe"), "its checksum differs"),
    "bytes": ("record.json", lambda p: p.write_bytes(b"\xff\n\xfe"), "cannot be read"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_named_in_one_line_and_is_one(
    harm: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, do, says = HARMS[harm]
    do(tree / "a" / "seed-0" / file)
    assert main(["verify", str(tree)]) == 1
    wrong = [word for word in lines(capsys).values() if word != "whole"]
    assert len(wrong) == 1 and says in wrong[0]


def test_any_flipped_bit_of_a_record_is_found_or_changes_nothing(tree: Path) -> None:
    """Spaces between values may change: they say nothing (faults P3)."""
    file = tree / "a" / "seed-0" / "record.json"
    content, record = file.read_bytes(), Record.load(file).to_dict()
    for at in range(0, 8 * len(content), 37):
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            found = Record.load(file).to_dict()
        except Refused:
            continue
        assert found["scores"] == record["scores"] and found["tasks"] == record["tasks"]


def test_a_record_without_a_checksum_is_read_and_told(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an older holdfast wrote it, or who changed it and says so."""
    file = tree / "a" / "seed-0" / "record.json"
    body = json.loads(file.read_text())
    body.pop("sha256")
    body["scores"] = [[0.25]]
    file.write_text(json.dumps(body))
    assert Record.load(file).scores == [[0.25]] and Record.load(file).extra == {}
    assert main(["verify", str(tree)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "no checksum" in line]
    assert len(told) == 1 and told[0].startswith(f"{file}: whole, as far as can be seen")


def test_what_is_not_as_it_was_written_is_neither_drawn_nor_gone_on_from(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tree / "a" / "seed-0" / "record.json"
    replaced(file, "0.5", "0.7")
    assert main(["report", str(tree), "--out", str(tree / "r.html")]) == 2
    assert f"{file}: is not as it was written" in capsys.readouterr().err
    with pytest.raises(Refused, match="if you changed it, take out its sha256"):
        Record.load(file)


# --- a manifest by a stranger ---------------------------------------------------------------------


def forged(folder: Path, files: Any) -> None:
    """A manifest that vouches for itself, as `commit` would write it."""
    (folder / MANIFEST).write_text(manifest._manifest(files))


def entry(content: bytes) -> list[Any]:
    return [len(content), hashlib.sha256(content).hexdigest()]


@pytest.mark.parametrize(
    "name", ["../secret", "in/../../secret", "{}/secret", "..", "", ".", "/", "a\0b", "\\secret"]
)
def test_no_path_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    """Even where size and hash are right: whether they are is what must not be told."""
    folder = checkpoint(tmp_path / "x")
    (tmp_path / "secret").write_bytes(b"secret")
    forged(folder, {name.format(tmp_path): entry(b"secret")})
    told: list[str] = []
    assert verify([folder], told.append) == 1
    assert len(told[0].splitlines()) == 1
    assert "is no file in its folder" in told[0] or "is no plain file" in told[0]


@pytest.mark.parametrize("where", ["file", "folder", "manifest"])
def test_links_are_not_followed(where: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    (tmp_path / "out").mkdir()
    target = {"file": "model.safetensors", "folder": "in", "manifest": MANIFEST}[where]
    os.rename(folder / target, tmp_path / "out" / "y")
    (folder / target).symlink_to(tmp_path / "out" / "y")
    told: list[str] = []
    assert verify([folder], told.append) == 1
    assert "is a symbolic link" in told[0]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    for name in ("model.safetensors", MANIFEST):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert manifest.damage(folder) == f"{name} is no plain file"
        (folder / name).unlink()
        (folder / name).write_bytes(b"weights")
        commit(folder)
    os.mkfifo(tmp_path / "record.json")
    told: list[str] = []
    assert verify([tmp_path], told.append) == 1
    assert told[0].endswith("record.json: is no plain file")


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": [10**30, "0"]}, {"model.safetensors": [-1, "0"]},
        {"model.safetensors": [float("nan"), "0"]}, {"model.safetensors": [1e400, "0"]},
        {"model.safetensors": ["7", "0"]}, {"model.safetensors": [7]},
        {"model.safetensors": None}, {"model.safetensors": [None, None]}, [], None, 3,
        {"a" * 5000: [7, "0"]}, {"\u202e\n": [7, "0"]},
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_a_manifest_of_nonsense_is_damage_in_one_line(files: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    forged(folder, files)
    told: list[str] = []
    assert verify([folder], told.append) == 1
    assert len(told) == 2 and len(told[0]) < 400 and told[0].isprintable()


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    os.truncate(folder / MANIFEST, manifest.LARGEST + 1)
    assert manifest.damage(folder) == "manifest.json is larger than 64 MiB"
    assert json.loads("1")  # a JSON of a thousand keys is one too
    body = '{"schema": 1, "sha256": "0", "files": {"a": [1, "0"], "a": [1, "0"]}}'
    (folder / MANIFEST).write_text(body)
    assert manifest.damage(folder) == "manifest.json is not as it was written"


# --- bad input ------------------------------------------------------------------------------------


def test_nothing_to_check_is_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tree / "runs.csv", tmp_path / "empty"):
        assert main(["verify", str(tree), str(path)]) == 2
        out, errors = capsys.readouterr()
        assert out == "" and errors.count("\n") == 1 and str(path) in errors
    with pytest.raises(Refused, match="no such folder"):
        verify([tmp_path / "none"])


def test_torch_is_not_loaded(tree: Path) -> None:
    """A tree is checked where nothing can be trained, and at once."""
    code = (
        "import sys; from holdfast.cli import main; code = main(['verify', sys.argv[1]])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'safetensors'} & sys.modules.keys()\n"
        "sys.exit(code or len(heavy))"
    )
    subprocess.run([sys.executable, "-c", code, str(tree)], check=True, timeout=100)
