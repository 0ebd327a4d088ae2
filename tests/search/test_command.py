"""`holdfast search` as it is typed: a whole tiny search, several processes, refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from fakes import make_curve, make_result, plan

from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.experiments.sequence import load_tasks
from holdfast.search import plan as plans
from holdfast.search import trial
from holdfast.search.plan import Plan
from holdfast.search.run import search
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
    monkeypatch.setattr(trial, "constant_score", lambda *_: -1.0)
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
        (["--engine", "slurm"], "SQLite serves one machine; take journal:FILE"),
        (["--engine", "ray", "--address", "h:1", "--storage", "sqlite:///s"], "SQLite serves one"),
        (["--engine", "slurm", "--storage", "postgresql://ann:pw@h/x"], "set PGPASSWORD"),
        (["--engine", "ray", "--jobs", "0"], "--jobs: must be a whole number from 1 on"),
        (["--workers", "0"], "--workers: must be a whole number from 1 on"),
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


def test_a_half_keeps_equal_texts_on_one_side(place: Path, tmp_path: Path) -> None:
    lines = [f"{'word ' * (i % 20)}number {i},{'ab'[i % 2]}\n" for i in range(120)] * 3
    (tmp_path / "thrice.csv").write_text("text,label\n" + "".join(lines))
    made = Plan.make(str(place / "bert"), [tmp_path / "thrice.csv"], shift="length", trials=9,
                     parts=4, max_length=16)  # fmt: skip
    for half in (*made.pair(0), *made.pair(1)):
        chosen, rest = ({row.text for row in rows} for rows in (half.selection, half.train))
        assert chosen and rest and chosen.isdisjoint(rest)


def test_warnings_of_the_tasks_are_told(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults D11: evaluation rows that are in the training rows too."""
    rows = (place / "mood.jsonl").read_text()
    for name in ("twice.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(rows)
    tasks = [f"{tmp_path / 'twice.jsonl'}?evaluation=held.jsonl", place / "question.jsonl"]
    search(str(place / "bert"), tasks, out=tmp_path / "out", train=make_curve, trials=8, parts=4,
           evaluate=make_result, progress=False, pruner="none", max_length=16)  # fmt: skip
    assert "twice: " in caplog.text and "also in the training rows" in caplog.text
