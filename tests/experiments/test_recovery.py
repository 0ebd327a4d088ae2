"""What a kill, damage or a restart changes of a sequence: nothing, or it is told."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import files, run, told
from transformers import AutoModelForSequenceClassification

from holdfast import Recipe, Refused, Replay
from holdfast.errors import Busy
from holdfast.experiments import learner, lease
from holdfast.experiments.record import Record
from holdfast.training import checkpoints, manifest, saving

# --- killed and started again ---------------------------------------------------------------------


def kill_after(
    module: Any, name: str, call: int, *, before: bool = False, also: tuple[Any, ...] = ()
) -> None:
    """SIGKILL this process at the n-th call of a function: after it, or before.

    also: modules that hold the function too; their calls count as well.
    """
    original, calls = getattr(module, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if before and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    for place in (module, *also):
        setattr(place, name, counted)


def half_removed(*_: Any, **__: Any) -> None:
    """Killed in the middle of removing a task's checkpoints: the newest has lost its moments."""
    for folder in Path(os.environ["HALF"]).rglob("optimizer.pt"):
        folder.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_removing(out: Path) -> None:
    os.environ["HALF"] = str(out)
    learner.shutil.rmtree = half_removed  # type: ignore[assignment]


def kill_writing(call: int, *, before: bool = False) -> None:
    """At the n-th state or manifest."""
    kill_after(checkpoints, "write_text_atomic", call, before=before, also=(manifest,))


# A state and a manifest at steps 3, 6, 9, 12, 15 and 16 of a task, and when it is kept: 14 calls.
KILLS: dict[str, Callable[[Path], None]] = {
    "before the first checkpoint": lambda _: kill_after(
        learner.Learner, "score", 1, before=True
    ),
    "mid-task, checkpoint half written": lambda _: kill_writing(3, before=True),
    "mid-task, our state written and Trainer's not": lambda _: kill_writing(3),
    "mid-task, all written but the manifest": lambda _: kill_writing(4, before=True),
    "mid-task, whole and not rotated": lambda _: kill_after(
        saving, "rotate", 3, before=True
    ),
    "second task, mid-epoch": lambda _: kill_writing(20),
    "kept, its manifest not written": lambda _: kill_writing(14, before=True),
    "third task, learned and not kept": lambda _: kill_after(learner, "evaluate", 20, before=True),
    "kept and not recorded": lambda _: kill_after(learner.Learner, "keep", 2),
    "while checkpoints are removed": in_the_middle_of_removing,
    "between tasks": lambda _: kill_after(learner.Learner, "learn", 2, before=True),
    "before it is marked as done": lambda _: kill_after(learner.Learner, "learn", 3),
}  # fmt: skip


def killed(point: str, place: Path, out: Path) -> None:
    KILLS[point](out)
    run(place, out, seed=5)


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    point: str, place: Path, whole: Path, tmp_path: Path, fork: Any
) -> None:
    process = fork.Process(target=killed, args=(point, place, tmp_path))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    if (tmp_path / "record.json").exists():
        assert Record.load(tmp_path).status == "running"
    run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole)
    assert told(tmp_path) == told(whole)
    assert not list((tmp_path / "tasks").rglob("checkpoint-*"))


def test_killed_twice_while_recovering(place: Path, whole: Path, tmp_path: Path, fork: Any) -> None:
    for point in ("second task, mid-epoch", "mid-task, checkpoint half written"):
        process = fork.Process(target=killed, args=(point, place, tmp_path))
        process.start()
        process.join(240)
        assert process.exitcode == -signal.SIGKILL
    run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole) and told(tmp_path) == told(whole)


# --- damaged, stopped, moved ----------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, place: Path, out: Path, *, module: Any, name: str,
            call: int, **more: Any) -> None:  # fmt: skip
    """A run that ends as by Ctrl-C before the n-th call of a function."""
    original, calls = getattr(module, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, counted)
        run(place, out, **more)


def test_damage_in_the_middle_of_a_task(
    place: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop_at(monkeypatch, place, tmp_path, module=saving, name="rotate", call=9, seed=5)
    newest = tmp_path / "tasks" / "2-question.training" / "checkpoint-9"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-9])
    record = run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole) and told(tmp_path) == told(whole)
    (line,) = record.warnings
    assert line.startswith("question: checkpoint-9 is passed over: optimizer.pt has ")
    assert line in caplog.text and Record.load(tmp_path).warnings == [line]


@pytest.mark.parametrize("file", ["model.safetensors", checkpoints.TENSORS, manifest.MANIFEST])
def test_a_damaged_finished_task_is_named_and_learned_again_if_deleted(
    file: str, place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, place, tmp_path, module=saving, name="rotate", call=15, seed=5)
    home = tmp_path / "tasks" / "2-question"
    content = bytearray((home / file).read_bytes())
    content[len(content) // 2] ^= 4
    (home / file).write_bytes(content)
    with pytest.raises(Refused) as refusal:
        run(place, tmp_path, seed=5)
    assert str(refusal.value).startswith(f"{home}: {file} ") and "delete" in str(refusal.value)
    shutil.rmtree(home)
    assert Record.load(tmp_path).history[-1]["learning"] == 2
    run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole) and told(tmp_path) == told(whole)


def test_finished_tasks_share_one_encoder_while_they_are_taken_up(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: of those loaded before, only the encoder that stays is held."""
    stop_at(monkeypatch, place, tmp_path, module=learner.Learner, name="learn", call=3, seed=5)
    encoders: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = AutoModelForSequenceClassification.from_pretrained

    def loaded(folder: Any, **more: Any) -> Any:
        gc.collect()
        alive.append(sum(encoder() is not None for encoder in encoders))
        found = load(folder, **more)  # with what it says of its loading, if that was asked for
        model = found[0] if isinstance(found, tuple) else found
        encoders.append(weakref.ref(model.base_model))
        return found

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", loaded)
    # once more where the state is read, after both tasks' models
    monkeypatch.setattr(learner, "load_state", lambda *_: loaded(place / "bert"))
    stop_at(monkeypatch, place, tmp_path, module=learner.Learner, name="learn", call=1, seed=5)
    assert alive == [0, 1]  # however many tasks are finished, one encoder is read


def test_bf16_with_replay_goes_on_as_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate leaves autocast around the models it trained, and loaded ones have none."""
    plain: dict[str, Any] = {
        "topics": ("mood", "colour"), "recipe": Recipe(methods=[Replay(memory=4, share=1.0)]),
        "bf16": True, "epochs": 1.0,
    }  # fmt: skip
    record = run(place, tmp_path / "whole", **plain)
    assert record.versions["precision"] == "bfloat16 autocast"
    stop_at(monkeypatch, place, tmp_path / "cut", module=learner.Learner, name="learn", call=2,
            **plain)  # fmt: skip
    run(place, tmp_path / "cut", **plain)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    for home in (tmp_path / "cut" / "tasks").iterdir():  # bf16 was at work, and only in training
        assert AutoModelForSequenceClassification.from_pretrained(home).dtype == torch.float32
    run(place, tmp_path / "float", **plain | {"bf16": False})
    assert files(tmp_path / "float") != files(tmp_path / "whole")


def test_a_deleted_run_is_not_made_up_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault P13: its lease is gone too, so that another process might begin beside this one."""
    original, out = saving.rotate, tmp_path / "run"

    def delete(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        shutil.rmtree(out)

    monkeypatch.setattr(saving, "rotate", delete)
    with pytest.raises(Refused, match="run: was deleted while it was worked on"):
        run(place, out, topics=("mood",), recipe="plain")
    assert not out.exists()


def test_a_run_that_was_taken_over_saves_nothing_more(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that was paused for so long that it was taken for dead."""
    original, steps = learner.Trainer.training_step, list[int]()
    before: dict[Path, bytes] = {}

    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def paused(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 15 + 7:  # in step 12, which ends with a checkpoint
            lease.take(tmp_path, over=1).release()
            before.update(contents())
            time.sleep(1.1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Busy, match="taken over"):
        patch.setattr(learner.Trainer, "training_step", paused)
        run(place, tmp_path, seed=5)
    assert contents() == before and len(steps) == 15 + 8
    run(place, tmp_path, seed=5)
    assert files(tmp_path) == files(whole) and told(tmp_path) == told(whole)


def test_seconds_add_up_over_processes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"topics": ("mood",), "recipe": "plain", "epochs": 1.0}
    stop_at(monkeypatch, place, tmp_path, module=saving, name="rotate", call=3, **plain)
    record = Record.load(tmp_path)
    assert record.seconds == [] and record.elapsed > 0
    record.elapsed += 1000
    record.save(tmp_path / "record.json")
    again = run(place, tmp_path, **plain)
    assert 1000 < again.seconds[0] < 1100 and again.elapsed == 0


def test_another_machine_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"topics": ("mood", "colour"), "recipe": "plain", "epochs": 0.5}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    stop_at(monkeypatch, place, tmp_path, module=learner.Learner, name="learn", call=2, **plain)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 78)
    assert run(place, tmp_path, **plain).warnings == [
        "threads was 77 and is 78 since the run went on"
    ]


def test_batches_of_like_length_go_on_as_they_were(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch of the second task."""
    plain: dict[str, Any] = {
        "topics": ("mood", "colour"), "recipe": "plain", "group_by_length": True, "epochs": 1.0,
    }  # fmt: skip
    run(place, tmp_path / "whole", **plain)
    stop_at(monkeypatch, place, tmp_path / "cut", module=saving, name="rotate", call=5, **plain)
    (training,) = (tmp_path / "cut" / "tasks").glob("2-*.training")
    assert sorted(p.name for p in training.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    run(place, tmp_path / "cut", **plain)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    run(place, tmp_path / "random", **plain | {"group_by_length": False})
    assert files(tmp_path / "random") != files(tmp_path / "whole")


def test_bf16_by_the_machine_is_what_the_run_began_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pays = True
    monkeypatch.setattr("holdfast.tasks.kinds.pretrained.bf16_pays", lambda: pays)
    plain: dict[str, Any] = {"recipe": "plain", "bf16": "auto", "epochs": 0.5}
    run(place, tmp_path, ("mood",), **plain)
    pays = False  # on another machine
    record = run(place, tmp_path, ("mood", "colour"), **plain)
    assert record.settings["bf16"] is True
    assert record.versions["precision"] == "bfloat16 autocast" and len(record.seconds) == 2
    record = run(place, tmp_path / "new", ("mood",), **plain)
    assert record.settings["bf16"] is False and record.versions["precision"] == "float32"
