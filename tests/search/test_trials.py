"""Trials on disk: written, read back, and refused where studies are mixed."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_studies import GOOD, OTHER, csv, logs, study, write

from holdfast.errors import Refused
from holdfast.files import read_yaml
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.search.combine import combine, fuse
from holdfast.search.trials import (
    COLUMNS,
    STATES,
    Trial,
    read_study,
    write_trials,
)


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
        ('{"trials": [' + ROW.replace("0.8", "NaN") + "]}", "NaN is no finite number"),
        ('{"trials": [' + ROW.replace("2e-5", "Infinity") + "]}", "Infinity"),
        ('{"trials": [' + ROW.replace("2e-5", "1e999") + "]}", "1e999 is no finite number"),
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


def test_controls_alone_are_no_study(tmp_path: Path) -> None:
    """They are what a search is compared with, and no result of it."""
    trials = [Trial(number=i, lr=(1e-5,) * 3, new=0.5, old_after=0.5, extra={"control": name})
              for i, name in enumerate(("flat@1e-05", "flat@2e-05", None))]  # fmt: skip
    unfinished = replace(trials[2], state="pruned")
    says = r"only controls were finished \(2\), no searched one"
    write_trials(tmp_path / "trials.csv", [*trials[:2], unfinished], study="a")
    with pytest.raises(Refused, match=says):
        combine([tmp_path], out=tmp_path / "rates.yaml")
    write_trials(tmp_path / "trials.csv", trials, study="a")
    assert len(read_study(tmp_path).trials) == 3
    rows = [{"new": 0.5, "old_after": 0.5, "lr": [1e-5] * 3, "extra.control": "flat"}] * 2
    (tmp_path / "t.json").write_text(json.dumps({"trials": rows}))
    with pytest.raises(Refused, match=says):
        read_study(tmp_path / "t.json")


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
