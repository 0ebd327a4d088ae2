"""The fusion in closed form, its invariances, and what a file of trials may hold."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_studies import GOOD, OTHER, csv, logs, study, write

from holdfast.cli import build_parser, main
from holdfast.errors import Refused
from holdfast.files import sealed
from holdfast.network.rates import Rates
from holdfast.search import combine as module
from holdfast.search.combine import Fusion, combine, fuse, rank_weights, table
from holdfast.search.trials import (
    Trial,
    read_study,
)

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


# --- files ----------------------------------------------------------------------------------------


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


def test_the_verb_prints_each_study_and_writes_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = csv(tmp_path / "one", GOOD, OTHER.replace(",b,", ",a,").replace("complete", "pruned"))
    two = write(tmp_path / "two" / "trials.csv", [(1.2, [1e-5, 1e-5, 1e-4])], "a", layers=6)
    out = tmp_path / "rates.yaml"
    assert main(["combine", str(one.parent), str(two), "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("1 pruned", "fused", "1.500", "100 %", "counts 2 times", "rates.yaml"):
        assert word in said, word
    assert Rates.load(out).layers == 6
    defaults = build_parser().parse_args(["combine", "x"])
    assert (defaults.base, defaults.layers, str(defaults.out)) == (module.BASE, None, "rates.yaml")


def test_the_table_says_when_the_depth_is_unknown() -> None:
    def told(fusion: Fusion) -> str:
        return str(table(fusion).caption)

    assert "--layers" in told(fuse([study(logs(3))]))
    assert "--layers" not in told(fuse([study(logs(3))], layers=12))


def test_combining_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, holdfast.cli.combine as verb\n"
        "assert 'numpy' not in sys.modules, 'help would load NumPy'\n"
        "import holdfast.search.combine\n"
        "print(sorted({'torch', 'optuna', 'transformers', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_trials_that_are_not_as_their_search_wrote_them_are_refused(tmp_path: Path) -> None:
    """A digit of a rate has no reward beside it that would not agree."""
    file = csv(tmp_path, GOOD)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    facts = tmp_path / "search.json"
    facts.write_text(json.dumps(sealed({"files": {"trials.csv": sha}})))
    out = tmp_path / "rates.yaml"
    for path in (tmp_path, file):
        combine([path], out=out)
    whole, text = out.read_bytes(), file.read_text()
    file.write_text(text.replace("2e-5", "8e-5"))
    assert file.read_text() != text
    for path in (tmp_path, file):
        with pytest.raises(Refused, match=r"trials\.csv: is not as its search wrote it"):
            combine([path], out=out)
    assert out.read_bytes() == whole
    facts.write_text("{")
    with pytest.raises(Refused, match=r"search\.json: cannot be read"):
        combine([tmp_path], out=out)
    facts.unlink()
    combine([tmp_path], out=out)  # of a search that ended before it was whole, or a copy
