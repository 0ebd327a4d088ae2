"""Self-training: what BALD is, who is drawn, what never enters, and that a kill changes nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sequences import files, told
from test_recovery import kill_after

from holdfast import Recipe, Refused
from holdfast.cli import main
from holdfast.experiments import learner, selftrain
from holdfast.experiments.selftrain import Said, bald, chosen, drawn_by, rounds_in
from holdfast.experiments.serving import load
from holdfast.experiments.settings import SelfTraining, Settings

SHORT: dict[str, Any] = {
    "epochs": 2.0, "batch_size": 4, "lr": 5e-3, "save_steps": 3, "max_length": 16, "train_size": 8,
    "selection": 6, "progress": False, "rounds": 2, "rows": 40, "passes": 3, "pseudo": 12,
}  # fmt: skip


def learn(place: Path, out: Path, unlabelled: str = "many.jsonl", **more: Any) -> Any:
    if not (place / "many.jsonl").is_file():
        new = models.write_task(place / "other", "mood", count=60, seed=7).read_text()
        (place / "many.jsonl").write_text((place / "mood.jsonl").read_text() + new)
    task = more.pop("task", "mood.jsonl")
    return selftrain.selftrain(str(place / "bert"), str(place / task), str(place / unlabelled),
                               out=out, **{**SHORT, **more})  # fmt: skip


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed self-training."""
    out = tmp_path_factory.mktemp("selftrain")
    learn(place, out)
    return out


# --- the formulas ---------------------------------------------------------------------------------


def test_bald_by_hand() -> None:
    p = torch.tensor([
        # sure and opposite; unsure and alike; sure and alike; one of three; .9 / .5
        [[1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0], [0.9, 0.1]],
        [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]],
        [[1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]],
    ], dtype=torch.float64)  # fmt: skip
    third = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    m, h = 1.9 / 3, -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    last = -(m * math.log(m) + (1 - m) * math.log(1 - m)) - (h + 2 * math.log(2)) / 3
    assert bald(p).tolist() == pytest.approx([third, 0, 0, third, last], abs=1e-12)


@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 10**6))
def test_bald_is_the_mutual_information_of_row_and_pass(t: int, c: int, seed: int) -> None:
    """Σ p(t, c) log p(t, c) / (p(t) p(c)), with p(t) = 1/T: the same by another equation."""
    draw = random.Random(seed)
    raw = [[draw.random() ** 3 + 1e-9 for _ in range(c)] for _ in range(t)]
    p = [[x / sum(row) for x in row] for row in raw]
    mean = [sum(column) / t for column in zip(*p, strict=True)]
    mutual = sum(p[i][j] / t * math.log(p[i][j] / mean[j]) for i in range(t) for j in range(c))
    found = float(bald(torch.tensor(p, dtype=torch.float64)[:, None])[0])
    assert found == pytest.approx(mutual, abs=1e-9) and 0 <= found <= math.log(c)


def test_the_first_drawn_has_its_share_of_the_weights() -> None:
    """Over a grid of all pairs of uniform numbers: no chance, an error of the grid's width."""
    for one, two in ((0.5, 0.5), (0.9, 0.3), (0.2, 1.0)):
        n = 300
        grid = [(i + 0.5) / n for i in range(n)]
        first = sum(drawn_by([one, two], 1, iter(pair).__next__) == [0]
                    for pair in itertools.product(grid, grid))  # fmt: skip
        assert first / n**2 == pytest.approx(one / (one + two), abs=3 / n)


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=1, max_size=9), st.integers(0, 99))
def test_a_weight_of_0_is_never_drawn_and_nobody_twice(weights: list[float], seed: int) -> None:
    draw = random.Random(seed).random
    possible = {i for i, w in enumerate(weights) if w}
    for size in range(len(weights) + 1):
        found = drawn_by(weights, size, draw)
        assert len({*found}) == len(found) == min(size, len(possible)) and {*found} <= possible


def said(*rows: tuple[int, float, float]) -> Said:
    """label, max p̄ and a of each row."""
    label, sure, a = map(list, zip(*rows, strict=True))
    return Said(label, sure, a, False)


SAID = said(*[(0, 0.5 + i / 50, 0.02 * i) for i in range(20)], *[(1, 0.9, 0.3)] * 4, (2, 0.4, 1.0),
            (2, 0.4, 1.05))  # fmt: skip


@pytest.mark.parametrize("choose", ["bald", "confidence", "random"])
def test_classes_are_balanced_and_controls_take_as_many_rows(choose: Any) -> None:
    how = SelfTraining(choose=choose, pseudo=18)
    found = chosen(SAID, how, 3, random.Random(0).random)
    # 6 of each: class 1 has four, those of class 2 have a weight of max(0, 1 − a) = 0
    assert Counter(SAID.label[i] for i in found) == {0: 6, 1: 4}
    assert found == sorted({*found})
    if choose == "confidence":
        assert found[:6] == [14, 15, 16, 17, 18, 19]
    # A share is one of the rows that were answered; a class has one row at least.
    some = chosen(SAID, SelfTraining(choose=choose, pseudo=0.25), 3, random.Random(0).random)
    assert Counter(SAID.label[i] for i in some) == {0: 2, 1: 2}
    least = chosen(SAID, SelfTraining(choose=choose, pseudo=1), 3, random.Random(0).random)
    assert Counter(SAID.label[i] for i in least) == {0: 1, 1: 1}


def test_the_score_weighs_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """s = α max p̄ + (1 − α)(1 − a), and 1 − a by default."""
    given: list[list[float]] = []
    monkeypatch.setattr(selftrain, "drawn_by", lambda w, size, _: given.append([*w]) or [])
    for alpha in (0.0, 0.3, 1.0):
        chosen(said((0, 0.7, 0.2), (0, 0.6, 1.5)), SelfTraining(alpha=alpha), 1, random.random)
    assert given[0] == pytest.approx([0.8, 0.0])
    assert given[1] == pytest.approx([0.3 * 0.7 + 0.7 * 0.8, 0.3 * 0.6])
    assert given[2] == pytest.approx([0.7, 0.6])
    chosen(SAID, SelfTraining(choose="random"), 3, random.random)
    assert given[3] == [1.0] * 20


def test_most_votes_win_and_of_equal_ones_the_more_probable(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [[[0.6, 0.4], [0.9, 0.1]], [[0.6, 0.4], [0.45, 0.55]], [[0.0, 1.0], [0.45, 0.55]],
              [[0.4, 0.6], [0.9, 0.1]]]  # fmt: skip
    logits = iter(torch.tensor(passes).log())
    monkeypatch.setattr("holdfast.tasks.kinds.classification.outputs",
                        lambda *_, **__: [([0, 1], next(logits))])  # fmt: skip
    task = selftrain.load_tasks([place / "mood.jsonl"], seed=0, plan=Settings())[0]
    found = selftrain.answered(whole / "round-0", task, task.train[:2], passes=4, seed="0",
                               bar=None)  # fmt: skip
    # two votes each: p̄ is .4 / .6 and .675 / .325; three passes' mean would not decide by votes
    assert found.label == [1, 0] and found.sure == pytest.approx([0.6, 0.675]) and not found.agree


# --- rounds ---------------------------------------------------------------------------------------


def test_each_round_is_a_run_of_the_task_and_of_rows_that_its_teacher_labelled(
    place: Path, whole: Path
) -> None:
    records = learn(place, whole)  # only read
    found = rounds_in(whole)
    assert [r.tasks[0]["rows"]["train"] for r in records] == [
        8,
        *(8 + len(rows(whole / f"round-{k}.jsonl")) for k in (1, 2)),
    ]
    assert len({r.tasks[0]["evaluation_hash"] for r in records}) == 1
    truth = {x["text"]: x["label"] for x in rows(place / "many.jsonl")}
    plan = Settings(train_size=8, selection=6)
    task = selftrain.load_tasks([place / "mood.jsonl"], seed=0, plan=plan)[0]
    held = {row.text for row in (*task.train, *task.selection, *task.evaluation)}
    assert records[0].tasks[0]["hash"] == task.hash and held <= truth.keys()
    for k, (record, facts) in enumerate(zip(records, found, strict=True)):
        assert facts["round"] == k and facts["evaluation"] == record.scores[0][0]
        assert facts["selection"] == record.selection_scores[0][0]
        assert ("peft" in record.recipe) == (k > 0)
        assert load(whole / f"round-{k}").predict("mood", ["a good film"])[0].label
        if k:
            pseudo = rows(whole / f"round-{k}.jsonl")
            assert facts["pseudo"] == {
                n: sum(x["label"] == n for x in pseudo) for n in ("bad", "good")
            }
            assert 0 < max(facts["pseudo"].values()) <= 6
            assert not held & {x["text"] for x in pseudo}
            right = [truth[x["text"]] == x["label"] for x in pseudo]
            assert facts["agreement"] == sum(right) / len(right)
            assert all(0 <= x["bald"] <= math.log(2) and 0.5 <= x["sure"] <= 1 for x in pseudo)
            assert f"labelled by the model of round {k - 1}" in record.tasks[0]["warnings"][-1]
    assert "pseudo" not in found[0]


def test_0_rounds_are_the_labelled_rows_and_more_are_added(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    assert len(learn(place, tmp_path, rounds=0)) == 1
    assert not [*tmp_path.glob("*.jsonl")]
    learn(place, tmp_path)
    for k in range(3):
        assert files(tmp_path / f"round-{k}") == files(whole / f"round-{k}")
    assert rounds_in(tmp_path) == rounds_in(whole)
    with pytest.raises(Refused, match=r'other settings \(how\.choose: "bald" → "random"\)'):
        learn(place, tmp_path, choose="random")


KILLS = {
    "round 1's teacher has answered, and nothing is written": (selftrain, "chosen", 1),
    "round 1 has its rows": (selftrain, "_write", 1),
    "round 1 in training": (learner.Learner, "score", 5),
    "round 2 learned and not recorded": (selftrain.Job, "run", 3),
}


def killed(place: Path, out: Path, kill: str) -> None:
    kill_after(*KILLS[kill])
    learn(place, out)


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_one_goes_on(
    kill: str, place: Path, whole: Path, tmp_path: Path, fork: Any
) -> None:
    process = fork.Process(target=killed, args=(place, tmp_path, kill))
    process.start()
    process.join()
    assert process.exitcode == -9
    learn(place, tmp_path)
    assert rounds_in(tmp_path) == rounds_in(whole)
    for k in range(3):
        assert files(tmp_path / f"round-{k}") == files(whole / f"round-{k}")
        assert told(tmp_path / f"round-{k}") == told(whole / f"round-{k}")
        if k:
            name = f"round-{k}.jsonl"
            assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    "rounds", [[1], [{}], [{"round": 0}], {"a": 1}, "ab", [{"round": 1, "selection": 0.5,
               "evaluation": 0.5}], [{"round": 0, "selection": "x", "evaluation": 0.5}]]
)  # fmt: skip
def test_what_is_no_list_of_rounds_is_refused(rounds: Any, whole: Path, tmp_path: Path) -> None:
    body = json.loads((whole / selftrain.STATE).read_text())
    (tmp_path / selftrain.STATE).write_text(json.dumps({**body, "rounds": rounds}))
    with pytest.raises(Refused, match=r"selftrain\.json is damaged"):
        selftrain._begun(tmp_path, body["config"])


@pytest.mark.parametrize("kept", [slice(0, 3), slice(0, 0)])
def test_a_round_is_not_told_to_have_learned_from_other_rows(
    kept: slice, place: Path, whole: Path, tmp_path: Path
) -> None:
    """Its run was deleted, and of the file of its rows a part is left."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.rmtree(out / "round-2")
    file = out / "round-2.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[kept]))
    with pytest.raises(Refused, match=r"round-2\.jsonl: holds other rows than round 2 learned"):
        learn(place, out)
    file.unlink()
    learn(place, out)
    assert told(out / "round-2") == told(whole / "round-2")


def test_a_model_that_is_exchanged_between_rounds_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, real = Path(shutil.copytree(place, tmp_path / "own")), selftrain._pseudo
    file = own / "bert" / "config.json"

    def labelled(*words: Any) -> Any:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"mark": 1}))
        return real(*words)

    monkeypatch.setattr(selftrain, "_pseudo", labelled)
    with pytest.raises(Refused, match="round-1: model files: others than round 0 had"):
        learn(own, tmp_path / "out", rounds=1)


@pytest.mark.parametrize("line", ['{"text": 5, "label": "good"}', "[" * 9999, "5"])
def test_a_file_of_pseudo_labels_that_is_none_is_refused(
    line: str, place: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "round-1.jsonl").write_text(line + "\n")
    task = selftrain.load_tasks([place / "mood.jsonl"], seed=0, plan=Settings())[0]
    with pytest.raises(Refused, match=r"round-1\.jsonl: is damaged"):
        selftrain._with_pseudo(task, tmp_path / "round-1.jsonl", {}, before=0)


# --- rows -----------------------------------------------------------------------------------------


def test_rows_that_the_task_holds_never_enter(place: Path, tmp_path: Path, caplog: Any) -> None:
    """By text without case and spacing; those without a label need none, and are told once."""
    shutil.copy(place / "mood.jsonl", tmp_path / "mood.jsonl")
    task = selftrain.load_tasks([tmp_path / "mood.jsonl"], seed=0, plan=Settings(
        train_size=8, selection=6))[0]  # fmt: skip
    lines = [f"  {row.text.upper()} " for row in (*task.evaluation, *task.train, *task.selection)]
    (tmp_path / "many.txt").write_text(
        "\n".join([*lines, "a new film", "A new  film", "", "a new book"])
    )
    selftrain.tell_once.cache_clear()  # once a process
    found, truth = selftrain._new_rows(str(tmp_path / "many.txt"), task)
    assert [row.text for row in found] == ["A new  film", "a new book"] and truth == {}
    assert (
        caplog.text.count(f"{len(task.evaluation)} rows without a label are evaluation rows") == 1
    )
    (tmp_path / "known.txt").write_text("\n".join(lines))
    with pytest.raises(Refused, match="no row that the task does not hold"):
        selftrain._new_rows(str(tmp_path / "known.txt"), task)


def test_columns_are_the_tasks_and_labels_are_only_compared(tmp_path: Path) -> None:
    heads = "body,reply,stars\n"
    few = [f"a {w} film {i},the book,{s}\n" for i in range(9) for w, s in (("good", 1), ("bad", 0))]
    (tmp_path / "few.csv").write_text(heads + "".join(few))
    spec = f"{tmp_path / 'few.csv'}?text=body&pair=reply&label=stars"
    task = selftrain.load_tasks([spec], seed=0, plan=Settings())[0]
    (tmp_path / "many.csv").write_text(heads + "the plot,fine,1\nthe cast,dull,7\nthe man,poor,\n")
    (tmp_path / "bare.csv").write_text("x,y\nthe plot,fine\n")
    found, truth = selftrain._new_rows(str(tmp_path / "many.csv"), task)
    assert [(r.text, r.pair) for r in found] == [
        ("the plot", "fine"),
        ("the cast", "dull"),
        ("the man", "poor"),
    ]
    assert truth == {("the plot", "fine"): 1}
    found, truth = selftrain._new_rows(f"{tmp_path / 'bare.csv'}?text=x&pair=y", task)
    assert len(found) == 1 and truth == {}
    with pytest.raises(Refused, match="no column 'body'"):
        selftrain._new_rows(str(tmp_path / "bare.csv"), task)


def test_what_cannot_be_is_refused_before_anything_is_trained(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftrain.Job, "run", lambda *_: pytest.fail("trained"))
    (tmp_path / "numbers.jsonl").write_text(
        "".join(f'{{"text": "a film {i}", "label": {i / 7}}}\n' for i in range(20))
    )
    for more, why in [
        ({"task": f"{tmp_path}/numbers.jsonl?type=regression"}, "is of kind regression"),
        ({"unlabelled": "none.csv"}, "no such file"),
        ({"choose": "entropy"}, "--choose"),
        ({"choose": "random", "alpha": 0.5}, "--alpha: is of bald, not of random"),
        ({"rounds": 16}, "--rounds"), ({"passes": 1}, "--passes"), ({"phce": 1.0}, "--phce"),
        ({"pseudo": 1.0}, "--pseudo"), ({"roundz": 3}, "did you mean"),
    ]:  # fmt: skip
        with pytest.raises(Refused, match=why):
            learn(place, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match="holds a run; choose another --out"):
        (tmp_path / "run.json").touch()
        learn(place, tmp_path)


def test_students_have_their_own_recipe(place: Path, tmp_path: Path) -> None:
    records = learn(place, tmp_path, rounds=1, student=Recipe(name="bare"), phce=2.5,
                    student_lr=1e-3, epochs=0.5, choose="confidence")  # fmt: skip
    teacher, student = (r.recipe for r in records)
    assert not teacher["methods"] and student["methods"] == {"phce": {"tau": 2.5}}
    assert "peft" not in student
    assert [r.settings["lr"] for r in records] == [5e-3, 1e-3]


def test_a_model_without_dropout_is_told(place: Path, tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(place, tmp_path / "place")
    models.save_bert(tmp_path / "place" / "bert", dropout=0.0)
    learn(tmp_path / "place", tmp_path / "out", rounds=1, epochs=0.5)
    assert "all passes agree, as without dropout: BALD tells nothing" in caplog.text
    assert max(x["bald"] for x in rows(tmp_path / "out" / "round-1.jsonl")) < 1e-15


def test_the_verb(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(place, tmp_path / "made", rounds=0, epochs=0.5)  # writes the file
    words = f"""selftrain --model {place / "bert"} --task {place / "mood.jsonl"} --unlabelled
        {place / "many.jsonl"} --out {tmp_path / "out"} --rounds 1 --passes 2 --pseudo 4 --epochs .5
        --train-size 8 --max-length 16""".split()
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "pseudo labels" in shown and "bad 2, good 2" in shown and "report.html" in shown
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_by_another_engine_it_is_the_same(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is one job, whose records name the command that was typed."""
    pytest.importorskip("ray", reason="the engine ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(sys, "argv", ["holdfast", "selftrain", "as typed"])
    words = [
        "selftrain",
        "--model",
        str(place / "bert"),
        "--task",
        str(place / "mood.jsonl"),
        "--unlabelled",
        str(place / "many.jsonl"),
        "--engine",
        "ray",
        "--out",
        str(tmp_path),
    ]
    for name, value in SHORT.items():
        words += [] if name == "progress" else [f"--{name.replace('_', '-')}", str(value)]
    assert main(words) == 0
    assert rounds_in(tmp_path) == rounds_in(whole)
    for number in range(3):
        assert files(tmp_path / f"round-{number}") == files(whole / f"round-{number}")
        record = json.loads((tmp_path / f"round-{number}" / "record.json").read_text())
        assert record["command"] == sys.argv
