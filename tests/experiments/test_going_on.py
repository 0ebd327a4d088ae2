"""A task learned later: in the same folder, from another run, from a classifier in use."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sequences import SETTINGS, files, run, told
from test_recovery import stop_at
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from holdfast import EWC, Recipe, Refused, ReInit, cli, load, load_task, run_sequence
from holdfast.experiments import gate, learner, origin, serving
from holdfast.experiments.record import Record
from holdfast.methods import METHODS
from holdfast.training import checkpoints, saving

TOPICS = tuple(models.TOPICS)
TINY = {"ewc": {"rows": 8}, "replay": {"memory": 4}, "dps": {"stage": 4}, "merge": {"rows": 8},
        "gpm": {"rows": 8}, "kfac_ewc": {"rows": 8, "every": 2}}  # fmt: skip


def go_on(last: Path, topic: str, out: Path, **more: Any) -> Record:
    """One more task after those of a run."""
    place = more.pop("place")
    given = {**{k: v for k, v in SETTINGS.items() if k == "progress"}, **more}
    return run_sequence(None, [place / f"{topic}.jsonl"], from_run=last, out=out, **given)


def last_home(folder: Path) -> dict[str, str]:
    """The files of the last task's folder by SHA-256."""
    found = files(folder)
    last = max(found, key=lambda name: int(name.split("/")[1].split("-")[0])).rsplit("/", 1)[0]
    return {name: sha for name, sha in found.items() if name.startswith(last)}


def without_history(folder: Path) -> dict[str, Any]:
    record = told(folder)
    for key in ("from", "began", "created"):
        record.pop(key, None)
    for task in record["tasks"]:
        task.pop("chosen", None)
    for moved in record["movement"].values():
        moved.pop("overlap", None)  # it needs the folders of both tasks
    return record


# Those that end no task carry nothing over but what each task begins with.
CARRYING = [n if m.defines("end_task") else pytest.param(n, marks=pytest.mark.slow)
            for n, m in METHODS.items()]  # fmt: skip


@pytest.mark.parametrize("name", CARRYING)
def test_three_commands_on_three_days_are_one_command(
    name: str, place: Path, tmp_path: Path
) -> None:
    recipe = Recipe(methods=[METHODS[name].from_dict(TINY.get(name, {}))])
    one = {"recipe": recipe, "seed": 3, "epochs": 1.0}
    run(place, tmp_path / "whole", **one)
    run(place, tmp_path / "october", TOPICS[:1], **one)
    go_on(tmp_path / "october", TOPICS[1], tmp_path / "november", place=place)
    shutil.rmtree(tmp_path / "october")  # it is not needed any more
    go_on(tmp_path / "november", TOPICS[2], tmp_path / "december", place=place)
    assert last_home(tmp_path / "december") == last_home(tmp_path / "whole")
    assert without_history(tmp_path / "december") == without_history(tmp_path / "whole")


def test_only_a_fresh_network_begins_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a second task, and a restart within the first goes on from its checkpoint."""
    anew: list[int] = []
    prepare = ReInit.prepare

    def counted(method: ReInit, model: Any) -> Any:
        anew.append(1)
        return prepare(method, model)

    monkeypatch.setattr(ReInit, "prepare", counted)
    one = {"recipe": Recipe(methods=[ReInit(layers=1)]), "seed": 3}
    run(place, tmp_path / "whole", TOPICS[:2], **one)
    assert len(anew) == 1
    stop_at(monkeypatch, place, tmp_path / "b", module=saving, name="rotate", call=3,
            topics=TOPICS[:2], **one)  # fmt: skip
    run(place, tmp_path / "b", TOPICS[:2], **one)
    assert len(anew) == 3
    assert files(tmp_path / "b") == files(tmp_path / "whole")
    go_on(tmp_path / "b", TOPICS[2], tmp_path / "c", place=place)
    assert len(anew) == 3


def test_tasks_added_in_the_same_folder(place: Path, whole: Path, tmp_path: Path) -> None:
    run(place, tmp_path, TOPICS[:1], seed=5)
    assert Record.load(tmp_path).kind == "train"
    run(place, tmp_path, TOPICS[:2], seed=5)
    run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole) and told(tmp_path) == told(whole)
    with pytest.raises(Refused, match="holds a run with other settings"):
        run(place, tmp_path, (TOPICS[1], TOPICS[0]), seed=5)


def test_killed_while_it_goes_on(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, tmp_path / "a", TOPICS[:2], seed=5)
    for name in ("keep", "learn"):  # before anything is learned, and after the checkpoint

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(learner.Learner, name, stop)
            go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=place)
    go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=place)
    assert last_home(tmp_path / "b") == last_home(whole)
    assert without_history(tmp_path / "b") == without_history(whole)


def test_another_recipe_remembers_the_old_tasks(place: Path, tmp_path: Path) -> None:
    """As a twin does by hand: EWC's Fisher information of the old tasks, on their rows."""
    plain = {"recipe": "plain", "seed": 2, "epochs": 1.0}
    run(place, tmp_path / "a", TOPICS[:2], **plain)
    ewc = Recipe(methods=[EWC(rows=1000, labels="expected")])
    record = go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=place, recipe=ewc)
    assert [each["name"] for each in record.extra["began"]] == ["plain"]
    assert record.scores[:2] == [[*row, None] for row in Record.load(tmp_path / "a").scores]
    state = checkpoints.read_state(tmp_path / "b" / "tasks" / f"2-{TOPICS[1]}")
    assert state["meta"]["finished"] == list(TOPICS[:2])

    _, old = serving.models_in(tmp_path / "a" / "final")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "a" / "final")
    bound = ewc.unbound(seed=2)
    for topic, model in zip(TOPICS, old, strict=False):
        task = load_task(place / f"{topic}.jsonl", seed=2)
        batches = [
            {**tokens(row.text, return_tensors="pt"), "labels": torch.tensor([row.label])}
            for row in task.train
        ]
        bound.remember(topic, model, batches, shared=model.base_model)
    for key, tensor in bound.state_dict()["tensors"].items():
        if key != "generator":
            torch.testing.assert_close(state["tensors"][key], tensor, rtol=1e-4, atol=1e-7)


def test_rows_that_are_gone_or_changed(place: Path, tmp_path: Path) -> None:
    here = tmp_path / "place"
    shutil.copytree(place, here)
    plain = {"recipe": "plain", "epochs": 1.0}
    run(here, tmp_path / "a", TOPICS[:2], **plain)
    file = here / f"{TOPICS[0]}.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[1:], lines[0]]))
    with pytest.raises(Refused, match=f"{TOPICS[0]} .*its rows changed since.*--without-old-rows"):
        go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=here)
    file.unlink()
    with pytest.raises(Refused, match=f"{TOPICS[0]} .*cannot be read again.*--without-old-rows"):
        go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=here)
    assert not (tmp_path / "b").exists()
    with pytest.raises(Refused, match="its rows are gone, and the recipe reads them"):
        go_on(tmp_path / "a", TOPICS[2], tmp_path / "c", place=here, without_old_rows=True,
              recipe="ewc")  # fmt: skip
    record = go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=here, without_old_rows=True)
    assert record.scores[1][0] is not None
    assert record.scores[2][:2] == [None, None] and record.scores[2][2] is not None
    # its head is still there
    assert load(tmp_path / "b").predict(TOPICS[0], ["a good film"])[0].label


def test_the_wrong_tasks_added_can_be_taken_back(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as nothing of them is learned."""
    run(place, tmp_path, TOPICS[:1], seed=5)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Learner, "learn", stop)
        run(place, tmp_path, (TOPICS[0], TOPICS[2], TOPICS[1]), seed=5)
    assert run(place, tmp_path, TOPICS[:1], seed=5).names == [TOPICS[0]]
    run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole) and told(tmp_path) == told(whole)


@pytest.mark.parametrize("recipe", [None, "ewc"])  # linked as it is, and remembered anew
def test_killed_while_it_begins(
    recipe: str | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(place, tmp_path / "a", TOPICS[:1], recipe="plain", epochs=1.0)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    where = (serving, "_link") if recipe is None else (learner, "commit")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, stop)
        go_on(tmp_path / "a", TOPICS[1], tmp_path / "b", place=place, recipe=recipe)
    assert list((tmp_path / "b" / "tasks").glob("1-*"))
    record = go_on(tmp_path / "a", TOPICS[1], tmp_path / "b", place=place, recipe=recipe)
    assert record.status == "done" and record.scores[1][0] is not None


def test_final_is_made_again(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, TOPICS[:1], recipe="plain", epochs=1.0)
    shutil.rmtree(tmp_path / "final")
    with pytest.raises(Refused, match="run its command to the end"):
        load(tmp_path)
    run(place, tmp_path, TOPICS[:1], recipe="plain", epochs=1.0)
    assert load(tmp_path).tasks


def test_names_of_strangers_lead_nowhere(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "evil")
    for file in ("record.json", "final/tasks.json"):
        path = tmp_path / "evil" / file
        body = path.read_text().replace(f'"name": "{TOPICS[0]}"', '"name": "x/../../y"')
        unsealed = {k: v for k, v in json.loads(body).items() if k != "sha256"}
        path.write_text(json.dumps(unsealed))
    with pytest.raises(Refused, match="a task's name is not a plain name"):
        origin.origin_of(tmp_path / "evil", None)
    with pytest.raises(Refused, match=r"tasks\.json is damaged"):
        serving.described(tmp_path / "evil" / "final")


def test_a_configuration_that_is_not_its_records_is_not_gone_on_from(
    whole: Path, tmp_path: Path
) -> None:
    """A flipped bit of it would be another recipe, without a word (faults P3)."""
    shutil.copytree(whole, tmp_path / "run")
    assert origin.origin_of(tmp_path / "run", None).seed is not None
    path = tmp_path / "run" / "run.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"seed": body["seed"] + 1}))
    with pytest.raises(Refused, match=r"run\.json: is not as its record\.json has it \(seed: "):
        origin.origin_of(tmp_path / "run", None)


@pytest.fixture
def classifier(place: Path, tmp_path: Path) -> Path:
    """A model trained on the first topic, its labels in another order than holdfast's own."""
    task = load_task(place / f"{TOPICS[0]}.jsonl")
    names = list(reversed(task.labels or ()))
    model: Any = models.bert(num_labels=len(names), id2label=dict(enumerate(names)), seed=4,
                             label2id={n: i for i, n in enumerate(names)})  # fmt: skip
    model.save_pretrained(tmp_path / "deployed")
    AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / "deployed")
    return tmp_path / "deployed"


def test_a_classifier_in_use_is_protected(place: Path, tmp_path: Path, classifier: Path) -> None:
    old = place / f"{TOPICS[0]}.jsonl"
    record = go_on(classifier, TOPICS[1], tmp_path / "b", place=place, old_task=old,
                   recipe=Recipe(methods=[EWC(strength=1e9, rows=8)]), max_length=16)  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokens = AutoTokenizer.from_pretrained(classifier)
    task = load_task(old)
    right = 0
    for row in task.evaluation:
        best = int(model(**tokens(row.text, return_tensors="pt")).logits.argmax())
        right += model.config.id2label[best] == (task.labels or ())[int(row.label)]
    assert record.scores[0][0] == pytest.approx(right / len(task.evaluation))
    assert record.steps[0] == 0 and record.steps[1]
    head = load(tmp_path / "b").models[TOPICS[0]].classifier.weight
    assert torch.equal(head.cpu(), model.classifier.weight)  # its own, still

    assert record.model["hash"] and record.rates and record.extra["from"] == str(classifier)
    assert record.extra["began"] == [None]  # what it learned with is not known
    assert 0 <= (record.seconds[0] or 0) < 600
    gate.judge_run(tmp_path / "b", max_forgetting=1.0)  # though its order is not the rows'
    go_on(tmp_path / "b", TOPICS[2], tmp_path / "d", place=place)

    with pytest.raises(Refused, match="are not of its head"):
        go_on(classifier, TOPICS[1], tmp_path / "c", place=place,
              old_task=f"{place / TOPICS[2]}.jsonl")  # fmt: skip
    unnamed = json.loads((classifier / "config.json").read_text())
    unnamed["id2label"] = {i: f"LABEL_{i}" for i in unnamed["id2label"]}
    (classifier / "config.json").write_text(json.dumps(unnamed))
    with pytest.raises(Refused, match=r"are not of its head.*id2label"):
        go_on(classifier, TOPICS[1], tmp_path / "c", place=place, old_task=old)
    with pytest.raises(Refused, match="add --old-task"):
        go_on(classifier, TOPICS[1], tmp_path / "c", place=place)


def test_what_cannot_be_gone_on_from(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match="neither a run nor a saved model"):
        go_on(place, TOPICS[0], tmp_path / "b", place=place)
    with pytest.raises(Refused, match=f"two tasks are called '{TOPICS[0]}'"):
        go_on(whole, TOPICS[0], tmp_path / "b", place=place)
    with pytest.raises(Refused, match="leave out --model"):
        run_sequence("minilm", [place / f"{TOPICS[0]}.jsonl"], from_run=whole)
    with pytest.raises(Refused, match="leave out --old-task"):
        origin.origin_of(whole, "x.csv")
    stop_at(monkeypatch, place, tmp_path / "cut", module=learner.Learner, name="learn", call=2)
    with pytest.raises(Refused, match="is not finished"):
        origin.origin_of(tmp_path / "cut", None)
    with pytest.raises(Refused, match=r"--from .* goes on with all its tasks; .*final is a model"):
        run_sequence(str(whole), [place / f"{TOPICS[0]}.jsonl"], out=tmp_path / "b")


# --- what is left to be used ----------------------------------------------------------------------


def test_final_serves_every_task_with_one_encoder(place: Path, whole: Path) -> None:
    """Its predictions are those that the record's last row scored."""
    served, record = load(whole), Record.load(whole)
    assert list(served.tasks) == record.names
    encoders = {id(model.base_model) for model in served.models.values()}
    assert len(encoders) == 1
    for j, topic in enumerate(record.names):
        task = load_task(place / f"{topic}.jsonl", seed=5)
        second = [r.pair or "" for r in task.evaluation] if task.pairs else None
        found = served.predict(topic, [r.text for r in task.evaluation], second, batch=3)
        said = [p.label for p in found]
        truth = [(task.labels or ())[int(r.label)] for r in task.evaluation]
        right = sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)
        assert right == pytest.approx(record.scores[-1][j])
        for each in found:
            assert sum(each.probabilities.values()) == pytest.approx(1.0)
            assert max(each.probabilities, key=each.probabilities.__getitem__) == each.label
    size = sum(p.stat().st_size for p in (whole / "final").glob("*.safetensors"))
    assert size < 1.2 * (whole / "final" / "model.safetensors").stat().st_size


def test_a_full_disk_leaves_no_part_of_an_exported_model(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, out = load(whole), tmp_path / "model"

    def full(folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served.processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        served.save(TOPICS[0], out)
    assert not [*out.iterdir()]
    monkeypatch.undo()
    served.save(TOPICS[0], out)  # the same command again


def test_no_class_is_said_of_outputs_that_are_not_finite(whole: Path) -> None:
    """As of a word that only the rows of now have: the largest of NaNs is the first class."""
    served, topic = load(whole), TOPICS[0]
    embedded = served.models[topic].base_model.get_input_embeddings().weight
    (token,) = served.processor("sad", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        embedded[token] = float("nan")
    with pytest.raises(Refused, match=f"^{topic}: the model's outputs are not finite"):
        served.predict(topic, ["sad"])


def test_final_is_no_second_copy_and_needs_no_holdfast(whole: Path) -> None:
    home, final = max((whole / "tasks").iterdir()), whole / "final"
    one, two = (folder / "model.safetensors" for folder in (home, final))
    assert one.stat().st_ino == two.stat().st_ino
    assert not list(final.glob("holdfast*"))
    assert AutoModelForSequenceClassification.from_pretrained(final).config.num_labels


def test_one_task_as_an_ordinary_model(whole: Path, tmp_path: Path) -> None:
    served = load(whole)
    served.save(TOPICS[0], tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "m")("a good film", return_tensors="pt")
    shares = model(**inputs).logits.softmax(1)[0].tolist()
    given = served.predict(TOPICS[0], ["a good film"])[0].probabilities
    assert list(given.values()) == pytest.approx(shares, abs=1e-6)
    assert list(given) == [model.config.id2label[i] for i in range(len(shares))]
    with pytest.raises(Refused, match="is not empty"):
        served.save(TOPICS[0], tmp_path / "m")


def test_in_onnx_by_optimum(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A stand-in for Optimum: what it is given, and what is left where it is missing or fails."""
    command = ["export", str(whole), "--task", TOPICS[0], "--onnx", "--out"]
    for name in ("optimum", "optimum.exporters", "optimum.exporters.onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refused, match=r"pip install 'optimum\[onnxruntime\]'"):
        load(whole).save(TOPICS[0], tmp_path / "a", onnx=True)
    assert not (tmp_path / "a").exists()

    def export(model: Any, output: Path) -> None:
        output.mkdir()
        (output / "model.onnx").write_text(str(model.config.num_labels))
        assert {p.device.type for p in model.parameters()} == {"cpu"}

    stub = types.ModuleType("optimum.exporters.onnx")
    stub.onnx_export_from_model = export  # type: ignore[attr-defined]
    for name in ("optimum", "optimum.exporters"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    assert cli.main([*command, str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "onnx" / "model.onnx").read_text() == "2"
    AutoTokenizer.from_pretrained(tmp_path / "b" / "onnx")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")

    def cannot(*_: Any) -> None:
        raise ValueError("Trying to export a thing\nthat is custom")

    stub.onnx_export_from_model = cannot  # type: ignore[attr-defined]
    with pytest.raises(Refused, match=r"cannot export it .Trying to export a thing.; .*is whole"):
        load(whole).save(TOPICS[0], tmp_path / "c", onnx=True)


def test_labels_that_are_not_those_of_the_head(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "final", tmp_path / "final")
    body = json.loads((tmp_path / "final" / "tasks.json").read_text())
    body["tasks"][-1]["labels"].append("one more")
    (tmp_path / "final" / "tasks.json").write_text(json.dumps(body))
    with pytest.raises(Refused, match=r"a head of \d outputs for \d labels"):
        serving.models_in(tmp_path / "final")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("max_length", value) for value in (0, -5, 0.5, "16", None)],
        *[("labels", value) for value in ([1, 2], {"no": 0, "yes": 1}, "ab", [["a"]], ["a", "a"])],
    ],
)
def test_what_is_told_of_the_tasks_is_checked(
    key: str, value: Any, whole: Path, tmp_path: Path
) -> None:
    """Labels "ab" were answered as a and b; of 0 tokens a model made a traceback."""
    body = json.loads((whole / "final" / "tasks.json").read_text())
    (body if key == "max_length" else body["tasks"][-1])[key] = value
    (tmp_path / "tasks.json").write_text(json.dumps(body))
    with pytest.raises(Refused, match=r"tasks\.json is damaged"):
        serving.described(tmp_path)


def test_what_cannot_be_loaded(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is no run"):
        load(tmp_path)
    served = load(whole)
    with pytest.raises(Refused, match=f"did you mean '{TOPICS[0]}'"):
        served.predict(TOPICS[0][:-1], ["a"])
    with pytest.raises(Refused, match="takes one text"):
        served.predict(TOPICS[0], ["a"], ["b"])
    shutil.copytree(whole, tmp_path / "copy")
    file = tmp_path / "copy" / "final" / "tasks.json"
    body = json.loads(file.read_text())
    body["tasks"].reverse()
    file.write_text(json.dumps(body, indent=1))
    with pytest.raises(Refused, match=r"tasks\.json is not as it was written"):
        load(tmp_path / "copy")
