"""Security: files of strangers that would run code, lead elsewhere, or fill the memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import torch

from holdfast.experiments.record import Record
from holdfast.recipe import Recipe
from holdfast.tasks import load_task
from holdfast.testing.faults.place import Place, check_refusal, equal, refuses
from holdfast.testing.faults.suite import Wrong, swapped, tried


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def untouched(place: Place) -> None:
    if (place / "marker").exists():
        raise Wrong("foreign code was run")


def pickles(place: Place) -> list[bytes]:
    """A payload, raw and as torch packs it."""
    payload, packed = Payload(place / "marker"), io.BytesIO()
    torch.save({"state": payload}, packed)
    return [pickle.dumps(payload), pickle.dumps(payload, protocol=0), packed.getvalue()]


@tried("S1", "command line")
def s1(place: Place) -> None:
    task = place.rows()
    for content in pickles(place):
        for name in ("rows.csv", "rows.jsonl", "rows.parquet", "rows.csv.gz"):
            place.refused(place.write(name, content))
        place.refused(task, recipe=place.write("recipe.yaml", content))
        place.write("old/record.json", content)
        check_refusal(*place.command("report", place / "old"))
        untouched(place)


@tried("S1", "Trainer")
def s1_trainer(place: Place) -> None:
    from holdfast.testing.faults.checkpoints import RECIPE, stopped_trainer
    from holdfast.training.manifest import commit

    at = stopped_trainer(place, step=2)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (at / name).read_bytes()
        for content in pickles(place):
            place.write(str((at / name).relative_to(place.folder)), content)
            commit(at)
            trainer = place.trainer(recipe=RECIPE)
            refuses(lambda t=trainer: t.train(resume_from_checkpoint=str(at)))  # type: ignore[misc]
            untouched(place)
        (at / name).write_bytes(kept)


def floor(package: str, least: str) -> None:
    """The oldest release of a package that may stand beside holdfast."""
    wanted = next(r for r in requires("holdfast") or () if r.startswith(f"{package}>="))
    found = wanted.partition(">=")[2].partition(";")[0].strip()
    as_numbers: Callable[[str], list[int]] = lambda text: [int(n) for n in text.split(".")]  # noqa: E731
    assert as_numbers(found) >= as_numbers(least), f"{package} {found} is let in"


@tried("S2", "command line")
def s2(place: Place) -> None:
    floor("torch", "2.10")
    model = place.copied_bert()
    (model / "model.safetensors").unlink()
    for content in pickles(place):
        (model / "pytorch_model.bin").write_bytes(content)
        place.refused(place.rows(), model=model, begun=True)
        untouched(place)


@tried("S3", "command line")
def s3(place: Place) -> None:
    task, model = place.rows(), place.copied_bert()
    raw = pickles(place)[0]
    for name in (".metadata", "__0_0.distcp", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(raw)
    assert place.train(task, model=model)[0] == 0
    for folder in (place / "run", *(place / "run/tasks").iterdir()):
        for name in (".metadata", "__0_0.distcp", "pytorch_model.bin"):
            (folder / name).write_bytes(raw)
    place.train(task, model=model)
    place.command("verify", place / "run")
    place.command("report", place / "run")
    untouched(place)


def config(model: Path, **keys: Any) -> None:
    body = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(body | keys))


@tried("S4", "command line")
def s4(place: Place) -> None:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import import_utils

    from holdfast.tasks.kinds.pretrained import load_config, load_saved

    floor("transformers", "5.3")
    model = place.copied_bert()
    code = f"open({str(place / 'marker')!r}, 'w').close()\nclass Config: pass\n"
    (model / "own.py").write_text(code)
    kept = (model / "config.json").read_text()
    config(model, model_type="own", auto_map={"AutoConfig": "own.Config"})
    place.refused(place.rows(), model=model, begun=True)
    untouched(place)
    (model / "config.json").write_text(kept)
    import transformers.integrations.hub_kernels as kernels

    def fetched(*_: Any, **__: Any) -> None:
        (place / "marker").touch()

    with swapped(kernels, "get_kernel", fetched), \
            swapped(import_utils, "is_kernels_available", lambda *_, **__: True):  # fmt: skip
        for key in ("_attn_implementation", "attn_implementation", "_experts_implementation"):
            config(model, **{key: "stranger/kernel"})
            load_config(str(model))
            load_saved(AutoModelForSequenceClassification, str(model))
            untouched(place)


@tried("S5", "command line")
def s5(place: Place) -> None:
    archives: list[Path] = []
    for ending in ("zip", "tar", "tar.gz"):
        for number, name in enumerate(("../marker", str(place / "marker"))):
            path = place / f"a{number}.{ending}"
            if ending == "zip":
                with zipfile.ZipFile(path, "w") as packed:
                    packed.writestr(name, "text")
            else:
                with tarfile.open(path, "w:gz" if "gz" in ending else "w") as file:
                    member = tarfile.TarInfo(name)
                    member.size = 4
                    file.addfile(member, io.BytesIO(b"text"))
            archives.append(path)
    before = {*place.home.rglob("*")}
    task = place.rows()
    for path in archives:
        place.refused(path, says="archive")
        place.refused(task, model=path, says="archive")
        for verb in ("report", "verify"):
            check_refusal(*place.command(verb, path), "archive")
    made = {*place.home.rglob("*")} - before - {task}
    equal({p for p in made if place.bert not in (p, *p.parents)}, set(), "files that were unpacked")


@tried("S6", "command line")
def s6(place: Place) -> None:
    import resource

    line = b"the good film,yes\nthe bad film,no\n"
    bomb = place.write("bomb.csv.gz", gzip.compress(b"text,label\n" + line * 3_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    place.refused(bomb, says="bomb.csv.gz")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, f"{grown:.0f} MB for {bomb.stat().st_size} bytes"
    task, model = place.rows(), place.copied_bert()
    header = {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
    body = json.dumps(header).encode()
    for content in (struct.pack("<Q", 4 << 30) + b"{}", struct.pack("<Q", 2**63) + b"{}",
                    struct.pack("<Q", len(body)) + body + b"\0" * 4):  # fmt: skip
        (model / "model.safetensors").write_bytes(content)
        place.refused(task, model=model, begun=True)


class _Page(HTMLParser):
    """What a browser would run or fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.odd: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script"
        risky = [k for k, v in attributes if k.startswith("on") or "javascript:" in (v or "")]
        if risky or tag in ("iframe", "object", "embed", "base", "form", "link"):
            self.odd.append(f"<{tag} {' '.join(risky)}>")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts.append(data)
        self.inside = False


EVIL = ("<script>alert(1)</script>", "</style><script>alert(1)</script>", '" onerror="alert(1)',
        "<img src=x onerror=alert(1)>", "{{ 7*7 }}")  # fmt: skip


def parsed(page: str) -> _Page:
    found = _Page()
    found.feed(page)
    return found


@tried("S7", "command line")
def s7(place: Place) -> None:
    from holdfast.report.page import render

    rows = [{"text": f"a film {i} {EVIL[i % 5]}", "label": EVIL[i % 2]} for i in range(16)]
    path = place.write("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    code, said = place.train(f"{path}?name=<script>alert(1)<%2Fscript>")
    assert code == 0, said
    clean = parsed(render([_record("plain")])).scripts
    pages = [(place / "run/report.html").read_text(), *(render([_record(e)]) for e in EVIL)]
    for page in pages:
        found = parsed(page)
        if found.odd or any("alert" in text for text in found.scripts):
            raise Wrong(f"a page runs what a stranger wrote: {found.odd}")
        assert len(found.scripts) <= max(1, len(clean)), "a page has more scripts than ours"
        assert "default-src 'none'" in page.replace("&#39;", "'"), "no policy"


def _record(name: str) -> Record:
    return Record(
        tasks=[{"name": name, "metric": "accuracy", "labels": [name, "b"], "hash": "sha256:00",
                "rows": {"train": 9, "selection": 3, "evaluation": 9}, "source": name,
                "synthetic": False, "warnings": [name]}],
        scores=[[0.5]], recipe={"name": name, "methods": {}}, settings={"lr": 1e-4, "seed": 0},
        model={"name": name, "parameters": 9, "hash": "sha256:aa"}, seed=0,
        command=["holdfast", name], seconds=[1.0], steps=[9], skipped_steps=[0],
    )  # fmt: skip


@tried("S8", "command line")
def s8(place: Place) -> None:
    from holdfast.report.tables import write_csv

    risky = ["=1+1", "+cmd", "-cmd", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"]
    write_csv([{"a": cell, "=key": -1.5} for cell in risky], place / "a.csv")
    with (place / "a.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    for cell in [*header, *(row[0] for row in rows)]:
        if cell.lstrip()[:1] in "=+-@\t\r＝":
            raise Wrong(f"a spreadsheet would compute {cell!r}")
    equal({row[1] for row in rows}, {"-1.5"}, "a number")


RED = "\x1b[31mred\x1b]0;title\x07\u202e"


@tried("S9", "command line")
def s9(place: Place) -> None:
    place.write("run/run.json", json.dumps({"tasks": [[RED, ""]], RED: RED}))
    _record(RED).save(place / "run/record.json")
    task = place.rows()
    for words in (
        ["runs", place.folder], ["verify", place / RED], ["report", place / RED],
        ["report", place / "run"], ["train", "--task", RED, "--out", place / "x"],
        ["train", "--task", task, "--model", f"./{RED}", "--out", place / "x"], [RED],
        ["train", f"--{RED}"], ["train", "--recipe", RED, "--task", task],
        ["train", "--task", task, "--model", place.bert, "--out", place / "run"],
    ):  # fmt: skip
        _, said = place.command(*words)
        assert said, f"{words[0]} says nothing"
        if set("\x1b\x07\u202e") & set(said):
            raise Wrong(f"{words[0]} passes terminal codes on")


@tried("S10", "command line")
def s10(place: Place) -> None:
    task, mark = place.rows(), place / "marker"
    for value in (
        f"!!python/object/apply:os.system ['touch {mark}']",
        "!!python/name:os.system",
        "!!python/object/new:os.system [x]",
        "!!map {}",
        "!mine 1",
        f"!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {mark}']",
    ):
        path = place.write("recipe.yaml", f"name: {value}\n")
        place.refused(task, recipe=path, says=("recipe.yaml", "line 1: tag"))
        refuses(lambda p=path: Recipe.load(p), "tag")  # type: ignore[misc]
        untouched(place)


@tried("S11", "command line")
def s11(place: Place) -> None:
    from holdfast.experiments.record import scrub, without_secrets
    from holdfast.search import storage

    for url in ("postgresql://bob:SECRET@host/x", "mysql+pymysql://bob:SECRET@h:1/x?a=b",
                "postgresql://h/x?user=bob&password=SECRET", "https://SECRET@host/x"):  # fmt: skip
        told = scrub(url) + " ".join(without_secrets(["search", "--storage", url]))
        if "SECRET" in told:
            raise Wrong(f"a password is told: {told}")
    for url in ("postgresql://bob:SE@CRET@h/x", "postgresql://bob:SE@C/RET@h/x"):
        said = refuses(lambda u=url: storage.address(u, place.folder), "%40")  # type: ignore[misc]
        if "CRET" in said or "RET@" in said:
            raise Wrong("the end of a password is told as a host")


@tried("S12", "command line")
def s12(place: Place) -> None:
    opened: list[object] = []

    class Listening(socket.socket):
        def listen(self, *backlog: int) -> None:
            opened.append(self.getsockname())
            super().listen(*backlog)

    with swapped(socket, "socket", Listening):
        code, said = place.train(place.rows())
    assert code == 0, said
    equal([a for a in opened if isinstance(a, tuple) and a[0] not in ("127.0.0.1", "::1")], [],
          "addresses that are listened on")  # fmt: skip


@tried("S13", "command line")
def s13(place: Place) -> None:
    floor("pyarrow", "14.0.1")
    floor("datasets", "4.0")
    for content in pickles(place):
        refuses(lambda: load_task(place.write("rows.parquet", content)))  # noqa: B023
        untouched(place)


@tried("S14", "command line")
def s14(place: Place) -> None:
    _linked(place, "record.json", "run.json", "report.html", "tasks")


@tried("S14", "command line", slow=True)
def s14_lease(place: Place) -> None:
    _linked(place, "lease.1")  # taken for another's, and waited for


def _linked(place: Place, *names: str) -> None:
    """What a planted link leads to stays as it was, and nothing is written behind it."""
    task, victim = place.rows(), place.write("victim", "as it was")
    (place / "elsewhere").mkdir()
    for number, name in enumerate(names):
        for how in (os.symlink, os.link):
            out = place / f"out{number}{how.__name__}"
            out.mkdir()
            if name == "tasks" and how is os.link:
                continue
            how(place / "elsewhere" if name == "tasks" else victim, out / name)
            code, said = place.train(task, out=out.name)
            assert code in (0, 2), said
            equal(victim.read_text(), "as it was", f"what a {how.__name__} {name} leads to")
            equal([*(place / "elsewhere").iterdir()], [], "files behind the link")
