"""General rows among a task's own: how many, which, and that they belong to the run's identity."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
from sequences import files

from holdfast import Refused, load_task, run_sequence
from holdfast.experiments import learner
from holdfast.experiments.mix import general, mixed
from holdfast.experiments.record import Record
from holdfast.tasks.kinds import generation

SHORT: dict[str, Any] = {"epochs": 1.0, "batch_size": 4, "lr": 1e-2, "max_length": 16,
                         "save_steps": 2, "progress": False, "recipe": "plain"}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("place"), random.Random(0)
    lines = [" ".join(draw.choices(models.WORDS, k=draw.randrange(4, 30))) for _ in range(120)]
    (folder / "general.txt").write_text("\n".join(lines))
    for name, model in (("gpt2", models.gpt2(resid_pdrop=0.1)), ("t5", models.t5())):
        model.save_pretrained(folder / name)  # type: ignore[operator]
        models.tokenizer(template=False).save_pretrained(folder / name)
    models.save_bert(folder / "bert")
    models.write_task(folder, "mood")
    for name in ("day", "night"):
        rows = [{"prompt": f"the {w} film {i}", "answer": f"{name} {draw.choice(models.WORDS)} {i}"}
                for i, w in enumerate(["red", "blue", "green", "cold"] * 6)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(place: Path, out: Path, **more: Any) -> Record:
    tasks = [place / f"{name}.jsonl" for name in more.pop("names", ("day", "night"))]
    model = more.pop("model", str(place / "gpt2"))
    given = {"mix": f"{place / 'general.txt'}:0.3", "out": out, **SHORT, **more}
    return run_sequence(model, tasks, **given)


def beside(
    folder: Path, mix: str | None, rows: list[dict[str, Any]], *, seed: int = 0, task: int = 0
) -> list[Any]:
    """What stands beside `rows`: by a learner of nothing else."""
    made: Any = SimpleNamespace(
        encoded={},
        kind=generation.KIND, source=str(folder / "gpt2"), rows=lambda *_: rows,
        processor=models.tokenizer(template=False), seed=seed, place=0,
        plan=SimpleNamespace(mix=mix, max_length=16),
    )  # fmt: skip
    found = mixed(made, task)
    assert [found[i] for i in range(len(rows))] == rows
    return [found[i] for i in range(len(rows), len(found))]


def test_a_share_of_the_rows_are_windows_of_the_file(place: Path) -> None:
    task, share = general(f"{place / 'general.txt'}:0.05")
    words, config = models.tokenizer(template=False), models.gpt2().config
    every = [*generation.KIND.encode(task.train, task, words, max_length=16, config=config)]
    held = [*generation.KIND.encode(task.evaluation, task, words, max_length=16, config=config)]
    rows = [{"input_ids": [i]} for i in range(190)]
    found = beside(place, f"{place / 'general.txt'}:0.05", rows)
    assert share == 0.05 and len(found) == 10  # of 200
    assert all(row in every and row not in held for row in found)
    assert len({str(row) for row in found}) == 10
    assert found == beside(place, f"{place / 'general.txt'}:0.05", rows)
    for other in ({"seed": 1}, {"task": 1}):
        assert found != beside(place, f"{place / 'general.txt'}:0.05", rows, **other)
    many = beside(place, f"{place / 'general.txt'}:0.9", rows)
    assert len(many) == 1710  # more than there are: each as often as others, but for one
    often = [many.count(row) / every.count(row) for row in every]
    assert max(often) - min(often) <= 1
    assert beside(place, None, rows) == []


def test_what_is_mixed_in_is_learned_and_survives_a_kill(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(place, tmp_path / "plain", mix=None)
    whole = run(place, tmp_path / "whole")
    assert plain.steps == [5, 5] and whole.steps == [7, 7]  # of 18 rows, and of 26
    end = learner.Trainer.end_task

    def stop(self: Any) -> None:
        if self.task == "night":
            raise KeyboardInterrupt
        end(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Trainer, "end_task", stop)
        run(place, tmp_path / "cut")
    run(place, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    run(place, tmp_path / "a", names=("day",))
    more = {"from_run": tmp_path / "a", "out": tmp_path / "b", "progress": False}
    run_sequence(None, [place / "night.jsonl"], **more)  # its mix is the run's own
    ours, theirs = files(tmp_path / "b"), files(tmp_path / "whole")
    assert all(ours[name] == theirs[name] for name in ours if name.startswith("tasks/2-"))


def test_another_mix_is_another_run(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "general.txt", tmp_path / "g.txt")
    run(place, tmp_path / "a", mix=f"{tmp_path / 'g.txt'}:0.3", names=("day",))
    for other in (None, f"{tmp_path / 'g.txt'}:0.2"):
        with pytest.raises(Refused, match="holds a run with other settings"):
            run(place, tmp_path / "a", mix=other, names=("day",))
    text = (tmp_path / "g.txt").read_text()
    (tmp_path / "g.txt").write_text(text.replace("film", "book"))
    with pytest.raises(Refused, match=r"holds a run with other settings \(mix: "):
        run(place, tmp_path / "a", mix=f"{tmp_path / 'g.txt'}:0.3", names=("day",))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mix": "general.txt"}, "--mix: 'general.txt' is no file and share"),
        ({"mix": "general.txt:1.0"}, "as general.txt:0.05"),
        ({"mix": ":0.1"}, "is no file and share"),
        ({"mix": "none.txt:0.1"}, "none.txt: no such file"),
        ({"mix": "{}/mood.jsonl:0.1"}, "mood is a classification, and no text from text"),
        ({"names": ("mood",), "model": "{}/bert"}, "is for language models.*--recipe replay"),
        ({"model": "{}/t5"}, "general: is running text, and an encoder-decoder answers prompts"),
    ],
)
def test_what_cannot_be_mixed_in_is_refused(
    given: dict[str, Any], says: str, place: Path, tmp_path: Path
) -> None:
    told = {k: v.format(place) if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(Refused, match=says):
        run(place, tmp_path / "a", **told)
    assert not (tmp_path / "a").exists()


def test_running_text_is_mixed_among_conversations(place: Path, tmp_path: Path) -> None:
    """Each row is encoded as its own kind; a model without a template takes no conversations."""
    words = models.tokenizer(template=False)
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    shutil.copytree(place / "gpt2", tmp_path / "gpt2")
    words.save_pretrained(tmp_path / "gpt2")
    said = [[{"role": "user", "content": f"who {i}"}, {"role": "assistant", "content": f"a {i}"}]
            for i in range(24)]  # fmt: skip
    (place / "talk.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in said))
    record = run(place, tmp_path / "a", names=("talk",), model=str(tmp_path / "gpt2"))
    rows = record.tasks[0]["rows"]["train"]
    assert record.tasks[0]["kind"] == "chat" and record.steps == [-(-round(rows / 0.7) // 4)]
    with pytest.raises(Refused, match="no chat template"):
        run(place, tmp_path / "b", mix=f"{place / 'talk.jsonl'}:0.5")


def test_prompts_and_answers_are_mixed_in_too(place: Path, tmp_path: Path) -> None:
    record = run(place, tmp_path, names=("day",), mix=f"{place / 'night.jsonl'}:0.5",
                 model=str(place / "t5"))  # fmt: skip
    rows = len(load_task(place / "day.jsonl").train)
    assert record.steps == [-(-2 * rows // 4)] and record.tasks[0]["rows"]["train"] == rows
