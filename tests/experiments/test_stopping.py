"""SIGTERM and Ctrl-C: the step is finished and saved, and going on changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import RECIPE, SETTINGS, files, run, told
from transformers import Trainer

from holdfast import cli
from holdfast.cli import demo
from holdfast.experiments import learner, lease, sequence
from holdfast.experiments.record import Record
from holdfast.training import saving
from holdfast.training.manifest import damage, newest_complete


def signal_at(module: Any, name: str, call: int, *numbers: int) -> None:
    """Send this process signals before the n-th call of a function."""
    original, calls = getattr(module, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(module, name, counted)


def twice() -> None:
    """The second signal comes while the checkpoint is written that the first one asked for."""
    signal_at(Trainer, "training_step", 30 + 13, signal.SIGTERM)
    signal_at(saving, "save_state", 9, signal.SIGTERM)


# 16 steps a task, of 30 micro-batches; saved every 3 steps, an epoch is 8.
# What sends the signal; the exit code; the newest whole checkpoint, as task and step.
POINTS: dict[str, tuple[Callable[[], None], int, tuple[int, int] | None]] = {
    "within a window of the second task": (
        lambda: signal_at(Trainer, "training_step", 30 + 13, signal.SIGTERM), 143, (2, 7)),
    "while a checkpoint is written": (
        lambda: signal_at(saving, "commit", 2, signal.SIGINT), 130, (1, 7)),
    "while an epoch's end is scored": (
        lambda: signal_at(learner, "evaluate", 1, signal.SIGTERM), 143, (1, 8)),
    "while a task is closed": (
        lambda: signal_at(learner.Trainer, "end_task", 1, signal.SIGINT), 130, (1, 16)),
    "before a task begins": (
        lambda: signal_at(learner.Learner, "learn", 2, signal.SIGTERM), 143, None),
    "again while it is saved": (twice, 143, (2, 6)),
}  # fmt: skip


def stopped(point: str, place: Path, out: Path, errors: Path) -> None:
    """As `holdfast sequence` does, in a process of its own."""
    torch.set_num_threads(1)
    sys.stderr = errors.open("w", buffering=1)
    POINTS[point][0]()

    sequence.run_sequence = lambda *_, **__: run(place, out, seed=5)
    sys.exit(cli.main(["sequence", "--tasks", "x"]))


def ours(errors: str) -> list[str]:
    """Lines of the command line, among bars and warnings."""
    return [line for line in errors.splitlines() if line.startswith("holdfast: ")]


@pytest.mark.parametrize("point", POINTS)
def test_a_stopped_run_ends_as_if_nothing_had_happened(
    point: str, place: Path, whole: Path, tmp_path: Path, fork: Any
) -> None:
    out, errors = tmp_path / "run", tmp_path / "errors"
    process = fork.Process(target=stopped, args=(point, place, out, errors))
    process.start()
    process.join(240)
    _, code, newest = POINTS[point]
    assert process.exitcode == code
    said = ours(errors.read_text())
    if point == "again while it is saved":
        assert said == []  # at once: nothing more is said or done
    else:
        word = "interrupted" if code == 130 else "stopped by SIGTERM"
        (line,) = said
        assert line == f"holdfast: {word}; the same command goes on from the last checkpoint"
    if newest is not None:
        (training,) = (out / "tasks").glob(f"{newest[0]}-*.training")
        found = newest_complete(training)
        assert found is not None and found.name == f"checkpoint-{newest[1]}"
    assert Record.load(out).status == "running"
    run(place, out, seed=5)
    assert files(out) == files(whole)
    assert told(out) == told(whole)


def test_a_kill_between_an_epochs_checkpoint_and_its_end_loses_no_scores(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last step Trainer saves before it closes the epoch, and a resumed one skips both."""
    original, calls = saving.rotate, []

    def sixth(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "rotate", sixth)
        run(place, tmp_path, seed=5)
    assert (tmp_path / "tasks" / "1-mood.training" / "checkpoint-16").is_dir()
    run(place, tmp_path, seed=5)
    assert told(tmp_path) == told(whole) and files(tmp_path) == files(whole)


# --- several processes ----------------------------------------------------------------------------


def compared(place: Path, out: Path) -> None:
    """As `holdfast compare` does, with two workers."""
    from holdfast.experiments.compare import compare

    recipes: Any = {"a": (RECIPE, {}), "b": (RECIPE, {"lr": 1e-3})}
    plain = {**SETTINGS, "epochs": 400.0, "save_steps": 2}

    def work(_: Any) -> None:
        compare(str(place / "bert"), [place / "mood.jsonl"], recipes, seeds=[0], out=out,
                workers=2, **plain)  # fmt: skip

    demo.run = work
    sys.exit(cli.main(["demo"]))


def holder(folder: Path) -> str | None:
    """Who holds a run, such as `process 7 on …`."""
    return lease.holder(folder, lease.newest(folder))


@pytest.mark.parametrize(
    "group", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["parent", "group"]
)
def test_workers_save_and_end_with_the_first_process(
    group: bool, place: Path, tmp_path: Path
) -> None:
    """Told by its parent alone, or by the terminal or service manager as well."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path; from test_stopping import compared\n"
        f"if __name__ == '__main__': compared(Path({str(place)!r}), Path({str(tmp_path)!r}))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    runs = [tmp_path / "a" / "seed-0", tmp_path / "b" / "seed-0"]
    end = time.monotonic() + 200
    try:
        while not all(list(r.rglob("checkpoint-*/manifest.json")) for r in runs):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        workers = [int(str(holder(r)).split()[1]) for r in runs]
        assert process.pid not in workers
        (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert ours(errors) == [
        "holdfast: stopped by SIGTERM; the same command goes on from the last checkpoint"
    ]
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for home in runs:
        assert holder(home) is None
        checkpoints = list((home / "tasks").glob("*.training/checkpoint-*"))
        assert checkpoints and not [c for c in checkpoints if damage(c)]
        assert Record.load(home).status == "running"
