"""The page of a search that was made here, and `holdfast report` of its folder."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from fakes import make_curve, make_result

from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.report.search import load_search, render, write_search_report
from holdfast.search.run import search


@pytest.fixture(scope="module")
def facts(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("facts")
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    search(str(place / "bert"), tasks, out=out, train=make_curve, evaluate=make_result,
           progress=False, trials=14, sampler="random", pruner="none", epochs=1.0, max_length=16,
           selection=12, parts=4)  # fmt: skip
    return out


def test_the_page_shows_all_that_was_asked_for(facts: Path, tmp_path: Path) -> None:
    body = load_search(facts)
    page = render(body)
    for title in (
        "History",
        "Rates of the best trials",
        "Importance of each part",
        "Learned against kept",
        "The searched curve and its controls",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "14 of 14 trials" in page and body["gain"]["verdict"] in page.lower()
    assert page.count("data:image/svg+xml") == 2 * 5
    assert write_search_report(body, tmp_path / "report.html").read_text() == page


def test_a_search_is_reported_again(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(facts), "--out", str(tmp_path / "page.html")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "bertcl@" in out and "No gain: Of all trials the flat rate" in out
    assert "3 fresh seeds." in out
    assert "holdfast search</p>" in (tmp_path / "page.html").read_text()


def test_a_page_holds_nothing_that_runs_or_calls_home(facts: Path) -> None:
    body = json.loads((facts / "search.json").read_text())
    evil = "<script>alert(1)</script>\x1b[31m\u202e"
    body["tasks"][0]["name"] = evil
    body["trials"][9]["control"] = evil
    body["final"][0]["label"] = evil
    body["gain"]["sentence"] = evil
    body["command"] = ["holdfast", evil]
    page = render(body)
    assert page.count("<script") == 1 and "<script>alert" not in page  # the one that sorts
    assert "\x1b" not in page and "\u202e" not in page
    assert "default-src 'none'" in html.unescape(page)
    for word in ("http://", "https://", "<iframe", "<link", "onerror", "@import"):
        assert word not in page


def test_a_search_of_which_nothing_came_still_has_a_page(facts: Path) -> None:
    body = load_search(facts)
    body |= {"trials": [], "final": [], "front": [], "reasons": {},
             "importance": {"shares": {}, "note": "nothing"}, "winner": None}  # fmt: skip
    body["steps"] |= {"share": None}
    assert "History" not in render(body)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"kind": "search", "schema": 9}', '{"kind": "search", "schema": 1}'],
)
def test_what_is_no_search_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(Refused):
        load_search(tmp_path)
