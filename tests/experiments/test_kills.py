"""`holdfast sequence`, killed at random times again and again, ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import models
import pytest
import torch
from sequences import RECIPE, SETTINGS, files, told

from holdfast import cli
from holdfast.experiments.record import Record
from holdfast.training import checkpoints

KILLS = int(os.environ.get("KILLS", "60"))


def sequence(place: Path, out: Path) -> None:
    torch.set_num_threads(1)
    checkpoints.KEPT_FROM = 0  # every slot a file of its own, linked where it did not change
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    words = ["sequence", "--model", f"{place}/bert", "--recipe", f"{place}/recipe.yaml",
             "--seed", "5", "--out", str(out), "--tasks"]  # fmt: skip
    words += [f"{place}/{topic}.jsonl" for topic in models.TOPICS]
    for name, value in SETTINGS.items():
        if name != "progress":
            words += [f"--{name.replace('_', '-')}", str(value)]
    sys.exit(cli.main(words))


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_as_one_that_was_not(
    place: Path, tmp_path: Path
) -> None:
    """Fault P1 and P19: also while a checkpoint is written, rotated, or gone on from."""
    RECIPE.save(place / "recipe.yaml")
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["test_kills", "holdfast.experiments.learner", "holdfast.report"])

    def started(out: Path) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=sequence, args=(place, out))
        process.start()
        return process

    for name in ("warm", "whole"):  # the first one starts the server
        process, begun = started(tmp_path / name), time.monotonic()
        process.join(300)
        assert process.exitcode == 0
        takes = time.monotonic() - begun
    expected = files(tmp_path / "whole"), told(tmp_path / "whole")
    assert len(expected[0]) > 20

    draw, kills, runs, where = random.Random(1), 0, 0, set[str]()
    out = tmp_path / "0"
    while kills < KILLS or out.exists():
        process = started(out)
        if kills < KILLS:
            process.join(draw.uniform(0, takes))
        else:
            process.join(300)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            where |= {p.name for p in out.glob("tasks/*")}
            continue
        assert process.exitcode == 0, (runs, kills)
        assert Record.load(out).status == "done"
        assert (files(out), told(out)) == expected, (runs, kills)
        assert not list(out.rglob("checkpoint-*")) and cli.main(["verify", str(out)]) == 0
        shutil.rmtree(out)
        runs += 1
        out = tmp_path / str(runs)
    print(f"{kills} kills over {runs} runs of {takes:.1f} s, among them in {sorted(where)}")
    assert runs > 1 or KILLS < 20
