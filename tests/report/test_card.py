"""The model card: what the Hub reads of it, the record's numbers, and names that mean harm."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_records as made
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from holdfast import Refused
from holdfast.report import record_beside, write_card
from holdfast.report.card import code, public, until

HUB = {"source": "hub:glue/mrpc?metric=f1", "warnings": ["8 evaluation rows carved"]}


def hub(**more: Any) -> Any:
    record = made.two(0.8, 0.95, 0.7, recipe="dps", **more)
    record.tasks[1] |= HUB
    return record


def html(text: str) -> str:
    """The body as a reader of Markdown with tables shows it, plain HTML let through."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


class Seen(HTMLParser):
    """Tags, and the text of every cell and block."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, _: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.rows[-1][-1] += data


def test_the_hub_reads_base_model_datasets_and_metrics(tmp_path: Path) -> None:
    record = hub()
    card = ModelCard.load(write_card(record, tmp_path, license="apache-2.0"))
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "datasets": ["nyu-mll/glue"],
        "metrics": ["accuracy"],
        "tags": ["holdfast", "continual-learning"],
    }


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ({"name": "google/bert", "hash": None}, "google/bert"),
        ({"name": "models/mine", "hash": "00ff"}, None),  # a folder
        ({"name": "a b\n- x", "hash": None}, None),
    ],
)
def test_only_a_model_of_the_hub_is_named_as_base(
    model: dict[str, Any], known: str | None, tmp_path: Path
) -> None:
    card = ModelCard.load(write_card(made.record([[0.9]], model=model), tmp_path))
    assert card.data.base_model == known
    assert "license" not in card.data.to_dict() and card.data.tags == ["holdfast"]
    assert card.data.datasets is None


def test_the_card_holds_the_matrix_with_its_noise_and_how_it_was_made(tmp_path: Path) -> None:
    record = hub(settings={"lr": 2e-5, "out": "runs/a", "model": "minilm"})
    record.warn("a line to read")
    text = write_card(record, tmp_path).read_text()
    seen = Seen(html(text.split("---\n", 2)[2]))
    # sqrt(.7 · .3 / 500) = .0205, sqrt(.8 · .2 / 500) = .0179, sqrt(.95 · .05 / 500) = .0097
    assert seen.rows[1:3] == [["trec6", "0.950 ± 0.010", "–"],
                              ["snli", "0.700 ± 0.020", "0.800 ± 0.018"]]  # fmt: skip
    for said in (
        "a line to read", made.EXPOSURE, "forgetting 0.250", "lr 2e-05", "drop: 0.3", "seed 0",
        "holdfast sequence --recipe dps", "0123abcd", "Task-incremental",
    ):  # fmt: skip
        assert said in seen.text, said
    assert "(no name)" not in text and "runs/a" not in text


def test_a_card_of_one_task_and_of_an_earlier_folder(tmp_path: Path) -> None:
    record = until(hub(), 1)
    assert record.names == ["trec6"] and record.scores == [[0.95]] and record.scenario is None
    text = write_card(record, tmp_path).read_text()
    assert "0.950 ± 0.010" in text and "snli" not in text.replace("SNLI", "")
    assert not (tmp_path / ".eval_results").exists()


def test_a_result_of_a_hub_task_is_in_the_hubs_format(tmp_path: Path) -> None:
    hf = pytest.importorskip("huggingface_hub")
    if not hasattr(hf, "parse_eval_result_entries"):
        pytest.skip("an older huggingface_hub does not know the format")
    write_card(hub(), tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    (entry,) = hf.parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert file.name == "snli.yaml"
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "mrpc", 0.8)
    assert entry.notes == "accuracy on 500 rows; standard error 0.0179; 8 evaluation rows carved"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)
    write_card(hub(), tmp_path / "..", task="trec6")  # not from the Hub
    assert not (tmp_path / ".." / ".eval_results").exists()


@pytest.mark.parametrize("name", [
    *made.HOSTILE, "a | b", "[x](http://evil.example)", "![x](http://evil.example/x.png)",
    "---\nlicense: mit", "**bold** _x_ `code`", "```\n# head", "http://evil.example",
    "\n- item", "&lt;b&gt;", "a\\|b", "key: [x, y]", "<!-- x", "\u202egnp.exe",
])  # fmt: skip
def test_hostile_names_stay_names(name: str, tmp_path: Path) -> None:
    record = hub(names=["one", name])
    record.tasks[0] |= {"source": f"data/{name}", "metric": name, "warnings": [name]}
    record.tasks[1] |= {"source": f"hub:{name}", "name": "two"}
    record.recipe["name"] = record.model["name"] = record.exposure = name
    record.command, record.settings = ["holdfast", name], {"mix": name}
    record.versions = {name: name}
    record.warn(name)
    text = write_card(record, tmp_path).read_text(encoding="utf-8")
    usual = Seen(html(write_card(hub(names=["one", "two"], settings={"mix": 1}), tmp_path / "..")
                      .read_text().split("---\n", 2)[2]))  # fmt: skip
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    assert set(yaml.safe_load(front)) <= {"library_name", "tags", "base_model", "metrics"}
    seen = Seen(html(body))
    allowed = "h1 h2 p ul li table thead tbody tr th td pre code"
    assert set(seen.tags) <= set(allowed.split())
    assert [len(row) for row in seen.rows] == [len(row) for row in usual.rows]
    assert seen.tags.count("code") == usual.tags.count("code")
    assert seen.tags.count("h2") == usual.tags.count("h2")
    assert "\u202e" not in text
    if name in ("a | b", "**bold** _x_ `code`", "&lt;b&gt;", "a\\|b"):  # as it is, on the page
        assert seen.rows[3][1] == name  # the first task's metric


def test_a_fence_is_longer_than_any_within() -> None:
    assert code("x\n````\n# y", "sh") == "`````sh\nx\n````\n# y\n`````"


@pytest.mark.parametrize(("word", "shown"), [
    ("/home/ann/data/x.csv?text=a/b", "x.csv?text=a/b"), ("~/x.csv", "x.csv"),
    ("data/x", "data/x"),     ("hub:glue/mrpc", "hub:glue/mrpc"), ("--out=a/b", "--out=a/b"),
    ("/usr/bin/holdfast", "holdfast"), (r"C:\Users\ann\x.csv", "x.csv"),
])  # fmt: skip
def test_folders_of_whoever_ran_it_are_left_out(word: str, shown: str) -> None:
    assert public(word) == shown


def test_a_record_is_found_beside_what_it_is_about(tmp_path: Path) -> None:
    record, home = hub(), tmp_path / "run" / "tasks" / "1-trec6"
    home.mkdir(parents=True)
    record.save(tmp_path / "run" / "record.json")
    assert record_beside(tmp_path / "run", record.names).names == ["trec6", "snli"]
    assert record_beside(tmp_path / "run" / "final", record.names).scores == record.scores
    assert record_beside(home, ["trec6"]).scores == [[0.95]]
    assert record_beside(home, ["other"]) is None
    assert record_beside(tmp_path, ["trec6"]) is None


def test_a_license_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--license"):
        write_card(hub(), tmp_path, license="Apache 2.0\ntags: x")
    assert not list(tmp_path.iterdir())
