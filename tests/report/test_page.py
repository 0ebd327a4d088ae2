"""The page parsed: pictures, tables, and nothing that runs or reaches out."""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_records import EXPOSURE, HOSTILE, record, study, two

from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.report import as_text, find_records, matrix_table, pictures, write_report
from holdfast.report.canvas import LIGHT
from holdfast.report.facts import comparisons
from holdfast.report.general import draw
from holdfast.report.page import TEMPLATES, check_page, render

VOID = {"meta", "img", "source", "br"}
LINKS = {"href", "src", "srcset", "action", "formaction", "data", "poster", "background", "cite"}


class Page(HTMLParser):
    """Elements, attributes and text; fails on a tag left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: list[list[str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.raw.append([])
        elif tag in ("td", "th"):
            self.raw[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self.open):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.raw[-1][-1] += data

    @property
    def cells(self) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.raw]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    @property
    def pictures(self) -> list[str]:
        uris = [a[k] for tag, a in self.tags for k in ("src", "srcset") if a.get(k)]
        return [base64.b64decode(str(uri).split(",", 1)[1]).decode() for uri in uris]


def inert(html: str) -> Page:
    """Nothing on the page runs, loads or points anywhere."""
    page = Page(html)
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"iframe", "object", "embed", "link", "base", "form", "svg", "a"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in LINKS & set(attributes):
            assert str(attributes[name]).startswith("data:image/svg+xml;base64,"), (tag, name)
    ours = {"style": TEMPLATES / "style.css", "script": TEMPLATES / "sort.js"}
    policy = str(next(a["content"] for _, a in page.tags if a.get("http-equiv")))
    for tag, file in ours.items():  # that one, and no other
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        assert text == file.read_text("utf-8") and html.count(f"<{tag}") == 1
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
        html = html.replace(text, "")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    assert not [a for _, a in page.tags if "style" in a]
    assert not re.search(r"(?:https?:)?//", re.sub(r"data:[^\"]*", "", html)), "an address"
    style = ours["style"].read_text("utf-8")
    assert "url(" not in style and "@import" not in style
    assert html.index("Content-Security-Policy") < html.index("<style>")
    for svg in page.pictures:
        root = ElementTree.fromstring(svg)
        names = {element.tag.split("}")[-1] for element in root.iter()}
        assert names <= {"svg", "defs", "style", "g", "path", "text", "tspan", "clipPath", "rect",
                         "use"}, names  # fmt: skip
        for element in root.iter():
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on")
                assert not key.endswith("href") or value.startswith("#")
    return page


def test_one_run() -> None:
    page = inert(render([two(0.8, 0.952, 0.741)]))
    assert "trec6 fell from 0.952 to 0.741 (−21.1 points" in page.text
    assert EXPOSURE in page.text
    assert ["trec6", "0.952± 0.010", "–"] in page.cells
    assert ["snli", "0.741± 0.020", "0.800± 0.018"] in page.cells
    assert ["forgetting", "+0.211", "–"] in page.cells
    assert ["BWT / T", "−0.105", "the same sum, over T (SEEKR, SAPT, TRACE)"] in page.cells
    assert not [cells for cells in page.cells if cells[0] == "trained alone"]  # not measured
    titles = [
        "What each task scored",
        "Forgetting by task",
        "Learning rates",
        "Scores while training",
        "Numbers",
    ]
    positions = [page.text.index(title) for title in titles]
    assert positions == sorted(positions), "pictures come first"
    for word in (
        "holdfast sequence --recipe plain",
        "max_grad_norm: 1.0",
        "0123abcd",
        "sha256:00ff",
        "2e-05",
    ):
        assert word in page.text[page.text.index("To repeat this run") :]
    assert len(page.pictures) == 6  # three, light and dark
    assert any("trec6" in svg for svg in page.pictures)


def test_recipes_over_seeds() -> None:
    page = inert(render(study(), title="Mine"))
    assert page.text.startswith("Mine · holdfast")
    assert "Learned against kept" in page.text and "control: plain" in page.text
    assert ["plain control", "3", "0.800 ± 0.000", "0.950 ± 0.000", "0.710 ± 0.010",
            "+0.240 ± 0.010", "1.510 ± 0.010", "60", "0 B"] in page.cells  # fmt: skip
    assert ["dps", "3", "−0.010 [−0.010, −0.010]", "+0.110 [+0.085, +0.135]",
            "+0.100 [+0.075, +0.125]", "0.250[0.250]", "0.003"] in page.cells  # fmt: skip
    assert page.text.count("Scores of dps, seed 2") == 1
    assert page.text.index("Take dps: new plus old is higher than plain's by +0.100") < (
        page.text.index("A run took 60 s (the control 60 s); it holds nothing beside the model.")
    ) < page.text.index("Learned against kept")  # fmt: skip


def test_a_task_scored_once_while_training_is_seen() -> None:
    """Of one epoch a task the last one has a single score in each seed, which no line shows."""
    runs = [two(0.8, 0.9, 0.7, seed=s) for s in range(2)]
    for run in runs:
        run.history = [{"learning": i, "epoch": 1.0, "step": 30, "scores": scores}
                       for i, scores in enumerate(([0.9, None], [0.7, 0.8]))]  # fmt: skip
    (shown,) = [p for p in pictures(runs) if p.title == "Scores while training"]
    (svg,) = {base64.b64decode(p.light.split(",")[1]).decode() for p in shown.panels}
    assert f"fill: {LIGHT.colours[1]}" in svg and f"fill: {LIGHT.colours[0]}" not in svg


def test_a_notebook_shows_the_pictures_of_the_page() -> None:
    page, shown = inert(render(study())), pictures(study())
    assert shown[0].title == "Learned against kept"
    for picture in shown:
        html = Page(picture._repr_html_())
        assert set(html.pictures) <= set(page.pictures) and len(html.pictures) == len(
            picture.panels
        )
    hostile = pictures([two(0.8, 0.9, 0.7, recipe=HOSTILE[0])])[0]._repr_html_()
    assert {tag for tag, _ in Page(hostile).tags} <= {"b", "br", "img"}


def test_hostile_names_are_text() -> None:
    size = len(HOSTILE)
    scores: list[list[Any]] = [[0.5 if j <= i else None for j in range(size)] for i in range(size)]
    hostile = record(
        scores, names=HOSTILE, recipe=HOSTILE[0], warnings=HOSTILE[1:2], exposure=HOSTILE[2],
        commit=HOSTILE[0], command=[HOSTILE[1], "\x1b[31m"], synthetic=True,
        settings={HOSTILE[0]: HOSTILE[1]}, versions={HOSTILE[1]: HOSTILE[0]},
        rates={"order": HOSTILE, "multiplier": [1.0] * size}, created=HOSTILE[0],
        model={"name": HOSTILE[0], "hash": HOSTILE[1]},
    )  # fmt: skip
    page = inert(render([hostile], title=HOSTILE[1]))
    for name in HOSTILE:
        assert " ".join(name.split()) in page.text, name
    assert "\x1b" not in page.text and "49" not in page.text.split("{{")[0][-3:]
    many = [
        two(0.8, 0.9, 0.7, seed=s, recipe=r, names=HOSTILE[:2]) for s in (0, 1) for r in HOSTILE
    ]
    inert(render(many))


@pytest.mark.parametrize(
    "made",
    [
        record([[None, None], [None, None]], history=[], rates=None, status="running"),
        record([[0.9]], kind="train"),
        record([[0.9, None], [None, 0.8]], history=[{"step": 3}, {"step": None, "scores": [1, 2]}]),
        Record(tasks=[{"name": "a"}, {"name": "b"}]),
        Record(tasks=[{"name": "a", "metric": None, "rows": None, "labels": None}]),
        two(0.5, 0.5, 0.5, rates={"order": ["a", "b"], "multiplier": [0, 1]}),
        two(0.5, 0.5, 0.5, rates={"order": ["a", "b"], "multiplier": [0, None]}),
        two(0.5, 0.5, 0.5, rates={"order": [], "multiplier": []}),
        two(-0.5, 0.0, -1.0, seed=None),
    ],
)
def test_whatever_is_missing_the_page_stands(made: Record) -> None:
    page = inert(render([made]))
    assert "None" not in page.text.replace("None.", "") and "nan" not in page.text.lower().split()


def test_recipes_that_measured_nothing_stand_beside_one_that_did() -> None:
    empty = record([[None, None], [None, None]], history=[], rates=None, recipe="empty")
    page = inert(render([empty, two(0.5, 0.6, 0.7), two(0.5, 0.6, 0.7, recipe="b")]))
    assert ["empty", "1", "–", "–", "–", "–", "–", "60", "0 B"] in page.cells


def test_unmeasured_is_a_dash() -> None:
    page = inert(render([record([[0.9, None], [None, 0.8]])]))
    assert ["snli", "–", "0.800± 0.018"] in page.cells
    assert ["forgetting", "–", "–"] in page.cells
    assert any(cells[:2] == ["new plus old", "–"] for cells in page.cells)


def test_synthetic_and_warnings_are_loud() -> None:
    page = inert(render([two(0.8, 0.9, 0.7, synthetic=True, skipped_steps=[0, 4])]))
    assert "trec6 is synthetic" in page.text and "2 tasks" in page.text
    assert "snli: 4 steps skipped" in page.text
    assert "Warnings None." in inert(render([two(0.8, 0.9, 0.7)])).text


def test_other_tasks_get_their_own_section() -> None:
    page = inert(render([two(0.8, 0.9, 0.7), record([[0.9]])]))
    assert "2 experiments" in page.text and "1. trec6 → snli" in page.text


def test_one_task_has_no_rows_for_what_only_several_have() -> None:
    for made in ([record([[0.9]])], [record([[0.8 + s / 10]], seed=s) for s in range(2)]):
        text = inert(render(made)).text
        assert "forgetting" not in text.lower() and "old after" not in text


def test_nothing_learned_is_the_verdict() -> None:
    tasks = [{"name": name, "metric": "accuracy", "constant": 0.85} for name in ("a", "b")]
    runs = [two(0.8, 0.8, 0.7, seed=s, recipe=r, tasks=tasks) for s in (0, 1)
            for r in ("plain", "dps")]  # fmt: skip
    page = inert(render(runs))
    assert "Nothing was learned" in page.text[: page.text.index("minilm")]
    assert "Take " not in page.text


def test_a_difference_that_seeds_cannot_show_is_no_reason_to_take_a_recipe() -> None:
    plain = [two(0.8, 0.9, 0.70 + 0.05 * seed, seed=seed) for seed in range(3)]
    dps = [two(0.8, 0.9, 0.80 - 0.02 * seed, seed=seed, recipe="dps") for seed in range(3)]
    text = inert(render(plain + dps)).text
    assert "Take plain: no recipe is better by a difference that these seeds can show." in text


def test_equal_recipes_stand_beside_each_other() -> None:
    runs = [two(0.8, 0.9, 0.7, recipe=r) for r in ("plain", "dps")]
    between = two(0.7, 0.9, 0.6, recipe="between")
    page = inert(render([runs[0], between, runs[1]]))
    heads = [cells[0] for cells in page.cells if len(cells) == 9]
    assert heads[1:] == ["plain control", "dps as plain", "between"]


def test_a_model_is_loaded_by_two_lines_wherever_it_lies() -> None:
    made = two(0.8, 0.9, 0.7)
    made.settings["out"] = 'runs/it\'s "here"'
    text = inert(render([made])).text
    (line,) = re.findall(r"holdfast\.load\((.*?)\) model", text)
    assert ast.literal_eval(line) == made.settings["out"] and "model.predict('snli'" in text


def test_movement_and_classes_are_shown_where_records_have_them() -> None:
    moved = {"trec6": {"parts": {"layer.0": 0.01}, "changed": 0.3},
             "snli": {"parts": {"layer.0": 0.02}, "changed": 0.4, "overlap": 0.5}}  # fmt: skip
    made = two(0.8, 0.9, 0.7, movement=moved)
    made.tasks[0]["classes"] = {"train": [900, 100], "selection": [9, 1], "evaluation": [7, 3]}
    page = inert(render([made]))
    assert ["plain", "snli", "0.400", "0.500"] in page.cells
    assert ["yes", "100", "1", "3"] in page.cells and "How far each part moved" in page.text
    assert "How far" not in inert(render([two(0.8, 0.9, 0.7)])).text


def test_the_scenario_is_named_and_explained() -> None:
    page = inert(render([two(0.8, 0.9, 0.7, scenario="class-incremental")])).text
    assert "Class-incremental (van de Ven et al. 2022): one head over the labels of all" in page
    assert "Scores of different scenarios do not compare." in page
    assert "Task-incremental" in inert(render([two(0.8, 0.9, 0.7)])).text
    assert "incremental" not in inert(render([record([[0.9]])])).text


def test_credentials_stay_out() -> None:
    leaky = two(0.8, 0.9, 0.7, command=["x", "--token", "hunter2", "db://me:hunter2@host"])
    leaky.settings["storage"] = "db://me:hunter2@host"
    assert "hunter2" not in render([leaky])


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert write_report([two(0.8, 0.9, 0.7)], path) == path
    first = path.read_text(encoding="utf-8")
    inert(first)
    assert first.startswith("<!DOCTYPE html>")
    with pytest.raises(Refused, match="is a folder"):
        write_report([two(0.8, 0.9, 0.7)], tmp_path)
    with pytest.raises(Refused, match="no records"):
        write_report([], path)


def test_half_a_formula_is_still_a_name() -> None:
    page = inert(render([record([[0.9]], names=["$\\frac{1$"], recipe="a_{$\\bad$", kind="train")]))
    assert any("$\\frac{1$" in svg for svg in page.pictures)


def test_the_same_records_give_the_same_page() -> None:
    made = [two(0.8, 0.9, 0.7)]
    assert render(made) == render(made)


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs would be missing from every mean."""
    for name in ("mine", "theirs"):
        two(0.8, 0.9, 0.7).save(tmp_path / name / "record.json")
    scan = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "theirs":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(Refused, match="theirs: Permission denied; name the folders of the runs"):
        find_records([tmp_path])
    assert len(find_records([tmp_path / "mine"])) == 1


def test_find_records(tmp_path: Path) -> None:
    for i in range(3):
        two(0.8, 0.9, 0.7, seed=i).save(tmp_path / "runs" / str(i) / "record.json")
    (tmp_path / "runs" / "2" / "other.json").write_text("{}", encoding="utf-8")
    one = tmp_path / "runs" / "1" / "record.json"
    assert [r.seed for r in find_records([tmp_path, one])] == [0, 1, 2]
    assert [r.seed for r in find_records([one])] == [1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"no record\.json"):
        find_records([tmp_path / "empty"])
    with pytest.raises(Refused, match="no such file"):
        find_records([tmp_path / "nothing"])


def test_a_task_trained_alone_belongs_to_its_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "a"
    two(0.8, 0.9, 0.7, alone={"snli": 0.85}).save(run / "record.json")
    record([[0.85]], names=["snli"], kind="train").save(run / "alone" / "snli" / "record.json")
    for asked in (tmp_path, run):
        assert [len(r.tasks) for r in find_records([asked])] == [2]
    monkeypatch.chdir(run)
    assert [len(r.tasks) for r in find_records(["."])] == [2]
    assert [len(r.tasks) for r in find_records([run / "alone"])] == [1]  # asked for by name


def test_a_recipe_called_alone_is_reported(tmp_path: Path) -> None:
    two(0.8, 0.9, 0.7).save(tmp_path / "alone" / "seed-0" / "record.json")
    assert len(find_records([tmp_path])) == 1


def test_a_score_without_noise_says_why() -> None:
    one = two(0.8, 0.9, 0.7)
    one.tasks[0]["metric"] = "f1"
    said = "no noise of f1: it needs the predictions, not kept"
    assert said in render([one]) and said in " ".join(as_text(matrix_table(one)).split())
    assert "no noise" not in render([two(0.8, 0.9, 0.7)])


def test_general_ability_has_a_table_of_its_own() -> None:
    told = {"base": {"arc acc": 0.3}, "after": {"trec6": {"kl": 0.25}, HOSTILE[0]: {"kl": 9.0}}}
    page = inert(render([two(0.8, 0.9, 0.7, general=told)]))
    assert page.cells.count(["arc acc", "0.300", "–", "–", ""]) == 1
    (row,) = [cells for cells in page.cells if cells[0] == "kl"]
    assert row[1:4] == ["–", "0.250", "–"] and "nats" in row[4]
    assert "general ability" not in inert(render([two(0.8, 0.9, 0.7)])).text
    several = inert(render([two(0.8, 0.9, 0.7, general=told), two(0.8, 0.9, 0.7, recipe="dps")]))
    assert [cells for cells in several.cells if cells[0] == "plain: kl"]


def test_general_ability_is_drawn_a_panel_a_measure_over_the_tasks() -> None:
    """Only what was measured, each measure on an axis of its own."""
    told = {"base": {"arc acc": 0.3}, "after": {"trec6": {"kl": 0.25, "arc acc": 0.2}}}
    runs = [two(0.8, 0.9, 0.7, general=told), two(0.8, 0.9, 0.7, recipe="dps")]
    (study,) = comparisons(runs)
    picture = draw(study)
    assert picture is not None and [p.title for p in picture.panels] == ["arc acc", "kl"]
    assert "Before the first task and after each." in inert(render(runs)).text
    (study,) = comparisons([two(0.8, 0.9, 0.7)])
    assert draw(study) is None


PROTOCOL: dict[str, Any] = {
    "name": "<b>mine", "about": "an order", "source": "a paper", "sequence": "one",
    "differs": ["2 topics of 10 <i>"], "left_out": ["yelp"], "caveats": ["another model"],
    "cited": [{"source": "a paper", "model": "T5", "averages": {"SeqFT": 18.9, "OSFT": 81.3}}],
}  # fmt: skip


def test_cited_figures_stand_only_beside_plain() -> None:
    extra = {"protocol": PROTOCOL}
    plain = [two(0.8, 0.9, s, seed=i, extra=extra) for i, s in enumerate((0.5, 0.7))]
    dps = two(0.8, 0.9, 0.8, recipe="dps", extra=extra)
    page = render([*plain, dps])
    assert "18.9" in page and "81.3" in page and "another model" in page and "yelp" in page
    assert "70.0\u00a0±\u00a07.1" in page  # of (.5 + .8) / 2 and (.7 + .8) / 2
    assert "&lt;b&gt;mine" in page and "<b>mine" not in page and "10 <i>" not in page
    alone = render([dps])
    assert "18.9" not in alone and "add plain and --flat" in alone and "another model" not in alone
    assert "2 topics of 10" in alone
    assert "SeqFT" not in render([*plain, two(0.8, 0.9, 0.8, recipe="dps")])  # of no protocol


def test_scores_of_tasks_that_are_only_tested_on_have_a_table() -> None:
    def scored(value: float, seed: int) -> Record:
        return two(0.8, 0.9, 0.5, seed=seed, extra={"elsewhere": {"snli": {"hans": value}}})

    page = render([scored(0.25, 0), scored(0.75, 1)])
    assert "only tested on" in page and "0.500\u00a0±\u00a00.354" in page and "hans" in page


@pytest.mark.parametrize(
    "extra",
    [
        {"protocol": 3, "elsewhere": [1]},
        {"protocol": {"name": None, "cited": {"a": 1}, "differs": "x"}, "elsewhere": {"snli": 1}},
        {"protocol": {"cited": [{"averages": {"a": "b", "c": True}}, 4]},
         "elsewhere": {"snli": {"hans": "high", "rte": None}}},
    ],
)  # fmt: skip
def test_a_damaged_protocol_leaves_the_page_standing(extra: dict[str, Any]) -> None:
    page = render([two(0.8, 0.9, 0.5, extra=extra)])
    assert "Numbers" in page and "only tested on" not in page


@pytest.mark.parametrize("held", ["{}", "text,label\n", "the thesis", "\x00"])
def test_no_page_is_written_over_what_is_none(held: str, tmp_path: Path) -> None:
    """A record or data named as --out would be lost."""
    path = tmp_path / "record.json"
    path.write_text(held)
    with pytest.raises(Refused, match=r"is no page, and would be lost; choose another --out"):
        write_report([two(0.8, 0.9, 0.7)], path)
    with pytest.raises(Refused, match="is no page"):
        check_page(path)
    assert path.read_text() == held


@pytest.mark.parametrize("held", ["", "<!DOCTYPE html>\n<p>old", "\ufeff\n <HTML>"])
def test_a_page_is_written_over_an_older_one(held: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(held)
    page = write_report([two(0.8, 0.9, 0.7)], tmp_path / "report.html")
    assert write_report([two(0.8, 0.9, 0.8)], page) == page
