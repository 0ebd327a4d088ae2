"""A report of real runs: what `compare` leaves behind is one study over its seeds."""

from __future__ import annotations

from pathlib import Path

import models
import pytest

from holdfast import Recipe, compare
from holdfast.report.facts import comparisons


def test_seeds_of_a_comparison_are_pooled_and_paired(tmp_path: Path) -> None:
    """Their training rows differ, and so do their hashes; what they are scored on does not."""
    tasks = [models.write_task(tmp_path, topic) for topic in ("mood", "colour")]
    records = compare(
        str(models.save_bert(tmp_path / "bert")),
        tasks,
        {"plain": (Recipe.named("plain"), {}), "l2sp": (Recipe.named("l2sp"), {})},
        seeds=[0, 1], out=tmp_path / "out", progress=False,
        epochs=0.5, batch_size=4, save_steps=0, max_length=16,
    )  # fmt: skip
    assert len({record.tasks[0]["hash"] for record in records}) == 2  # one a seed
    (study,) = comparisons(records)
    plain, l2sp = study.groups
    assert study.control == plain.label == "plain" and plain.seeds == l2sp.seeds == [0, 1]
    for name, spread in l2sp.spread.items():
        assert spread.n == 2 and spread.sd is not None, name
    gap = l2sp.difference["new_plus_old"]
    by_hand = [
        a - b
        for a, b in zip(l2sp.points["new_plus_old"], plain.points["new_plus_old"], strict=True)
    ]
    assert gap.n == 2 and gap.mean == pytest.approx(sum(by_hand) / 2) and gap.low is not None
