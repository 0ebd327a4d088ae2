"""Files of strangers that try to run code, to write elsewhere or to fill the memory.

Every payload is harmless: it would leave a marker file, and no test may find one. Attacks on one
part alone are tested beside it: bombs in tests/tasks/test_load.py, links in tests/search and
tests/experiments, what a page shows in tests/report/test_page.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from PIL import EpsImagePlugin, Image
from transformers.utils import import_utils

import holdfast
from holdfast import Refused
from holdfast.cli import main
from holdfast.experiments.origin import origin_of
from holdfast.experiments.record import Record
from holdfast.experiments.verify import verify
from holdfast.search.trials import read_study
from holdfast.tasks import load_task
from holdfast.tasks.kinds import images, pretrained
from holdfast.tasks.kinds.pretrained import load_config, load_saved, load_tokenizer, locate

HOME = Path(holdfast.__file__).parent
CLASSIFIER = transformers.AutoModelForSequenceClassification


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file that a payload makes where it runs."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "foreign code was run"


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))  # noqa: S301
    assert (tmp_path / "marker").exists()


# --- pickles --------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Any]] = {
    "rows.csv": load_task,
    "rows.jsonl": load_task,
    "rows.parquet": load_task,
    "rows.csv.gz": load_task,
    "recipe.yaml": holdfast.Recipe.load,
    "rates.yaml": holdfast.Rates.load,
    "record.json": Record.load,
    "trials.csv": read_study,
    "trials.json": read_study,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["raw", "torch", "text"])
def test_no_reader_unpickles(name: str, kind: str, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "torch":
        torch.save(Payload(mark), path)
    else:
        path.write_bytes(pickle.dumps(Payload(mark), protocol=0 if kind == "text" else None))
    with pytest.raises(Refused):
        READERS[name](path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_are_never_unpickled(name: str, mark: Path, tmp_path: Path) -> None:
    folder = models.save_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    torch.save({"w": Payload(mark)}, folder / name)
    with pytest.raises(Refused, match="cannot be loaded"):
        load_saved(CLASSIFIER, str(folder))


# --- configurations that ask for code -------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_bert(tmp_path_factory.mktemp("bert"))


def changed(folder: Path, **keys: Any) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | keys))


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


KERNEL = "stranger/kernel"


@pytest.mark.parametrize("value", [KERNEL, {"": KERNEL}, "flash_attention_2"])
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation",
                                 "_experts_implementation", "experts_implementation"])  # fmt: skip
def test_a_configuration_names_no_code_to_fetch(
    key: str, value: Any, copied: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers hands `owner/name` to the package `kernels`, which runs what it fetches."""
    kernels = transformers.integrations.hub_kernels
    monkeypatch.setattr(kernels, "get_kernel", lambda *_, **__: mark.touch())
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda *_, **__: True)
    changed(copied, **{key: value})
    config = load_config(str(copied))
    assert config._attn_implementation is None and config._experts_implementation is None
    for more in ({}, {"num_labels": 3}):
        model = load_saved(CLASSIFIER, str(copied), **more)
        assert model.config._attn_implementation in ("sdpa", "eager")
        assert model.config.num_labels == more.get("num_labels", 2)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run(
    file: str, copied: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the user asked whether it may: a terminal would be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"import os; os.system('touch {mark}')\nclass Config: pass\nclass Tokenizer: pass\n"
    (copied / "own.py").write_text(code)
    body = json.loads((copied / file).read_text())
    asked = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None],
             "AutoModelForSequenceClassification": "own.Config"}  # fmt: skip
    (copied / file).write_text(json.dumps({**body, "model_type": "own", "auto_map": asked}))
    for load in (load_config, load_tokenizer, lambda source: load_saved(CLASSIFIER, source)):
        try:
            load(str(copied))  # type: ignore[operator]
        except Refused:
            continue


def test_a_revision_is_pinned_for_all_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def read(name: str, **how: Any) -> Any:
        asked.append((name, how))
        raise OSError("no network")

    monkeypatch.setattr(pretrained.AutoConfig, "from_pretrained", read)
    monkeypatch.setattr(pretrained, "must_answer", lambda _: None)
    assert locate("ann/bert@0123abc") == "ann/bert@0123abc"
    with pytest.raises(Refused, match="ann/bert@0123abc: cannot be loaded"):
        load_config("ann/bert@0123abc")
    monkeypatch.setattr(pretrained, "_config", lambda *_, **__: (models.bert_config(), {}))
    monkeypatch.setattr(pretrained.AutoTokenizer, "from_pretrained", read)
    for load in (load_tokenizer, lambda source: load_saved(pretrained.AutoTokenizer, source)):
        with pytest.raises(Refused):
            load("ann/bert@0123abc")
    assert len(asked) == 3 and {name for name, _ in asked} == {"ann/bert"}
    assert all(how["revision"] == "0123abc" for _, how in asked)
    assert all(how["trust_remote_code"] is False for _, how in asked)


def test_a_folder_has_no_revision(copied: Path, tmp_path: Path) -> None:
    for model in (f"{copied}@main", "ann/bert@"):
        with pytest.raises(Refused, match="a local folder has none"):
            locate(model)
    odd = copied.rename(tmp_path / "bert@home")
    assert load_config(locate(str(odd))).model_type == "bert"


# --- pictures -------------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 11 11\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_picture_runs_no_program(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow goes by content, not by name, and gives PostScript to Ghostscript to run."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    for name in ("cat/1.png", "cat/9.png", "dog/1.png"):
        (tmp_path / "task" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "task" / name)
    planted = tmp_path / "task" / "cat" / "9.png"
    planted.write_bytes(POSTSCRIPT)
    with contextlib.suppress(Exception), Image.open(planted) as opened:
        opened.load()
    assert mark.exists()  # the payload works
    mark.unlink()
    with pytest.raises(Refused, match=r"9\.png: no picture that can be read"):
        load_task(tmp_path / "task")
    with pytest.raises(Refused, match="no picture that can be read"):
        images._opened(planted, "RGB")


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["!!python/object/apply:os.system [touch {0}]", "!!python/name:os.system", "!!map {{}}",
     "!<tag:yaml.org,2002:python/object/apply:os.system> [touch {0}]"],
)  # fmt: skip
def test_a_recipe_makes_no_objects(line: str, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: {line.format(mark)}\n")
    for load in (holdfast.Recipe.load, holdfast.Rates.load):
        with pytest.raises(Refused, match="line 1: tag"):
            load(path)


# --- archives -------------------------------------------------------------------------------------


def packed(path: Path, name: str) -> Path:
    """An archive whose one member leads out of where it is unpacked."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "text")
    else:
        with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w") as file:
            member = tarfile.TarInfo(name)
            member.size = 4
            file.addfile(member, io.BytesIO(b"text"))
    return path


DOORS: dict[str, Callable[[Path], Any]] = {
    "task": load_task,
    "model": lambda path: locate(str(path)),
    "from": lambda path: origin_of(path, None),
    "report": Record.load,
    "verify": lambda path: verify([path]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "TGZ"])
def test_archives_are_refused_whole(door: str, ending: str, mark: Path, tmp_path: Path) -> None:
    path = packed(tmp_path / f"a.{ending}", f"../{mark.name}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused, match=r"is an archive.*unpack it into an empty folder"):
        DOORS[door](path)
    assert sorted(tmp_path.rglob("*")) == before


# --- what reaches the terminal --------------------------------------------------------------------

RED = "\x1b[31mred\x1b]0;title\x07\u202e"


def test_no_terminal_codes_are_passed_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    record = Record(tasks=[{"name": RED}], recipe={"name": RED})
    record.save(tmp_path / "run" / "record.json")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"tasks": [[RED, ""]], RED: RED}))
    for words in (
        ["runs", str(tmp_path)], ["runs", str(tmp_path / RED)], ["verify", str(tmp_path / RED)],
        ["report", str(tmp_path / RED)], ["train", "--task", RED, "--out", str(tmp_path / "x")],
        ["train", "--task", "builtin:mood", "--model", f"./{RED}", "--out", str(tmp_path / "x")],
        [RED], ["train", f"--{RED}"], ["train", "--recipe", RED, "--task", "builtin:mood"],
        ["verify", str(tmp_path)],
    ):  # fmt: skip
        try:
            main(words)
        except SystemExit as end:
            assert end.code == 2
        said = "".join(capsys.readouterr())
        assert said and not set("\x1b\x07\u202e") & set(said), words


def test_another_runs_keys_are_told_as_text() -> None:
    assert str(Refused(f"key {RED}", where="a\nb", remedy="\x00")).isprintable()


# --- what the linter does not ban -----------------------------------------------------------------


def test_every_torch_load_takes_weights_only() -> None:
    for file in HOME.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call in re.finditer(r"torch\.load\(.*", text):
            assert "weights_only=True" in call[0], f"{file.name}: {call[0]}"
        assert not re.search(
            r"pickle\.loads?\(|autoescape=False(?!,  # noqa: S701)|trust_remote_code.{0,4}True",
            text,
        )
