"""`holdfast search` as it is typed: a whole tiny search, several processes, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from fakes import make_curve, make_result, plan

from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.experiments.sequence import load_tasks
from holdfast.report.search import load_search, render, write_search_report
from holdfast.search import plan as plans
from holdfast.search import processes, training
from holdfast.search.plan import Plan
from holdfast.search.run import search
from holdfast.search.study import Study
from holdfast.tasks import Task

TINY = ["--epochs", "0.5", "--batch-size", "8", "--max-length", "16", "--selection", "12",
        "--parts", "3", "--flat", "5e-3", "1e-2", "--trials", "5"]  # fmt: skip


def words(place: Path, out: Path, *more: str) -> list[str]:
    tasks = [str(place / "mood.jsonl"), str(place / "question.jsonl")]
    return ["search", "--model", str(place / "bert"), "--tasks", *tasks, "--out", str(out), *TINY,
            *more]  # fmt: skip


def test_a_search_from_the_command_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So few steps teach little: without this all trials would stop after task one.
    monkeypatch.setattr(training, "constant_score", lambda *_: -1.0)
    assert main(words(place, tmp_path)) == 0
    said = capsys.readouterr()
    body = json.loads((tmp_path / "search.json").read_text())
    assert " ".join(body["gain"]["sentence"].split()) in " ".join(said.out.split())
    assert "flat@" in said.out and "rates.yaml" in said.out
    assert sum(body["counts"].values()) == 5 and "best" in said.err
    for name in ("rates.yaml", "trials.csv", "report.html", "study.db", "study.json"):
        assert (tmp_path / name).is_file()
    rows: dict[int, set[str]] = defaultdict(set)
    for f in body["final"]:  # what is compared is on evaluation rows, and each seed its own run
        for s in f["seeds"]:
            (found,) = (tmp_path / "final").glob(f"{f['label'].split('@')[0].replace(' ', '-')}*/"
                                                 f"seed-{s['seed']}/record.json")  # fmt: skip
            run = json.loads(found.read_text())
            assert (run["scores"][1], run["scores"][0][0]) == ([s["old_after"], s["new"]], s["old"])
            assert (run["settings"]["lr"], run["seed"]) == (f["rate"], s["seed"])
            curve = [f["params"][f"x.{part}"] for part in body["space"]["parts"]]
            mean = math.prod(curve) ** (1 / len(curve))
            assert run["recipe"]["rates"]["multipliers"] == pytest.approx([x / mean for x in curve])
            rows[s["seed"]].add(run["tasks"][0]["hash"])
            assert not (found.parent / "tasks").exists()
    # every seed its own rows, the same for all that are compared
    assert [len(hashes) for hashes in rows.values()] == [1, 1, 1]
    assert len(set.union(*rows.values(), {body["tasks"][0]["hash"]})) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective", "pareto", "--pruner", "hyperband"], "--pruner: no pruner"),
        (["--tune", "ewc.strenght"], "did you mean 'ewc.strength'"),
        (["--lr", "1e-4"], "unknown option '--lr'"),
        (["--shift", "cluster"], "it takes 1"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_exit_with_2(
    more: list[str], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words(place, tmp_path / "out", *more))
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr().err
    assert code == 2 and said in told and told.count("\n") == 1
    assert not (tmp_path / "out" / "trials").exists()


def test_halves_of_one_task(place: Path) -> None:
    halves = Plan.make(str(place / "bert"), ["builtin:sentiment"], shift="length", trials=9,
                       train_size=200, parts=4, max_length=32)  # fmt: skip
    assert [t.name for t in halves.tasks] == ["sentiment-short", "sentiment-long"]
    other = halves.pair(5)
    assert [t.evaluation for t in other] == [t.evaluation for t in halves.tasks]
    for mine, theirs in zip(halves.tasks, other, strict=True):
        assert mine.train != theirs.train and mine.selection != theirs.selection
        assert len(theirs.train) == 200 and not {*theirs.train} & {*theirs.selection}
    assert halves.facts["shift"] == "length" and "(length)" in halves.title


def test_a_shift_is_made_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedded again, in another process, a row might fall to the other half."""
    made = Plan.make(str(place / "bert"), ["builtin:sentiment"], shift="cluster", trials=9,
                     train_size=60, parts=4, max_length=16)  # fmt: skip
    monkeypatch.setattr(plans, "load_shifted", None)
    monkeypatch.setattr(plans, "load_tasks", None)
    other = made.pair(5)
    assert [t.evaluation for t in other] == [t.evaluation for t in made.tasks]
    assert [t.name for t in other] == ["sentiment-cluster1", "sentiment-cluster2"]
    assert other[0].train != made.tasks[0].train and made.pair(5) == other


def test_a_damaged_model_cannot_embed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bert", tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(Refused, match="cannot be loaded") as refusal:
        Plan.make(str(tmp_path / "bert"), ["builtin:sentiment"], shift="cluster", trials=9,
                  train_size=60, parts=4, max_length=16)  # fmt: skip
    assert "\n" not in str(refusal.value)


def test_a_seed_means_the_rows_of_a_sequence(place: Path) -> None:
    made = plan(place)
    for seed in (0, 3):
        tasks = [place / "mood.jsonl", place / "question.jsonl"]
        assert list(made.pair(seed)) == load_tasks(tasks, seed=seed, plan=made.settings)


def test_halves_that_hold_too_few_rows(place: Path) -> None:
    def half(**more: Any) -> Task:
        made = Plan.make(str(place / "bert"), ["builtin:sentiment"], shift="length", trials=9,
                         parts=4, max_length=16, **more)  # fmt: skip
        return made.tasks[0]

    with pytest.raises(Refused, match="sentiment-short: selection 1900 leaves no row"):
        half(selection=1900)
    # the whole task has 2,700: what is told is of the half, and of what was asked for
    few = half(train_size=2000)
    (said,) = few.warnings
    assert said == f"train_size 2000 takes all {len(few.train)} training rows"
    assert half(train_size=1000).warnings == ()


def test_warnings_of_the_tasks_are_told(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults D11: evaluation rows that are in the training rows too."""
    rows = (place / "mood.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(rows * 2)
    tasks = [tmp_path / "twice.jsonl", place / "question.jsonl"]
    search(str(place / "bert"), tasks, out=tmp_path / "out", train=make_curve, trials=8, parts=4,
           evaluate=make_result, progress=False, pruner="none", max_length=16)  # fmt: skip
    assert "twice: " in caplog.text and "also in the training rows" in caplog.text


# --- several processes --------------------------------------------------------------------------


def killed_once(_: object) -> object:
    """Dies by SIGKILL in its first trial of all; then as `make_curve`."""
    from fakes import curve

    mark = Path(os.environ["HOLDFAST_TEST_MARK"])

    def train(job: object, watch: object) -> object:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return curve(job, watch)  # type: ignore[arg-type]

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
    processes.spread(of, 2, killed_once, make_result, progress=False)  # type: ignore[arg-type]
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


@pytest.mark.usefixtures("_importable")
def test_what_ends_processes_is_told_in_a_line(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A full disk, or memory that does not suffice: each with what to do."""
    of = Study(tmp_path, plan(place))
    with pytest.raises(OSError, match="No space left"):
        processes.spread(of, 1, full, make_result, progress=False)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"by SIGKILL; .*fewer --workers"):
        processes.spread(of, 1, killed, make_result, progress=False)  # type: ignore[arg-type]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("_importable")
def test_what_one_process_is_refused_ends_all(place: Path, tmp_path: Path) -> None:
    of = Study(tmp_path, plan(place))
    with pytest.raises(Refused, match="No space left"):
        processes.spread(of, 2, refusing, make_result, progress=False)  # type: ignore[arg-type]
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
    return len(list((folder / "claims").glob("*"))) if folder.exists() else 0


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


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("facts")
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    search(str(place / "bert"), tasks, out=out, train=make_curve, evaluate=make_result,
           progress=False, trials=14, sampler="random", pruner="none", epochs=1.0, max_length=16,
           selection=12, parts=4)  # fmt: skip
    return out


def test_the_page_shows_all_that_was_asked_for(facts: Path, tmp_path: Path) -> None:
    body = load_search(facts)
    page = render(body)
    for title in (
        "History",
        "Rates of the best trials",
        "Importance of each part",
        "Learned against kept",
        "The searched curve and its controls",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "14 of 14 trials" in page and body["gain"]["verdict"] in page.lower()
    assert page.count("data:image/svg+xml") == 2 * 5
    assert write_search_report(body, tmp_path / "report.html").read_text() == page


def test_a_search_is_reported_again(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(facts), "--out", str(tmp_path / "page.html")]) == 0
    assert "bertcl@" in capsys.readouterr().out
    assert "holdfast search</p>" in (tmp_path / "page.html").read_text()


def test_a_page_holds_nothing_that_runs_or_calls_home(facts: Path) -> None:
    body = json.loads((facts / "search.json").read_text())
    evil = "<script>alert(1)</script>\x1b[31m\u202e"
    body["tasks"][0]["name"] = evil
    body["trials"][9]["control"] = evil
    body["final"][0]["label"] = evil
    body["gain"]["sentence"] = evil
    body["command"] = ["holdfast", evil]
    page = render(body)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert "default-src 'none'" in page
    for word in ("http://", "https://", "<iframe", "<link", "onerror", "@import"):
        assert word not in page


def test_a_search_of_which_nothing_came_still_has_a_page(facts: Path) -> None:
    body = load_search(facts)
    body |= {"trials": [], "final": [], "front": [], "reasons": {},
             "importance": {"shares": {}, "note": "nothing"}, "winner": None}  # fmt: skip
    body["steps"] |= {"share": None}
    assert "History" not in render(body)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"kind": "search", "schema": 9}', '{"kind": "search", "schema": 1}'],
)
def test_what_is_no_search_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(Refused):
        load_search(tmp_path)
