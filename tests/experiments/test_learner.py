"""How a task of a sequence is learned, closed and told of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from sequences import SETTINGS, files, forbid, run
from transformers import TrainerCallback

from holdfast import Recipe, Refused, Replay, run_sequence
from holdfast.engine.bound import Bound
from holdfast.errors import TrainingDiverged, tell_once
from holdfast.experiments import callbacks, learner
from holdfast.experiments.record import Record
from holdfast.training import checkpoints


def test_bf16_is_for_training_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and a task's end are of full precision; the replayed pass of an old task is not."""
    scored, replayed, ended = [], [], []
    original, forward, end_task = learner.evaluate, Bound.forward, Bound.end_task

    def evaluate(model: Any, *args: Any) -> float:
        scored.append("forward" in model.__dict__)
        return original(model, *args)

    def seen(bound: Any, inputs: Any, *, task: str | None = None, **more: Any) -> Any:
        if task is not None and task != bound.task:
            replayed.append("forward" in bound.models[task].__dict__)
        return forward(bound, inputs, task=task, **more)

    def ending(bound: Any, data: Any) -> None:
        ended.append("forward" in bound.models[bound.task].__dict__)
        end_task(bound, data)

    monkeypatch.setattr(learner, "evaluate", evaluate)
    monkeypatch.setattr(Bound, "forward", seen)
    monkeypatch.setattr(Bound, "end_task", ending)
    run(place, tmp_path, ("mood", "colour"), Recipe(methods=[Replay(memory=4)]), bf16=True,
        epochs=1.0)  # fmt: skip
    assert scored and not any(scored) and ended == [False, False]
    assert replayed and all(replayed)


def test_bf16_scores_where_asked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], learner.evaluate

    def evaluate(*given: Any) -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*given)

    monkeypatch.setattr(learner, "evaluate", evaluate)
    run(place, tmp_path, ("mood",), Recipe(), bf16_eval=True, epochs=1.0)
    assert seen and all(seen)


def test_every_task_is_closed(place: Path, whole: Path, tmp_path: Path) -> None:
    """The last one too: its state lets a later sequence go on."""
    run(place, tmp_path, ("mood",))
    for folder, names in ((whole, list(models.TOPICS)), (tmp_path, ["mood"])):
        home = folder / "tasks" / f"{len(names)}-{names[-1]}"
        assert checkpoints.read_state(home)["meta"]["finished"] == names
        kept = checkpoints.read_state(home)["meta"]["numbers"]["replay"]["rows"]
        assert list(kept) == names


def test_the_record_says_what_methods_hold_and_where_it_ran(place: Path, whole: Path) -> None:
    record = Record.load(whole)
    assert list(record.methods_state) == ["ewc", "replay", "dps"]
    for held in record.methods_state.values():
        assert held["bytes"] > 0
    ewc = record.methods_state["ewc"]
    assert ewc["bytes_per_weight"] == pytest.approx(8, rel=0.5)
    assert record.versions["device"] == "cpu" and record.versions["precision"] == "float32"
    assert record.versions["threads"] == str(torch.get_num_threads())


def test_a_classifier_says_that_its_head_went(place: Path, tmp_path: Path) -> None:
    deployed = str(place / "classifier")
    models.bert().save_pretrained(deployed)
    models.tokenizer().save_pretrained(deployed)
    record = run_sequence(deployed, [place / "mood.jsonl"], "plain", out=tmp_path,
                          **{**SETTINGS, "epochs": 0.5})  # fmt: skip
    assert any("own head was dropped" in line for line in record.warnings)


def test_alone_is_added_to_a_finished_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"topics": ("mood", "colour"), "recipe": "plain", "epochs": 0.5}
    first = run(place, tmp_path, **plain)
    before = files(tmp_path)
    assert first.forward_transfer is None
    added = run(place, tmp_path, **plain, alone=True)
    assert list(added.alone) == ["colour"] and added.forward_transfer is not None
    assert added.settings["alone"] is True and added.scores == first.scores
    assert files(tmp_path) == before
    forbid(monkeypatch, "load_model", "Trainer")
    assert run(place, tmp_path, **plain).to_dict() == Record.load(tmp_path).to_dict()
    assert Record.load(tmp_path).to_dict() == added.to_dict()


def test_a_recipe_may_be_renamed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"topics": ("mood",), "epochs": 0.5}
    run(place, tmp_path, recipe=Recipe(name="a"), **plain)
    forbid(monkeypatch, "load_model", "Trainer")
    run(place, tmp_path, recipe=Recipe(name="b"), **plain)
    assert Record.load(tmp_path).recipe["name"] == "b"


def test_what_is_odd_about_rows_is_told_before_training(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = (place / "mood.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(text + text)
    forbid(monkeypatch, "load_model")
    for _ in range(2):
        with pytest.raises(AssertionError):
            run_sequence(str(place / "bert"), [tmp_path / "twice.jsonl"], out=tmp_path / "run",
                         **SETTINGS)  # fmt: skip
    lines = [r.message for r in caplog.records if r.message.startswith("twice: ")]
    assert lines and len(lines) == len(set(lines))


def test_rows_that_max_length_cuts_are_told_and_recorded(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = [{"text": f"{w} " * n, "label": n} for w in models.WORDS[:10] for n in (3, 40)]
    long = [{"text": "red " * 40, "label": n} for n in (3, 40)]
    for name, rows in (("some", half), ("held", long)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tell_once.cache_clear()
    asked = f"{tmp_path / 'some.jsonl'}?evaluation=held.jsonl"
    for seed in range(2):
        record = run_sequence(str(place / "bert"), [asked], seed=seed, out=tmp_path / str(seed),
                              selection=2, **{**SETTINGS, "epochs": 1.0})  # fmt: skip
        assert record.warnings == [
            "some: 50 % of the training rows are cut at 16 tokens.",
            "some: 100 % of the evaluation rows are cut at 16 tokens.",
        ]
    assert caplog.text.count("cut at 16 tokens (--max-length)") == 2  # once a process


@pytest.mark.parametrize("how", ["logits", "gradients"])
def test_a_diverged_run_has_no_score(
    how: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults N3, N13: the second task diverges; the first keeps its row."""
    if how == "gradients":
        original = Bound._before_step

        def infinite(bound: Any) -> None:
            if bound.task == "colour":
                for w in bound.weights.values():
                    w.grad.fill_(float("inf"))
            original(bound)

        monkeypatch.setattr(Bound, "_before_step", infinite)
    else:
        evaluate = learner.evaluate

        def diverged(model: Any, rows: Any, task: Any, *args: Any) -> float:
            if task.name == "colour":
                raise TrainingDiverged("diverged: the outputs are not finite", where=task.name)
            return evaluate(model, rows, task, *args)

        monkeypatch.setattr(learner, "evaluate", diverged)
    with pytest.raises(Refused, match="colour: diverged"):
        run(place, tmp_path, ("mood", "colour"), "plain", epochs=1.0)
    record = Record.load(tmp_path)
    assert record.status == "running" and record.seconds[1:] == []
    assert record.scores[0][0] is not None and record.scores[1] == [None, None]
    assert record.selection_scores is not None and record.selection_scores[1] == [None, None]
    assert "colour was not learned: colour: diverged" in record.warnings[-1]


def test_steps_that_were_skipped_are_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Bound._before_step

    def once(bound: Any) -> None:
        if bound.step == 2 and not bound.skipped:
            next(iter(bound.weights.values())).grad.fill_(float("nan"))
        original(bound)

    monkeypatch.setattr(Bound, "_before_step", once)
    record = run(place, tmp_path, ("mood",), "plain", epochs=1.0)
    assert record.skipped_steps == [1]
    assert record.warnings == ["mood: 1 steps skipped for non-finite gradients."]


def test_a_bar_tells_the_time_left_to_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a second, 5 left of this task and 90 of later ones: 47.5 seconds."""
    told: dict[str, str] = {}

    class Drawn:
        n, format_dict = 0, {"rate": 2.0}

        def update(self, steps: int) -> None:
            self.n += steps

        def set_postfix(self, said: dict[str, str], *, refresh: bool) -> None:
            assert not refresh  # without a terminal that would be a line for every log
            told.update(said)

    monkeypatch.setattr(callbacks, "drawn", lambda *_, **__: Drawn())
    bar, state = callbacks.Bar("", "one", 0, 2, later=90), SimpleNamespace(max_steps=10)
    state.global_step = 0
    bar.on_train_begin(None, state, None)
    state.global_step = 5
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 0.25})
    assert told == {"loss": "0.250", "all tasks": "00:47 left"} and bar.bar.n == 5


def test_every_row_that_is_scored_moves_its_bar(place: Path, monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path) -> None:  # fmt: skip
    moved: dict[str, int] = {}

    class Drawn:
        def __init__(self, total: int, label: str, **_: Any) -> None:
            self.label, self.total = label, total
            moved[label] = 0

        def update(self, rows: int) -> None:
            moved[self.label] += rows

        def close(self) -> None:
            assert moved[self.label] == self.total

    monkeypatch.setattr(learner, "drawn", Drawn)
    monkeypatch.setattr(learner, "Bar", lambda *_, **__: TrainerCallback())
    run(place, tmp_path, topics=(next(iter(models.TOPICS)),), recipe="plain", progress=True)
    assert len(moved) == 1 and min(moved.values()) > 0


@pytest.mark.slow
def test_what_tasks_share_is_compiled_once_for_rows_of_any_length(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for both tasks, and scores by uncompiled code; the numbers are those without."""
    made, original = [], torch.nn.Module.compile

    def counted(self: Any, **how: Any) -> None:
        def backend(graph: Any, _: Any) -> Any:
            made.append(torch.is_grad_enabled())
            return graph

        torch.compiler.reset()
        original(self, backend=backend, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    more: dict[str, Any] = {"topics": ("mood", "colour"), "recipe": "plain", "epochs": 0.5}
    run(place, tmp_path / "compiled", compile=True, **more)
    assert made == [True]
    run(place, tmp_path / "plain", **more)
    assert files(tmp_path / "compiled") == files(tmp_path / "plain")
