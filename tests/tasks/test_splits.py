from __future__ import annotations

from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedShuffleSplit

from holdfast.tasks.splits import stratified

LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=200)


@given(labels=LABELS, share=st.floats(0.01, 0.99), seed=st.text(max_size=5))
def test_the_parts_are_disjoint_complete_and_in_order(
    labels: list[int], share: float, seed: str
) -> None:
    size = round(share * len(labels))
    chosen, others = stratified(labels, size, seed=seed)
    assert len(chosen) == size
    assert sorted(chosen + others) == list(range(len(labels)))
    assert chosen == sorted(chosen) and others == sorted(others)
    assert (chosen, others) == stratified(labels, size, seed=seed)


@given(counts=st.lists(st.integers(10, 60), min_size=2, max_size=6), share=st.floats(0.1, 0.9))
def test_every_class_is_within_a_row_of_its_share(counts: list[int], share: float) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    size = round(share * len(labels))
    found = Counter(labels[index] for index in stratified(labels, size, seed="0")[0])
    for label, count in enumerate(counts):
        assert abs(found[label] - size * count / len(labels)) < 1


@given(counts=st.lists(st.integers(5, 60), min_size=2, max_size=6), share=st.floats(0.2, 0.8))
def test_class_counts_agree_with_scikit_learn(counts: list[int], share: float) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    size = round(share * len(labels))
    assume(len(counts) <= size <= len(labels) - len(counts))
    theirs, _ = next(
        StratifiedShuffleSplit(1, train_size=size, random_state=0).split(labels, labels)
    )
    mine, _ = stratified(labels, size, seed="0")
    ours, sklearn = (Counter(labels[index] for index in part) for part in (mine, theirs))
    # Equal remainders may be rounded either way; nothing else may differ.
    assert all(abs(ours[label] - sklearn[label]) <= 1 for label in range(len(counts)))


@given(labels=LABELS)
def test_rare_classes_get_a_row_and_keep_one(labels: list[int]) -> None:
    counts = Counter(labels)
    size = len(counts)
    chosen, others = stratified(labels, size, seed="0", leave=1)
    taken, kept = (Counter(labels[index] for index in part) for part in (chosen, others))
    for label, count in counts.items():
        assert kept[label] >= 1
        assert taken[label] >= 1 or count == 1


def test_a_rare_class_among_many_rows() -> None:
    labels = [0] * 990 + [1] * 6 + [2] * 4
    chosen, _ = stratified(labels, 20, seed="0", leave=1)
    assert Counter(labels[index] for index in chosen) == {0: 18, 1: 1, 2: 1}


def test_numbers_are_spread_over_their_range() -> None:
    labels = [index / 100 for index in range(1000)]
    chosen, _ = stratified(labels, 100, seed="0")
    assert Counter(int(labels[index]) for index in chosen) == {tenth: 10 for tenth in range(10)}


def test_the_choice_is_pinned() -> None:
    """A seed means these rows in every release; records are compared across them."""
    assert stratified([0, 1] * 10, 6, seed="selection 0")[0] == [1, 6, 8, 13, 17, 18]
    assert stratified([0, 1] * 10, 6, seed="selection 1")[0] != [1, 6, 8, 13, 17, 18]
