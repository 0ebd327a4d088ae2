"""Protocols: what is shipped is what was published, and what is not there is refused by name."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import models
import pytest

from holdfast.errors import Refused
from holdfast.experiments.settings import Settings
from holdfast.files import dump_yaml
from holdfast.tasks import hub, load_task, protocol
from holdfast.tasks.protocol import Protocol, names, places
from holdfast.tasks.spec import parse

# As the papers give them: Progressive Prompts and O-LoRA; IDBR.
PUBLISHED = {
    "standard-1": ["dbpedia amazon yahoo agnews"],
    "standard-2": ["dbpedia amazon agnews yahoo"],
    "standard-3": ["yahoo amazon agnews dbpedia"],
    "long-4": ["mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo"],
    "long-5": ["multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo"],
    "long-6": ["yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic"],
    "idbr": ["agnews yelp yahoo", "agnews yelp amazon yahoo dbpedia"],
    "low-resource": ["mrpc", "rte", "cola", "stsb", "trec6", "sst2"],
    "out-of-domain": ["snli", "mnli"],
}
OWN: dict[str, Any] = {
    "about": "two moods",
    "source": "nobody",
    "tasks": {
        "mood": {"folder": "mood.jsonl"},
        "tint": {
            "folder": "tint.jsonl",
            "stand_in": {"folder": "colour.jsonl", "differs": "of other colours"},
        },
    },
    "sequences": {"there": ["mood", "tint"], "back": ["tint", "mood"]},
}


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """A function: the protocol of `OWN` with other keys, from a file."""

    def make(**more: Any) -> Protocol:
        path = tmp_path / "mine.yaml"
        body = {k: v for k, v in {**OWN, **more}.items() if v is not None}
        path.write_text(dump_yaml(body))
        return Protocol.named(str(path))

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for topic in ("mood", "colour"):
        models.write_task(tmp_path / "data", topic)
    return tmp_path / "data"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_protocol_is_what_was_published(name: str) -> None:
    found = Protocol.named(name)
    assert [" ".join(order) for order in found.sequences.values()] == PUBLISHED[name]
    Settings.from_dict(found.settings)
    assert found.differs
    scenario = {"standard": "task", "long": "task", "idbr": "class"}.get(name.split("-")[0])
    assert found.scenario == (scenario and f"{scenario}-incremental")
    rows = {"standard": 1000, "long": 1000, "idbr": 2000}
    assert found.per_class == rows.get(name.split("-")[0])


def test_there_are_no_other_protocols_and_all_are_in_the_wheel() -> None:
    assert names() == sorted(PUBLISHED)
    told = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["holdfast"]
    files = [protocol.KNOWN, *protocol.HOME.iterdir()]
    for file in files:
        path = file.relative_to(protocol.HOME.parents[1]).as_posix()
        assert any(fnmatch(path, pattern) for pattern in patterns), path


def test_the_page_of_protocols_has_every_name_and_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text()
    for name, orders in PUBLISHED.items():
        (line,) = [row for row in page.splitlines() if row.startswith(f"| `{name}` |")]
        if name != "out-of-domain":
            said = re.findall(r"[a-z0-9]+(?:, [a-z0-9]+)+", line)
            assert said[: len(orders)] == (
                [", ".join(order.split()) for order in orders] if " " in orders[0]
                else [", ".join(orders) + ", each"]
            )  # fmt: skip


def test_cited_averages_are_those_that_were_published() -> None:
    found = [Protocol.named(f"standard-{n}").cited for n in (1, 2, 3)]
    averages = [{m: a for c in cited for m, a in c.averages.items()} for cited in found]
    assert averages == [
        {"SeqFT": a, "SeqLoRA": b, "O-LoRA": c, "OSFT": d, "all tasks at once": 80.0}
        for a, b, c, d in [
            (18.9, 44.6, 75.4, 81.3), (24.9, 32.7, 75.7, 81.2), (41.7, 53.7, 76.3, 81.3)
        ]
    ]  # fmt: skip


def test_every_known_task_names_a_dataset_on_the_hub() -> None:
    for name, place in places().items():
        assert parse(str(place.spec)).kind == "hub" and place.folder, name


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sequnces": {"x": ["mood"]}}, "unknown key 'sequnces'; did you mean 'sequences'"),
        ({"about": None}, "missing key 'about'"),
        ({"sequences": {}}, "sequences: "),
        ({"sequences": {"x": ["mod"]}}, "no task 'mod'; did you mean 'mood'"),
        ({"sequences": {"x": ["mood", "mood"]}}, "mood twice in x"),
        ({"sequences": {"../x": ["mood"]}}, "sequences"),
        ({"tests": {"tnt": {}}}, "no task 'tnt'; did you mean 'tint'"),
        ({"per_class": 0}, "per_class: .*greater than 0"),
        ({"scenario": "class incremental"}, "scenario: "),
        ({"settings": {"head": "shared"}}, "say scenario"),
        ({"tasks": {"mood": {"foldr": "x"}}}, "unknown key 'tasks.mood.foldr'; .*'folder'"),
        ({"cited": [{"source": "a", "model": "b", "averages": {"c": 1.0}}]}, "of which sequence"),
        ({"cited": [{"source": "a", "model": "b", "averages": {"c": 1.0}, "sequence": "up"}]},
         "no sequence 'up'"),
        ({"cited": [{"source": "a", "model": "b", "averages": {"c": 1.0}, "sequence": "back"}]},
         "without caveats"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(more: dict[str, Any], says: str, own: Any) -> None:
    with pytest.raises(Refused, match=says) as refusal:
        own(**more)
    assert str(refusal.value).count("\n") == 0


def test_a_name_that_is_no_protocol_is_refused() -> None:
    with pytest.raises(Refused, match="no protocol 'standard-4'; did you mean 'standard-"):
        Protocol.named("standard-4")
    with pytest.raises(Refused, match="No such file"):
        Protocol.named("nowhere.yaml")


def test_a_folder_wins_over_its_stand_in_and_a_stand_in_is_told(own: Any, data: Path) -> None:
    plan = own().plan("mine", {}, data=data)
    assert plan.sequences["back"] == [
        f"{data}/colour.jsonl?name=tint", f"{data}/mood.jsonl?name=mood"
    ]  # fmt: skip
    assert plan.of("back")["differs"] == ["tint: of other colours"]
    models.write_task(data, "colour").rename(data / "tint.jsonl")
    plan = own().plan("mine", {}, data=data)
    assert plan.sequences["back"][0] == f"{data}/tint.jsonl?name=tint"
    assert plan.told["differs"] == []


def test_tasks_that_are_nowhere_are_refused_by_name(own: Any, data: Path) -> None:
    tasks = {**OWN["tasks"], "far": {"folder": "faraway"}, "gone": {}}
    cited = [{"source": "a", "model": "b", "averages": {"c": 50.0}, "sequence": s}
             for s in ("two", "three")]  # fmt: skip
    found = own(tasks=tasks, cited=cited, caveats=["another model"],
                sequences={"two": ["mood", "tint"], "three": ["far", "mood", "tint"],
                           "none": ["gone"]})  # fmt: skip
    with pytest.raises(Refused) as refusal:
        found.plan("mine", {}, data=data)
    assert str(refusal.value) == (
        f"--data {data}: not to be had: far (folder faraway), gone; --only-served runs the rest"
    )
    plan = found.plan("mine", {}, data=data, only_served=True)
    assert {name: len(order) for name, order in plan.sequences.items()} == {"two": 2, "three": 2}
    assert plan.told["left_out"] == ["far", "gone"]
    # A figure of three tasks is no figure of two of them.
    assert plan.of("three")["cited"] == [] != plan.of("two")["cited"]
    with pytest.raises(
        Refused, match=r"had: mood \(folder mood.jsonl\), tint \(folder tint.jsonl\)$"
    ):
        own().plan("mine", {}, data=data.parent, only_served=True)
    with pytest.raises(Refused, match="no such folder"):
        own().plan("mine", {}, data=data / "x")


def test_without_data_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(place: str, options: Any) -> dict[str, Any]:
        asked.append(place)
        if "yelp" in place:
            raise Refused("the Hub gave no dataset")
        return {}

    monkeypatch.setattr(hub, "load", load)
    with pytest.raises(
        Refused, match=r"idbr: not to be had: yelp \(the Hub gave no dataset\); .*--data"
    ):
        Protocol.named("idbr").plan("idbr", {})
    assert sorted(asked) == sorted({parse(str(places()[t].spec)).place
                                    for t in PUBLISHED["idbr"][1].split()})  # fmt: skip
    plan = Protocol.named("idbr").plan("idbr", {}, only_served=True)
    first = parse(plan.sequences["three"][0]).options
    assert (first.name, first.per_class, first.metric) == ("agnews", "2000", "accuracy")
    assert plan.settings["head"] == "shared"


def test_settings_of_ones_own_win_and_are_told(own: Any, data: Path) -> None:
    found = own(per_class=5, scenario="class-incremental", settings={"epochs": 1, "lr": 1e-4})
    plan = found.plan("mine", {"epochs": 2.0, "lr": 1e-4, "bf16": True}, data=data)
    assert plan.settings == {"epochs": 2.0, "lr": 1e-4, "bf16": True, "head": "shared"}
    assert plan.told["differs"][-1] == "epochs 2.0 was asked for; the protocol has epochs 1"
    assert len(plan.told["differs"]) == 2  # and the stand-in
    assert parse(plan.sequences["there"][0]).options.per_class == "5"
    plan = found.plan("mine", {"train_size": 9, "head": "task"}, data=data)
    assert plan.told["differs"][1:] == [
        "train_size 9 was asked for; the protocol has per_class 5",
        "head task was asked for; the protocol has head shared",
    ]
    assert parse(plan.sequences["there"][0]).options.per_class is None


def test_rows_a_class_hold_for_builtin_tasks_and_what_has_none_says_so(
    own: Any, tmp_path: Path
) -> None:
    (tmp_path / "talk.txt").write_text("some words\n")
    places = {"mood": {"spec": "builtin:intents"}, "tint": {"spec": str(tmp_path / "talk.txt")}}
    plan = own(tasks=places, per_class=5).plan("mine", {})
    intents, _ = plan.sequences["there"]
    assert Counter(row.label for row in load_task(intents).train) == dict.fromkeys(range(8), 5)
    assert plan.told["differs"] == [
        "tint: all training rows; per_class is not for its kind of task"
    ]
