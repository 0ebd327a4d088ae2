"""Memory that does not suffice: half the rows at a time, once, for the same steps (P12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import files, run, told
from test_compare import compared

from holdfast import Recipe, Refused
from holdfast.errors import OutOfMemory
from holdfast.experiments import learner, memory
from holdfast.experiments.record import Record

CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU)]
FOUR: dict[str, Any] = {"topics": ("mood", "colour"), "seed": 5, "batch_size": 4, "accumulation": 1}
TWO: dict[str, Any] = FOUR | {"batch_size": 2, "accumulation": 2}


def room(patch: pytest.MonkeyPatch, rows: int, *, after: int = 0, error: Any = None,
         lr: float | None = None) -> None:  # fmt: skip
    """From the n-th micro-batch on memory holds so many rows; lr: only in runs of this rate."""
    step, calls = learner.Trainer.training_step, []

    def limited(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        calls.append(1)
        mine = lr is None or self.args.learning_rate == lr
        if mine and len(calls) > after and len(inputs["labels"]) > rows:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(self, model, inputs, *more)

    patch.setattr(learner.Trainer, "training_step", limited)


def without_notice(folder: Path) -> dict[str, Any]:
    """What a record says, without what it was asked for and what was learned instead."""
    record = told(folder)
    for key in ("batch_size", "accumulation"):
        record["settings"].pop(key)
    record.pop(memory.HALVED, None)
    return record


@pytest.mark.parametrize("error", [
    pytest.param(e, marks=[pytest.mark.slow] * (e is not ERRORS[-1]), id=type(e).__name__)
    for e in ERRORS
])  # fmt: skip
def test_half_the_rows_at_a_time_are_the_run_that_asked_for_them(
    error: Exception, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, though checkpoints of the first try lay there."""
    run(place, tmp_path / "two", **TWO)
    room(monkeypatch, 2, after=5, error=error)
    record = run(place, tmp_path / "four", **FOUR)
    assert files(tmp_path / "four") == files(tmp_path / "two")
    assert without_notice(tmp_path / "four") == without_notice(tmp_path / "two")
    assert record.extra[memory.HALVED] == {"batch_size": 2, "accumulation": 2}
    assert record.settings["batch_size"] == 4  # what was asked for, as run.json has it
    (line,) = record.warnings
    assert line == ("out of memory with 4 rows at a time: the task is learned anew with 2 and an "
                    "accumulation of 2")  # fmt: skip


def test_what_was_learned_before_stays_and_a_killed_run_goes_on_with_half(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second task; then stopped in it, and gone on with by another process."""
    run(place, tmp_path / "whole", **FOUR | {"topics": ("mood",)})
    with monkeypatch.context() as patch:
        room(patch, 2, after=20)
        run(place, tmp_path / "once", **FOUR)
    with monkeypatch.context() as patch:
        room(patch, 2, after=20)
        step, calls = learner.Trainer.training_step, []

        def stopped(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
            calls.append(1)
            if len(calls) == 40:
                raise KeyboardInterrupt
            return step(self, model, inputs, *more)

        patch.setattr(learner.Trainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / "twice", **FOUR)
    assert Record.load(tmp_path / "twice").extra[memory.HALVED]["batch_size"] == 2
    run(place, tmp_path / "twice", **FOUR)
    first = "tasks/1-mood/model.safetensors"
    assert files(tmp_path / "once")[first] == files(tmp_path / "whole")[first]
    assert files(tmp_path / "twice") == files(tmp_path / "once")
    assert told(tmp_path / "twice") == told(tmp_path / "once")


@pytest.mark.parametrize(("size", "tries"), [(4, 2), (3, 1)])
def test_once_and_no_more(
    size: int, tries: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd micro-batch has no half that makes the same steps."""
    made: list[int] = []
    create = learner.Learner._untrained
    monkeypatch.setattr(learner.Learner, "_untrained",
                        lambda self, *a: made.append(1) or create(self, *a))  # fmt: skip
    room(monkeypatch, 1)
    last = size if tries == 1 else size // 2
    with pytest.raises(OutOfMemory, match=f"out of memory with {last} rows at a time; a smaller"):
        run(place, tmp_path, **FOUR | {"batch_size": size})
    record = Record.load(tmp_path)
    assert len(made) == tries and record.status == "running"
    assert record.warnings[-1] == f"out of memory with {last} rows at a time"
    with pytest.raises(Refused, match="out of memory"):
        run(place, tmp_path, **FOUR | {"batch_size": size})


def test_what_is_no_lack_of_memory_is_raised(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(monkeypatch, 0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run(place, tmp_path, **FOUR)
    assert not (tmp_path / "record.json").exists()


def test_the_other_runs_of_a_comparison_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: Any = {"large": (Recipe(), {"lr": 3e-4}), "plain": (Recipe(), {})}
    room(monkeypatch, 1, lr=3e-4)
    with pytest.raises(OutOfMemory, match="large"):
        compared(place, tmp_path, recipes)
    for seed in (0, 3):
        assert Record.load(tmp_path / "plain" / f"seed-{seed}").status == "done"
        assert Record.load(tmp_path / "large" / f"seed-{seed}").status == "running"
