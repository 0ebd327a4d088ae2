"""Hub ids, through the real `datasets` objects; only the download itself is a stand-in."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from holdfast.errors import Refused
from holdfast.tasks import load_task
from holdfast.tasks.hub import answers


def split(count: int, names: list[str] | None = None, start: int = 0) -> datasets.Dataset:
    columns = {
        "sentence1": [f"first {start + i}" for i in range(count)],
        "sentence2": [f"second {start + i}" for i in range(count)],
        "label": [i % 2 if names else i / 4 for i in range(count)],
        "idx": list(range(count)),
    }
    label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    features = datasets.Features(
        sentence1=datasets.Value("string"),
        sentence2=datasets.Value("string"),
        label=label,
        idx=datasets.Value("int32"),
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def hub(monkeypatch):
    """Whatever is put into `found` is what the Hub holds; `asked` is what it was asked for."""

    class Hub:
        found: object = None
        asked: tuple[object, ...] = ()

    def load_dataset(path: str, name: str | None = None, **options: object) -> object:
        Hub.asked = (path, name, options)
        if isinstance(Hub.found, Exception):
            raise Hub.found
        return Hub.found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["different", "same"]
    Hub.found = datasets.DatasetDict(
        train=split(40, names), validation=split(10, names, 90), test=split(6, names, 200)
    )
    return Hub


@pytest.mark.parametrize(
    "spec, path, config",
    [
        ("glue/mrpc", "nyu-mll/glue", "mrpc"),
        ("hub:nyu-mll/glue/mrpc", "nyu-mll/glue", "mrpc"),
        ("nyu-mll/glue?config=mrpc", "nyu-mll/glue", "mrpc"),
        ("owner/name", "owner/name", None),
        ("hub:name", "name", None),
    ],
)
def test_an_id_names_a_dataset_and_its_configuration(hub, spec, path, config) -> None:
    task = load_task(spec)
    assert hub.asked == (path, config, {"revision": None})  # no code from the Hub is asked for
    assert task.source == "hub:" + spec.removeprefix("hub:")  # whatever folder there is later
    assert task.labels == ("different", "same") and task.metric == "accuracy"
    assert task.rows == {"train": 36, "selection": 4, "evaluation": 10}
    assert task.evaluation[1].text == "first 91" and task.evaluation[1].pair == "second 91"


def test_a_revision_and_a_split_can_be_pinned(hub) -> None:
    task = load_task("glue/mrpc?revision=abc123&evaluation=test")
    assert hub.asked[2] == {"revision": "abc123"}
    assert task.rows["evaluation"] == 6


def test_a_float_label_is_a_regression(hub) -> None:
    hub.found = datasets.DatasetDict(train=split(40), validation=split(10, start=90))
    task = load_task("glue/stsb")
    assert task.labels is None and task.metric == "spearman"
    assert task.evaluation[3].label == 0.75


def test_without_held_out_rows_they_are_carved(hub) -> None:
    hub.found = datasets.DatasetDict(train=split(40, ["a", "b"]))
    assert load_task("owner/name").rows["evaluation"] == 8


def test_unlabelled_rows_are_named(hub) -> None:
    rows = split(6, ["a", "b"], 200)
    hub.found["test"] = rows.map(lambda row: {"label": -1})
    said = "glue/mrpc, test: 6 bad rows: row 1: label -1 is outside 0 to 1; row 2: label -1"
    with pytest.raises(Refused, match=said):
        load_task("glue/mrpc?evaluation=test")


@pytest.mark.parametrize(
    "found, said",
    [
        (ConnectionError("no route\nto host"), r"no dataset \(ConnectionError: no route\)"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer"),
        (ValueError(""), r"\(ValueError: \)"),
        (datasets.DatasetDict(test=split(4, ["a", "b"])), "no split 'train'; it has 'test'"),
        (split(4, ["a", "b"]), "has no splits"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, found, said) -> None:
    hub.found = found
    with pytest.raises(Refused, match=said) as caught:
        load_task("owner/name")
    assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_is_refused(hub) -> None:
    with pytest.raises(Refused, match="no split 'valid'; did you mean 'validation'"):
        load_task("glue/mrpc?evaluation=valid")
    with pytest.raises(Refused, match="configuration stands twice"):
        load_task("glue/mrpc?config=qqp")


def test_without_a_network_the_hub_is_not_tried(hub, answering) -> None:
    answering.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answering.setattr("holdfast.tasks.hub.answers", lambda _: False)
    with pytest.raises(Refused, match=r"^glue/mrpc: no network: https://.*; .*HF_HUB_OFFLINE=1"):
        load_task("glue/mrpc")
    assert hub.asked == ()


def test_what_was_fetched_before_needs_no_network(hub, answering) -> None:
    answering.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answering.setattr("holdfast.tasks.hub.answers", lambda _: pytest.fail("asked the network"))
    assert load_task("glue/mrpc").labels == ("different", "same")


@pytest.mark.parametrize("wait", [0.0, 30.0])
def test_the_hub_has_seconds_to_answer_and_is_asked_once(wait: float, answering) -> None:
    """A name that resolves for half a minute holds nobody up; a refusal comes at once."""
    calls = []

    class Session:
        def head(self, endpoint: str, timeout: float) -> None:
            calls.append((endpoint, timeout))
            time.sleep(wait)
            raise OSError("no route to host")

    answering.undo()
    answering.setattr("huggingface_hub.get_session", Session)
    answering.setattr("holdfast.tasks.hub.PATIENCE", 0.2)
    began = time.monotonic()
    assert not answers(f"https://hub.test/{wait}") and not answers(f"https://hub.test/{wait}")
    assert time.monotonic() - began < 5
    assert calls == [(f"https://hub.test/{wait}", 0.2)]


def test_any_answer_is_a_network(answering) -> None:
    class Session:
        def head(self, endpoint: str, timeout: float) -> int:
            return 503

    answering.undo()
    answering.setattr("huggingface_hub.get_session", Session)
    assert answers("https://hub.test/any")


def test_the_clients_lines_stay_off_the_terminal(hub) -> None:
    load_task("glue/mrpc")
    for name in ("huggingface_hub.utils._http", "datasets.load"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)


def test_the_real_loader_refuses_when_offline(tmp_path: Path) -> None:
    code = (
        "from holdfast.tasks import load_task\n"
        "from holdfast.errors import Refused\n"
        "try: load_task('hub:owner/name')\n"
        "except Refused as refusal: print('refused', refusal)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("refused owner/name: the Hub gave no dataset")
    assert done.stdout.count("\n") == 1


def test_the_real_loader_reads_a_dataset(hub, tmp_path: Path, monkeypatch) -> None:
    """`load_dataset` itself, on files written here: the objects it makes are what we read."""
    monkeypatch.undo()
    for name, start in (("train", 0), ("validation", 50)):
        rows = [{"text": f"t {start + i}", "label": "ab"[i % 2]} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = datasets.load_dataset

    def local(path: str, name: str | None = None, **options: object) -> object:
        return real("json", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    task = load_task("owner/name")
    assert task.labels == ("a", "b") and task.evaluation[0].text == "t 50"
