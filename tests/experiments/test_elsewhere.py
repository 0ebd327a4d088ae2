"""Tests on other tasks: what an answer means there, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sequences import SETTINGS

from holdfast import Refused, Task, run_sequence
from holdfast.experiments.elsewhere import Elsewhere, answer_ids, score_elsewhere
from holdfast.experiments.record import Record
from holdfast.tasks import Row, load_task
from holdfast.tasks.kinds import kind_named

ANSWERS = {"neutral": "no", "contradiction": "no", "entailment": "yes"}


def task(name: str, *labels: str, metric: str = "accuracy") -> Task:
    words = models.WORDS
    rows = tuple(Row(f"{a} {b}", None, (i + j) % len(labels))
                 for i, a in enumerate(words) for j, b in enumerate(words[:4]))  # fmt: skip
    return Task(name, labels, metric, rows[:4], (), rows, source="made")


def test_a_label_means_what_the_map_says_or_its_own_name() -> None:
    learned = task("nli", "entailment", "neutral", "contradiction")
    assert answer_ids(learned, task("two", "no", "yes"), ANSWERS) == [1, 0, 0]
    other = task("three", "contradiction", "entailment", "neutral")
    assert answer_ids(learned, other, {}) == [1, 2, 0]
    with pytest.raises(Refused, match=r"nli, tested on two: no answer for the label 'neutral'"):
        answer_ids(learned, task("two", "no", "yes"), {"entailment": "yes"})


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_the_score_is_that_of_the_mapped_answers(metric: str) -> None:
    """By a row at a time, in words; the head has more outputs than the task has labels."""
    learned = task("nli", "entailment", "neutral", "contradiction")
    other = task("two", "no", "yes", metric=metric)
    kind: Any = kind_named("classification")
    tokens = models.tokenizer()
    rows = kind.encode(other.evaluation, other, tokens, max_length=16)
    model = models.bert(num_labels=3, seed=3, initializer_range=1.0).eval()
    said = []
    for row in other.evaluation:
        with torch.no_grad():
            best = int(model(**tokens(row.text, return_tensors="pt")).logits.argmax())
        said.append(ANSWERS[learned.labels[best]] == "yes")  # type: ignore[index]
    assert 0 < sum(said) < len(said)
    truth = [row.label == 1 for row in other.evaluation]
    right = sum(a == b for a, b in zip(said, truth, strict=True)) / len(said)
    hits = sum(a and b for a, b in zip(said, truth, strict=True))
    wanted = {"accuracy": right, "f1": 2 * hits / (sum(said) + sum(truth))}
    ids = answer_ids(learned, other, ANSWERS)
    got = score_elsewhere(model, rows, other, ids, kind.collator(tokens))
    assert got == pytest.approx(wanted[metric])


def test_a_run_that_was_killed_has_the_same_scores_elsewhere(place: Path, tmp_path: Path) -> None:
    """And a test changes nothing else: weights and scores are those of a run without it."""
    tests = {f"{place}/question.jsonl": {"good": "person", "bad": "place", "red": "person",
                                         "blue": "count"}}  # fmt: skip
    names = [f"{place}/{topic}.jsonl" for topic in ("mood", "colour")]
    more: dict[str, Any] = {**SETTINGS, "epochs": 0.5, "save_steps": 0}

    def run(out: str, tasks: list[str], **how: Any) -> Record:
        return run_sequence(str(place / "bert"), tasks, "plain", out=tmp_path / out, **more, **how)

    plain, tested = run("plain", names), run("tested", names, tests=tests)
    assert plain.scores == tested.scores and "elsewhere" not in plain.extra
    run("parts", names[:1], tests=tests)
    parts = run("parts", names, tests=tests)  # goes on
    assert parts.extra["elsewhere"] == tested.extra["elsewhere"]
    assert {k: list(v) for k, v in parts.extra["elsewhere"].items()} == {
        "mood": ["question"], "colour": ["question"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "more", "says"),
    [
        ({"good": "person", "bad": "place"}, {}, "colour, tested on question: no answer"),
        ({"good": "person", "bad": "palce"}, {}, "mood, tested on question: no answer for .*'bad'"),
        ({"good": "person"}, {"head": "shared"}, "need a head for each task"),
    ],
)
def test_what_cannot_be_tested_is_refused_before_training(
    answers: dict[str, str], more: dict[str, Any], says: str, place: Path, tmp_path: Path
) -> None:
    tasks = [f"{place}/mood.jsonl", f"{place}/colour.jsonl"]
    with pytest.raises(Refused, match=says):
        run_sequence(str(place / "bert"), tasks, "plain", out=tmp_path / "x",
                     tests={f"{place}/question.jsonl": answers}, **SETTINGS, **more)  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_numbers_are_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "n.csv"
    path.write_text("text,label\n" + "".join(f"t {i},{i}.5\n" for i in range(20)))
    other = f"{path}?type=regression"
    with pytest.raises(Refused, match="only tasks of one class a row"):
        Elsewhere({other: {}}, [load_task("builtin:intents")], head="task")
