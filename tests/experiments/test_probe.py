"""General ability beside the tasks: each number against a slow twin, and training as it was."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import numpy as np
import pytest
import torch
from sequences import files
from torch import Tensor
from transformers import BertForMaskedLM, BertModel

from holdfast import Recipe, Refused, Replay, load_task, run_sequence
from holdfast.errors import tell_once
from holdfast.experiments import learner, probe
from holdfast.experiments.embed import embedder
from holdfast.experiments.record import Record
from holdfast.tasks.kinds import generation

SHORT: dict[str, Any] = {"epochs": 1.0, "batch_size": 4, "lr": 1e-2, "max_length": 16,
                         "save_steps": 2, "progress": False}  # fmt: skip
KIND = generation.KIND


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with dropout, tasks of text and of labels, and a reference text."""
    folder, draw = tmp_path_factory.mktemp("place"), random.Random(0)
    text = [" ".join(draw.choices(models.WORDS, k=draw.randrange(4, 30))) for _ in range(40)]
    (folder / "general.txt").write_text("\n".join(text))
    made = {
        "gpt2": models.gpt2(resid_pdrop=0.1),
        "t5": models.t5(),
        "mlm": models.bert("MaskedLM", hidden_dropout_prob=0.1),
        "bert": models.bert("SequenceClassification"),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)  # type: ignore[operator]
        models.tokenizer(template=name != "gpt2").save_pretrained(folder / name)
    for topic in ("mood", "colour"):
        models.write_task(folder, topic, count=20)
        lines = (folder / f"{topic}.jsonl").read_text().splitlines()
        rows = [{"prompt": r["text"], "answer": r["label"]} for r in map(json.loads, lines)]
        (folder / f"{topic}-said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(place: Path, name: str, out: Path, **more: Any) -> Record:
    said = "" if name in ("mlm", "bert") else "-said"
    tasks = [place / f"{topic}{said}.jsonl" for topic in ("mood", "colour")]
    given = {"recipe": "plain", "reference": place / "general.txt", **SHORT, **more}
    return run_sequence(str(place / name), tasks[: given.pop("size", 2)], out=out, **given)


def text(place: Path) -> str:
    return (place / "general.txt").read_text()


# --- how probable a text is -----------------------------------------------------------------------


@pytest.mark.parametrize("begins", [False, True])  # whether the tokenizer begins a text by a token
@torch.no_grad()
def test_every_token_but_a_windows_first_is_scored_once(begins: bool, place: Path) -> None:
    model: Any = models.gpt2().eval()
    words, begin = models.tokenizer(template=begins), [2] if begins else []
    ids = words(text(place), add_special_tokens=False)["input_ids"]
    room, losses, count = 16 - len(begin), 0.0, 0
    for at in range(0, len(ids), room):
        window = [*begin, *ids[at : at + room]]
        log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for place_, token in enumerate(window[1:]):
            losses -= float(log_p[place_, token])
            count += 1
    rows = probe.windows(text(place), words, 16)
    assert count == len(ids) if begins else count == len(ids) - math.ceil(len(ids) / room)
    assert probe.nll(model, rows, KIND.collator(words)) == pytest.approx(losses / count, rel=1e-6)


def test_the_same_tokens_are_masked_each_time(place: Path) -> None:
    words = models.tokenizer()
    ids = words(text(place), add_special_tokens=False)["input_ids"]
    rows = probe.masked(text(place), words, 16)
    assert rows == probe.masked(text(place), words, 16)
    labels = [label for row in rows for label in row["labels"] if label != -100]
    assert len(labels) == math.ceil(0.15 * len(ids))
    for row in rows:
        assert row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 and len(row["labels"]) <= 16
        hidden = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert hidden == [i for i, token in enumerate(row["input_ids"]) if token == 4]
        told = [a if b == -100 else b
                for a, b in zip(row["input_ids"], row["labels"], strict=True)][1:-1]  # fmt: skip
        assert any(told == ids[at : at + len(told)] for at in range(0, len(ids), 14))


@torch.no_grad()
def twin_of_masked(place: Path, encoder: dict[str, Tensor] | None) -> float:
    """The checkpoint's own head, untied, on other weights of the encoder: row by row."""
    model: Any = BertForMaskedLM.from_pretrained(place / "mlm").eval()
    decoder = model.cls.predictions.decoder
    decoder.weight = torch.nn.Parameter(decoder.weight.clone())
    if encoder is not None:
        model.bert.load_state_dict(encoder, strict=False)
    losses = []
    for row in probe.masked(text(place), models.tokenizer(), 16):
        log_p = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[i, t]) for i, t in enumerate(row["labels"]) if t != -100]
    return sum(losses) / len(losses)


def test_an_encoder_under_the_head_of_its_checkpoint(place: Path, tmp_path: Path) -> None:
    found = run(place, "mlm", tmp_path).general
    assert found["base"]["masked_nll"] == pytest.approx(twin_of_masked(place, None), rel=1e-5)
    for folder, name in (("1-mood", "mood"), ("2-colour", "colour")):
        learned = BertModel.from_pretrained(tmp_path / "tasks" / folder).state_dict()
        twin = twin_of_masked(place, learned)
        assert found["after"][name]["masked_nll"] == pytest.approx(twin, rel=1e-5)
        assert twin != pytest.approx(found["base"]["masked_nll"], rel=1e-3)


# --- how far a model has moved --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@torch.no_grad()
def test_kl_is_from_the_base_over_answer_tokens(name: str, place: Path) -> None:
    make = {"gpt2": models.gpt2, "t5": models.t5}[name]
    base: Any = make(seed=0).eval()
    now: Any = make(seed=1).eval()
    words = models.tokenizer(template=name == "t5")
    task = load_task(place / "mood-said.jsonl")
    rows = KIND.encode(task.train, task, words, max_length=16, config=base.config)
    total, count = 0.0, 0
    for row in rows:
        inputs = {k: torch.tensor([v]) for k, v in row.items()}
        p, q = (m(**inputs).logits[0].double().softmax(-1) for m in (base, now))
        labels = inputs["labels"][0]
        if name == "gpt2":
            p, q, labels = p[:-1], q[:-1], labels[1:]
        each = (p * (p / q).log()).sum(-1)[labels != -100]
        total, count = total + float(each.sum()), count + len(each)
    collate = KIND.collator(words)
    assert probe.kl(base, now, rows, collate) == pytest.approx(total / count, rel=1e-5)
    assert probe.kl(base, copy.deepcopy(base), rows, collate) == 0.0


def test_cosine_distance_is_of_mean_vectors(place: Path, tmp_path: Path) -> None:
    """As of `embed`, which pools them too; and a model that did not move has distance 0."""
    found = run(place, "bert", tmp_path, seed=1).general
    words, task = models.tokenizer(), load_task(place / "colour.jsonl", seed=1)
    base = BertModel.from_pretrained(place / "bert")
    learned = BertModel.from_pretrained(tmp_path / "tasks" / "2-colour")
    b, n = (embedder(m, words, max_length=16)(task.evaluation) for m in (base, learned))
    cosines = (b * n).sum(1) / np.linalg.norm(b, axis=1) / np.linalg.norm(n, axis=1)
    twin = float((1 - cosines).mean())
    assert found["after"]["colour"] == {"cosine_distance": pytest.approx(twin, abs=1e-6)}
    assert twin > 1e-4 and found["base"] == {}

    rows: Any = [words(row.text) for row in task.evaluation]
    collate = learner.kind_of([task]).collator(words)
    base.eval()
    with torch.no_grad():
        assert 0 <= probe.cosine_distance(base, base, rows, collate) < 1e-6


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for lm_eval, which seeds all generators and changes modes as the real one does."""
    calls: list[Any] = []

    class HFLM:
        def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.model, self.tokenizer = pretrained, tokenizer
            tokenizer.padding_side = "left"

    class TaskManager:
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in ("arc", "piqa")]

    def simple_evaluate(*, model: HFLM, tasks: list[str], **_: Any) -> dict[str, Any]:
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        model.model.train()
        weight = float(model.model.lm_head.weight.detach().double().sum())
        calls.append(weight)
        score = {"alias": "x", "acc,none": weight, "acc_stderr,none": 0.1, "sample_len": 3}
        return {"results": dict.fromkeys(tasks, score)}

    made = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.models": {},
            "lm_eval.models.huggingface": {"HFLM": HFLM},
            "lm_eval.tasks": {"TaskManager": TaskManager}}  # fmt: skip
    for name, held in made.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["gpt2", "mlm", "bert"])
def test_training_is_the_same_bit_for_bit(
    name: str, place: Path, tmp_path: Path, harness: list[Any]
) -> None:
    recipe = Recipe(methods=[Replay(memory=4)])  # it draws
    beside = {"lm_eval": ["arc"]} if name == "gpt2" else {}
    with_, without = (
        run(place, name, tmp_path / "with", recipe=recipe, **beside),
        run(place, name, tmp_path / "without", recipe=recipe, reference=None),
    )
    assert files(tmp_path / "with") == files(tmp_path / "without")
    assert with_.scores == without.scores and without.general == {}
    assert Record.load(tmp_path / "with").general == with_.general
    assert len(harness) == (3 if beside else 0)


def test_no_random_state_and_no_mode_is_changed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: list[Any]
) -> None:
    measure, seen = probe.Probe.__call__, []

    def states() -> list[Any]:
        return [
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ]  # type: ignore[index]

    def watched(self: Any, learner_: Any, index: int) -> None:
        before = states(), [m.training for m in learner_.models[index].modules()]
        measure(self, learner_, index)
        assert before == (states(), [m.training for m in learner_.models[index].modules()])
        assert learner_.processor.padding_side == "right"
        seen.append(index)

    monkeypatch.setattr(probe.Probe, "__call__", watched)
    run(place, "gpt2", tmp_path, lm_eval=["arc"])
    assert seen == [0, 1]


def test_scores_of_lm_eval_stand_in_the_record(
    place: Path, tmp_path: Path, harness: list[Any]
) -> None:
    """Of the base once and after each task; neither errors nor counts are scores."""
    record = run(place, "gpt2", tmp_path, lm_eval=["arc", "piqa"], reference=None)
    base, mood, colour = harness
    assert len({base, mood, colour}) == 3
    found = {"base": record.general["base"], **record.general["after"]}
    assert found == {
        name: {"arc acc": value, "piqa acc": value}
        for name, value in (("base", base), ("mood-said", mood), ("colour-said", colour))
    }


@pytest.mark.parametrize("call", [1, 2])
def test_a_killed_run_measures_what_it_had_not(
    call: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(place, "gpt2", tmp_path / "whole")
    measured, calls = probe.nll, []

    def counted(*given: Any) -> float:
        calls.append(1)
        return measured(*given)

    monkeypatch.setattr(probe, "nll", counted)
    end, ends = learner.Trainer.end_task, []

    def stop(self: Any) -> None:
        ends.append(1)
        if len(ends) == call:
            raise KeyboardInterrupt
        end(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Trainer, "end_task", stop)
        run(place, "gpt2", tmp_path / "cut")
    again = run(place, "gpt2", tmp_path / "cut")
    assert again.general == whole.general and files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(calls) == 3  # the base once, each task once


def test_going_on_measures_against_the_first_base(place: Path, tmp_path: Path) -> None:
    whole = run(place, "gpt2", tmp_path / "whole")
    run(place, "gpt2", tmp_path / "a", size=1)
    asked = {"reference": place / "general.txt", "out": tmp_path / "b", "progress": False}
    went = run_sequence(None, [place / "colour-said.jsonl"], from_run=tmp_path / "a", **asked)
    assert went.general == whole.general
    (tmp_path / "other.txt").write_text("a film is a film ?")
    with pytest.raises(Refused, match=r"its numbers are of .*general\.txt.*another --out"):
        run(place, "gpt2", tmp_path / "a", size=1, reference=tmp_path / "other.txt")


def test_what_is_not_measured_is_told_once(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, left in (("t5", {"kl"}), ("bert", {"cosine_distance"})):
        tell_once.cache_clear()
        record = run(place, name, tmp_path / name, size=1)
        (line,) = [w for w in record.warnings if "scores no running text" in w]
        assert caplog.text.count(line) == 1
        assert {*record.general["after"][record.names[0]]} == left
        caplog.clear()
    run(place, "bert", tmp_path / "late", size=1, reference=None)
    late = run(place, "bert", tmp_path / "late", size=1)
    assert "General ability was not measured after mood." in late.warnings


def test_what_cannot_be_measured_is_refused_before_training(place: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("film")
    (tmp_path / "blank.txt").write_text(" \n")
    out = tmp_path / "run"
    for given, says in (
        ({"reference": place / "generl.txt"}, r"no such file.*'general\.txt'"),
        ({"reference": place / "mood.jsonl"}, "is a table, not running text"),
        ({"reference": tmp_path / "blank.txt"}, "no text"),
        ({"reference": tmp_path / "short.txt"}, "too short to be scored"),
        ({"lm_eval": ["arc"]}, "--lm-eval: needs a package.*pip install lm-eval"),
    ):
        with pytest.raises(Refused, match=says):
            run(place, "gpt2", out, **{"reference": None, **given})
    with pytest.raises(Refused, match="--lm-eval: is for language models"):
        run(place, "bert", out, reference=None, lm_eval=["arc"])
    assert not out.exists()


def test_an_unknown_task_of_lm_eval_is_refused(
    place: Path, tmp_path: Path, harness: list[Any]
) -> None:
    with pytest.raises(Refused, match="no task 'arcc'"):
        run(place, "gpt2", tmp_path / "run", lm_eval=["arc", "arcc"])
    assert harness == [] and not (tmp_path / "run").exists()
