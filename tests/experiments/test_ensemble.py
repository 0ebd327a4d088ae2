"""An ensemble for each task (`--head levi`): the encoder stays, final/ serves all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from sequences import files, run, told
from test_going_on import TOPICS, go_on, last_home
from test_recovery import stop_at
from transformers import AutoModel

from holdfast import (
    EWC,
    BitFit,
    HeadFirst,
    LoRA,
    Rates,
    Recipe,
    Refused,
    ReInit,
    load,
    load_task,
    run_sequence,
)
from holdfast.cli import main
from holdfast.experiments import learner
from holdfast.experiments.record import Record

LEVI: dict[str, Any] = {"head": "levi", "recipe": "plain", "seed": 5, "epochs": 1.0}


@pytest.fixture(scope="module")
def learned(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(place, out, **LEVI)
    return out


def test_nothing_that_tasks_share_changes_and_nothing_is_forgotten(
    place: Path, learned: Path
) -> None:
    record, served = Record.load(learned), load(learned)
    before = models.weights(AutoModel.from_pretrained(place / "bert"))
    encoders = {id(m.base_model): m.base_model for m in served.models.values()}
    (encoder,) = encoders.values()
    assert models.same(models.weights(encoder), before)
    for j in range(3):
        assert len({row[j] for row in record.scores[j:]}) == 1
    assert record.scenario == "task-incremental"
    assert record.model["parameters"] == sum(
        p.numel() for p in served.models[TOPICS[0]].parameters()
    )
    assert any("encoder was not trained" in line for line in record.warnings)


def test_final_answers_as_the_record_scored(
    place: Path, learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, served = Record.load(learned), load(learned)
    for j, topic in enumerate(record.names):
        task = load_task(place / f"{topic}.jsonl", seed=5)
        found = served.predict(topic, [r.text for r in task.evaluation], batch=3)
        truth = [(task.labels or ())[int(r.label)] for r in task.evaluation]
        right = [p.label == t for p, t in zip(found, truth, strict=True)]
        assert record.scores[-1][j] == pytest.approx(sum(right) / len(right))
    rows, out = f"{place}/mood.jsonl?text=text", tmp_path / "said.jsonl"
    assert main(["predict", str(learned), rows, "--task", "mood", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 40
    with pytest.raises(Refused, match=r"without holdfast nothing loads it"):
        served.save(TOPICS[0], tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("call", [7, 12])  # within the second task or third
def test_killed_in_the_middle(
    call: int, place: Path, learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, place, tmp_path / "cut", module=learner.Learner, name="note_time",
            call=call, **LEVI)  # fmt: skip
    run(place, tmp_path / "cut", **LEVI)
    assert files(tmp_path / "cut") == files(learned)
    assert told(tmp_path / "cut") == told(learned)


def test_a_run_is_gone_on_with(place: Path, learned: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "a", TOPICS[:2], **LEVI)
    go_on(tmp_path / "a", TOPICS[2], tmp_path / "b", place=place)
    assert last_home(tmp_path / "b") == last_home(learned)
    for head in ("task", "shared"):
        with pytest.raises(Refused, match="was learned with --head levi"):
            go_on(tmp_path / "a", TOPICS[2], tmp_path / "c", place=place, head=head)
    with pytest.raises(Refused, match="final: is an ensemble"):
        run_sequence(str(tmp_path / "a" / "final"), [place / f"{TOPICS[0]}.jsonl"],
                     out=tmp_path / "d", progress=False)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("default", "merge, lwf, head_first"),
        (Recipe(methods=[EWC()]), "ewc"),
        (Recipe(peft=LoRA(rank=2)), "peft"),
        (Recipe(methods=[ReInit()]), "reinit"),
        (Recipe(methods=[BitFit()]), "bitfit"),
        (Recipe(head_first=HeadFirst()), "head_first"),
        (Recipe(rates=Rates.bertcl()), "rates"),
    ],
    ids=str,
)
def test_recipes_for_an_encoder_that_learns_are_refused(
    recipe: Any, named: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=rf"that learns \({named}\); --recipe plain"):
        run(place, tmp_path / "a", **{**LEVI, "recipe": recipe})


def test_the_command_line_takes_the_plain_recipe(place: Path, tmp_path: Path) -> None:
    words = ["sequence", "--model", f"{place}/bert", "--head", "levi", "--epochs", "1"]
    words += ["--max-length", "16", "--out", str(tmp_path / "a"), "--tasks", f"{place}/mood.jsonl"]
    assert main(words) == 0
    assert (Record.load(tmp_path / "a").recipe or {})["name"] == "plain"
