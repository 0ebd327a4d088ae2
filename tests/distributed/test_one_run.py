"""`torchrun … -m holdfast sequence`: one run on two processes is that of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest
from launch import torchrun
from safetensors.torch import load_file

from holdfast.cli import main
from holdfast.experiments.record import Record

SHORT = [
    "--epochs",
    "1",
    "--max-length",
    "16",
    "--batch-size",
    "8",
    "--selection",
    "8",
    "--train-size",
    "40",
]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Two tasks of 40 rows: five whole batches, which two processes share alike."""
    place = models.save_bert(tmp_path / "bert", dropout=0.0)
    tasks = [str(models.write_task(tmp_path, t, count=80)) for t in ("mood", "question")]
    return ["--model", str(place), "--tasks", *tasks, *SHORT]


def sequence(words: Sequence[str], out: Path) -> subprocess.CompletedProcess[str]:
    return torchrun("-m", "holdfast", "sequence", *words, "--out", str(out), limit=180)


def files(run: Path) -> dict[str, Any]:
    """The weights in a run's folder, by file."""
    return {str(p.relative_to(run)): load_file(p) for p in sorted(run.rglob("model.safetensors"))}


def far(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The distance of all weights together. Single ones differ by more: AdamW's first steps are as
    large for a gradient that is all rounding."""
    return float(sum((one[n] - two[n]).square().sum() for n in one)) ** 0.5


def test_a_run_on_two_processes_is_that_of_one(words: list[str], tmp_path: Path) -> None:
    """Equal losses and weights, merged, with heads fitted; the first process alone writes."""
    words += ["--recipe", "default", "--lr", "1e-3"]
    assert main(["sequence", *words, "--out", str(tmp_path / "one")]) == 0
    done = sequence(words, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (Record.load(tmp_path / name) for name in ("one", "two"))
    assert two.versions["processes"] == "2" and two.steps == one.steps == [5, 5]
    for ours, theirs in zip(two.history, one.history, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    mine, alone = (files(tmp_path / name) for name in ("two", "one"))
    assert mine.keys() == alone.keys() and len(mine) == 3
    start = {f"bert.{n}": w for n, w in load_file(tmp_path / "bert" / "model.safetensors").items()}
    for name, weights in alone.items():
        learned = {n: w for n, w in weights.items() if n in start}
        ours = {n: w for n, w in mine[name].items() if n in start}
        off, moved = far(ours, learned), far(start, learned)
        assert len(learned) == len(start) and off < 0.02 * moved, name
    assert main(["verify", str(tmp_path / "two")]) == 0
    assert done.stdout.count("after learning") == 1  # one process speaks


def test_the_group_is_left_before_python_ends(tmp_path: Path) -> None:
    """What gloo's threads hold longer than that aborts the process at times, though all is done."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "import atexit, torch.distributed as dist\n"
        "atexit.register(lambda: print('held' if dist.is_initialized() else 'left'))\n"
        "from holdfast.experiments.ranks import join, wait\n"
        "join()\n"
        "join()\n"
        "assert dist.get_world_size() == 2\n"
        "wait()\n"  # else one may end while the other still connects
    )
    done = torchrun(script, limit=60)
    said = "".join(done.stdout.split())  # lines of two processes may come in between
    assert done.returncode == 0 and said == "leftleft", done.stderr


def test_what_does_not_fit_is_refused_by_one_line(words: list[str], tmp_path: Path) -> None:
    done = sequence([*words, "--batch-size", "7"], tmp_path / "odd")
    assert done.returncode != 0 and not (tmp_path / "odd").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("holdfast:")]
    assert said == ["holdfast: --batch-size: 7 rows cannot be shared by 2 processes alike; "
                    "take a multiple of 2"]  # fmt: skip


@pytest.mark.slow  # seven launches
def test_killed_processes_go_on_to_the_same_end(words: list[str], tmp_path: Path) -> None:
    """With -9 in either task; the others end with it, and the command goes on bit for bit."""
    words += ["--recipe", "default", "--save-steps", "1", "--epochs", "4"]
    assert sequence(words, tmp_path / "whole").returncode == 0
    out, command = tmp_path / "killed", [sys.executable, "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", "2", "-m", "holdfast", "sequence", *words]
    for task in ("1-mood", "2-question"):
        going = subprocess.Popen(
            [*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.monotonic() + 120
        while not [*(out / "tasks").glob(f"{task}.training/checkpoint-[3-9]")]:
            assert going.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        ranks = subprocess.run(["pgrep", "-P", str(going.pid)], capture_output=True, text=True)
        os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
        assert going.wait(120) != 0
    assert sequence(words, out).returncode == 0
    ours, whole = files(out), files(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    for name, weights in ours.items():
        assert all(bool((w == whole[name][key]).all()) for key, w in weights.items()), name
    assert Record.load(out).scores == Record.load(tmp_path / "whole").scores
