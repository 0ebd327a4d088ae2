"""Sequences of tiny tasks: what a record holds, what is refused, what a kill changes (nothing)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from sequences import RECIPE, SETTINGS, files, forbid, run, told
from transformers import AutoModelForSequenceClassification

from holdfast import PEFT, Rates, Recipe, Refused, run_sequence
from holdfast.experiments import sequence
from holdfast.experiments.record import Record
from holdfast.experiments.runs import WEIGHTS
from holdfast.methods import ChildTuning
from holdfast.tasks.kinds import pretrained
from holdfast.tasks.kinds.pretrained import files_hash

TOPICS = tuple(models.TOPICS)

# --- the record ---------------------------------------------------------------------------------


def test_the_record_is_complete(place: Path, whole: Path) -> None:
    record = json.loads((whole / "record.json").read_text())
    assert record["status"] == "done" and record["kind"] == "sequence" and record["seed"] == 5
    for name in ("scores", "selection_scores"):
        for i, row in enumerate(record[name]):
            assert [cell is None for cell in row] == [j > i for j in range(3)]
            assert all(0 <= cell <= 1 for cell in row[: i + 1])
    assert [t["name"] for t in record["tasks"]] == list(models.TOPICS)
    for task in record["tasks"]:
        assert {split: sum(n) for split, n in task["classes"].items()} == task["rows"]
    assert record["tasks"][1]["labels"] == ["count", "person", "place"]
    for task in record["tasks"]:
        assert sum(task["rows"].values()) == 40 and len(task["hash"]) == 64
        assert task["metric"] == "accuracy" and task["synthetic"] is False
    assert record["steps"] == [16, 16, 16] and record["skipped_steps"] == [0, 0, 0]
    assert len(record["seconds"]) == 3 and min(record["seconds"]) > 0
    assert record["settings"]["lr"] == 5e-3 and record["settings"]["accumulation"] == 2
    assert record["settings"]["model"] == str(place / "bert")
    assert Recipe.from_dict(record["recipe"]) == RECIPE
    assert record["versions"].keys() >= {"python", "torch", "transformers", "holdfast"}
    assert record["model"]["architecture"] == "BertModel" and record["model"]["layers"] == 2
    assert record["rates"]["order"] == ["embeddings", "layer.0", "layer.1", "head"]
    assert record["exposure"] is None
    last = [h for h in record["history"] if h["learning"] == 2]
    assert [h["epoch"] for h in last] == [1.0, 2.0] and len(last[0]["scores"]) == 3
    first = [h for h in record["history"] if h["learning"] == 0]
    assert first[0]["scores"][1:] == [None, None]


def test_metrics_follow_from_the_matrix(whole: Path) -> None:
    record = Record.load(whole)
    s = record.scores
    assert record.metrics["forgetting"] == record.forgetting
    assert record.new_plus_old is not None and record.forward_transfer is None
    assert s[2][2] is not None


def test_the_record_reads_what_the_checkpoints_predict(place: Path, whole: Path) -> None:
    """scores[i][i] once more, from the saved folder alone, with nothing of ours but the metric."""
    from transformers import AutoTokenizer

    record = Record.load(whole)
    tasks = sequence.load_tasks(
        [place / f"{t}.jsonl" for t in models.TOPICS], seed=5, plan=sequence.Settings()
    )
    for i, task in enumerate(tasks):
        home = whole / "tasks" / f"{i + 1}-{task.name}"
        model = AutoModelForSequenceClassification.from_pretrained(home).eval()
        tokens = AutoTokenizer.from_pretrained(home)
        right = 0
        for row in task.evaluation:
            with torch.no_grad():
                logits = model(**tokens(row.text, return_tensors="pt")).logits
            right += int(logits.argmax()) == row.label
        assert right / len(task.evaluation) == pytest.approx(record.scores[i][i])
        assert model.config.id2label == dict(enumerate(task.labels or ()))


def test_nothing_but_results_is_left(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == [
        "final",
        "lease.1",
        "record.json",
        "run.json",
        "tasks",
    ]
    for home in (whole / "tasks").iterdir():
        assert not [p.name for p in home.iterdir() if p.is_dir()]


def test_the_seed_alone_decides(place: Path, whole: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "same", seed=5)
    torch.manual_seed(99)  # and no state of the process
    assert files(tmp_path / "same") == files(whole)
    assert told(tmp_path / "same") == told(whole)
    run(place, tmp_path / "other", seed=6)
    assert files(tmp_path / "other") != files(whole)


def test_saving_more_often_changes_nothing(place: Path, whole: Path, tmp_path: Path) -> None:
    for save_steps in (0, None):
        run(place, tmp_path / str(save_steps), seed=5, save_steps=save_steps)
        assert files(tmp_path / str(save_steps)) == files(whole)


def test_methods_are_at_work(place: Path, whole: Path, tmp_path: Path) -> None:
    run(place, tmp_path, recipe=Recipe(rates=Rates.bertcl()), seed=5)
    names = [n for n in files(tmp_path) if n.endswith("model.safetensors")]
    assert len(names) == 3
    assert all(files(tmp_path)[n] != files(whole)[n] for n in names)


def test_a_task_is_learned(place: Path, tmp_path: Path) -> None:
    record = run(place, tmp_path, ("mood",), "plain", epochs=12.0, lr=1e-2, save_steps=0)
    assert record.kind == "train" and record.scores[0][0] >= 0.75
    assert record.history[-1]["loss"] < record.history[0]["loss"]


def test_alone_gives_forward_transfer(place: Path, tmp_path: Path) -> None:
    record = run(place, tmp_path, ("mood", "colour"), "plain", alone=True, epochs=1.0)
    by_itself = Record.load(tmp_path / "alone" / "colour")
    assert record.alone == {"colour": by_itself.scores[0][0]}
    assert record.forward_transfer == pytest.approx(record.scores[1][1] - record.alone["colour"])
    assert (
        by_itself.settings["lr"] == record.settings["lr"] and by_itself.settings["alone"] is False
    )
    again = run(place, tmp_path, ("mood", "colour"), "plain", alone=True, epochs=1.0)
    assert again.to_dict() == record.to_dict()


def test_a_task_alone_draws_what_it_draws_in_its_sequence(place: Path, tmp_path: Path) -> None:
    """Forward transfer is a difference of two runs: they begin with one head."""
    run(place, tmp_path, ("mood", "colour"), "plain", alone=True, lr=1e-12, epochs=0.5)
    name = "classifier.weight"
    heads = [load_file(tmp_path / home / "model.safetensors")[name]
             for home in ("tasks/2-colour", "alone/colour/tasks/1-colour")]  # fmt: skip
    torch.testing.assert_close(*heads, atol=1e-7, rtol=0)


def test_regression_bf16_and_epochs_in_part(tmp_path: Path, place: Path) -> None:
    (tmp_path / "size.csv").write_text(
        "text,label\n" + "".join(f"the film {'good ' * (i % 7)},{i % 7}.5\n" for i in range(40))
    )
    record = run_sequence(str(place / "bert"), [f"{tmp_path}/size.csv?type=regression"], "plain",
                          out=tmp_path / "run", bf16=True, warmup=2, schedule="cosine",
                          **{**SETTINGS, "epochs": 1.5})  # fmt: skip
    assert record.tasks[0]["labels"] is None and record.tasks[0]["metric"] == "spearman"
    assert record.steps == [12] and -1 <= record.scores[0][0] <= 1
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/tasks/1-size")
    assert saved.config.problem_type == "regression" and saved.dtype == torch.float32


# --- a finished run is only read ------------------------------------------------------------------


def test_a_finished_run_is_only_read(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "load_model", "load_processor", "Trainer")
    before = (whole / "record.json").read_bytes()
    record = run(place, whole, seed=5)
    assert record.to_dict() == Record.load(whole).to_dict()
    assert (whole / "record.json").read_bytes() == before


def test_a_moved_run_knows_where_it_is(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "moved")
    assert run(place, tmp_path / "moved", seed=5).settings["out"] == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"lr": 1e-3}, "settings"), ({"seed": 6}, "seed: 5 → 6"), ({"recipe": "plain"}, "recipe"),
        ({"topics": ("question", "mood", "colour")}, "tasks"), ({"topics": ("mood",)}, "tasks"),
    ],
)  # fmt: skip
def test_other_settings_in_its_folder_are_refused(
    more: Any, named: str, place: Path, whole: Path
) -> None:
    with pytest.raises(Refused, match="run with other settings") as refusal:
        run(place, whole, **{"seed": 5} | more)
    assert named in str(refusal.value)


def test_rows_that_changed_are_refused(place: Path, whole: Path, tmp_path: Path) -> None:
    """The same files by name, one word of one row another (faults D13)."""
    for topic in models.TOPICS:
        text = (place / f"{topic}.jsonl").read_text()
        (tmp_path / f"{topic}.jsonl").write_text(text.replace(' 7"', ' 7a"'))
    tasks = [tmp_path / f"{t}.jsonl" for t in models.TOPICS]
    with pytest.raises(Refused, match="tasks"):
        run_sequence(str(place / "bert"), tasks, RECIPE, out=whole, seed=5, **SETTINGS)


def test_without_a_folder_the_configuration_names_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for lr in (1e-3, 2e-3, 1e-3):
        run(place, None, ("mood",), "plain", epochs=0.5, save_steps=0, lr=lr)
    assert len(list(Path("runs").iterdir())) == 2


def test_the_order_of_tasks_is_part_of_the_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for topics in (("mood", "colour"), ("colour", "mood")):
        record = run(place, None, topics, "plain", epochs=0.5, save_steps=0)
        assert record.names == list(topics)
    assert len(list(Path("runs").iterdir())) == 2


# --- refused before anything is trained -----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (None, "nowhere"),
        ('{"text": "x", "label": "good"}', "one class"),
        ('{"text": "x", "label": "good"}\n{"text": "y"}', "label"),
        ('{"text": "x", "label": "good"}\nnot json', "line 2"),
        ("", "bad.jsonl"),
    ],
)
def test_a_bad_second_task_is_refused_before_weights_load(
    line: str | None, says: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "load_model", "load_processor", "Learner")
    bad = tmp_path / ("nowhere.jsonl" if line is None else "bad.jsonl")
    if line is not None:
        bad.write_text(line + "\n")
    with pytest.raises(Refused, match=says):
        run_sequence(
            str(place / "bert"), [place / "mood.jsonl", bad], "plain", out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lr": -1.0}, "--lr"), ({"lr": float("nan")}, "--lr"), ({"lr": float("inf")}, "--lr"),
        ({"lr": "1e-4"}, "--lr"), ({"epochs": 0.0}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"warmup": 1.0}, "--warmup"), ({"selection": 1.0}, "--selection"),
        ({"schedule": "liner"}, "--schedule"), ({"schedule": "reduce_lr_on_plateau"}, "--schedule"),
        ({"seed": -1}, "--seed"), ({"seed": 1.0}, "--seed"), ({"seed": True}, "--seed"),
        ({"max_length": 1}, "--max-length"), ({"save_steps": -1}, "--save-steps"),
        ({"learning_rate": 1e-4}, "learning"), ({"epoch": 3}, "did you mean 'epochs'"),
        ({"topics": ()}, "no tasks"), ({"topics": ("mood", "mood")}, "two tasks are called"),
        ({"recipe": "dpss"}, "did you mean 'dps'"), ({"recipe": "no.yaml"}, "no.yaml"),
        ({"train_size": 1}, "train_size"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(
    more: Any, says: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "load_model", "load_processor", "Learner")
    with pytest.raises(Refused) as refusal:
        run(place, tmp_path / "run", **more)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_too_little_room_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(Refused, match="GB free"):
        run(place, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_loaded_leaves_its_folder_free(place: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(Refused, match="broken"):
        run_sequence(str(tmp_path / "broken"), [place / "mood.jsonl"], "plain",
                     out=tmp_path / "run", **SETTINGS)  # fmt: skip
    run(place, tmp_path / "run", ("mood",), "plain", epochs=0.5)


# --- other weights at the same place --------------------------------------------------------------


def test_other_weights_in_the_models_folder_are_refused(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    """The scores of the old ones were printed as the result (faults C9)."""
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((whole / "run.json").read_text())
    assert config[WEIGHTS] == files_hash(str(place / "bert"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({**config, WEIGHTS: "0123"}))
    with pytest.raises(Refused, match=rf'other settings \({WEIGHTS}: "0123" → "{config[WEIGHTS]}"'):
        run(place, tmp_path / "run", seed=5)
    del config[WEIGHTS]  # of a run from before they were noted
    (tmp_path / "run" / "run.json").write_text(json.dumps(config))
    assert run(place, tmp_path / "run", seed=5).status == "done"


@pytest.mark.parametrize("most", [1 << 30, 1 << 10])
def test_every_file_a_model_is_loaded_from_counts(
    most: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "WHOLE", most)
    folder = tmp_path / "model"
    shutil.copytree(place / "bert", folder)
    found = [files_hash(str(place / "bert"))]
    assert files_hash(str(folder)) == found[0]
    (folder / "README.md").write_text("told")
    assert files_hash(str(folder)) == found[0]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 1
        (folder / name).write_bytes(content)
        found.append(files_hash(str(folder)))
    assert len({*found}) == 4


@pytest.mark.parametrize("peft", [None, PEFT("lora", r=2)])
def test_how_far_tasks_moved_is_what_their_checkpoints_say(
    peft: Any, place: Path, tmp_path: Path
) -> None:
    recipe = Recipe(methods=[] if peft else [ChildTuning(share=0.3)], peft=peft)
    moved = run(place, tmp_path / "r", TOPICS[:2], recipe, epochs=1.0).movement
    homes = [place / "bert", *sorted((tmp_path / "r" / "tasks").iterdir())]
    kept = [load_file(home / "model.safetensors") for home in homes]
    first, second, third = [
        {n.removeprefix("bert."): w for n, w in named.items()} for named in kept
    ]
    for before, after, task in ((first, second, TOPICS[0]), (second, third, TOPICS[1])):
        for part in ("layer.0", "layer.1"):
            names = [n for n in after if f"encoder.{part}." in n]
            off = sum((after[n] - before[n]).double().norm() ** 2 for n in names)
            size = sum(before[n].double().norm() ** 2 for n in names)
            assert moved[task]["parts"][part] == pytest.approx(float((off / size) ** 0.5), rel=1e-4)
    if peft:
        assert "changed" not in moved[TOPICS[0]]
        return
    names = [n for n in first if "encoder.layer." in n]
    a = torch.cat([(second[n] != first[n]).flatten() for n in names])
    b = torch.cat([(third[n] != second[n]).flatten() for n in names])
    assert moved[TOPICS[0]]["changed"] == pytest.approx(float(a.double().mean()))
    assert "overlap" not in moved[TOPICS[0]] and 0 < moved[TOPICS[1]]["changed"] < 0.5
    assert moved[TOPICS[1]]["overlap"] == pytest.approx(float((a & b).sum() / (a | b).sum()))
