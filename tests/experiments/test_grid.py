"""A grid of runs, killed and paused and joined from elsewhere, ends as one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import files, told

from holdfast import compare
from holdfast.experiments import lease
from holdfast.experiments.runs import runs_below
from holdfast.recipe import PRESETS
from holdfast.report import run_rows

RUNS, KILLS = int(os.environ.get("RUNS", "24")), int(os.environ.get("KILLS", "4"))
RECIPES = ("plain", "dps", "ewc", "mixout")
SILENCE = 6.0  # seconds; two minutes elsewhere


def grid(place: Path, out: Path, host: str = lease.HOST) -> list[Any]:
    """What a process of that host name does when it is given the command."""
    torch.set_num_threads(1)
    lease.HOST, lease.STALE, lease.BEAT = host, SILENCE, SILENCE / 8
    return compare(
        str(place / "bert"), [place / "mood.jsonl", place / "colour.jsonl"],
        {name: (PRESETS[name](), {}) for name in RECIPES}, seeds=range(RUNS // len(RECIPES)),
        out=out, progress=False, epochs=1.0, batch_size=4, save_steps=2, max_length=16,
    )  # fmt: skip


def process(place: Path, out: Path, host: str) -> None:
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    grid(place, out, host)


def table(records: list[Any]) -> list[dict[str, Any]]:
    """Rows of runs.csv, without what is of each process by nature."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "out", "created")}
            for row in run_rows(records)]  # fmt: skip


@pytest.mark.slow
def test_a_grid_that_is_killed_paused_and_joined_ends_as_one_left_alone(
    place: Path, tmp_path: Path
) -> None:
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["test_grid", "holdfast.experiments.learner"])
    draw, kills, begun = random.Random(2), 0, time.monotonic()

    def started(host: str, out: str) -> multiprocessing.process.BaseProcess:
        made = fork.Process(target=process, args=(place, tmp_path / out, host))
        made.start()
        return made

    alone = started(lease.HOST, "alone")
    alone.join()
    takes = time.monotonic() - begun
    assert alone.exitcode == 0

    # Two at work: one is killed again and again, each second time the one of another host; between
    # two kills the other is paused until it is taken for dead.
    begun = time.monotonic()
    hosts = [lease.HOST, "elsewhere"]
    pair = [started(host, "grid") for host in hosts]
    done = 0
    while any(each.is_alive() for each in pair):
        time.sleep(draw.uniform(0.15, 0.5) * takes / (KILLS + 1))
        done = sum(status == "done" for _, _, status in runs_below(tmp_path / "grid"))
        if kills < KILLS and done < RUNS:
            at = kills % 2
            os.kill(pair[at].pid or 0, signal.SIGKILL)
            pair[at].join()
            kills += pair[at].exitcode == -signal.SIGKILL
            if kills == KILLS // 2 and pair[1 - at].is_alive():
                os.kill(pair[1 - at].pid or 0, signal.SIGSTOP)
            pair[at] = started(hosts[at], "grid")
            if kills == KILLS // 2:
                time.sleep(1.5 * SILENCE)
                os.kill(pair[1 - at].pid or 0, signal.SIGCONT)
    print(f"{RUNS} runs: alone in {takes:.0f} s; by two hosts, with {kills} kills and a pause, "
          f"in {time.monotonic() - begun:.0f} s")  # fmt: skip
    assert [each.exitcode for each in pair] == [0, 0] and kills == KILLS
    homes = {home.relative_to(tmp_path / "grid") for home, _, _ in runs_below(tmp_path / "grid")}
    assert len(homes) == RUNS + RUNS // len(RECIPES)  # a seed's first task is learned once for all
    for home in homes:
        assert files(tmp_path / "grid" / home) == files(tmp_path / "alone" / home), home
        ours, whole = (told(tmp_path / name / home) for name in ("grid", "alone"))
        for record in (ours, whole):  # where the run of the first task lies, and how long it took
            record.pop("first", None)
        assert ours == whole, home
    assert table(grid(place, tmp_path / "grid")) == table(grid(place, tmp_path / "alone"))
    assert not list((tmp_path / "grid").rglob("checkpoint-*"))
