"""Several labels a row: how they are read, what is learned, what is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from holdfast import Refused
from holdfast.tasks import Row, Task, load_task
from holdfast.tasks.kinds import evaluate, kind_named
from holdfast.tasks.scores import several_score

LABELS = ("bad", "good", "warm")


def written(folder: Path, cells: list[Any], name: str = "m.jsonl") -> Path:
    rows = ({"text": f"row {i}", "label": cell} for i, cell in enumerate(cells))
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return folder / name


def task(labels: tuple[str, ...] = LABELS, metric: str = "f1_micro") -> Task:
    texts = ("the film was good", "a warm book", "bad", "good and warm", "the plot")
    said = ((1,), (2,), (0,), (1, 2), ())
    rows = tuple(Row(t, None, tuple(sorted(labels.index(LABELS[i]) for i in ids)))
                 for t, ids in zip(texts, said, strict=True))  # fmt: skip
    return Task(name="m", labels=labels, metric=metric, train=rows, selection=(), evaluation=rows,
                source="", kind="multilabel")  # fmt: skip


def test_lists_and_text_give_the_same_rows(tmp_path: Path) -> None:
    lists = [["a", "b"], [], ["b"], ["c", "a"]] * 20
    one = load_task(f"{written(tmp_path, lists)}?type=multilabel")
    texts = ["|".join(each) for each in lists]
    two = load_task(f"{written(tmp_path, texts, 'n.jsonl')}?type=multilabel&name=m")
    assert one.labels == ("a", "b", "c") and one.kind == "multilabel" and one.hash == two.hash
    assert {row.label for row in one.train} == {(0, 1), (), (1,), (0, 2)}


def test_joined_labels_that_are_read_as_classes_are_told(tmp_path: Path) -> None:
    told = "the label 'a|b' is one class; for several labels a row say ?type=multilabel"
    found = load_task(str(written(tmp_path, ["a", "b", "a|b"] * 20)))
    assert found.labels == ("a", "a|b", "b") and told in found.warnings
    others = load_task(str(written(tmp_path, ["a", "b", "a|c"] * 20)))  # c is no label
    assert not any("one class" in line for line in others.warnings)


def test_every_label_reaches_the_selection_rows(tmp_path: Path) -> None:
    cells = [["common"]] * 80 + [["common", "rare"]] * 4
    found = load_task(f"{written(tmp_path, cells)}?type=multilabel", selection=0.1)
    assert any(1 in row.label for row in found.selection)
    assert any(1 in row.label for row in found.evaluation)


@pytest.mark.parametrize("cell", [[-100], ["-100.0"], "-100", ["a", "-100"], "-100|b"])
def test_a_row_whose_labels_are_not_known_is_left_out(cell: Any, tmp_path: Path) -> None:
    """It was learned as one that has none of the labels (faults D12)."""
    known = [["a"], ["b"], ["a", "b"], []] * 9
    one = load_task(f"{written(tmp_path, [*known, cell])}?type=multilabel")
    assert one.hash == load_task(f"{written(tmp_path, known)}?type=multilabel").hash
    assert any("1 row labelled -100 skipped" in line for line in one.warnings)


def test_labels_are_stripped_one_by_one(tmp_path: Path) -> None:
    clean = [["Joy", "fear"], ["fear"], ["Joy"]] * 9
    odd = [[" Joy", "FEAR "], *clean[1:]]
    with pytest.raises(Refused, match=r"several spellings.*--strip"):
        load_task(f"{written(tmp_path, odd)}?type=multilabel")
    one = load_task(f"{written(tmp_path, odd)}?type=multilabel&strip=yes")
    two = load_task(f"{written(tmp_path, clean)}?type=multilabel")
    assert one.labels == ("Joy", "fear") and one.hash == two.hash
    assert any("2 rows with a label mended" in line for line in one.warnings)


@pytest.mark.parametrize(("cell", "why"), [
    (["a", "a"], "a label twice"), ({"a": 1}, "labels are a list"), ([["a"]], "is a list"),
    (["a", "unheard"], "not among those"),
])  # fmt: skip
def test_cells_that_are_refused(tmp_path: Path, cell: Any, why: str) -> None:
    held = written(tmp_path, [["a"], cell], "held.jsonl")
    train = written(tmp_path, [["a"], ["b"], []] * 9)
    with pytest.raises(Refused, match=why):
        load_task(f"{train}?type=multilabel&evaluation={held.name}")


def test_the_loss_is_that_of_independent_labels() -> None:
    kind, asked = kind_named("multilabel"), task()
    words = models.tokenizer()
    model = models.bert(**{k: v for k, v in kind.head_config(LABELS).items()})  # type: ignore[attr-defined]
    rows = kind.encode(asked.train, asked, words, max_length=16)
    batch = kind.collator(words)([rows[i] for i in range(5)])
    truth = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).float()
    assert torch.equal(batch["labels"], truth)
    out = model(**batch)
    p = out.logits.sigmoid()
    expected = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    torch.testing.assert_close(out.loss, expected)


def test_a_row_has_the_labels_above_a_half() -> None:
    """The score, and what is predicted, against logits by hand."""
    kind, asked, words = kind_named("multilabel"), task(), models.tokenizer()
    model: Any = models.bert(**kind.head_config(LABELS)).eval()  # type: ignore[attr-defined]
    rows = kind.encode(asked.train, asked, words, max_length=16)
    with torch.no_grad():
        said = torch.stack([
            model(**{k: torch.tensor([v]) for k, v in rows[i].items() if k != "labels"}).logits[0]
            for i in range(5)
        ]) > 0  # fmt: skip
    truth = [[float(i in r.label) for i in range(3)] for r in asked.train]
    expected = f1_score(truth, said.int(), average="micro")
    assert evaluate(model, rows, asked, kind.collator(words)) == pytest.approx(expected)
    told = kind.predict(model, {"labels": LABELS}, [r.text for r in asked.train], None, words,
                        max_length=16, batch=2)  # fmt: skip
    assert [p.label for p in told] == [
        tuple(n for n, yes in zip(LABELS, row.tolist(), strict=True) if yes) for row in said
    ]


def test_what_was_measured_is_aligned_by_name() -> None:
    kind, other = kind_named("multilabel"), ("warm", "bad", "good")
    words = models.tokenizer()
    model = models.bert(**kind.head_config(LABELS)).eval()  # type: ignore[attr-defined]
    found = [
        kind.measure(model, kind.encode(t.train, t, words, max_length=16), t, kind.collator(words))
        for t in (task(), task(other))
    ]
    moved = kind.aligned(found[1], other, LABELS)
    assert np.array_equal(moved[:, :3], found[0][:, :3])  # the truth
    assert not np.array_equal(found[1], moved)


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 6), min_size=1, max_size=12))
def test_scores_are_scikit_learns(cells: list[tuple[int, ...]]) -> None:
    truth, said = np.split(np.array(cells, dtype=float), 2, axis=1)
    for metric, average in (("f1_micro", "micro"), ("f1_macro", "macro")):
        theirs = f1_score(truth, said, average=average, zero_division=0.0)
        assert several_score(metric, truth, said) == pytest.approx(theirs)
    assert several_score("accuracy", truth, said) == pytest.approx(accuracy_score(truth, said))


@pytest.mark.parametrize("cell", ["['a', 'b']", '["a"]', "[]", " [1, 2] ", "['it is', 'b|c']"])
def test_lists_that_were_written_as_text_are_refused(tmp_path: Path, cell: str) -> None:
    """As pandas writes them into a CSV: each list would be a label of its own."""
    cells = ["a", "b"] * 20 + [cell]
    with pytest.raises(Refused, match="line 41: a list that was written as text"):
        load_task(f"{written(tmp_path, cells)}?type=multilabel")


def test_names_in_brackets_are_labels(tmp_path: Path) -> None:
    task = load_task(f"{written(tmp_path, ['[a]', '[b]|[c, d]'] * 20)}?type=multilabel")
    assert task.labels == ("[a]", "[b]", "[c, d]")


@pytest.mark.parametrize("mark", [",", ", ", ";"])
def test_labels_with_other_marks_between_them_are_told(tmp_path: Path, mark: str) -> None:
    cells = ["a", "b", f"a{mark}b"] * 20
    task = load_task(f"{written(tmp_path, cells)}?type=multilabel")
    told = f"the label 'a{mark}b' is one label; for several labels a row write | between them"
    assert told in task.warnings
