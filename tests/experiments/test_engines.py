"""Many runs, by one process or several, on one host or several: each once, and all see the same."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sequences import files, told

from holdfast import cli
from holdfast.errors import Busy, Refused
from holdfast.experiments import lease
from holdfast.experiments.engines import Job, Partly, carry_out
from holdfast.experiments.engines.local import Local
from holdfast.experiments.engines.plan import Only
from holdfast.experiments.engines.ray import Ray
from holdfast.experiments.engines.slurm import Slurm
from holdfast.experiments.record import Record
from holdfast.experiments.runs import RECORD, open_run
from holdfast.testing.nodes import Nodes
from holdfast.training import stopping

SHORT = ["--epochs", "0.5", "--batch-size", "4", "--save-steps", "0", "--max-length", "16"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started find the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BEAT", 0.05), ("STALE", 0.4), ("LOOK", 0.01)):
        monkeypatch.setattr(lease, name, value)


def counted(out: Path, label: str, seconds: float = 0.0) -> str:
    """A run that notes each time that it is not only read."""
    with open_run(out, {"tasks": []}):
        if not (out / RECORD).exists():
            time.sleep(seconds)
            with (out / "times").open("a") as file:
                file.write("x")
            tasks = [{"name": "mood", "metric": "accuracy"}]
            Record(tasks=tasks, settings={"label": label}).save(out / RECORD)
        return str(Record.load(out).settings["label"])


def jobs(place: Path, number: int, **more: Any) -> list[dict[str, Any]]:
    return [{"out": place / str(i), "label": f"run {i}", **more} for i in range(number)]


def times(place: Path) -> list[int]:
    return [len(path.read_text()) for path in sorted(place.glob("*/times"))]


def test_callers_at_once_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody refuses, nothing is done twice, and each returns everything."""
    monkeypatch.setattr(lease, "LOOK", 0.01)
    found: dict[int, list[str]] = {}

    def call(number: int) -> None:
        todo = jobs(tmp_path, 12, seconds=0.02)
        found[number] = carry_out(counted, todo, Local(), where=tmp_path)

    callers = [threading.Thread(target=call, args=(n,)) for n in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == {n: [f"run {i}" for i in range(12)] for n in range(3)}
    assert times(tmp_path) == [1] * 12


def forged(folder: Path, **more: Any) -> None:
    """The lease of a process elsewhere, of which nothing is heard."""
    folder.mkdir(parents=True)
    sign = {"process": 7, "host": "elsewhere", "boot": "x", "locked": True, "token": "t", **more}
    (folder / "lease.1").write_text(json.dumps(sign))


@pytest.mark.usefixtures("hasty")
def test_what_others_hold_is_done_last_and_not_waited_for(tmp_path: Path) -> None:
    forged(tmp_path / "1")
    begun = time.monotonic()
    assert carry_out(counted, jobs(tmp_path, 3), Local(), where=tmp_path)[1] == "run 1"
    assert time.monotonic() - begun >= lease.STALE
    done = [(tmp_path / str(i) / RECORD).stat().st_mtime_ns for i in range(3)]
    assert done[0] < done[2] < done[1]


def refused(out: Path, label: str) -> None:
    if label == "run 1":
        raise Refused("not this one", where=label)
    counted(out, label)


def test_a_refusal_ends_all(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="run 1: not this one"):
        carry_out(refused, jobs(tmp_path, 3), Local(), where=tmp_path)
    assert times(tmp_path) == [1]


def test_a_plan_has_one_command_a_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Carried out one by one, they make the runs of the whole command, bit for bit."""
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--model", str(place / "bert"), "--tasks", str(place / "mood.jsonl"),
             "--recipes", "plain", "dps", "--seeds", "3", *SHORT, "--out"]  # fmt: skip
    assert cli.main(["plan", *words, "a b"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    runs = ["plain/seed-3", "dps/seed-3"]
    assert [line["run"] for line in lines] == runs and not list(tmp_path.iterdir())
    for line in lines:
        begun, *rest = shlex.split(line["command"])
        assert begun == "holdfast" and cli.main(rest) == 0
        assert cli.main(rest) == 0  # at least once: again is nothing
    assert not (tmp_path / "a b" / "runs.csv").exists()
    assert cli.main([*words, "whole"]) == 0
    for run in runs:
        one, other = tmp_path / "a b" / run, tmp_path / "whole" / run
        assert files(one) == files(other) and told(one) == told(other)
    capsys.readouterr()
    assert cli.main(["plan", *words, "a b"]) == 0 and '"run"' not in capsys.readouterr().out
    assert not (tmp_path / "a b" / "runs.csv").exists()


@pytest.mark.parametrize("more, first", [([], "first"), (["--budget", "1"], "tuning/first")])
def test_a_plan_says_that_more_comes_after_it(
    more: list[str], first: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr("holdfast.experiments.engines.plan.tell_once", said.append)
    words = ["plan", "compare", "--model", str(place / "bert"), "--recipes", "plain", "ewc", *SHORT,
             "--tasks", *(str(place / f"{topic}.jsonl") for topic in ("mood", "question")), *more,
             "--seeds", "3", "--out", str(tmp_path / "first" / "out")]  # fmt: skip
    assert cli.main(words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["run"].startswith(f"{first}/")
    assert said == ["further runs begin where these end: plan again when they are done"]
    assert cli.main([*words, "--head", "shared"]) == 0  # no first task is
    assert len(said) == (2 if more else 1)


def test_only_a_run_that_is_there(tmp_path: Path) -> None:
    other = Only("5", tmp_path)
    with pytest.raises(Partly):
        carry_out(counted, jobs(tmp_path, 3), other, where=tmp_path)
    with pytest.raises(Refused, match="5 is none of the runs"):
        other.end()
    with open_run(tmp_path / "1", {}), pytest.raises(Busy):
        carry_out(counted, jobs(tmp_path, 3), Only("1", tmp_path), where=tmp_path)
    assert not times(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--engine slurm --time 4h", "--time: must be H:MM:SS"),
        ("--engine slurm --cpus 0.5", "--cpus: Slurm gives whole ones"),
        ("--engine ray --partition gpu", "--partition: is no option of the engine ray"),
        ("--address auto", "--address: is no option of the engine local"),
        ("--workers 0", "--workers: must be a whole number"),
    ],
)
def test_options_of_engines_are_checked_first(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--tasks", "builtin:intents", "--recipes", "plain", "--out", str(tmp_path / "out")]
    assert cli.main(["compare", *more, *words.split()]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- elsewhere ------------------------------------------------------------------------------------


def steps(folder: Path) -> str:
    """Asked to end by a signal, it saves, and goes on when it is called again."""
    begun = folder / "begun"
    if not begun.exists():
        with stopping.looking():
            begun.write_text(str(os.getpid()))
            while not stopping.asked():
                time.sleep(0.01)
            (folder / "saved").write_text(str(stopping.asked()))
    return (folder / "saved").read_text()


def killed_once(folder: Path) -> str:
    """Dies by SIGKILL the first time."""
    if not (folder / "mark").exists():
        (folder / "mark").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def told_off(folder: Path) -> None:
    raise Refused("not here", where=str(folder), remedy="elsewhere")


def begun(folder: Path, seconds: float = 120) -> int:
    """The process of `steps`, once it is at work."""
    end = time.monotonic() + seconds
    while not (folder / "begun").is_file() or not (folder / "begun").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    return int((folder / "begun").read_text())


def given(engine: Any, folder: Path, *work: Any) -> list[Any]:
    todo = [Job(folder / str(i), str(i), each) for i, each in enumerate(work)]
    return [result for _, result in sorted(engine(todo, where=str(folder)))]


@pytest.mark.slow
def test_a_job_of_slurm_saves_and_is_queued_again_when_its_time_is_over(tmp_path: Path) -> None:
    """As Slurm does, by SIGUSR2; submitit's own handler would end it on the spot."""
    pytest.importorskip("submitit", reason="the engine slurm is submitit")
    ender = threading.Thread(target=lambda: os.kill(begun(tmp_path), signal.SIGUSR2))
    ender.start()
    found = given(Slurm(cluster="local", time="10"), tmp_path, partial(steps, tmp_path))
    ender.join()
    assert found == [str(int(signal.SIGUSR2))]
    logs = "".join(p.read_text() for p in (tmp_path / "slurm").glob("*_log.*"))
    assert "Requeued job" in logs


@pytest.mark.slow
def test_slurm_replaces_what_is_killed_and_passes_on_a_refusal(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the engine slurm is submitit")
    here = Slurm(cluster="local", time="10")
    assert given(here, tmp_path, partial(killed_once, tmp_path)) == ["done"]
    with pytest.raises(Refused, match="not here; elsewhere"):
        given(here, tmp_path, partial(told_off, tmp_path))


@pytest.mark.slow
def test_ray_replaces_what_is_killed_and_stops_with_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the engine ray")
    two = [partial(killed_once, tmp_path), partial(counted, tmp_path / "c", "c")]
    assert given(Ray(cpus=0.5), tmp_path, *two) == ["done", "c"]
    with pytest.raises(Refused, match="not here; elsewhere"):
        given(Ray(), tmp_path, partial(told_off, tmp_path))
    making = Ray(cpus=0.5)(
        [Job(tmp_path, "a", partial(counted, tmp_path / "d", "d")),
         Job(tmp_path, "b", partial(steps, tmp_path))], where="x",
    )  # fmt: skip
    assert next(making) == (0, "d")
    begun(tmp_path)
    making.close()
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGINT))


@pytest.fixture
def nodes(tmp_path: Path, _importable: None) -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="the engine ray")
    (tmp_path / "nodes").mkdir()
    made = Nodes(tmp_path / "nodes")
    try:
        yield made
    finally:
        made.end()


DRIVER = """
import sys
from pathlib import Path
from test_engines import counted, jobs
from holdfast.experiments.engines import carry_out
from holdfast.experiments.engines.ray import Ray
place, runs = Path(sys.argv[1]), int(sys.argv[2])
found = carry_out(counted, jobs(place, runs, seconds=0.5), Ray(address=sys.argv[3]), where=place)
assert found == [f"run {i}" for i in range(runs)]
"""


@pytest.mark.slow
def test_a_node_and_the_driver_are_killed_and_nothing_is_done_twice(
    nodes: Nodes, tmp_path: Path
) -> None:
    runs, place = 24, tmp_path / "runs"

    def driver(**more: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", DRIVER, str(place), str(runs), nodes.address]
        return subprocess.Popen(words, env=nodes.env | more, text=True, stderr=subprocess.PIPE)

    def until(done: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not done():
            assert first.poll() is None and time.monotonic() < end
            time.sleep(0.05)

    stranger = driver(RAY_AUTH_TOKEN="0" * 64)
    said = stranger.communicate(timeout=120)[1]
    assert stranger.returncode and "no Ray answers" in said and not place.exists()

    first = driver()
    until(lambda: len(times(place)) >= runs // 4)
    nodes.kill(nodes.far)
    until(lambda: len(times(place)) >= runs // 2)
    first.kill()
    first.wait()
    assert len(times(place)) < runs, "the kills were to fall into the grid"
    again = driver()
    said = again.communicate(timeout=200)[1]
    assert again.returncode == 0, said
    assert times(place) == [1] * runs
