"""What loggers are sent: a sequence is one run, its values are the record's, each sent once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
from sequences import files, run
from test_recovery import kill_after, kill_writing

from holdfast import Rates, Recipe, Refused, Replay
from holdfast.experiments import loggers
from holdfast.experiments.loggers import points
from holdfast.experiments.record import Record

Points = dict[str, list[tuple[int, float]]]
TOPICS = tuple(models.TOPICS)[:2]
LIGHT = Recipe(rates=Rates.bertcl(), methods=[Replay(memory=4)], name="light")


def logged(place: Path, out: Path, size: int = 2, *loggers: str) -> Record:
    return run(place, out, TOPICS[:size], LIGHT, seed=5, report_to=loggers)


def told(record: Record) -> Points:
    """What a record says by itself, by tag; an independent reading of it."""
    found: Points = {}
    for point in record.history:
        for name, score in zip(record.names, point["scores"], strict=True):
            if score is not None:
                found.setdefault(f"selection/{name}", []).append((point["step"], score))
    for i in range(len(record.tasks)):
        end = sum(n or 0 for n in record.steps[: i + 1])
        for j in range(i + 1):
            found.setdefault(f"score/{record.names[j]}", []).append((end, record.scores[i][j]))
    return found


def written(folder: Path) -> Points:
    """Scalars of a TensorBoard folder, by tag without `train/`."""
    pytest.importorskip("tensorboard", reason="reads event files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag.removeprefix("train/"): [(e.step, e.value) for e in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def agree(found: Points, record: Record) -> None:
    for tag, wanted in told(record).items():
        sent = found[f"holdfast/{tag}"]
        assert [step for step, _ in sent] == [step for step, _ in wanted], tag
        assert [v for _, v in sent] == pytest.approx([v for _, v in wanted]), tag
    for name in ("forgetting", "backward_transfer", "average", "plasticity", "new_plus_old"):
        *_, (step, last) = found[f"holdfast/{name}"]
        assert step == sum(n or 0 for n in record.steps)
        assert last == pytest.approx(record.metrics[name]), name


@pytest.fixture(scope="module")
def sent(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorboard", reason="the logger of this run")
    out = tmp_path_factory.mktemp("sent")
    logged(place, out, 2, "tensorboard")
    return out


def test_a_sequence_is_one_run_with_the_values_of_its_record(sent: Path) -> None:
    assert len(list((sent / "logs").iterdir())) == 1  # one writer, from the first task to the last
    found = written(sent / "logs")
    agree(found, Record.load(sent))
    for tag, values in found.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
    assert [step for step, _ in found["loss"]] == [8, 16, 24, 32]
    rates = {tag for tag in found if tag.startswith("holdfast/rate/")}
    assert {tag.rpartition("/")[2] for tag in rates} == {"embeddings", "layer.0", "layer.1", "head"}
    for tag in rates:  # a schedule scales all parts alike, and the last step has a rate too
        shares = [a / b for (_, a), (_, b) in zip(found[tag], found["learning_rate"], strict=True)]
        assert shares == pytest.approx([shares[0]] * 4, rel=1e-5), tag
    assert [step for step, _ in found["holdfast/penalty/replay"]] == [24, 32]


def killed(place: Path, out: Path, point: str) -> None:
    if point == "training":
        kill_writing(20, before=True)  # in the second task: step 8 is logged, 6 the last checkpoint
    else:
        from holdfast.experiments.learner import Learner

        kill_after(Learner, "learn", 2)  # kept; its scores neither recorded nor sent
    logged(place, out, 2, "tensorboard")


@pytest.mark.parametrize("point", ["training", pytest.param("recording", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_in_its_logs_and_sends_nothing_twice(
    point: str, place: Path, sent: Path, tmp_path: Path, fork: Any
) -> None:
    process = fork.Process(target=killed, args=(place, tmp_path, point))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    begun = written(tmp_path / "logs")
    assert begun["loss"] and begun["loss"][-1][0] == (24 if point == "training" else 32)
    logged(place, tmp_path, 2, "tensorboard")
    found, wanted = written(tmp_path / "logs"), written(sent / "logs")
    agree(found, Record.load(tmp_path))
    assert {t: [s for s, _ in v] for t, v in found.items()} == {
        t: [s for s, _ in v] for t, v in wanted.items()
    }
    assert json.loads((tmp_path / "loggers.json").read_text())["name"].startswith(
        f"{tmp_path.parent.name}-{tmp_path.name}-"
    )


def test_a_logger_that_comes_later_gets_all_scores_and_a_finished_run_no_more(
    place: Path, sent: Path, tmp_path: Path
) -> None:
    logged(place, tmp_path, 1)
    for _ in range(2):
        logged(place, tmp_path, 2, "tensorboard")
        assert len(list((tmp_path / "logs").iterdir())) == 1
    assert files(tmp_path) == files(sent)  # loggers change nothing of what is learned
    found = written(tmp_path / "logs")
    agree(found, Record.load(tmp_path))
    assert [step for step, _ in found["loss"]] == [24, 32]


def test_points_only_come_at_the_end_as_a_run_goes_on(sent: Path) -> None:
    """By which a resumed run knows how many were sent."""
    whole = Record.load(sent)
    every = list(points(whole))
    for learned in range(len(whole.tasks)):
        part = Record.load(sent)
        kept = [h for h in whole.history if h["learning"] <= learned][:-1]
        part.forget_from(learned)
        part.history = kept
        some = list(points(part))
        assert some == every[: len(some)] and len(some) == 1 + 3 * learned + 1
    assert len(every) == 7


def test_what_else_a_record_holds_is_told_at_its_tasks_end(sent: Path) -> None:
    record = Record.load(sent)
    question = record.names[1]
    record.general = {"base": {"kl": None, "nll": 3.0}, "after": {question: {"nll": 3.5}}}
    vars(record)["movement"] = {
        question: {"parts": {"head": 0.5, "layer.0": None}, "changed": 0.1, "overlap": 0.25}
    }
    first, *rest = points(record)
    assert first == (0, {"holdfast/general/nll": 3.0})
    extra = {"general/nll": 3.5, "movement/head": 0.5, "changed": 0.1, "mask_overlap": 0.25}
    ((step, found),) = [p for p in rest if "holdfast/changed" in p[1]]
    assert step == 32 and {f"holdfast/{k}": v for k, v in extra.items()}.items() <= found.items()
    assert "holdfast/movement/layer.0" not in found


def made() -> tuple[list[tuple[str, int, dict[str, float]]], type]:
    """An integration, and what it was called with."""
    calls: list[tuple[str, int, dict[str, float]]] = []

    class Noting:
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            calls.append(("begin", state.global_step, {}))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            calls.append(("log", state.global_step, logs))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            calls.append(("end", state.global_step, {}))

    return calls, Noting


def test_a_run_that_is_opened_is_closed_and_opened_again_and_anothers_is_left_open(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for W&B, whose own integration leaves a run open for whatever comes next."""
    calls, noting = made()
    wandb, opened = types.ModuleType("wandb"), []
    wandb.run = None  # type: ignore[attr-defined]

    def init(**how: Any) -> None:
        opened.append((how.pop("name"), how))
        wandb.run = types.SimpleNamespace(id=how["id"] or "first")  # type: ignore[attr-defined]

    wandb.init, wandb.finish = init, lambda: setattr(wandb, "run", None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(loggers.INTEGRATION_TO_CALLBACK, "wandb", noting)
    plain: dict[str, Any] = {"recipe": "plain", "head": "prototype", "report_to": ["wandb"]}
    for size in (1, 2):
        run(place, tmp_path / "run", TOPICS[:size], **plain)
        assert wandb.run is None  # type: ignore[attr-defined]
    (one, first), (two, second) = opened
    assert one == two and one.startswith(f"{tmp_path.name}-run-")
    same = {"project": "huggingface", "resume": "allow"}
    assert first == {**same, "id": None} and second == {**same, "id": "first"}
    assert [kind for kind, *_ in calls] == ["begin", "log", "end"] * 2  # each score once
    mine = wandb.run = types.SimpleNamespace(id="mine")  # type: ignore[attr-defined]
    run(place, tmp_path / "other", TOPICS[:1], **plain)
    assert wandb.run is mine and len(opened) == 2  # type: ignore[attr-defined]


def test_a_logger_that_cannot_begin_is_refused_and_the_others_are_closed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, noting = made()

    class Away(noting):  # type: ignore[misc, valid-type]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("no server\nmany lines")

    monkeypatch.setitem(loggers.INTEGRATION_TO_CALLBACK, "noting", noting)
    monkeypatch.setitem(loggers.INTEGRATION_TO_CALLBACK, "away", Away)
    with pytest.raises(
        Refused, match=r"--report-to: away cannot begin \(no server\); .*leave away"
    ):
        run(place, tmp_path, TOPICS[:1], recipe="plain", report_to=["noting", "away"])
    assert [kind for kind, *_ in calls] == ["begin", "end"]
    assert not list((tmp_path / "tasks").glob("*"))  # nothing was trained


def test_every_logger_of_a_run_is_told_by_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prototypes take no step: all points stand at 0, and none is lost."""
    calls, noting = made()
    monkeypatch.setitem(loggers.INTEGRATION_TO_CALLBACK, "noting", noting)
    record = run(place, tmp_path, TOPICS[:2], recipe=Recipe(name="plain"), head="prototype",
                 report_to=["noting"])  # fmt: skip
    assert Counter(kind for kind, *_ in calls) == {"begin": 1, "log": 2, "end": 1}
    assert calls[-1][0] == "end" and {step for _, step, _ in calls} == {0}
    scores = {f"holdfast/score/{n}": s for n, s in zip(record.names, record.scores[1], strict=True)}
    assert scores.items() <= calls[2][2].items()


def test_loggers_that_are_not_there_are_refused_before_anything_is_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise RuntimeError("XCallback requires x to be installed. Run `pip install x`.")

    with pytest.raises(Refused, match=r"no logger 'tensorbord'.*tensorboard"):
        run(place, tmp_path / "a", report_to=["tensorbord"])
    monkeypatch.setitem(loggers.INTEGRATION_TO_CALLBACK, "absent", absent)
    with pytest.raises(Refused, match="--report-to: XCallback requires x"):
        run(place, tmp_path / "a", report_to=["absent"])
    assert not (tmp_path / "a").exists()


# --- packages that are not in CI ------------------------------------------------------------------


def by(logger: str, place: Path, out: Path) -> Record:
    """One task, then a second one in the same folder: two runs of a process."""
    logged(place, out, 1, logger)
    return logged(place, out, 2, logger)


def test_mlflow_gets_one_run_which_is_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="not in the dev extra")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "holdfast")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        record = by("mlflow", place, tmp_path / "run")
        assert mlflow.active_run() is None
        client = mlflow.MlflowClient()
        ours = client.get_experiment_by_name("holdfast").experiment_id
        (made,) = client.search_runs([ours])
        assert made.info.status == "FINISHED"
        found = {
            tag: [(m.step, m.value) for m in client.get_metric_history(made.info.run_id, tag)]
            for tag in made.data.metrics
        }
    finally:
        mlflow.set_tracking_uri(before)
    for tag, wanted in told(record).items():
        assert found[f"holdfast/{tag}"] == wanted
    assert [step for step, _ in found["loss"]] == [8, 16, 24, 32]
    assert found["holdfast/forgetting"] == [(32, record.forgetting)]


def kept_by_trackio(place: Path, out: Path, base: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(base)
    by("trackio", place, out)


def test_trackio_gets_one_run_which_is_gone_on_with(place: Path, tmp_path: Path, fork: Any) -> None:
    pytest.importorskip("trackio", reason="not in the dev extra")
    process = fork.Process(target=kept_by_trackio,
                           args=(place, tmp_path / "run", tmp_path / "base"))  # fmt: skip
    process.start()
    process.join(240)
    assert process.exitcode == 0
    with sqlite3.connect(tmp_path / "base" / "huggingface.db") as base:
        rows = base.execute("select run_name, metrics from metrics order by id").fetchall()
    assert len({name for name, _ in rows}) == 1
    found: Points = {}
    for _, text in rows:
        values = json.loads(text)
        step = values.pop("train/global_step", None)
        for tag, value in values.items():
            found.setdefault(tag.removeprefix("train/"), []).append((step, value))
    record = Record.load(tmp_path / "run")
    for tag, wanted in told(record).items():
        assert found[f"holdfast/{tag}"] == wanted
    assert [step for step, _ in found["loss"]] == [8, 16, 24, 32]


def test_wandb_gets_one_run_which_is_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="not in the dev extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    by("wandb", place, tmp_path / "run")
    offline = [p.name.rpartition("-")[2] for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(offline) == 2 and len(set(offline)) == 1  # a folder a process, of one run
