"""One head for all tasks of a sequence: gone on with, killed, served, judged, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sequences import RECIPE, run, told
from test_going_on import TOPICS, go_on, last_home, without_history
from test_recovery import stop_at
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from holdfast import EWC, LoRA, Merge, Recipe, Refused, load, load_task, run_sequence
from holdfast.cli import main
from holdfast.experiments import gate, learner, serving
from holdfast.experiments.record import Record
from holdfast.search.plan import Plan

EVERY = ["bad", "good", "count", "person", "place", "blue", "red"]  # in the order they come in
ONE: dict[str, Any] = {"head": "shared", "seed": 5, "epochs": 1.0}


def turned(folder: Path) -> Path:
    """Moods again: other rows, the labels in the other order."""
    rows = [json.loads(line) for line in models.write_task(folder, "mood", seed=1).open()]
    home = folder / "turned"
    home.mkdir()
    for split, part in (("train", rows[:28]), ("validation", rows[28:])):
        lines = [json.dumps({"text": r["text"], "label": int(r["label"] == "bad")}) for r in part]
        (home / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    about = {"task": "turned", "labels": ["good", "bad"], "metric": "f1"}
    (home / "meta.json").write_text(json.dumps(about))
    return home


def sequence(place: Path, out: Path, *tasks: str | Path, **more: Any) -> Record:
    found = [place / f"{t}.jsonl" if isinstance(t, str) else t for t in tasks]
    plain = {"recipe": "plain", "max_length": 16, "epochs": 1.0, "batch_size": 4, "lr": 5e-3}
    return run_sequence(str(place / "bert"), found, out=out, progress=False, **plain | more)


@pytest.fixture(scope="module")
def together(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run: EWC, replay and mixing."""
    out = tmp_path_factory.mktemp("together")
    run(place, out, recipe=RECIPE, **ONE)
    return out


ADAPTED = Recipe(peft=LoRA(rank=2), methods=[Merge()], name="adapted")


@pytest.mark.parametrize(
    "recipe", ["default", RECIPE, ADAPTED], ids=["default", "together", "adapted"]
)
def test_three_commands_on_three_days_are_one_command(
    recipe: Any, place: Path, tmp_path: Path
) -> None:
    """Head first, lwf on near rows, merging; EWC, replay and mixing; each task has new labels."""
    run(place, tmp_path / "whole", recipe=recipe, **ONE)
    run(place, tmp_path / "october", TOPICS[:1], recipe=recipe, **ONE)
    go_on(tmp_path / "october", TOPICS[1], tmp_path / "november", place=place)
    shutil.rmtree(tmp_path / "october")
    go_on(tmp_path / "november", TOPICS[2], tmp_path / "december", place=place)
    assert last_home(tmp_path / "december") == last_home(tmp_path / "whole")
    one, three = (without_history(tmp_path / name) for name in ("whole", "december"))
    for fit in (*one["head_first"].values(), *three["head_first"].values()):
        fit.pop("seconds")
    assert one == three
    assert not [*tmp_path.rglob("head-*.safetensors")]  # no task has one of its own


@pytest.mark.parametrize("call", [7, 12])  # within the second task or third: the head has grown
def test_killed_in_the_middle(
    call: int, place: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, place, tmp_path / "cut", module=learner.Learner, name="note_time",
            call=call, recipe=RECIPE, **ONE)  # fmt: skip
    run(place, tmp_path / "cut", recipe=RECIPE, **ONE)
    assert last_home(tmp_path / "cut") == last_home(together)
    assert told(tmp_path / "cut") == told(together)


def test_november_has_labels_that_october_had_not(place: Path, tmp_path: Path) -> None:
    """October was learned as ever: a single task's head is the same."""
    run(place, tmp_path / "a", TOPICS[:1], recipe="plain", seed=5, epochs=1.0)
    assert Record.load(tmp_path / "a").scenario is None
    record = go_on(tmp_path / "a", TOPICS[1], tmp_path / "b", place=place, head="shared")
    assert record.scenario == "class-incremental"
    assert [t["labels"] for t in record.tasks] == [EVERY[:2], EVERY[2:5]]  # each one's own
    served = load(tmp_path / "b")
    assert served.one_head and {id(m) for m in served.models.values()} == {
        id(served.models[TOPICS[0]])
    }
    together = run(place, tmp_path / "c", TOPICS[:2], recipe="plain", **ONE)
    assert last_home(tmp_path / "b") == last_home(tmp_path / "c")
    assert record.scores == together.scores
    more = go_on(tmp_path / "b", TOPICS[2], tmp_path / "e", place=place, recipe="ewc")
    assert more.scores[:2] == [[*row, None] for row in record.scores]  # remembered, not learned
    assert [t["labels"] for t in serving.described(tmp_path / "e" / "final")["tasks"]] == [
        EVERY
    ] * 3
    with pytest.raises(Refused, match=r"--head task: what it goes on from .* with --head shared"):
        go_on(tmp_path / "b", TOPICS[2], tmp_path / "d", place=place, head="task")
    for head in ("task", "prototype"):
        with pytest.raises(Refused, match="holds a run with other settings"):
            run(place, tmp_path / "c", recipe="plain", **{**ONE, "head": head})


def test_final_says_any_label_to_any_task(
    place: Path, together: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the record scored is what is served: over all labels, told by name."""
    record, served = Record.load(together), load(together)
    for j, topic in enumerate(record.names):
        task = load_task(place / f"{topic}.jsonl", seed=5)
        found = served.predict(topic, [r.text for r in task.evaluation], batch=3)
        assert [*found[0].probabilities] == EVERY
        truth = [(task.labels or ())[int(r.label)] for r in task.evaluation]
        right = [p.label == t for p, t in zip(found, truth, strict=True)]
        assert record.scores[-1][j] == pytest.approx(sum(right) / len(right))
    served.save(TOPICS[0], tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert [*model.config.id2label.values()] == EVERY
    rows, out = f"{place}/mood.jsonl?text=text", str(tmp_path / "said.jsonl")
    assert main(["predict", str(together), rows, "--task", "mood", "--out", out]) == 0
    assert "each one of all 7 labels of the tasks' one head" in capsys.readouterr().out


def test_the_gate_counts_labels_of_later_tasks_as_lost(place: Path, tmp_path: Path) -> None:
    record = sequence(place, tmp_path / "a", "mood", "question", head="shared", lr=2e-2, epochs=4.0)
    (found,) = gate.judge_run(tmp_path / "a", max_forgetting=0.02)
    assert found.before == record.scores[0][0] and found.after == record.scores[1][0]
    sequence(place, tmp_path / "b", "mood", lr=2e-2, epochs=4.0)
    tasks = [load_task(place / "mood.jsonl")]
    one, two = load(tmp_path / "b"), load(tmp_path / "a")
    assert gate.judge(one, two, tasks, max_forgetting=0.02) == [found]
    with pytest.raises(Refused, match="is another task"):
        renamed = tasks[0].renumbered(("bad", "good", "else"))
        gate.judge(two, two, [renamed], max_forgetting=0.02)


def test_the_same_labels_in_another_order_are_told_by_name(place: Path, tmp_path: Path) -> None:
    home = turned(tmp_path)
    record = sequence(place, tmp_path / "a", "mood", home, head="shared", epochs=12.0)
    assert record.scenario == "domain-incremental"
    assert record.tasks[1]["labels"] == ["good", "bad"]
    served = load(tmp_path / "a")
    assert served.models["turned"].config.num_labels == 2
    task = load_task(home)
    said = [p.label for p in served.predict("turned", [r.text for r in task.evaluation])]
    truth = [("good", "bad")[int(r.label)] for r in task.evaluation]
    hits = sum(a == b == "bad" for a, b in zip(said, truth, strict=True))
    f1 = 2 * hits / (said.count("bad") + truth.count("bad"))  # of the task's own second label
    assert record.scores[1][1] == pytest.approx(f1) and f1 > 0.7
    assert (record.scores[1][0] or 0) > 0.8  # they do not contradict each other


def test_a_classifier_in_use_grows(place: Path, tmp_path: Path) -> None:
    """Its own outputs come first, in its own order, and its score is the first row."""
    names = ["good", "bad"]
    model: Any = models.bert(num_labels=2, id2label=dict(enumerate(names)), seed=4)
    model.save_pretrained(tmp_path / "deployed")
    AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / "deployed")
    more: dict[str, Any] = {"place": place, "old_task": place / "mood.jsonl", "max_length": 16}
    recipe = Recipe(methods=[EWC(strength=1e9, rows=8)])
    record = go_on(tmp_path / "deployed", "question", tmp_path / "b", head="shared", recipe=recipe,
                   lr=1e-12, **more)  # fmt: skip
    served = load(tmp_path / "b").models["mood"].cpu()
    assert [*served.config.id2label.values()] == [*names, *EVERY[2:5]]
    torch.testing.assert_close(served.classifier.weight[:2], model.classifier.weight)
    alone = go_on(
        tmp_path / "deployed", "question", tmp_path / "t", recipe=recipe, lr=1e-12, **more
    )
    assert record.scores[0] == alone.scores[0] and record.scenario == "class-incremental"
    with pytest.raises(Refused, match="--head prototype: what it goes on from was learned"):
        go_on(tmp_path / "deployed", "question", tmp_path / "p", head="prototype", recipe="plain",
              **more)  # fmt: skip


def test_prototypes_take_no_step(place: Path, tmp_path: Path) -> None:
    """Three days are one command, the encoder stays as it is, and the record says so."""
    plain: dict[str, Any] = {"recipe": "plain", "head": "prototype", "seed": 5}
    record = run(place, tmp_path / "whole", **plain)
    run(place, tmp_path / "a", TOPICS[:1], **plain)
    go_on(tmp_path / "a", TOPICS[1], tmp_path / "b", place=place)
    go_on(tmp_path / "b", TOPICS[2], tmp_path / "c", place=place)
    assert last_home(tmp_path / "c") == last_home(tmp_path / "whole")
    assert without_history(tmp_path / "c") == without_history(tmp_path / "whole")
    assert record.steps == [0, 0, 0] and "No step was taken" in record.warnings[-1]
    base = AutoModel.from_pretrained(place / "bert")
    made: Any = load(tmp_path / "whole").models["mood"].base_model.cpu()
    assert models.same(models.weights(made), models.weights(base))
    _, found = serving.models_in(tmp_path / "whole" / "final")
    assert found[0].config.prototype_rows == [
        sum(row.label == label for row in task.train)
        for task in (load_task(place / f"{t}.jsonl", seed=5) for t in TOPICS)
        for label in range(len(task.labels or ()))
    ]
    with pytest.raises(Refused, match="what it goes on from was learned with --head prototype"):
        go_on(tmp_path / "a", TOPICS[1], tmp_path / "d", place=place, head="shared")


def test_prototypes_tell_what_is_far_and_take_further_classes(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "a", TOPICS[:2], recipe="plain", head="prototype", seed=5)
    rows = [json.loads(line)["text"] for line in (place / "colour.jsonl").open()]
    (tmp_path / "rows.csv").write_text(
        "id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(rows))
    )
    words = f"predict {tmp_path / 'a'} {tmp_path / 'rows.csv'} --task mood --keep id --out".split()
    for name in ("said.csv", "said.jsonl"):
        assert main([*words, str(tmp_path / name)]) == 0
    served = load(tmp_path / "a")
    far = [each.out_of_domain for each in served.predict("mood", rows)]
    assert min(far) > 0  # type: ignore[type-var]
    head, *lines = (tmp_path / "said.csv").read_text().splitlines()
    assert head == "id,label,probability,out_of_domain"
    assert [float(line.split(",")[3]) for line in lines] == pytest.approx(far)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").open()]
    assert [row["out_of_domain"] for row in said] == pytest.approx(far)
    colours = {c: [t for t in rows if c in t.split()][:6] for c in ("red", "blue")}
    more = served.add_classes(colours)
    before, after = (s.models["mood"].classifier.weight for s in (served, more))
    assert torch.equal(after[: len(before)], before) and len(after) == len(before) + 2
    new = [each.out_of_domain for each in more.predict("question", rows)]
    assert all(n <= f for n, f in zip(new, far, strict=True))  # type: ignore[operator]
    (lone,) = served.add_classes({"lone": rows[:1]}).predict("mood", rows[:1])
    assert lone.label == "lone" and lone.out_of_domain == pytest.approx(0, abs=1e-4)
    assert {each.label for each in served.predict("mood", rows)} <= set(EVERY[:5])
    more.save("mood", tmp_path / "model")
    again: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(again.classifier.weight, after.cpu())
    assert list(again.config.id2label.values()) == [*EVERY[:5], "red", "blue"]
    listed = "takes a list of texts"
    for wrong, why in [("red film", listed), ([("a", "b")], listed), ([], "no rows of 'x'")]:
        with pytest.raises(Refused, match=why):
            served.add_classes({"x": wrong})
    for none in ({}, [("red film", "x")]):
        with pytest.raises(Refused, match="needs labels, each with its texts"):
            served.add_classes(none)


def test_what_does_not_go_with_one_head_is_refused(place: Path, tmp_path: Path) -> None:
    """Before anything is made."""
    numbers = tmp_path / "n.jsonl"
    numbers.write_text("".join(f'{{"text": "a {i}", "label": {i / 7}}}\n' for i in range(30)))
    out = tmp_path / "a"
    for head in ("shared", "prototype"):
        with pytest.raises(Refused, match=f"--head {head}: numbers have no classes"):
            sequence(place, out, "mood", Path(f"{numbers}?type=regression"), head=head)
    for recipe in ("ewc", "bertcl", Recipe(peft=LoRA())):
        with pytest.raises(Refused, match=r"--head prototype: trains nothing, .* --recipe plain"):
            sequence(place, out, "mood", "colour", head="prototype", recipe=recipe)
    with pytest.raises(Refused, match="--alone: a task alone has other labels than the head"):
        sequence(place, out, "mood", "colour", head="shared", alone=True)
    text = tmp_path / "t.jsonl"
    text.write_text(
        "".join(f'{{"prompt": "a {i}", "answer": "film {i % 3}"}}\n' for i in range(30))
    )
    with pytest.raises(Refused, match="--head shared: tasks of kind generation have no heads"):
        sequence(place, out, text, head="shared")
    with pytest.raises(Refused, match="--head: Input should be 'task', 'shared'"):
        sequence(place, out, "mood", head="both")
    with pytest.raises(Refused, match="--head: is no setting of a search"):
        Plan.make("minilm", ["builtin:intents"], head="shared")  # type: ignore[call-arg]
    assert not out.exists()


def test_forward_transfer_is_measured_where_labels_stay(place: Path, tmp_path: Path) -> None:
    record = sequence(place, tmp_path / "a", "mood", turned(tmp_path), head="shared", alone=True)
    assert record.forward_transfer is not None


def test_other_scenarios(place: Path, whole: Path) -> None:
    assert Record.load(whole).scenario == "task-incremental"
