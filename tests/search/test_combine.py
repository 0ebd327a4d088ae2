"""The fusion in closed form, its invariances, and what a file of trials may hold."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import Refused
from holdfast.files import read_yaml
from holdfast.rates import Rates
from holdfast.recipe import Recipe
from holdfast.search import combine as module
from holdfast.search.combine import Fusion, combine, fuse, rank_weights, table
from holdfast.search.trials import (
    COLUMNS,
    STATES,
    Study,
    Trial,
    part_names,
    read_study,
    write_trials,
)
from holdfast.search.verbs import add_combine

SHA = iter(range(10**9))


def study(trials: Sequence[tuple[float, Sequence[float]]]) -> Study:
    """A study of (reward, rates) pairs, each reward half from either task."""
    made = tuple(
        Trial(number=i, lr=tuple(lr), old=0.9, new=reward / 2, old_after=reward / 2)
        for i, (reward, lr) in enumerate(trials)
    )
    usual: dict[str, Any] = {
        "source": "made",
        "sha256": str(next(SHA)),
        "study": None,
        "layers": None,
    }
    return Study(**usual | {"trials": made, "left_out": {}})


def logs(count: int = 49, seed: int = 0, parts: int = 10) -> list[tuple[float, list[float]]]:
    """Trials of the published shape: rewards, and log-uniform rates in [1e-7, 1e-3]."""
    draw = np.random.default_rng(seed)
    rates = 10 ** draw.uniform(-7, -3, (count, parts))
    return [(float(r), [float(v) for v in lr]) for r, lr in
            zip(draw.uniform(1.0, 1.8, count), rates, strict=True)]  # fmt: skip


# --- the formula --------------------------------------------------------------------------------


def test_three_trials_by_hand() -> None:
    # Ranks 0, 1, 2 weigh 1, 1/2, 1/4 at base 2. In powers of ten, part by part:
    #   (4·-4 + 2·-5 + 1·-6)/7 = -32/7,   (4·-3 + 2·-3 + 1·-3)/7 = -3,   (4·-6 + 2·-4 + 1·-2)/7
    found = fuse(
        [study([(1.1, [1e-5, 1e-3, 1e-4]), (1.5, [1e-4, 1e-3, 1e-6]), (0.9, [1e-6, 1e-3, 1e-2])])],
        base=2,
    )
    assert np.log10(found.fused) == pytest.approx([-32 / 7, -3, -34 / 7], rel=1e-12)
    mean = (-32 / 7 - 3 - 34 / 7) / 3
    assert math.log10(found.geometric_mean_rate) == pytest.approx(mean)
    assert np.log10(found.multipliers) == pytest.approx([-32 / 7 - mean, -3 - mean, -34 / 7 - mean])


def test_studies_count_alike_however_many_trials_they_have() -> None:
    many = study([(1.0 + i / 100, [1e-4, 1e-4, 1e-4]) for i in range(30)])
    few = study([(0.2, [1e-6, 1e-6, 1e-2])])
    assert fuse([many, few]).fused == pytest.approx([1e-5, 1e-5, 1e-3])


def test_the_best_of_many_trials_weighs_four_ninths() -> None:
    weights = rank_weights([1 - i / 100 for i in range(49)])
    assert weights[0] == pytest.approx(4 / 9, abs=1e-12)  # 1 - 1/1.8
    assert weights[1] == pytest.approx(4 / 9 / 1.8) and weights.sum() == pytest.approx(1)
    assert fuse([study(logs())]).weights[0].max() == pytest.approx(0.444, abs=1e-3)


def test_equal_rewards_share_the_mean_of_their_weights() -> None:
    # Ranks 0..3 weigh 1, 1/2, 1/4, 1/8 at base 2; the middle two are tied: 3/8 each.
    assert rank_weights([0.5, 0.7, 0.9, 0.7], 2) == pytest.approx(
        np.array([1 / 8, 3 / 8, 1, 3 / 8]) * 8 / 15
    )
    # Two ways to the same accuracy differ in rounding; they are one reward all the same.
    one, other = 0.1 + 0.7, 0.5 + 0.3 + 2e-16
    assert one != other and len(set(rank_weights([one, other]))) == 1
    assert len(set(rank_weights([0.8, 0.8 + 1e-6]))) == 2


def test_base_one_is_the_plain_mean_and_a_huge_one_takes_the_best() -> None:
    trials = logs(7)
    plain = np.exp(np.log([lr for _, lr in trials]).mean(0))
    assert fuse([study(trials)], base=1).fused == pytest.approx(plain)
    best = max(trials)[1]
    assert fuse([study(trials)], base=1e300).fused == pytest.approx(best)


@pytest.mark.parametrize("bad", [0.99, 0, -1.8, math.nan, math.inf, True, "1.8", None])
def test_other_bases_are_refused(bad: Any) -> None:
    with pytest.raises(Refused, match="--base"):
        fuse([study(logs(3))], base=bad)


rate = st.floats(1e-9, 1e-1)
reward = st.sampled_from([0.1, 0.3, 0.1 + 0.2, 1.2, 1.5, 1.7])  # few, so that ties are common
made = st.lists(st.tuples(reward, st.lists(rate, min_size=4, max_size=4)), min_size=1, max_size=12)


@given(st.lists(made, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_neither_the_order_of_rows_nor_of_studies_leaves_a_trace(
    several: list[list[tuple[float, list[float]]]], random: Any
) -> None:
    one = fuse([study(trials) for trials in several])
    shuffled = [random.sample(trials, len(trials)) for trials in several]
    random.shuffle(shuffled)
    other = fuse([study(trials) for trials in shuffled])
    assert other.fused.tolist() == pytest.approx(one.fused.tolist(), rel=1e-13)


@given(st.lists(rate, min_size=3, max_size=12), st.lists(reward, min_size=1, max_size=20))
def test_equal_trials_give_back_themselves(lr: list[float], rewards: list[float]) -> None:
    found = fuse([study([(r, lr) for r in rewards]), study([(1.0, lr)])])
    assert found.fused == pytest.approx(lr, rel=1e-12)


@given(made, st.floats(1e-3, 1e3))
def test_a_common_factor_changes_the_scale_and_not_the_shape(
    trials: list[tuple[float, list[float]]], factor: float
) -> None:
    one = fuse([study(trials)])
    other = fuse([study([(r, [factor * v for v in lr]) for r, lr in trials])])
    assert other.multipliers == pytest.approx(one.multipliers, rel=1e-9)
    assert other.geometric_mean_rate == pytest.approx(factor * one.geometric_mean_rate, rel=1e-9)
    assert math.prod(one.multipliers) == pytest.approx(1)


@given(made)
def test_each_part_stays_within_what_was_tried(trials: list[tuple[float, list[float]]]) -> None:
    columns = np.array([lr for _, lr in trials])
    fused = fuse([study(trials)]).fused
    assert (fused >= columns.min(0) * (1 - 1e-12)).all()
    assert (fused <= columns.max(0) * (1 + 1e-12)).all()


def test_one_study_is_its_own_fusion_and_agrees_with_a_plain_loop() -> None:
    trials = logs()
    ranked = sorted(trials, reverse=True)
    top = [sum(1.8**-r * math.log(lr[p]) for r, (_, lr) in enumerate(ranked)) for p in range(10)]
    expected = [math.exp(t / sum(1.8**-r for r in range(49))) for t in top]
    found = fuse([study(trials)])
    assert found.fused == pytest.approx(expected, rel=1e-12)
    assert found.rates[0] == pytest.approx(expected, rel=1e-12)


def test_the_reward_is_new_and_old_after_and_not_old() -> None:
    def trial(number: int, old: float, new: float, after: float, lr: float) -> Trial:
        return Trial(number=number, old=old, new=new, old_after=after, lr=(lr,) * 3)

    forgets, keeps = trial(0, 0.99, 0.9, 0.5, 1e-3), trial(1, 0.5, 0.8, 0.8, 1e-5)
    both = replace(study([]), trials=(forgets, keeps))
    assert fuse([both], base=1e9).fused == pytest.approx([1e-5] * 3)


# --- files --------------------------------------------------------------------------------------


def csv(folder: Path, *lines: str, header: str | None = None, name: str = "trials.csv") -> Path:
    rates = ",".join(f"lr.{part}" for part in part_names(3))
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([header or f"{','.join(COLUMNS)},{rates}", *lines]) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


GOOD = "0,complete,.9,.8,.7,1.5,100,a,1e-5,2e-5,3e-5"


def write(path: Path, trials: Sequence[tuple[float, Sequence[float]]], name: str, **m: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_trials(path, study(trials).trials, study=name, **m)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    trials = [
        Trial(number=0, lr=(1e-5, 1 / 3e4, 5e-324), old=0.9, new=0.1 + 0.2, old_after=0.5, steps=7,
              extra={"dps.drop": 0.3, "note": "=HYPERLINK(1)"}),
        Trial(number=3, state="pruned", lr=(1e-5, 1e-5, 1e-5)),
        Trial(number=5, lr=(1.0, 2.0, 3.0), new=math.nan, old_after=0.5),
        Trial(number=6, lr=(1.0, 2.0, 3.0), new=math.inf, old_after=0.5),
        Trial(number=7, lr=(1.0, 2.0, 3.0), old=math.nan, new=0.5, old_after=0.5),
    ]  # fmt: skip
    write_trials(tmp_path / "trials.csv", trials, study="minilm trec6>snli task", layers=6)
    text = (tmp_path / "trials.csv").read_text()
    assert text.splitlines()[0].split(",") == [
        *COLUMNS, "lr.embeddings", "lr.point.1", "lr.head", "layers", "extra.dps.drop",
        "extra.note",
    ]  # fmt: skip
    assert "'=HYPERLINK" in text
    found = read_study(tmp_path)
    assert found.trials == (replace(trials[0], extra={}),)
    assert found.left_out == {"pruned": 1, "no score": 3}
    assert (found.study, found.layers, found.parts) == ("minilm trec6>snli task", 6, 3)
    assert found.sha256 == hashlib.sha256((tmp_path / "trials.csv").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["", " ", "=1+1", "@x", "a\nb", "x" * 301])
def test_names_of_studies_that_no_file_may_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="study"):
        write_trials(tmp_path / "trials.csv", study(logs(2)).trials, study=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", STATES)
def test_only_complete_trials_enter(state: str, tmp_path: Path) -> None:
    odd = GOOD.replace("0,complete", f"1,{state}").replace("1e-5,2e-5,3e-5", "1,1,1")
    found = read_study(csv(tmp_path, GOOD, odd))
    assert len(found.trials) == 1 + (state == "complete")
    assert found.left_out == ({} if state == "complete" else {state: 1})


def test_the_json_of_the_published_logs(tmp_path: Path) -> None:
    trials = logs()
    rows = [{"old": 0.9, "new": r / 2, "old_after": r / 2, "lr": lr} for r, lr in trials]
    rows.append({"old": 0.9, "new": None, "old_after": 0.3, "lr": [1e-5] * 10})
    (tmp_path / "a.json").write_text(json.dumps({"trials": rows}))
    write(tmp_path / "b" / "trials.csv", logs(seed=1), "b", layers=12)
    found = combine([tmp_path / "a.json", tmp_path / "b"], out=tmp_path / "rates.yaml")
    assert found.fused == pytest.approx(fuse([study(trials), study(logs(seed=1))]).fused)
    assert found.studies[0].left_out == {"no score": 1}

    rates = Rates.load(tmp_path / "rates.yaml")
    assert len(rates.multipliers) == 10 and rates.geometric_mean == pytest.approx(1)
    assert rates.layers == 12 and rates.freeze_below == 0
    again = [rates.geometric_mean_rate * m for m in rates.multipliers]  # type: ignore[operator]
    assert again == pytest.approx(found.fused)
    assert rates.to_dict() == read_yaml(tmp_path / "rates.yaml")  # no key but those of Rates
    Recipe(rates=rates).save(tmp_path / "mine.yaml")
    assert Recipe.load(tmp_path / "mine.yaml").rates == rates
    source = rates.provenance
    assert source["base"] == 1.8 and [s["trials"] for s in source["studies"]] == [49, 49]
    assert source["studies"][0]["left_out"] == {"no score": 1}
    digest = hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    assert source["studies"][0]["sha256"] == digest


OTHER = GOOD.replace("0,complete", "1,complete").replace(",a,", ",b,")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, OTHER, OTHER.replace("1,c", "2,c")], "study: 'a' (line 2); 'b' (lines 3–4)"),
        ([GOOD, OTHER.replace("complete", "fail")], "differ in study"),
        ([GOOD, OTHER.replace(",b,", ",,")], "none (line 3)"),
        ([GOOD, GOOD], "line 3: trial 0 stands in line 2 already"),
        ([GOOD.replace("1e-5", "0")], "line 2, lr.embeddings: rate 0 is not finite and above 0"),
        ([GOOD.replace("1e-5", "-1e-5")], "lr.embeddings"),
        ([GOOD.replace("2e-5", "nan")], "line 2, lr.point.1"),
        ([GOOD.replace("3e-5", "inf")], "line 2, lr.head"),
        ([GOOD.replace("3e-5", "1e999")], "line 2, lr.head"),
        ([GOOD.replace("3e-5", "")], "line 2, lr.head: '' is not a number"),
        ([GOOD.replace(".8", "good")], "line 2, new: 'good' is not a number"),
        ([GOOD.replace(".8", "1_0")], "line 2, new"),
        ([GOOD.replace("1.5", "1.6")], "line 2: reward 1.6 is not new + old_after, 1.5"),
        ([GOOD.replace("complete", "done")], "line 2: state 'done'"),
        ([GOOD.replace("complete", "prune")], "did you mean 'pruned'"),
        ([GOOD.replace("0,c", "0.5,c")], "number 0.5"),
        ([GOOD.replace("100", "-1")], "steps"),
        ([GOOD + ",9"], "line 2: 12 cells where the header has 11"),
        ([GOOD.replace("complete", "pruned")], "no trial with a score (1 pruned)"),
        ([], "no trial at all"),
        ([GOOD.replace("a", '"a')], "not proper CSV"),
        ([GOOD.replace(",a,", ",\x1b[31m,")], "cannot be printed"),
    ],
)
def test_rows_that_are_refused(lines: list[str], says: str, tmp_path: Path) -> None:
    path = csv(tmp_path, *lines)
    with pytest.raises(Refused, match=r"trials\.csv") as error:
        read_study(path)
    assert says in str(error.value) and "\n" not in str(error.value)


NAMES = f"{','.join(COLUMNS)},lr.embeddings,lr.point.1,lr.head"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (f"{NAMES},wall", "unknown column 'wall'; leave it out, or call it 'extra.wall'"),
        (f"{NAMES},shfit", "did you mean 'shift'"),
        (NAMES.replace("study,", ""), "no column 'study'"),
        (NAMES.replace("lr.head,", "").replace(",lr.head", ""), "no column 'lr.head'"),
        (NAMES.replace("lr.embeddings,lr.point.1", "lr.point.1,lr.embeddings"), "out of order"),
        (f"{NAMES},steps", "stands twice"),
        (NAMES.replace("lr.point.1", "lr.layer.1"), "unknown column 'lr.layer.1'"),
    ],
)
def test_headers_that_are_refused(header: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="line 1") as error:
        read_study(csv(tmp_path, header=header))
    assert says in str(error.value)


def test_a_declared_column_is_let_through(tmp_path: Path) -> None:
    path = csv(tmp_path, GOOD + ",3 s", header=f"{NAMES},extra.seconds")
    assert len(read_study(path).trials) == 1


def test_a_file_that_went_through_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = csv(tmp_path, GOOD)
    plain = read_study(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    found = read_study(path)
    assert found.trials == plain.trials and found.sha256 != plain.sha256


def test_a_shift_in_a_column_of_its_own_may_not_change_either(tmp_path: Path) -> None:
    rows = [GOOD + ",length", OTHER.replace(",b,", ",a,") + ",task"]
    with pytest.raises(Refused, match=r"differ in shift: 'length' \(line 2\); 'task' \(line 3\)"):
        read_study(csv(tmp_path, *rows, header=f"{NAMES},shift"))


ROW = '{"old": 0.9, "new": 0.8, "old_after": 0.7, "lr": [1e-5, 2e-5, 3e-5]}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "not a JSON object"),
        ("{}", "missing key 'trials'"),
        ('{"trials": {}}', "no list"),
        ('{"trials": []}', "no trial at all"),
        ('{"trials": [1]}', "trials[0]: 1 is no object"),
        (f'{{"trials": [{ROW}, {ROW}], "trials": []}}', "stands twice"),
        (f'{{"trials": [{ROW}], "sutdy": "a"}}', "did you mean 'study'"),
        ('{"trials": [' + ROW.replace('"old"', '"new"') + "]}", "key 'new' stands twice"),
        ('{"trials": [' + ROW.replace("0.8", "NaN") + "]}", "NaN is no JSON value"),
        ('{"trials": [' + ROW.replace("2e-5", "Infinity") + "]}", "Infinity"),
        ('{"trials": [' + ROW.replace("2e-5", "1e999") + "]}", "trials[0], lr.point.1"),
        ('{"trials": [' + ROW.replace("2e-5", "0") + "]}", "lr.point.1: rate 0"),
        ('{"trials": [' + ROW.replace("2e-5", '"2e-5"') + "]}", "'2e-5' is not a number"),
        ('{"trials": [' + ROW.replace("2e-5", "true") + "]}", "True is not a number"),
        ('{"trials": [' + ROW.replace("1e-5, ", "") + "]}", "2 rates; 3 to 500"),
        ('{"trials": [' + ROW.replace("[1e-5, 2e-5, 3e-5]", "3") + "]}", "lr 3 is no list"),
        (f'{{"trials": [{ROW}, {ROW.replace("2e-5", "2e-5, 2e-5")}]}}', "trials[1]: 4 rates"),
        ('{"trials": [' + ROW.replace('"old_after"', '"after"') + "]}", "unknown key 'after'"),
        (f'{{"trials": [{ROW[:-1]}, "shift": "a"}}, {ROW}]}}', "'a' (trials 0); none (trials 1)"),
        (f'{{"layers": 0, "trials": [{ROW}]}}', "layers 0"),
        (f'{{"study": 3, "trials": [{ROW}]}}', "study 3 is not text"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_json_that_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(Refused, match=r"t\.json") as error:
        read_study(tmp_path / "t.json")
    assert says in str(error.value)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.yaml").write_text("trials: []")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "c.json").write_bytes(b" " * (5 << 20))
    for name, says in {
        "empty": "no trials.csv in it",
        "gone.csv": "no such file",
        "a.yaml": "neither .csv nor .json",
        "b.csv": "not UTF-8",
        "c.json": "larger than 4 MiB",
    }.items():
        with pytest.raises(Refused, match=says):
            read_study(tmp_path / name)


@settings(max_examples=60)
@given(st.binary(max_size=80), st.sampled_from([".csv", ".json"]), st.integers(0, 400))
def test_nothing_but_a_refusal_leaves_the_reader(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, suffix: str, place: int
) -> None:
    good = {".csv": f"{NAMES}\n{GOOD}\n", ".json": f'{{"trials": [{ROW}]}}'}[suffix].encode()
    path = tmp_path_factory.mktemp("junk") / f"t{suffix}"
    path.write_bytes(good[:place] + junk + good[place + len(junk) :])
    try:
        read_study(path)
    except Refused as error:
        assert "\n" not in str(error)


def test_studies_that_do_not_go_together(tmp_path: Path) -> None:
    ten = write(tmp_path / "a" / "trials.csv", logs(3), "a", layers=12)
    six = write(tmp_path / "b" / "trials.csv", logs(3, parts=6), "b")
    deep = write(tmp_path / "c" / "trials.csv", logs(4), "c", layers=24)
    out = tmp_path / "r.yaml"
    with pytest.raises(Refused, match=r"b/trials\.csv: 6 rates a trial, .*a/trials\.csv has 10"):
        combine([ten, six], out=out)
    with pytest.raises(Refused, match="24 layers, the studies before have 12"):
        combine([ten, deep], out=out)
    with pytest.raises(Refused, match="12 layers, --layers says 24"):
        combine([ten], out=out, layers=24)
    with pytest.raises(Refused, match=r"same file as .*a/trials\.csv"):
        combine([ten, tmp_path / "a"], out=out)
    with pytest.raises(Refused, match=r"ends in \.yaml"):
        combine([ten], out=tmp_path / "a" / "trials.csv")
    with pytest.raises(Refused, match="powers of ten"):
        fuse([study([(1, [1e-300, 1e300, 1e300])])])
    assert not out.exists() and read_study(ten).study == "a"


# --- the verb -----------------------------------------------------------------------------------


def verb_parser() -> argparse.ArgumentParser:
    """The verb alone, in a parser as the command line makes it."""
    parser = argparse.ArgumentParser(prog="holdfast")
    verbs = parser.add_subparsers()

    def verb(name: str, run: Any, about: str, *example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=about, epilog="example:\n  " + " ".join(example))
        made.set_defaults(run=run)
        return made

    add_combine(verb)
    return parser


def test_the_verb_prints_each_study_and_writes_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = csv(tmp_path / "one", GOOD, OTHER.replace(",b,", ",a,").replace("complete", "pruned"))
    two = write(tmp_path / "two" / "trials.csv", [(1.2, [1e-5, 1e-5, 1e-4])], "a", layers=6)
    out = tmp_path / "rates.yaml"
    chosen = verb_parser().parse_args(["combine", str(one.parent), str(two), "--out", str(out)])
    chosen.run(chosen)
    said = " ".join(capsys.readouterr().out.split())
    for word in ("1 pruned", "fused", "1.500", "100 %", "counts 2 times", "rates.yaml"):
        assert word in said, word
    assert Rates.load(out).layers == 6
    defaults = verb_parser().parse_args(["combine", "x"])
    assert (defaults.base, defaults.layers, str(defaults.out)) == (module.BASE, None, "rates.yaml")


def test_the_table_says_when_the_depth_is_unknown() -> None:
    def told(fusion: Fusion) -> str:
        return str(table(fusion).caption)

    assert "--layers" in told(fuse([study(logs(3))]))
    assert "--layers" not in told(fuse([study(logs(3))], layers=12))


def test_combining_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, holdfast.search.verbs as verbs\n"
        "assert 'numpy' not in sys.modules, 'help would load NumPy'\n"
        "import holdfast.search.combine\n"
        "print(sorted({'torch', 'optuna', 'transformers', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
