"""The real tasks: every folder loads, with the figures its own `meta.json` gives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from holdfast.tasks import load_task

NAMES = (
    "ag_news", "amazon5", "cola", "dbpedia14", "hans_regenerated", "mnli", "mrpc", "qnli",
    "qqp", "rte", "sick", "snli", "sst2", "stsb", "trec6", "yahoo2",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_real_task_loads_whole(shared_data: Path, name: str) -> None:
    meta = json.loads((shared_data / name / "meta.json").read_text())
    task = load_task(shared_data / name)
    assert task.name == name and task.metric == meta["metric"]
    assert task.labels == (tuple(meta["labels"]) if meta["labels"] else None)
    assert task.rows["train"] + task.rows["selection"] == meta["rows"]["train"]
    assert task.rows["evaluation"] == meta["rows"]["validation"]
    if task.labels is not None:
        balance = meta["checks"]["per_split"]["train"]["balance"]
        counts = Counter(row.label for row in task.train + task.selection)
        assert [counts[label] for label in range(len(balance))] == balance
        chosen = Counter(row.label for row in task.selection)
        for label, count in counts.items():  # one row more where a text has two labels
            assert abs(chosen[label] - count * task.rows["selection"] / sum(counts.values())) < 2
        assert not {row.plain for row in task.selection} & {row.plain for row in task.train}


@pytest.mark.parametrize("name", ["ag_news", "mrpc", "stsb"])
def test_repeated_rows_agree_with_the_datas_own_count(shared_data: Path, name: str) -> None:
    meta = json.loads((shared_data / name / "meta.json").read_text())
    repeated = meta["checks"]["overlap"]["train_validation"]["same_row"]
    found = [
        warning for warning in load_task(shared_data / name).warnings if "evaluation" in warning
    ]
    assert found == ([f"{repeated} evaluation rows also in the training rows"] if repeated else [])
