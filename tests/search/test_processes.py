"""Several processes of one search: they share, are killed, and lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import make_curve, make_result, plan

from holdfast.errors import Busy, Refused
from holdfast.experiments.engines import Job
from holdfast.experiments.engines.local import Local
from holdfast.experiments.processes import spread
from holdfast.search.run import search, together
from holdfast.search.study import Study


class Apart(Local):
    """One process, and that not this one."""

    def __call__(self, jobs: Sequence[Job], *, where: str, **more: Any) -> Generator[Any]:
        return spread([job.work for job in jobs], 1, where=where, **more)


class Elsewhere(Local):
    """Says of jobs what it is told to, and carries out those of which it is told None."""

    at_once, begun = None, list[int]()

    def __init__(self, *rounds: list[Busy | None]) -> None:
        super().__init__()
        self.__dict__["rounds"] = iter(rounds)

    def __call__(self, jobs: Sequence[Job], *, where: str, **more: Any) -> Generator[Any]:
        self.begun.append(len(jobs))
        for number, said in enumerate(next(self.__dict__["rounds"])):
            yield number, jobs[number].work() if said is None else said


def test_processes_that_are_stopped_elsewhere_are_started_again(
    place: Path, tmp_path: Path
) -> None:
    """And where one is through, those that still wait for a place are called off."""
    of, gone = Study(tmp_path, plan(place)), Busy("was stopped")
    engine = Elsewhere([gone] * 12, [gone, None, AssertionError("was waited for")])
    together(of, engine, make_curve, make_result, progress=False)
    assert of.counts() == {"complete": 12} and engine.begun == [12, 12]  # trials: no place is known


def killed_once(_: object) -> object:
    """Dies by SIGKILL in its first trial of all; then as `make_curve`."""
    from fakes import curve

    mark = Path(os.environ["HOLDFAST_TEST_MARK"])

    def train(job: object, watch: object) -> object:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return curve(job, watch)

    return train


def refusing(_: object) -> object:
    def train(job: object, watch: object) -> object:
        raise Refused("No space left on device", where="trials/0")

    return train


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes find the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.usefixtures("_importable")
def test_a_killed_process_is_replaced_and_costs_no_trial(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_TEST_MARK", str(tmp_path / "mark"))
    of = Study(tmp_path / "out", plan(place))
    together(of, Local(2), killed_once, make_result, progress=False)
    assert of.counts() == {"complete": 12}
    assert sorted(t.user_attrs["attempts"] for t in of.trials()) == [1] * 11 + [2]


def full(_: object) -> object:
    def train(job: object, watch: object) -> object:
        raise OSError(28, "No space left on device", "x")

    return train


def killed(_: object) -> object:
    def train(job: object, watch: object) -> object:
        os.kill(os.getpid(), signal.SIGKILL)

    return train


def killed_by_one(_: object) -> object:
    from fakes import curve

    def train(job: Any, watch: Any) -> object:
        if job.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return curve(job, watch)

    return train


@pytest.mark.usefixtures("_importable")
def test_a_trial_that_kills_every_process_fails_alone(place: Path, tmp_path: Path) -> None:
    """One process takes it each time, which may happen with several too."""
    of = Study(tmp_path, plan(place))
    together(of, Apart(), killed_by_one, make_result, progress=False)
    assert of.counts() == {"complete": 11, "fail": 1}


@pytest.mark.usefixtures("_importable")
def test_what_ends_processes_is_told_in_a_line(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A full disk, or memory that does not suffice: each with what to do."""
    of = Study(tmp_path, plan(place))
    with pytest.raises(OSError, match="No space left"):
        together(of, Apart(), full, make_result, progress=False)
    with pytest.raises(Refused, match=r"by SIGKILL; .*fewer --workers"):
        together(of, Apart(), killed, make_result, progress=False)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("_importable")
def test_what_one_process_is_refused_ends_all(place: Path, tmp_path: Path) -> None:
    of = Study(tmp_path, plan(place))
    with pytest.raises(Refused, match="No space left"):
        together(of, Local(2), refusing, make_result, progress=False)
    assert of.counts()["complete"] == 0


JOIN = """
import sys
from pathlib import Path
from fakes import make_curve, make_result
from holdfast.search.run import search
if __name__ == "__main__":
    place, out = map(Path, sys.argv[1:])
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    search(str(place / "bert"), tasks, out=out, train=make_curve, evaluate=make_result,
           progress=False, trials=12, sampler="random", pruner="none", epochs=1.0, max_length=16,
           selection=12, parts=4)
"""


@pytest.mark.usefixtures("_importable")
def test_searches_that_join_one_folder_agree(place: Path, tmp_path: Path) -> None:
    """Started at once: one study, every trial once, the same files as of one alone."""
    both = [
        subprocess.Popen([sys.executable, "-c", JOIN, str(place), str(tmp_path / "two")])
        for _ in range(2)
    ]
    assert [p.wait(120) for p in both] == [0, 0]
    two = json.loads((tmp_path / "two" / "search.json").read_text())
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    one = search(str(place / "bert"), tasks, out=tmp_path / "one", train=make_curve,
                 evaluate=make_result, progress=False, trials=12, sampler="random", pruner="none",
                 epochs=1.0, max_length=16, selection=12, parts=4)  # fmt: skip
    for key in ("counts", "winner", "final", "gain", "steps"):
        assert one[key] == two[key]
    assert [t["params"] for t in one["trials"]] == [t["params"] for t in two["trials"]]


# --- killed at random moments -------------------------------------------------------------------


SLOW = """
import time
from fakes import curve
import holdfast.search.study as studies
from holdfast.search.objective import Diverged
studies.ATTEMPTS = 100  # twenty kills may all meet one trial
def slow(_):
    def train(job, watch):
        at = watch.at
        def later(*a, **k):
            time.sleep(0.03)
            at(*a, **k)
        watch.at = later
        found = curve(job, watch)
        if job.number % 7 == 3:
            raise Diverged("diverged: as it does", 5)
        return found
    return train
"""


def told(folder: Path) -> int:
    """How many claims were ever taken: files, so that looking disturbs nobody."""
    return len(list((folder / "leases").glob("[0-9]*")))


@pytest.mark.slow
@pytest.mark.usefixtures("_importable")
def test_twenty_kills_lose_nothing(place: Path, tmp_path: Path) -> None:
    """kill -9 of a worker at 20 random moments: the study ends as if nothing had happened."""
    import random

    draw = random.Random(20)
    code = SLOW + JOIN.replace("train=make_curve", "train=slow").replace("trials=12", "trials=30")
    out = tmp_path / "killed"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(place), str(folder)])

    kills = 0
    while kills < 20:
        worker = start(out)
        # From before the study is made to some trials on: half of them, once a trial was taken.
        before, end = told(out), time.monotonic() + 60
        while kills % 2 and told(out) == before and time.monotonic() < end:
            assert worker.poll() is None, "the search ended before it was killed often enough"
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3 if kills % 2 else 3.0))
        worker.kill()
        worker.wait()
        kills += 1
    assert 0 < told(out) < 30, "the kills were to fall into the search"
    both = [start(out), start(out)]
    assert [p.wait(300) for p in both] == [0, 0]
    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0
    one, two = (json.loads((f / "search.json").read_text()) for f in (tmp_path / "whole", out))
    assert [t["number"] for t in two["trials"]] == list(range(30))
    for key in ("counts", "reasons", "winner", "best_flat", "front"):
        assert one[key] == two[key]
    assert one["steps"]["spent"] == two["steps"]["spent"]
    for mine, theirs in zip(one["trials"], two["trials"], strict=True):
        for key in ("params", "state", "value", "rungs", "reason"):
            assert mine[key] == theirs[key]
    assert one["final"] == two["final"] and one["gain"] == two["gain"]


# --- on several hosts, and elsewhere ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("_importable")
def test_two_hosts_share_a_study_and_lose_nothing(place: Path, tmp_path: Path) -> None:
    """A folder that both see, and a journal in it. One host is killed again and again, the other is
    paused until it is taken for dead: the study ends as one that was left alone."""
    import random

    draw, silence = random.Random(3), 3.0
    host = f"""
import sys
from holdfast.experiments import lease
lease.HOST, lease.STALE, lease.BEAT = sys.argv.pop(), {silence}, {silence / 8}
"""
    code = (
        host
        + SLOW
        + JOIN.replace("train=make_curve", "train=slow, url='journal:' + str(out / 'log')")
    )
    code = code.replace("trials=12", "trials=30").replace("sleep(0.03)", "sleep(0.15)")

    def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(place), str(folder), name])

    out = tmp_path / "shared"
    one, two = start(out, "one"), start(out, "two")
    for kill in range(4):
        before, end = told(out), time.monotonic() + 90
        while told(out) < min(before + 4, 29) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 0.5))
        if kill == 2:
            one.send_signal(signal.SIGSTOP)
            time.sleep(2 * silence)
            one.send_signal(signal.SIGCONT)
        two.kill()
        two.wait()
        two = start(out, "two")
    assert [p.wait(300) for p in (one, two)] == [0, 0]
    whole = start(tmp_path / "whole", "one")
    assert whole.wait(300) == 0
    alone, both = (json.loads((f / "search.json").read_text()) for f in (tmp_path / "whole", out))
    for key in ("counts", "reasons", "winner", "best_flat", "front", "final", "gain"):
        assert alone[key] == both[key]
    for mine, theirs in zip(alone["trials"], both["trials"], strict=True):
        for key in ("params", "state", "value", "rungs", "reason"):
            assert mine[key] == theirs[key]
    assert any(t["attempts"] > 1 for t in both["trials"]), "the kills were to fall into trials"


@pytest.mark.slow
@pytest.mark.usefixtures("_importable")
@pytest.mark.parametrize("name", ["ray", "submitit"])
def test_a_search_by_another_engine_is_that_of_this_process(
    name: str, place: Path, tmp_path: Path
) -> None:
    from holdfast.experiments.engines.ray import Ray
    from holdfast.experiments.engines.slurm import Slurm

    pytest.importorskip(name, reason="the engine")
    engine = Ray(jobs=2, cpus=0.5) if name == "ray" else Slurm(cluster="local", jobs=2, time="10")
    asked: dict[str, Any] = {
        "trials": 12, "sampler": "random", "pruner": "none", "epochs": 1.0, "max_length": 16,
        "selection": 12, "parts": 4, "progress": False, "train": make_curve,
        "evaluate": make_result,
    }  # fmt: skip
    model, tasks = str(place / "bert"), [place / "mood.jsonl", place / "question.jsonl"]
    here = search(model, tasks, out=tmp_path / "here", **asked)
    there = search(model, tasks, out=tmp_path / "there", engine=engine, **asked)
    for key in ("counts", "winner", "final", "gain", "steps"):
        assert here[key] == there[key]
    assert [t["params"] for t in here["trials"]] == [t["params"] for t in there["trials"]]
