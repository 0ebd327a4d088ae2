"""Strict YAML and atomic writes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import files
from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.files import (
    differences,
    dump_yaml,
    only_keys,
    read_yaml,
    write_text_atomic,
    write_yaml,
)
from holdfast.report.search import load_search
from holdfast.tasks.kinds.pretrained import load_config
from holdfast.training.weights import open_model


def test_scalars_are_those_of_the_core_schema() -> None:
    text = "{a: 1e-5, b: no, c: 010, d: 2024-01-01, e: 1:30, f: true, g: ~, h: '1', i: -.5, j: 1_0}"
    assert read_yaml(text) == {
        "a": 1e-5, "b": "no", "c": 10, "d": "2024-01-01", "e": "1:30", "f": True, "g": None,
        "h": "1", "i": -0.5, "j": "1_0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "line 2: key 'a' given twice"),
        ("x: {b: 1, b: 2}", "line 1: key 'b' given twice"),
        ("a: &x [1]\nb: *x", "line 2: alias"),
        ("a: !!python/object/apply:os.system [x]", "line 1: tag"),
        ("a: !mine 1", "line 1: tag"),
        ("1: 2", "not text"),
        ("a: {1: 2}", "not text"),
        ("? [a]\n: 1", "not text"),
        ("- a", "found list"),
        ("", "found nothing"),
        ("a: [1", "line 1"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "not YAML"),
        ("[" * 5000, "too deeply"),
        ("a: " + "9" * 5000, "not a number"),
    ],
)
def test_what_a_plain_file_never_needs_is_refused(text: str, says: str) -> None:
    with pytest.raises(Refused, match=r"recipe\.yaml") as error:
        read_yaml(text, where="recipe.yaml")
    assert says in str(error.value)


def test_no_alias_bomb(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb)
    with pytest.raises(Refused, match="alias"):
        read_yaml(path)


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9")
    for path, says in ((tmp_path / "none.yaml", "No such"), (tmp_path, "irectory"), (latin, "UTF")):
        with pytest.raises(Refused, match=says):
            read_yaml(path)
    monkeypatch.setattr(files, "LARGEST", 2)
    with pytest.raises(Refused, match="larger"):
        read_yaml(latin)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    """Each was read for ever, or until memory was full."""
    pipe, zero = tmp_path / "pipe.yaml", tmp_path / "zero.yaml"
    os.mkfifo(pipe)
    zero.symlink_to("/dev/zero")
    for path in (pipe, zero):
        with pytest.raises(Refused, match="not an ordinary file"):
            read_yaml(path)
        with pytest.raises(files.NotPlain):
            files.read_plain(path)
        with pytest.raises(Refused, match="not an ordinary file"):
            Record.load(path)
        with pytest.raises(Refused, match="not an ordinary file"):
            load_search(path)
    with pytest.raises(Refused, match=r"pipe\.yaml: not an ordinary file"):
        files.only_plain(tmp_path)
    with pytest.raises(Refused, match=r"pipe\.yaml: not an ordinary file"):
        load_config(str(tmp_path))
    with pytest.raises(Refused, match=r"pipe\.yaml: not an ordinary file"):
        open_model(tmp_path)
    pipe.unlink()
    zero.unlink()
    (tmp_path / "inside").mkdir()
    zero.write_text("a: 1")
    files.only_plain(tmp_path)
    files.only_plain(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="larger"):
        files.read_plain(zero, 3)
    assert files.read_plain(zero, 4) == "a: 1"


def test_unknown_and_missing_keys() -> None:
    with pytest.raises(Refused, match=r"r\.yaml: unknown key 'lyers'; did you mean 'layers'"):
        only_keys({"lyers": 1}, ["layers", "name"], where="r.yaml")
    with pytest.raises(Refused, match="missing key 'name'"):
        only_keys({"layers": 1}, ["layers", "name"], required=["name"])
    only_keys({"name": 1}, ["layers", "name"], required=["name"])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_is_written_is_read_back(data: dict[str, object]) -> None:
    assert read_yaml(dump_yaml(data)) == data


def test_text_that_looks_like_a_number_stays_text() -> None:
    data = {"a": "1e-5", "b": "1.", "c": "no", "d": "é", "e": "\x85", "f": [1e-5, 3e22]}
    assert read_yaml(dump_yaml(data)) == data
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(Refused, match="contains itself"):
        dump_yaml({"a": loop})
    shared = (1, np.float64(0.5))
    assert read_yaml(dump_yaml({"a": shared, "b": shared})) == {"a": [1, 0.5], "b": [1, 0.5]}


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, b"x", Path("x"), {1: 2}])
def test_only_plain_data_is_saved(value: object, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"a\[0\]: .*cannot be saved"):
        write_yaml(tmp_path / "x.yaml", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    write_text_atomic(path, "old\n")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(Refused, match="No space left"):
        write_text_atomic(path, "new\n")
    assert path.read_bytes() == b"old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


def test_atomic_write_refuses_and_replaces_links(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such folder"):
        write_text_atomic(tmp_path / "none" / "a.txt", "x")
    with pytest.raises(Refused, match="is a folder"):
        write_text_atomic(tmp_path, "x")
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    write_text_atomic(real, "1")
    link.symlink_to(real)
    write_text_atomic(link, "2\né")
    assert not link.is_symlink() and real.read_text() == "1"
    assert link.read_text(encoding="utf-8") == "2\né"


def test_differences_name_the_key_and_both_values() -> None:
    before = {"lr": 1e-4, "recipe": {"methods": {"ewc": {"strength": 1.0, "rows": 8}}}, "same": [1]}
    now = {"lr": 5e-5, "recipe": {"methods": {"ewc": {"strength": 2.0, "rows": 8}, "lwf": {}}},
           "same": [1], "mix": "a.txt:0.1"}  # fmt: skip
    assert list(differences(before, now)) == [
        "lr: 0.0001 → 5e-05", 'mix: null → "a.txt:0.1"',
        "recipe.methods.ewc.strength: 1.0 → 2.0", "recipe.methods.lwf is new",
    ]  # fmt: skip
    assert "recipe.methods.lwf is gone" in differences(now, before)
    assert not list(differences(now, now))


def test_what_differs_shows_behind_a_long_common_beginning() -> None:
    (told,) = differences({"x": "a" * 200 + "old"}, {"x": "a" * 200 + "new"})
    assert 'old" → …' in told and 'new"' in told and len(told) < 60
