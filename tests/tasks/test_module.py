"""Networks of one's own, by a Python file: what is run, what is read, and the four examples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import Recipe, Refused, compare, load, run_sequence
from holdfast.cli import main
from holdfast.experiments.gate import judge
from holdfast.experiments.mix import general
from holdfast.experiments.record import Record
from holdfast.tasks import load_task, program
from holdfast.tasks.kinds import evaluate, kind_named

EXAMPLES = Path(__file__).parents[2] / "examples"
KIND = kind_named("module")
FILE = """
import numpy as np, torch
from torch import nn
from pathlib import Path

Path(__file__).with_name("ran").open("a").write("x")

def model():
    return nn.Linear(3, 2)

def rows(seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(40, 3))
    return {"x": x, "labels": (x[:, seed] > 0).astype(int)}

def loss(net, batch):
    logits = net(batch["x"])
    return nn.functional.cross_entropy(logits, batch["labels"]), logits

def score(net, batch):
    return (net(batch["x"]).argmax(-1) == batch["labels"]).float()

def predict(net, batch):
    return net(batch["x"]).argmax(-1).tolist()

def tasks():
    told = {"loss": loss, "score": score, "predict": predict, "metric": "accuracy"}
    return {"First One": {"train": rows(0), **told}, "second": {"train": rows(1), **told}}
"""
SHORT: dict[str, Any] = {"epochs": 2.0, "batch_size": 8, "lr": 0.05, "progress": False}


@pytest.fixture(autouse=True)
def untrusting() -> Any:
    """No file that an earlier test named is trusted."""
    program._trusted.clear()
    program._run.cache_clear()
    yield
    program._everything = False


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_told_by_their_values(net: Path) -> None:
    """Arrays by name or a list of rows, in another file with other names: the same task."""
    one = load_task(f"{net}:second")
    other = net.with_name("other.py")
    other.write_text(
        FILE
        + """
def tasks(before=tasks):
    told = before()["second"]
    x, y = told["train"]["x"], told["train"]["labels"]
    return {"only": {**told, "train": [{"labels": b, "x": a} for a, b in zip(x, y)]}}
"""
    )
    two = load_task(f"{other}?name=second")
    assert one.kind == "module" and one.metric == "accuracy" and one.rows == two.rows
    assert one.hash == two.hash and load_task(f"{net}:First One").hash != one.hash
    assert load_task(f"{net}:first-one").name == "first-one"  # as a run calls it


@pytest.mark.parametrize(("text", "place", "why"), [
    ("x = 1", "", r"no function model"), ("1 / 0", "", "ZeroDivisionError"),
    (FILE, "", "has 2 tasks.*:second"), (FILE, ":secnd", "did you mean 'second'"),
    (FILE.replace('"x": x,', '"x": x[1:],'), ":second", "arrays of"),
    (FILE.replace('"loss": loss,', ""), ":second", "has no 'loss'"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path: Path, text: str, place: str, why: str) -> None:
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(Refused, match=why):
        load_task(f"{tmp_path / 'net.py'}{place}")


def test_a_score_for_each_row_is_asked_for(net: Path) -> None:
    net.write_text(FILE.replace(".float()", ".float().mean()"))
    task = load_task(f"{net}:second")
    model = KIND.load_model(str(net), task, seed=0)
    collate = KIND.collator(KIND.load_processor(str(net)))
    with pytest.raises(Refused, match=r"returned \(\) for"):
        evaluate(model, KIND.encode(task.train, task, None, max_length=1), task, collate)


# --- a run ----------------------------------------------------------------------------------------


def learned(net: Path, out: Path, *names: str, **more: Any) -> Record:
    model = None if "from_run" in more else str(net)
    return run_sequence(model, [f"{net}:{n}" for n in names], "ewc", out=out, **SHORT, **more)


def test_going_on_is_one_run_and_all_tasks_are_served(net: Path, tmp_path: Path) -> None:
    whole = learned(net, tmp_path / "whole", "First One", "second")
    learned(net, tmp_path / "parts", "First One")
    parts = learned(net, tmp_path / "parts", "First One", "second")
    assert parts.scores == whole.scores
    one, two = (load(tmp_path / name) for name in ("whole", "parts"))
    weights = [served.models["second"].state_dict() for served in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    compare(str(net), [f"{net}:First One", f"{net}:second"], seeds=[0], out=tmp_path / "c",
            recipes={n: (Recipe.named(n), {}) for n in ("plain", "ewc")}, **SHORT)  # fmt: skip
    shared = Record.load(tmp_path / "c" / "ewc" / "seed-0")  # its first task, with plain
    assert "first" in shared.extra and shared.scores == whole.scores
    weights[1] = load(tmp_path / "c" / "ewc" / "seed-0").models["second"].state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    task = load_task(f"{net}:first-one")
    rows: list[Any] = [row.values for row in task.evaluation]  # type: ignore[attr-defined]
    said = [each.label for each in one.predict("first-one", rows)]
    right = np.mean([s == row["labels"] for s, row in zip(said, rows, strict=True)])
    assert right == pytest.approx(whole.scores[1][0])
    arrays = {name: np.stack([row[name] for row in rows]).astype(float) for name in rows[0]}
    assert [each.label for each in one.predict("first-one", arrays)] == said
    assert one.predict("first-one", []) == []
    with pytest.raises(Refused, match="neither arrays by name nor"):
        one.predict("first-one", ["a text"])


def test_runs_of_two_days_are_compared(net: Path, tmp_path: Path, capsys: Any) -> None:
    early = learned(net, tmp_path / "early", "First One")
    late = learned(net, tmp_path / "late", "second", from_run=tmp_path / "early")
    tasks = [load_task(f"{net}:first-one")]
    (told,) = judge(load(tmp_path / "early"), load(tmp_path / "late"), tasks, max_forgetting=1)
    assert told.before == pytest.approx(early.scores[0][0]) and told.verdict == "kept"
    assert told.after == pytest.approx(late.scores[1][0])
    assert main(["check", str(tmp_path / "early"), str(tmp_path / "late"),
                 "--max-forgetting", "1", "--trust-code"]) == 0  # fmt: skip
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    assert main(["predict", str(tmp_path / "late"), str(tmp_path / "rows.csv"), "--task",
                 "second", "--out", str(tmp_path / "a.jsonl")]) == 2  # fmt: skip
    assert "rows of arrays" in capsys.readouterr().err


def test_numbers_a_row_are_float32_in_a_batch(net: Path) -> None:
    net.write_text(FILE.replace('"labels": (x', '"y": x[:, 1], "labels": (x'))
    task = load_task(f"{net}:second")
    batch = KIND.collator(KIND.load_processor(str(net)))(
        KIND.encode(task.train, task, None, max_length=1)[:4]
    )
    assert {name: str(v.dtype) for name, v in batch.items()} == {
        "x": "torch.float32", "y": "torch.float32", "labels": "torch.int64",
    }  # fmt: skip


def test_a_run_is_judged_and_its_model_is_gone_on_from(
    net: Path, tmp_path: Path, capsys: Any
) -> None:
    learned(net, tmp_path / "one", "First One")
    told = {"recipe": "ewc", "from_run": tmp_path / "one" / "final", "old_task": f"{net}:First One"}
    more = run_sequence(None, [f"{net}:second"], out=tmp_path / "two", **told, **SHORT)
    assert more.scores[0][0] == Record.load(tmp_path / "one").scores[0][0]
    assert (
        main(["check", str(tmp_path / "one"), str(tmp_path / "two"), "--max-forgetting", "1"]) == 0
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    words = ["predict", str(tmp_path / "one"), str(tmp_path / "rows.jsonl"), "--task", "first-one"]
    assert main([*words, "--out", str(tmp_path / "out.csv")]) == 2
    assert "rows of arrays" in capsys.readouterr().err


def test_a_strangers_file_is_not_run(net: Path, tmp_path: Path, capsys: Any) -> None:
    """Neither the copy in a run, nor a file that its record names; trusted or named, both are."""
    learned(net, tmp_path / "run", "First One")
    stranger = tmp_path / "stranger"
    shutil.move(tmp_path / "run", stranger)
    ran = net.with_name("ran")
    ran.unlink()
    program._trusted.clear()
    program._run.cache_clear()
    rows = tmp_path / "more.py"
    rows.write_text(FILE)
    for words in (
        ["export", str(stranger), "--task", "first-one", "--out", str(tmp_path / "out")],
        ["sequence", "--from", str(stranger), "--tasks", f"{rows}:second"],
    ):
        assert main(words) == 2
        assert "--trust-code" in capsys.readouterr().err
        assert not any(stranger.rglob("ran")) and not ran.exists()
    words = ["export", str(stranger), "--task", "first-one", "--out", str(tmp_path / "out")]
    assert main([*words, "--trust-code"]) == 0 and (tmp_path / "out" / "module.py").is_file()


def test_what_was_looked_at_is_what_is_trusted(net: Path, tmp_path: Path) -> None:
    """--trust-code runs the copy in the run, which a refusal names: no other file that a stranger's
    config.json leads to."""
    learned(net, tmp_path / "run", "First One")
    other = tmp_path / "other.py"
    other.write_text(FILE.replace('"ran"', '"other ran"'))
    final = tmp_path / "run" / "final"
    body = json.loads((final / "config.json").read_text())
    (final / "config.json").unlink()  # a link to the task's
    (final / "config.json").write_text(json.dumps(body | {"file": str(other)}))
    program._trusted.clear()
    program.trust_all()
    KIND.open_saved(str(final), {"name": "first-one"})
    assert not (tmp_path / "other ran").exists() and (final / "ran").exists()


def test_a_record_of_another_kind_runs_no_file(net: Path, tmp_path: Path, capsys: Any) -> None:
    """What would be read decides, not the kind that a stranger's record tells."""
    learned(net, tmp_path / "run", "First One")
    record = tmp_path / "run" / "record.json"
    body = json.loads(record.read_text())
    del body["sha256"]  # which a stranger would make anew
    (tmp_path / "more.py").write_text(FILE)
    for task in body["tasks"]:
        task |= {"kind": "classification", "source": f"{tmp_path / 'more.py'}:second"}
    record.write_text(json.dumps(body))
    net.with_name("ran").unlink()
    assert main(["check", str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert "--trust-code" in capsys.readouterr().err
    with pytest.raises(Refused, match="is a Python file"):
        general(f"{tmp_path / 'more.py'}:0.5")
    assert not net.with_name("ran").exists()


def test_an_edited_file_is_told(net: Path, tmp_path: Path) -> None:
    learned(net, tmp_path / "run", "First One")
    net.write_text(FILE.replace("cross_entropy(logits", "cross_entropy(2 * logits"))
    record = learned(net, tmp_path / "run", "First One", "second")
    assert any("net.py was" in line for line in record.warnings)


def test_the_file_that_was_named_is_taken_and_its_network_must_fit(
    net: Path, tmp_path: Path
) -> None:
    learned(net, tmp_path / "run", "First One")
    net.write_text(FILE.replace("Linear(3, 2)", "Linear(3, 2, bias=False)"))
    with pytest.raises(Refused, match="does not fit the network"):
        learned(net, tmp_path / "run", "First One", "second")


# --- the examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "dps", "ewc", "merge"])
@pytest.mark.parametrize(("name", "tasks"), [
    ("cnn", ("low", "high")), ("gru", ("rises", "swings")), ("autoencoder", ("round", "straight")),
    ("graph", ("triangle", "connected")),
])  # fmt: skip
def test_the_examples_learn_two_tasks(
    tmp_path: Path, name: str, tasks: tuple[str, str], recipe: str
) -> None:
    file = EXAMPLES / f"{name}.py"
    record = run_sequence(
        str(file), [f"{file}:{task}" for task in tasks], recipe, out=tmp_path, epochs=1.0,
        lr=3e-3, train_size=200, evaluation_size=50, progress=False,
    )  # fmt: skip
    assert record.status == "done" and [t["kind"] for t in record.tasks] == ["module", "module"]
    made = KIND.load_model(str(file), load_task(f"{file}:{tasks[0]}"), seed=0)
    saved = json.loads((tmp_path / "final" / "config.json").read_text())
    assert saved["architectures"] == [type(made.net).__name__]
