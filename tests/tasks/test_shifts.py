"""Each shift does what it claims, learned from training rows, whatever order the rows have."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from holdfast.errors import Refused
from holdfast.tasks import Row, Task, load_task
from holdfast.tasks.shifts import (
    SHIFTS,
    SPLITS,
    Shifted,
    by_cluster,
    by_labels,
    by_length,
    shift,
    words,
)

SIZES = {"train": 240, "selection": 40, "evaluation": 120}


def made(*, classes: int = 2, seed: int = 0, pairs: bool = False, **balance: Any) -> Task:
    """Rows of 1 to 30 words, half of them about the sea and half about bread."""
    draw = random.Random(seed)
    weights = balance.get("weights", [1] * classes)
    sizes = balance.get("sizes", SIZES)

    def row(split: str, i: int) -> Row:
        topic = draw.choice(["sea ship wave harbour", "bread oven flour baker"])
        text = " ".join(draw.choices(topic.split(), k=draw.randint(1, 30)))
        label = draw.choices(range(classes), weights)[0]
        return Row(f"{text} {split}{i}", f"pair {i}" if pairs else None, label)

    rows = {split: tuple(row(split, i) for i in range(size)) for split, size in sizes.items()}
    names = tuple(f"class {c}" for c in range(classes))
    return Task("made", names, "accuracy", **rows, source="made.csv", warnings=("old",))


def topical(rows: Sequence[Row]) -> np.ndarray:
    """Embeddings (rows, 2) by topic, with some noise that depends on the text alone."""
    counts = HashingVectorizer(n_features=8, alternate_sign=False).transform(r.text for r in rows)
    sea = [sum(word in row.text for word in ("sea", "ship", "wave", "harbour")) for row in rows]
    return np.c_[np.array(sea, float), 0.1 * np.asarray(counts.sum(1)).ravel()]


def noise(rows: Sequence[Row]) -> np.ndarray:
    """Embeddings (rows, 9) without any structure, by text."""
    return np.array([np.random.default_rng(list(r.text.encode())).normal(size=9) for r in rows])


KINDS: dict[str, Callable[..., Shifted]] = {
    "length": by_length,
    "cluster": lambda task, **more: by_cluster(task, topical, **more),
    "labels": by_labels,
}
every = pytest.mark.parametrize("kind", KINDS)


# --- what all of them promise --------------------------------------------------------------------


@every
@pytest.mark.parametrize("pairs", [False, True])
def test_two_tasks_that_share_no_row_and_keep_all_else(kind: str, pairs: bool) -> None:
    task = made(pairs=pairs, classes=3)
    one, two, facts = KINDS[kind](task, seed=7)
    for split in SPLITS:
        halves = [set(getattr(half, split)) for half in (one, two)]
        assert not halves[0] & halves[1]
        whole = getattr(task, split)
        assert halves[0] | halves[1] <= set(whole)
        if kind != "labels":
            assert len(halves[0]) + len(halves[1]) == len(whole)
        for half in (one, two):  # in the order they had
            mine = getattr(half, split)
            assert list(mine) == [row for row in whole if row in set(mine)]
    for half in (one, two):
        assert (half.labels, half.metric, half.synthetic) == (task.labels, "accuracy", False)
        assert half.pairs == pairs and half.warnings[0] == "old"
        assert f"{kind} shift" in half.source and "seed 7" in half.source
        assert half.source.startswith("made.csv")
    assert one.name != two.name and one.name.startswith("made-")
    assert len({task.hash, one.hash, two.hash}) == 3
    assert facts["shift"] == kind and facts["seed"] == 7
    assert facts["rows"] == [one.rows, two.rows]


@every
def test_the_order_of_the_rows_decides_nothing(kind: str) -> None:
    task, draw = made(classes=3), random.Random(1)
    mixed = replace(task, **{s: tuple(draw.sample(getattr(task, s), SIZES[s])) for s in SPLITS})
    for half, other in zip(KINDS[kind](task)[:2], KINDS[kind](mixed)[:2], strict=True):
        for split in SPLITS:
            assert set(getattr(half, split)) == set(getattr(other, split))


@every
def test_a_seed_means_the_same_tasks_and_another_one_others(kind: str) -> None:
    task = made(sizes={**SIZES, "train": 241})
    rule = KINDS[kind] if kind != "length" else lambda t, **m: by_length(t, measure=coarse, **m)
    assert rule(task, seed=1)[:2] == rule(task, seed=1)[:2]
    if kind != "cluster":  # whose best clusters are the same from any start
        assert rule(task, seed=1)[:2] != rule(task, seed=2)[:2]


def coarse(row: Row) -> float:
    return words(row) // 10


@pytest.mark.parametrize("kind", ["length", "cluster"])
def test_the_rule_is_learned_from_the_training_rows_alone(kind: str) -> None:
    task = made()
    fewer = replace(task, evaluation=task.evaluation[::2], selection=())
    for half, other in zip(KINDS[kind](task)[:2], KINDS[kind](fewer)[:2], strict=True):
        assert half.train == other.train
        assert set(other.evaluation) == set(half.evaluation) & set(fewer.evaluation)


@every
def test_a_rule_learned_from_the_same_rows_leaves_evaluation_rows_in_place(kind: str) -> None:
    """A seed of `load_task` divides training and selection rows anew; scores stay comparable."""
    task = made(classes=4)
    pool = random.Random(2).sample(task.train + task.selection, 280)
    other = replace(task, train=tuple(pool[:140]), selection=tuple(pool[140:]))
    one, two, _ = KINDS[kind](task)
    same = KINDS[kind](other, learn=task.train)
    assert (same.first.evaluation, same.second.evaluation) == (one.evaluation, two.evaluation)
    assert set(same.first.train) <= set(pool[:140])  # the rows are its own all the same
    if kind == "length":
        assert same.facts["threshold"] == by_length(task).facts["threshold"]
        assert by_length(other).facts["threshold"] != same.facts["threshold"]
    if kind == "cluster":
        mine = shift(kind, [other], embed=noise, learn=task.train).first.evaluation
        assert mine == by_cluster(task, noise).first.evaluation
        assert mine != by_cluster(other, noise).first.evaluation
    if kind == "labels":
        lone = [row for row in task.train if row.label != 3]  # groups {0, 1}, {2}: 3 is in none
        assert all(row.label != 3 for row in by_labels(task, learn=lone).second.train)
        assert shift(kind, [task], learn=lone).facts["groups"][1] == ["class 2"]
    assert shift(kind, [other], embed=topical, learn=task.train)[:2] == same[:2]


@pytest.mark.parametrize("kind", ["length", "cluster"])
def test_equal_texts_fall_to_one_side(kind: str) -> None:
    task = made()
    references = tuple(replace(row, label=1 - int(row.label)) for row in task.train[:60])
    one, two, _ = KINDS[kind](replace(task, evaluation=references))
    assert {row.text for row in one.evaluation} <= {row.text for row in one.train}
    assert {row.text for row in two.evaluation} <= {row.text for row in two.train}


# --- length ---------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=30)
def test_no_short_row_is_longer_than_a_long_one(seed: int, step: int) -> None:
    task = made(seed=seed)
    one, two, facts = by_length(task, seed=seed, measure=lambda row: words(row) // step)
    assert abs(len(one.train) - len(two.train)) <= 1  # at the median, ties shared
    cut = facts["threshold"]
    assert cut == sorted(words(row) // step for row in task.train)[len(task.train) // 2]
    for split in SPLITS:  # one threshold for all
        assert all(words(row) // step <= cut for row in getattr(one, split))
        assert all(words(row) // step >= cut for row in getattr(two, split))


def test_the_half_goes_with_the_length_and_the_facts_say_how_far() -> None:
    one, two, facts = by_length(made())
    sides = [0] * len(one.train) + [1] * len(two.train)
    lengths = [words(row) for row in one.train + two.train]
    found = float(np.corrcoef(sides, lengths)[0, 1])
    assert found > 0.8 and facts["correlation"] == pytest.approx(found)
    assert facts["short"]["most"] <= facts["threshold"] <= facts["long"]["least"]
    assert facts["long"]["median"] == np.median([words(row) for row in two.train])
    assert facts["ties"] == pytest.approx(lengths.count(int(facts["threshold"])) / len(lengths))
    assert (one.name, two.name) == ("made-short", "made-long") and len(one.warnings) == 1


def test_the_pair_counts_too() -> None:
    assert words(Row("one two", "three", 0)) == 3 and words(Row(" one\ttwo\n", None, 0)) == 2
    task = made(pairs=True)
    paired = {s: tuple(replace(row, pair="w " * 50 if i % 2 else "w")
                       for i, row in enumerate(getattr(task, s))) for s in SPLITS}  # fmt: skip
    one, two, _ = by_length(replace(task, **paired))
    assert {row.pair for row in one.train + one.evaluation} == {"w"}
    assert {row.pair for row in two.train + two.evaluation} == {"w " * 50}


def test_another_measure() -> None:
    _, two, facts = by_length(made(), measure=lambda row: -len(row.text))
    assert max(len(row.text) for row in two.train) <= -facts["threshold"]


def test_many_rows_at_the_threshold_are_told() -> None:
    _, two, facts = by_length(made(), measure=coarse)
    assert facts["ties"] > 0.25 and "the seed places them" in two.warnings[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, True, "3"])
def test_a_measure_that_gives_no_number_is_refused(bad: Any) -> None:
    with pytest.raises(Refused, match=r"made: measure gives .*finite"):
        by_length(made(), measure=lambda row: bad)


def test_rows_of_one_length_are_refused() -> None:
    with pytest.raises(Refused, match=r"made: every training row measures 3; .*another shift"):
        by_length(made(), measure=lambda row: 3)


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (7, 3), (1, 4)])
def test_two_classes_are_balanced_exactly_and_oppositely(weights: tuple[int, int]) -> None:
    task = made(weights=weights, sizes={"train": 900, "selection": 100, "evaluation": 300})
    one, two, facts = by_labels(task)
    for split in SPLITS:
        whole = Counter(row.label for row in getattr(task, split))
        size = min(whole.values())
        most = round(0.8 * size)
        counts = [Counter(row.label for row in getattr(half, split)) for half in (one, two)]
        assert counts == [{0: most, 1: size - most}, {0: size - most, 1: most}]
        assert facts["left_out"][split] == sum(whole.values()) - 2 * size
    assert facts["shares"] == pytest.approx([0.8, 0.2], abs=0.5 / size)
    assert "rows left out to balance the labels" in one.warnings[-1]


@pytest.mark.parametrize(("classes", "front"), [(3, {0, 1}), (4, {0, 1}), (5, {0, 1, 2})])
def test_several_classes_are_balanced_in_two_groups(classes: int, front: set[int]) -> None:
    weights = list(range(1, classes + 1))
    task = made(classes=classes, weights=weights, sizes={**SIZES, "train": 3000})
    one, two, facts = by_labels(task, share=0.7)
    whole = Counter(row.label for row in task.train)
    size = min(sum(whole[c] for c in range(classes) if (c in front) == f) for f in (True, False))
    counts = [Counter(row.label for row in half.train) for half in (one, two)]
    most = round(0.7 * size)
    assert [sum(c[label] for label in front) for c in counts] == [most, size - most]
    assert [c.total() for c in counts] == [size, size]
    for count in counts:  # classes keep their proportions within a group
        for group in (front, set(range(classes)) - front):
            got, had = (sum(c[label] for label in group) for c in (count, whole))
            for label in group:
                assert abs(count[label] - got * whole[label] / had) <= 1.5
    assert facts["groups"][0] == [f"class {c}" for c in sorted(front)]


def test_of_equal_texts_one_is_kept() -> None:
    task = made()
    other = tuple(replace(row, label=1 - int(row.label)) for row in task.train)
    one, two, _ = by_labels(replace(task, train=task.train + other))
    turned = by_labels(replace(task, train=other + task.train))  # which one: not by their order
    assert set(turned.first.train) == set(one.train) and set(turned.second.train) == set(two.train)
    texts = [row.text for row in one.train + two.train]
    assert len(texts) == len(set(texts)) > 0.8 * len(task.train)


@pytest.mark.parametrize("bad", [0.5, 1.0, 0.2, 80, True, math.nan, "0.8"])
def test_shares_that_balance_nothing_are_refused(bad: Any) -> None:
    with pytest.raises(Refused, match="share"):
        by_labels(made(), share=bad)


def test_a_regression_has_no_labels_to_balance_but_a_length() -> None:
    task = made()
    numbers = {s: tuple(replace(r, label=float(i)) for i, r in enumerate(getattr(task, s)))
               for s in SPLITS}  # fmt: skip
    regression = replace(task, labels=None, metric="spearman", **numbers)
    with pytest.raises(Refused, match=r"made: a regression has no classes"):
        by_labels(regression)
    one, two, _ = by_length(regression)
    assert one.regression and len(one.train) + len(two.train) == len(task.train)


# --- what is refused ------------------------------------------------------------------------------


def test_halves_that_are_too_small_are_refused() -> None:
    small = {"train": 15, "selection": 5, "evaluation": 100}
    with pytest.raises(Refused, match=r"made: length shift, short half: 7 training rows, at least"):
        by_length(made(sizes=small))
    short = made(sizes={**SIZES, "evaluation": 12})
    with pytest.raises(Refused, match=r"half: \d evaluation rows.*larger task"):
        by_length(short)
    task = made()
    lone = tuple(row for row in task.selection if words(row) < 10)
    with pytest.raises(Refused, match=r"long half: 0 selection rows"):
        by_length(replace(task, selection=lone))


def test_halves_of_one_class_are_refused_and_lost_classes_told() -> None:
    task = made(classes=3)

    cut = by_length(task).facts["threshold"]
    same = {
        split: tuple(
            replace(row, label=0 if words(row) <= cut else i % 3)
            for i, row in enumerate(getattr(task, split))
        )
        for split in SPLITS
    }
    with pytest.raises(Refused, match=r"short half: every training row has the label 'class 0'"):
        by_length(replace(task, **same))
    single = replace(task, evaluation=same["evaluation"])
    with pytest.raises(Refused, match=r"short half: every evaluation row has the label"):
        by_length(single)
    gone = tuple(replace(r, label=2 if words(r) > 16 else i % 2) for i, r in enumerate(task.train))
    some = tuple(replace(r, label=i % 2 if words(r) < 20 else i % 3) for i, r in enumerate(gone))
    one, two, _ = by_length(replace(task, train=some))
    assert "no training row has the label 'class 2'" in one.warnings[-1]
    assert len(two.warnings) == 1


def test_shift_by_name() -> None:
    task, other = made(), replace(made(seed=1), name="other")
    assert set(KINDS) | {"task"} == set(SHIFTS)
    for kind, rule in KINDS.items():
        assert shift(kind, [task], seed=3, embed=topical)[:2] == rule(task, seed=3)[:2]
    assert shift("labels", [task], share=0.6) == by_labels(task, share=0.6)
    assert shift("length", [task], measure=coarse) == by_length(task, measure=coarse)
    assert shift("task", [task, other])[:2] == (task, other)
    for kind, tasks, says in (
        ("task", [task], "1 task for the shift 'task'; it takes 2"),
        ("length", [task, other], "2 tasks for the shift 'length'; it takes 1"),
        ("task", [task, task], "one name"),
        ("cluster", [task], "no encoder"),
        ("lenght", [task], "did you mean 'length'"),
    ):
        with pytest.raises(Refused, match=says):
            shift(kind, tasks)


def test_a_long_name_keeps_its_half() -> None:
    one, two, _ = by_length(replace(made(), name="n" * 64))
    assert one.name.endswith("-short") and two.name.endswith("-long")
    assert max(len(one.name), len(two.name)) <= 64


def test_shifts_import_no_torch() -> None:
    code = "import sys, holdfast.tasks.shifts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# --- on real rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trec6", "mrpc", "stsb"])
def test_length_of_real_rows(shared_data: Path, name: str) -> None:
    one, two, facts = by_length(load_task(shared_data / name))
    assert one.name == f"{name}-short" and facts["correlation"] > 0.5  # the published code: .002
    assert abs(len(one.train) - len(two.train)) < 0.02 * len(one.train)
    assert max(map(words, one.evaluation)) <= min(map(words, two.evaluation))


@pytest.mark.parametrize("name", ["trec6", "mrpc"])
def test_labels_of_real_rows(shared_data: Path, name: str) -> None:
    one, two, facts = by_labels(load_task(shared_data / name))
    assert facts["shares"] == pytest.approx([0.8, 0.2], abs=0.001)
    assert len(one.train) == len(two.train) > 800
