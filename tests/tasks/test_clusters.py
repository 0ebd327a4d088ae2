"""The cluster shift: two tasks by 2-means on embeddings."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer
from test_shifts import made, noise, topical

from holdfast.errors import Refused
from holdfast.tasks import load_task
from holdfast.tasks.shifts import (
    SPLITS,
    by_cluster,
)


def test_clusters_are_the_topics() -> None:
    one, two, facts = by_cluster(made(), topical)
    topics = [{"sea": 0, "bread": 0}, {"sea": 0, "bread": 0}]
    for side, half in enumerate((one, two)):
        for row in half.train + half.evaluation:
            topics[side]["sea" if topical([row])[0, 0] >= 1 else "bread"] += 1
    assert {max(t, key=t.__getitem__) for t in topics} == {"sea", "bread"}
    assert sum(min(t.values()) for t in topics) <= 0.05 * sum(sum(t.values()) for t in topics)
    assert len(one.train) >= len(two.train) and facts["dimensions"] == 2


def test_clusters_lie_further_apart_than_random_halves() -> None:
    task = made()
    one, two, facts = by_cluster(task, topical)
    points = [topical(half.train) for half in (one, two)]
    centres = [p.mean(0) for p in points]
    assert facts["distance"] == pytest.approx(float(np.linalg.norm(centres[0] - centres[1])))
    whole = np.concatenate(points)
    within = sum(((p - p.mean(0)) ** 2).sum() for p in points)
    explained = 1 - within / ((whole - whole.mean(0)) ** 2).sum()
    assert facts["explained"] == pytest.approx(explained) and explained > 0.6
    order = random.Random(0).sample(range(len(whole)), len(whole))
    halves = [whole[order[: len(whole) // 2]].mean(0), whole[order[len(whole) // 2 :]].mean(0)]
    assert facts["distance"] > 5 * np.linalg.norm(halves[0] - halves[1])


def test_every_row_goes_to_the_nearer_centroid() -> None:
    halves = by_cluster(made(), topical)[:2]
    centres = np.array([topical(half.train).mean(0) for half in halves])
    for side, half in enumerate(halves):
        for split in SPLITS:
            gaps = ((topical(getattr(half, split))[:, None] - centres) ** 2).sum(2)
            assert (gaps.argmin(1) == side).all()


def test_clusters_that_any_start_would_draw_otherwise_still_ignore_the_order() -> None:
    task, draw = made(), random.Random(1)
    mixed = replace(task, train=tuple(draw.sample(task.train, len(task.train))))
    for seed in range(3):
        one, other = (by_cluster(t, noise, seed=seed).first for t in (task, mixed))
        assert set(one.train) == set(other.train) and one.evaluation == other.evaluation
    seeds = {frozenset(by_cluster(task, noise, seed=seed).first.train) for seed in range(5)}
    assert len(seeds) > 1  # or the order would have been put to no test


@pytest.mark.parametrize(
    ("embed", "says"),
    [
        (lambda rows: np.ones((len(rows), 3)), "the same embedding"),
        (lambda rows: np.zeros((len(rows), 3)), "the same embedding"),
        (lambda rows: 1 + 1e-8 * noise(rows), "the same embedding"),  # but for rounding
        (lambda rows: np.ones(len(rows)), r"shape \(240,\)"),
        (lambda rows: np.ones((1, 3)), r"shape \(1, 3\) for 240 rows"),
        (lambda rows: np.full((len(rows), 3), np.nan), "not finite"),
    ],
)
def test_embeddings_that_are_refused(embed: Any, says: str) -> None:
    with pytest.raises(Refused, match=f"made: .*{says}"):
        by_cluster(made(), embed)


def test_clusters_of_real_rows(shared_data: Path) -> None:
    task = load_task(shared_data / "trec6", train_size=1000, evaluation_size=200)
    found = HashingVectorizer(n_features=64)
    _, _, facts = by_cluster(task, lambda rows: found.transform(r.text for r in rows).toarray())
    assert facts["explained"] > 0.03  # random halves: 1/1000
