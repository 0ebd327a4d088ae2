"""Documents and examples keep up with the code."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn

import holdfast
from holdfast.experiments.record import Record
from holdfast.methods import METHODS
from holdfast.recipe import PRESETS
from holdfast.tasks import METRICS, labels, table
from holdfast.tasks.spec import Options

ROOT = Path(__file__).parents[1]


LONG = "dsee.py"  # several times as long as the others
EXAMPLES = [pytest.param(path, marks=[pytest.mark.slow] * (path.name == LONG), id=path.name)
            for path in sorted((ROOT / "examples").glob("*.py"))]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


NOTEBOOK = ROOT / "examples" / "demo.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    """Those of the notebook, each with its source as one text."""
    body = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [c | {"source": "".join(c["source"])} for c in body["cells"] if c["cell_type"] == kind]


def test_the_notebook_has_no_outputs_and_its_links_lead_somewhere() -> None:
    assert not [c for c in cells("code") if c["outputs"] or c["execution_count"] is not None]
    told = "".join(cell["source"] for cell in cells("markdown"))
    links = re.findall(r"\]\((?!http)([^)#]+)\)", told)
    assert links and not [to for to in links if not (NOTEBOOK.parent / to).exists()]


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code as it stands, with a tiny model: its first cell holds what may be set."""
    display = pytest.importorskip("IPython.display", reason="of the notebook; not installed")
    shown: list[Any] = []
    monkeypatch.setattr(display, "display", lambda *pictures: shown.extend(pictures))
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    first, *others = cells("code")
    assert first["metadata"]["tags"] == ["parameters"]
    names: dict[str, Any] = {}
    exec(first["source"], names)
    names |= {"model": str(models.save_bert(tmp_path / "bert")), "rows": 24, "out": str(tmp_path)}
    for cell in others:
        exec(cell["source"], names)
    assert len(names["third"].scores) == 3 and names["third"].status == "done"
    assert [record.settings["train_size"] for record in names["records"]] == [24, 24]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert shown and all(panel.light in page for picture in shown for panel in picture.panels)
    assert [record.command for record in [*names["records"], names["third"]]] == [None] * 3
    printed = capsys.readouterr().out
    assert "after learning" in printed and "vs control" in printed and "Prediction(" in printed


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    """As a reader runs it, with MiniLM."""
    nbclient = pytest.importorskip("nbclient", reason="not installed")
    pytest.importorskip("ipykernel", reason="not installed")
    nbformat = pytest.importorskip("nbformat", reason="not installed")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    nbclient.NotebookClient(book, resources={"metadata": {"path": tmp_path}}).execute()
    made = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any('<img alt="' in o["data"].get("text/html", "") for o in made if "data" in o)
    assert "vs control" in "".join(o.get("text", "") for o in made)
    assert (tmp_path / "runs" / "notebook" / "third" / "final" / "tasks.json").is_file()


def test_aspects_of_real_rows_are_written_learned_and_answered(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absa = runpy.run_path(str(ROOT / "examples" / "absa.py"))
    assert absa["answer"]("The plot is dull, the cast dull.", "negative") == (
        "plot negative , cast negative <|endofterm|>"
    )
    assert absa["answer"]("nothing of the kind", "negative") is None
    absa["main"](str(shared_data / "sst2"))
    found = capsys.readouterr().out
    assert re.search(r"^\d{3} rows with an aspect, token_f1 0\.\d", found)
    asked = r"<\|review\|> .+ <\|endofreview\|> <\|term\|> "
    assert re.search(asked + r".*\n  \(by rule: \w+ (posi|nega)tive", found)


def test_pictures_are_stitched_when_small_objects_have_little_of_the_loss() -> None:
    made = runpy.run_path(str(ROOT / "examples" / "dynamic_scale.py"))
    x = torch.randn(8, 1, 16, 16)
    one = made["stitched"](x)[1, 0]
    for i, (y0, x0) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        for y, z in ((0, 0), (3, 7)):
            block = x[4 + i, 0, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2]
            torch.testing.assert_close(one[y0 + y, x0 + z], block.mean())
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    kind, size = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1]), torch.tensor([4.0, 8, 8, 12, 8, 4, 12, 8])
    each, small = made["losses"](net, (x, kind, size), stitch=True)
    target = nn.functional.one_hot(kind, 3).float().unflatten(0, (2, 4)).mean(1)
    wanted = nn.functional.cross_entropy(net(made["stitched"](x)), target)
    torch.testing.assert_close(each.mean(), wanted)
    assert small.tolist() == [True, True, True, False, True, True, False, True]  # of half the size
    _, small = made["losses"](net, (x, kind, size), stitch=False)
    assert small.nonzero().flatten().tolist() == [0, 5]
    r = made["share"](torch.tensor([3.0, 1, 0.5, 0.5]), torch.tensor([False, True, False, True]))
    assert r == pytest.approx(1.5 / 5)
    # The network of a step is judged by the share of the step before; at first there is none.
    asked: list[tuple[int, float]] = []
    made["trained"].__globals__["STEPS"] = 4
    _, count = made["trained"](lambda t, r: bool(asked.append((t, r))) or t == 1)
    assert count == 1 and [t for t, _ in asked] == [0, 1, 2, 3] and asked[0][1] == 1.0
    assert asked[2][1] == 1.0 and 0 <= asked[3][1] < 1  # all is small once it was stitched


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_that_names_its_settings(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    missing = [f.name for f in fields(METHODS[name]) if f.name not in page]
    assert not missing


def test_the_costs_that_are_shipped_are_those_of_a_committed_result() -> None:
    costs = json.loads((ROOT / "holdfast" / "methods" / "costs.json").read_text(encoding="utf-8"))
    words = costs["command"].split()
    result = json.loads((ROOT / words[words.index("--json") + 1]).read_text(encoding="utf-8"))
    assert result["commit"] == costs["commit"]
    rows = [r for r in result["rows"] if r["length"] == costs["tokens"]]
    for name, ratio in costs["steps"].items():
        assert name in METHODS
        assert ratio in [{k: round(v, 3) for k, v in r["whole"].items()}
                         for r in rows if r["arm"].startswith(name[:4])]  # fmt: skip


def test_readme_lists_every_method_and_every_recipe_that_is_none() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in PRESETS.keys() - METHODS if f"`{name}`" not in readme]
    assert not [name for name in METHODS if f"[`{name}`](docs/methods/{name}.md)" not in readme]


def test_the_page_of_tasks_names_every_option_and_metric() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    options = [f.name for f in fields(Options)]
    assert not [name for name in (*options, *METRICS) if f"`{name}`" not in page]
    caps = (table.MAX_TEXT, table.MAX_CELL, table.MAX_CHARACTERS, table.MAX_RECORDS,
            labels.MAX_CLASSES, labels.MAX_NAME)  # fmt: skip
    assert not [cap for cap in caps if f"{cap:,}" not in page]


def test_the_page_of_records_names_every_field_and_metric() -> None:
    page = (ROOT / "docs" / "record.md").read_text(encoding="utf-8")
    written = Record(tasks=[{"name": "a"}]).to_dict()
    assert not [name for name in (*written, *written["metrics"]) if f"`{name}`" not in page]


def test_links_in_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "llms.txt", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_llms_txt_follows_its_convention() -> None:
    """A title, a quoted summary, then sections that are lists of links, each with a note."""
    title, _, summary, *rest = (ROOT / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert title == "# holdfast" and summary.startswith("> ")
    sections = "\n".join(rest).split("\n## ")[1:]
    assert len(sections) > 2 and sections[-1].startswith("Optional\n")
    for section in sections:
        for line in section.splitlines()[1:]:
            assert not line or re.fullmatch(r"- \[[^\]]+\]\([^)]+\): .+", line), line


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:class|function):: holdfast\.(\S+)$", page, re.M)
    assert sorted(listed) == sorted(name for name in holdfast.__all__ if name != "__version__")


def test_the_house_has_every_module_and_the_layers_that_are_checked() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [p.name for p in (ROOT / "holdfast").glob("*.py") if p.name != "__init__.py"]
    packages = [f"{p.parent.name}/" for p in (ROOT / "holdfast").glob("*/__init__.py")]
    assert not [name for name in (*modules, *packages) if name not in page]
    drawn = re.search(r"```\n(cli → [^`]*)```", page)
    assert drawn is not None
    told = [{n.strip() for n in layer.split(",")} for layer in drawn[1].split("→")]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert told == [{n.removeprefix("holdfast.") for n in row.split(" | ")} for row in layers]


def test_every_source_file_stays_readable_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "holdfast").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
