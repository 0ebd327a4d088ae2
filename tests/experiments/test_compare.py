"""Recipes beside each other: folders, order, one process or several."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from holdfast import Recipe, Refused, compare
from holdfast.experiments.processes import spread
from holdfast.recipe import PRESETS
from holdfast.tasks.kinds import classification
from holdfast.training.stopping import Stopped

SETTINGS: dict[str, Any] = {"epochs": 0.5, "batch_size": 4, "save_steps": 0, "max_length": 16}
RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "plain": (PRESETS["plain"](), {}),
    "Plain, slow": (PRESETS["plain"](), {"lr": 1e-6}),
}


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes find the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def compared(place: Path, out: Path, recipes: Any = RECIPES, **more: Any) -> Any:
    tasks = [place / "mood.jsonl", place / "colour.jsonl"]
    plain = {"seeds": [0, 3], "out": out, "progress": False, **SETTINGS}
    return compare(str(place / "bert"), tasks, recipes, **plain | more)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    compared(place, out)
    return out


def test_every_recipe_with_every_seed(place: Path, whole: Path) -> None:
    records = compared(place, whole)
    assert [(r.settings["lr"], r.seed) for r in records] == [
        (2e-4, 0), (2e-4, 3), (1e-6, 0), (1e-6, 3)
    ]  # fmt: skip
    found = sorted(str(p.relative_to(whole)) for p in whole.rglob("record.json"))
    assert found == [f"{n}/seed-{s}/record.json" for n in ("plain-slow", "plain") for s in (0, 3)]


def test_finished_runs_are_only_read_and_new_ones_added(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    before = [p.read_bytes() for p in sorted(whole.rglob("record.json"))]
    monkeypatch.setattr(classification.KIND, "load_model", called)
    compared(place, whole)
    assert [p.read_bytes() for p in sorted(whole.rglob("record.json"))] == before
    with pytest.raises(AssertionError, match="trained again"):
        compared(place, whole, seeds=[0, 3, 4])


def test_a_difference_in_rate_alone_shows(whole: Path) -> None:
    """Both runs begin with one model: the slow one stays nearer to it."""
    from safetensors.torch import load_file

    def weight(label: str, task: str) -> Any:
        home = whole / label / "seed-0" / "tasks" / task
        return load_file(home / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]

    moved = {n: float((weight(n, "1-mood") - weight(n, "2-colour")).abs().max())
             for n in ("plain", "plain-slow")}  # fmt: skip
    assert 0 < moved["plain-slow"] < moved["plain"] / 10


@pytest.mark.slow
def test_several_processes_give_the_same(place: Path, whole: Path, tmp_path: Path) -> None:
    records = compared(place, tmp_path, workers=2)
    for record in records:
        folder = Path(record.settings["out"]).relative_to(tmp_path)
        other = json.loads((whole / folder / "record.json").read_text())
        assert record.scores == other["scores"] and record.seed == other["seed"]
    assert (records[0].settings["lr"], records[0].seed) == (2e-4, 0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"seeds": []}, "--seeds"), ({"seeds": [1, 1]}, "--seeds"),
        ({"recipes": {"A b": RECIPES["plain"], "a-b": RECIPES["plain"]}}, "one folder"),
        ({"recipes": {"good": RECIPES["plain"], "bad": (Recipe(), {"lr": -1.0})}}, "--lr"),
        ({"recipes": {"good": RECIPES["plain"], "bad": (Recipe(), {"rate": 1.0})}}, "rate"),
        ({"lr": float("nan")}, "--lr"), ({"workers": 0}, "--workers"),
    ],
    ids=["no seeds", "a seed twice", "one folder", "bad value", "unknown setting", "nan",
         "no process"],
)  # fmt: skip
def test_all_is_checked_before_the_first_run(
    more: Any, says: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=says):
        compared(place, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_a_refusal_in_another_process_is_a_refusal_here(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "plain").mkdir(parents=True)
    (tmp_path / "out" / "plain" / "seed-0").write_text("in the way")
    with pytest.raises(Refused, match="cannot be written") as refusal:
        compared(place, tmp_path / "out", {"plain": RECIPES["plain"]}, seeds=[0], workers=2)
    assert "--out" in str(refusal.value)


def killed_once(mark: Path, number: int) -> tuple[int, int]:
    """Dies by SIGKILL the first time that it is asked."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def stopped_once(mark: Path) -> str:
    """Is sent SIGTERM alone, as by a guard of memory, the first time that it is asked."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return "done"


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("_importable")
def test_a_killed_process_is_replaced_and_its_job_done(tmp_path: Path) -> None:
    """Of a pool one killed process would break every job."""
    jobs = [partial(killed_once, tmp_path / "mark", n) for n in range(3)]
    done = dict(spread(jobs, 2, where="x"))
    assert [done[n][0] for n in range(3)] == [0, 1, 2] and (tmp_path / "mark").exists()
    assert len({pid for _, pid in done.values()}) <= 2  # a process takes one job after another


@pytest.mark.usefixtures("_importable")
def test_a_process_that_is_stopped_from_elsewhere_is_replaced(tmp_path: Path) -> None:
    job = partial(stopped_once, tmp_path / "mark")
    assert list(spread([job], 1, where="x")) == [(0, "done")]


def killed_holding_the_bars(mark: Path) -> int:
    """Dies by SIGKILL the first time, with the lock of all processes' bars."""
    tqdm.get_lock().acquire()
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    tqdm.get_lock().release()
    return 1


@pytest.mark.usefixtures("_importable")
def test_a_process_that_is_killed_while_it_draws_holds_up_nobody(tmp_path: Path) -> None:
    job = partial(killed_holding_the_bars, tmp_path / "mark")
    assert list(spread([job], 1, where="x")) == [(0, 1)]
    with tqdm.get_lock():
        pass


@pytest.mark.usefixtures("_importable")
def test_a_job_that_ends_its_processes_is_given_up() -> None:
    with pytest.raises(Refused, match=r"x: its processes were .* by SIGKILL; .*fewer --workers"):
        list(spread([partial(killed, 0)], 1, where="x"))


def waiting(mark: Path) -> None:
    mark.touch()
    time.sleep(600)


@pytest.mark.usefixtures("_importable")
def test_a_signal_ends_those_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        if (tmp_path / "0").exists():
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("holdfast.experiments.processes.stopping.check", check)
    with pytest.raises(Stopped):
        list(spread([partial(waiting, tmp_path / "0")], 1, where="x"))
    assert not multiprocessing.active_children()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
