"""Prompts that are no column: templates, labels as words, conversations by a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from holdfast import LoRA, Recipe, Refused, cli, load, load_task, run_sequence
from holdfast.tasks.kinds import chat, kind_of
from holdfast.tasks.rows import unlabelled

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message comes first') }}{% endif %}"
    "[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] the{% endif %}"
)
FEW: dict[str, Any] = {"epochs": 1.0, "batch_size": 8, "max_length": 48, "progress": False}


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize("options", ["text={note}: {label}", "prompt={label}? {text}",
                                     "prompt={text} {note}&answer=note"])  # fmt: skip
def test_what_is_to_be_learned_may_not_stand_in_the_text(tmp_path: Path, options: str) -> None:
    with pytest.raises(Refused, match=r"the column '\w+' is what is to be learned, and stands in"):
        load_task(f"{sentiment(tmp_path)}?{options}")


# --- labels as words, templates -------------------------------------------------------------------


def sentiment(folder: Path, count: int = 20) -> Path:
    rows = [{"text": f"film {i}", "note": i, "label": ("bad", "good")[i % 2]} for i in range(count)]
    return write(folder / "film.jsonl", rows)


def test_labels_are_written_as_words(tmp_path: Path) -> None:
    file = sentiment(tmp_path)
    plain, words = load_task(file), load_task(f"{file}?type=generation")
    assert (words.kind, words.labels, words.metric) == ("generation", None, "exact_match")
    every = [[*t.train, *t.selection, *t.evaluation] for t in (plain, words)]
    assert {r.text: r.label for r in every[1]} == {
        r.text: (plain.labels or ())[int(r.label)] for r in every[0]
    }
    asked = load_task(f"{file}?prompt={{text}} of {{note}}: &metric=likelihood")
    assert asked.metric == "likelihood" and asked.kind == "generation"
    for row in asked.train:
        number = row.text.split()[1]
        assert row.text == f"film {number} of {number}: "
    braces = load_task(f"{file}?prompt={{{{x}}}} {{text}}")
    assert braces.train[0].text.startswith("{x} film")


def test_a_folder_of_ids_is_written_by_its_names(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 3 - 100 * (i == 4)}
            for i in range(12)]  # fmt: skip
    rows[4]["label"] = -100
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", rows[:3])
    told = {"labels": ["no", "maybe", "yes"], "metric": "accuracy"}
    (tmp_path / "meta.json").write_text(json.dumps(told))
    task = load_task(f"{tmp_path}?prompt=premise: {{text}} hypothesis: {{pair}}", selection=0)
    assert (task.metric, task.kind) == ("exact_match", "generation")
    assert task.evaluation[2].text == "premise: a 2 hypothesis: b 2"
    assert [row.label for row in task.evaluation] == ["no", "maybe", "yes"]
    assert len(task.train) == 11 and "labelled -100 skipped" in task.warnings[0]
    by_column = load_task(f"{tmp_path}?prompt=premise: {{sentence1}} hypothesis: {{sentence2}}")
    assert by_column.evaluation == task.evaluation
    told["labels"] = None  # type: ignore[assignment]
    told["metric"] = "spearman"
    (tmp_path / "meta.json").write_text(json.dumps(told))
    assert load_task(f"{tmp_path}?prompt={{text}}").evaluation[1].label == "1"
    with pytest.raises(Refused, match="is a regression; leave out type=classification"):
        load_task(f"{tmp_path}?type=classification")


def test_templates_that_do_not_fit(tmp_path: Path) -> None:
    file = sentiment(tmp_path)
    for query, says in (
        ("prompt={text", "no text with columns in braces"),
        ("prompt={} x", "no text with columns in braces"),
        ("prompt={text!r}", "no text with columns in braces"),
        ("prompt=hello", "no column in braces"),
        ("prompt={texts}", "no column 'texts'.*did you mean 'text'"),
        ("prompt={pair}", "no column 'pair', 'sentence2'"),
        ("prompt={text}&type=classification", "a classification has no prompt"),
        ("type=generation&metric=accuracy", "metric 'accuracy' does not suit"),
        ("type=generation&pair=note", r"put both into one: prompt=\{text\} … \{pair\}"),
    ):
        with pytest.raises(Refused, match=says):
            load_task(f"{file}?{query}")
    rows = [{"text": f"a {i}", "label": f"b {i % 2}"} for i in range(10)]
    write(file, [*rows, {"text": " ", "label": "b 1"}])
    assert "1 row without text skipped" in load_task(f"{file}?prompt={{text}}").warnings[0]
    write(file, [*rows, {"text": ["a"], "label": "b 1"}])
    with pytest.raises(Refused, match=r"line 11: 'text' is a list, not a text"):
        load_task(f"{file}?prompt={{text}}")
    write(file, rows)
    texts, *_ = unlabelled(f"{file}?prompt=is {{text}} ?", pairs=False, kind="generation")
    assert texts[:2] == ["is a 0 ?", "is a 1 ?"]


# --- conversations --------------------------------------------------------------------------------


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": c}
                    for i, c in enumerate(contents)]  # fmt: skip


def talks(file: Path, count: int = 16, words: Sequence[str] = ("good", "bad")) -> Path:
    rows = [{"messages": said("who", "a man", f"the film {i}", words[i % 2], system="warm")}
            for i in range(count)]  # fmt: skip
    return write(file, rows)


def test_the_last_answer_is_what_is_learned(tmp_path: Path) -> None:
    task = load_task(talks(tmp_path / "chat.jsonl"))
    assert (task.kind, task.metric, kind_of([task])) == ("chat", "likelihood", chat.KIND)
    row = next(r for r in task.train if r.text.count("the film"))
    assert json.loads(row.text)[0] == {"role": "system", "content": "warm"}
    assert [m["role"] for m in json.loads(row.text)] == ["system", "user", "assistant", "user"]
    assert row.label in ("good", "bad")

    words = models.tokenizer(template=False)
    words.chat_template = TEMPLATE
    made = chat.KIND.encode(task.train, task, words, max_length=64,
                            config=models.llama().config)  # fmt: skip
    for given, each in zip(task.train, made, strict=True):
        text = words.apply_chat_template(json.loads(given.text), tokenize=False,
                                         add_generation_prompt=True)  # fmt: skip
        asked = words(text, add_special_tokens=False)["input_ids"]
        answer = [*words(str(given.label), add_special_tokens=False)["input_ids"], 3]
        assert each["input_ids"] == [*asked, *answer]
        assert each["labels"] == [*[-100] * len(asked), *answer]
    assert chat.KIND.count_cut(task.train, made, task, words, max_length=64) == 0


def test_the_same_conversation_is_the_same_row_from_any_file(tmp_path: Path) -> None:
    """Parquet writes fields that others have as null, and a struct's keys in one order."""
    task = load_task(talks(tmp_path / "chat.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    mixed = [[{"name": None, **dict(reversed(m.items()))} for m in row["messages"]] for row in rows]
    pq.write_table(pa.table({"messages": mixed}), tmp_path / "chat.parquet")
    assert load_task(tmp_path / "chat.parquet").hash == task.hash
    write(tmp_path / "train.jsonl", rows)
    (tmp_path / "meta.json").write_text('{"kind": "generation", "task": "chat"}')
    assert load_task(tmp_path).hash == task.hash


@pytest.mark.parametrize(("messages", "says"), [
    (None, "'messages' is None, not a list of messages"),
    ([], "not a list of messages"),
    ("hello", "'messages' is 'hello'"),
    (["hello"], "message 1 has no 'role'"),
    ([{"from": "human", "value": "hello"}], "message 1 has no 'role'"),
    ([*said("hello"), {"role": "assistant", "content": None}], "message 2 has no 'content' of te"),
    (said("hello", " "), "message 2 has no 'content' of text"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 1 has no 'content'"),
    (said("hello"), "the last message is of 'user', not of 'assistant'"),
    (said("hello", "you")[1:], "no message before the answer"),
    (said("a \ud800", "you"), "half a character"),
])  # fmt: skip
def test_conversations_that_are_none_are_refused_by_line(
    messages: Any, says: str, tmp_path: Path
) -> None:
    rows = [{"messages": said("who", f"man {i}")} for i in range(5)]
    write(tmp_path / "chat.jsonl", [*rows[:3], {"messages": messages}, *rows[3:]])
    with pytest.raises(Refused, match=rf"chat\.jsonl, line 4: .*{says}"):
        load_task(tmp_path / "chat.jsonl")


def test_the_conversation_that_a_template_refuses_is_named() -> None:
    words = models.tokenizer(template=False)
    words.chat_template = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('so') }}{% endif %}{% endfor %}a"  # noqa: E501
    texts = [json.dumps(said(text)) for text in ("who", "no", "what")]
    with pytest.raises(Refused, match=r"'\[{.*no.*template takes no such conversation \(so\)"):
        chat.KIND.prompts(texts, words, decoder=True)


def test_answers_and_labels_beside_messages_come_first(tmp_path: Path) -> None:
    rows = [{"messages": said("a", "b"), "prompt": f"x {i}", "answer": f"y {i}"} for i in range(9)]
    assert load_task(write(tmp_path / "a.jsonl", rows)).kind == "generation"
    rows = [{"messages": said("a", "b"), "text": f"x {i}", "label": f"y {i % 2}"} for i in range(9)]
    assert load_task(write(tmp_path / "b.jsonl", rows)).kind == "classification"
    with pytest.raises(Refused, match="no column 'text'"):
        load_task(f"{talks(tmp_path / 'c.jsonl')}?type=classification")


def save(folder: Path, template: str | None = TEMPLATE) -> Path:
    words = models.tokenizer(template=False)
    words.chat_template = template
    words.save_pretrained(folder)
    models.llama().save_pretrained(folder)
    return folder


def test_a_sequence_of_conversations_is_learned_and_served(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    tasks = [talks(tmp_path / "day.jsonl"), talks(tmp_path / "night.jsonl", words=("red", "blue"))]
    run_sequence(str(model), tasks, out=tmp_path / "run", **FEW)
    served = load(tmp_path / "run")
    asked = said("who", "a man", "the film 3", system="warm")
    (one,) = served.predict("day", [json.dumps(asked)])
    assert served.predict("day", [asked]) == [one]
    with torch.no_grad():
        made, words = served.models["day"], served.processor
        ids = words.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt",
                                        return_dict=False)  # fmt: skip
        out = made.generate(ids, max_new_tokens=48 - ids.shape[1], do_sample=False,
                            eos_token_id=3, pad_token_id=0)[0, ids.shape[1] :]  # fmt: skip
    assert one.label == words.decode(out, skip_special_tokens=True).strip()

    # A file to answer may end with the user, or with an answer, which is asked for again.
    file = write(tmp_path / "new.jsonl", [
        {"messages": asked, "id": 1}, {"messages": [*asked, *said("", "x")[1:]], "id": 2},
    ])  # fmt: skip
    run = ["predict", str(tmp_path / "run"), str(file), "--task", "day", "--keep", "id", "--out"]
    assert cli.main([*run, str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [{"id": 1, "label": one.label}, {"id": 2, "label": one.label}]
    with pytest.raises(Refused, match=r"'\[{oh' is no list of messages"):
        served.predict("day", ["[{oh"])
    with pytest.raises(Refused, match="is no list of messages"):
        served.predict("day", ["who is it?"])


def test_what_no_template_takes_is_refused_before_training(tmp_path: Path) -> None:
    file = talks(tmp_path / "day.jsonl")
    bare = save(tmp_path / "bare", None)
    with pytest.raises(Refused, match=r"no chat template; .*rows of prompt and answer"):
        run_sequence(str(bare), [file], out=tmp_path / "a", **FEW)
    assert not (tmp_path / "a").exists()
    odd = [*said("who", "a man"), {"role": "system", "content": "x"}, *said("who", "a man")]
    write(file, [{"messages": [*odd, *said(f"who {i}", f"man {i}")]} for i in range(9)])
    tasks = [talks(tmp_path / "first.jsonl"), file]  # told before the first one is learned
    with pytest.raises(Refused, match=r"no such conversation.*a system message comes first"):
        run_sequence(str(save(tmp_path / "model")), tasks, out=tmp_path / "b", **FEW)
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    models.save_bert(tmp_path / "bert")
    with pytest.raises(Refused, match="is no language model"):
        run_sequence(str(tmp_path / "bert"), [file], out=tmp_path / "c", **FEW)


def test_words_are_learned_with_adapters_by_an_encoder_decoder(tmp_path: Path) -> None:
    """The published text-to-text protocol: a template, label words, exact match."""
    models.t5().save_pretrained(tmp_path / "t5")
    models.tokenizer().save_pretrained(tmp_path / "t5")
    spec = f"{sentiment(tmp_path)}?prompt=the {{text}} is"
    record = run_sequence(str(tmp_path / "t5"), [spec], Recipe(peft=LoRA(rank=2)),
                          out=tmp_path / "run", **FEW)  # fmt: skip
    assert record.tasks[0]["metric"] == "exact_match" and record.scores[0][0] is not None
    assert load(tmp_path / "run").predict("film", ["the film 1 is"])
