"""A tag for every word: how words and spans are read, what is learned, what is scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from holdfast import Refused
from holdfast.tasks import Row, Task, load_task
from holdfast.tasks.kinds import evaluate, kind_named
from holdfast.tasks.tagged import Span, entities, tags_of, words_in

TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
tag = st.sampled_from(TAGS)


def pieces() -> PreTrainedTokenizerFast:
    """Cuts `river` and `number` in two."""
    known = [*models.SPECIAL, *models.WORDS, "riv", "##er", "numb"]
    known = [w for w in known if w not in ("river", "number", "year")]
    made = Tokenizer(WordPiece({w: i for i, w in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]",
                                   model_input_names=["input_ids", "attention_mask"])  # fmt: skip


def task(metric: str = "entity_f1") -> Task:
    rows = (
        Row("the river city was cold", None, (0, 1, 2, 0, 0)),
        Row("a man", None, (0, 3)),
        Row("number river river", None, (3, 0, 1)),
    )
    return Task(name="t", labels=TAGS, metric=metric, train=rows, selection=(), evaluation=rows,
                source="", kind="tokens")  # fmt: skip


def written(folder: Path, rows: list[dict[str, Any]], name: str = "t.jsonl") -> Path:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return folder / name


# --- rows -----------------------------------------------------------------------------------------


def test_words_and_spans_give_the_same_task(tmp_path: Path) -> None:
    """Punctuation is a word of its own, and a span that ends within a word takes all of it."""
    text = "Anna went to New York, by ship"
    spans = [{"start": 13, "end": 20, "label": "LOC"}, {"start": 0, "end": 4, "label": "PER"}]
    words = ["Anna", "went", "to", "New", "York", ",", "by", "ship"]
    tags = ["B-PER", "O", "O", "B-LOC", "I-LOC", "O", "O", "O"]
    texts = [{"text": f"{text} {i}", "spans": spans} for i in range(9)]
    lists = [{"tokens": [*words, str(i)], "tags": [*tags, "O"]} for i in range(9)]
    one = load_task(written(tmp_path, texts))
    two = load_task(f"{written(tmp_path, lists, 'w.jsonl')}?name=t")
    assert one.labels == TAGS and one.metric == "entity_f1" and one.hash == two.hash
    assert any("9 rows with a span that ends within a word" in line for line in one.warnings)
    assert not any("I-PER" in line for line in one.warnings)


def test_tags_without_entities_are_scored_by_word(tmp_path: Path) -> None:
    rows = [{"words": ["a", f"man{i}"], "tags": ["DET", "NOUN"]} for i in range(9)]
    found = load_task(written(tmp_path, rows))
    assert found.labels == ("DET", "NOUN") and found.metric == "accuracy"


@pytest.mark.parametrize(("row", "why"), [
    ({"tokens": ["a"], "tags": ["O", "O"]}, "1 words and 2 tags"),
    ({"tokens": ["a b"], "tags": ["O"]}, "is no word"),
    ({"tokens": ["a"], "tags": [1]}, "without a name"),
    ({"tokens": "a", "tags": "O"}, "list"),
])  # fmt: skip
def test_rows_that_are_refused(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        load_task(written(tmp_path, [row] * 9))


@pytest.mark.parametrize(("spans", "why"), [
    ([{"start": 0, "end": 9, "label": "X"}], "no span"), ([{"start": 2, "end": 2, "label": "X"}],
    "no span"), ([{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 4, "label": "Y"}],
    "overlap"), ("0-3", "a list"),
])  # fmt: skip
def test_spans_that_are_refused(tmp_path: Path, spans: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        load_task(written(tmp_path, [{"text": "a city", "spans": spans}] * 9))


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    good = [{"tokens": ["a", f"man{i}"], "tags": ["O", "B-X"]} for i in range(9)]
    bad = [{"tokens": ["a"], "tags": []}, {"tokens": ["a"], "tags": [None]}]
    one = load_task(f"{written(tmp_path, [*bad, *good], 'b.jsonl')}?bad_rows=skip&name=t")
    two = load_task(written(tmp_path, good))
    assert one.hash == two.hash
    assert any("2 bad rows skipped, the first in line 1: 1 words" in w for w in one.warnings)


@given(st.lists(tag, max_size=12))
def test_entities_are_seqevals(tags: list[str]) -> None:
    theirs = [(start, end + 1, name) for name, start, end in get_entities(tags)]
    assert entities(tags) == theirs


def test_a_combining_mark_belongs_to_its_word() -> None:
    for text in ("caf\u0065\u0301 noir", "\u0928\u092e\u0938\u094d\u0924\u0947 jag"):
        assert [word for word, _, _ in words_in(text)] == text.split()


@given(st.text("ab ,.", max_size=30), st.data())
def test_spans_at_the_edges_of_words_come_back(text: str, data: st.DataObject) -> None:
    words = words_in(text)
    places = data.draw(st.lists(st.sampled_from(range(len(words))), unique=True) if words
                       else st.just([]))  # fmt: skip
    spans = [Span(words[i][1], words[i][2], "X") for i in sorted(places)]
    found = entities(tags_of(words, spans))
    assert [Span(words[a][1], words[b - 1][2], kind) for a, b, kind in found] == spans


@given(st.text("ab ,", max_size=20), st.data())
def test_a_span_covers_every_word_that_it_touches(text: str, data: st.DataObject) -> None:
    words = words_in(text)
    places = data.draw(st.lists(st.integers(0, len(text)), unique=True, max_size=6)
                       .map(sorted))  # fmt: skip
    spans = [Span(a, b, "X") for a, b in zip(places[::2], places[1::2], strict=False)]
    expected = ["O"] * len(words)
    for span in spans:
        begun = False
        for i, (_, start, end) in enumerate(words):
            if start < span.end and end > span.start:
                expected[i] = "I-X" if begun else "B-X"
                begun = True
    assert tags_of(words, spans) == expected


def test_spans_that_end_within_a_word_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"abc def{i}", "spans": [{"start": a, "end": b, "label": "X"}]}
            for i, (a, b) in enumerate([(0, 3), (0, 2), (4, 8), (5, 8), (0, 8)])]  # fmt: skip
    said = load_task(written(tmp_path, [*rows, *rows])).warnings
    assert any("4 rows with a span that ends within a word" in line for line in said)


# --- what is learned and scored -------------------------------------------------------------------


def model(seed: int = 0) -> Any:
    kind = kind_named("tokens")
    return models.bert("TokenClassification", seed=seed, **kind.head_config(TAGS)).eval()  # type: ignore[attr-defined]


def test_the_first_token_of_a_word_is_learned() -> None:
    kind, asked, words = kind_named("tokens"), task(), pieces()
    rows = kind.encode(asked.train, asked, words, max_length=16)
    assert rows[0]["labels"] == [0, 1, -100, 2, 0, 0]
    assert rows[2]["labels"] == [3, -100, 0, -100, 1, -100]
    batch = kind.collator(words)([rows[0], rows[1]])
    assert batch["labels"][1].tolist() == [0, 3, *[-100] * 4] and "tags" not in batch


@pytest.mark.parametrize("cut", [16, 4])
def test_f1_is_seqevals_also_where_words_were_cut(cut: int) -> None:
    """Row by row, in Python; a word that was cut is answered by O."""
    scores = [agrees(cut, model(seed)) for seed in range(9)]
    assert max(scores) > 0


def agrees(cut: int, made: Any) -> float:
    kind, asked, words = kind_named("tokens"), task(), pieces()
    rows = kind.encode(asked.train, asked, words, max_length=cut)
    said, true = [], []
    for row, each in zip(asked.train, rows, strict=True):
        ids = torch.tensor([each["input_ids"]])
        with torch.no_grad():
            best = made(input_ids=ids).logits[0].argmax(-1).tolist()
        names = [TAGS[b] for b, at in zip(best, each["labels"], strict=True) if at != -100]
        said.append([*names, *["O"] * (len(row.label) - len(names))])
        true.append([TAGS[i] for i in row.label])
    score = evaluate(made, rows, asked, kind.collator(words))
    assert score == pytest.approx(f1_score(true, said))
    assert kind.count_cut(asked.train, rows, asked, words, max_length=cut) == (
        0 if cut == 16 else 2
    )
    right = np.mean(np.concatenate(said) == np.concatenate(true))
    if cut == 16:
        rows = kind.encode(asked.train, asked, words, max_length=cut)
        found = evaluate(made, rows, task("accuracy"), kind.collator(words))
        assert found == pytest.approx(right)
    return score


class Knowing(nn.Module):
    """Says B-LOC of `city` and O of all else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Any, **_: Any) -> Any:
        city = input_ids == models.VOCABULARY.index("city")
        return SimpleNamespace(logits=functional.one_hot(city.long(), len(TAGS)).float())


def test_a_word_of_which_the_tokenizer_leaves_nothing_moves_no_tag() -> None:
    """BERT's normalizer drops a zero-width space: the words after it keep their places."""
    words, kind, made = models.tokenizer(), kind_named("tokens"), Knowing()
    words.backend_tokenizer.normalizer = BertNormalizer()
    row = Row("the \u200b city", None, (0, 0, 1))
    for metric, wanted in (("entity_f1", 1.0), ("accuracy", 2 / 3)):
        asked = replace(task(metric), train=(row,), evaluation=(row,))
        rows = kind.encode(asked.train, asked, words, max_length=16)
        assert rows[0]["labels"] == [-100, 0, 1, -100]
        assert evaluate(made, rows, asked, kind.collator(words)) == pytest.approx(wanted)
        assert kind.count_cut(asked.train, rows, asked, words, max_length=16) == 0
    said = kind.predict(made, {"labels": TAGS}, [row.text], None, words, max_length=16, batch=2)
    assert said[0].label == (Span(6, 10, "LOC"),)


def test_texts_without_a_word_have_no_entity() -> None:
    """Also by a decoder, whose tokenizer begins and ends no text."""
    words, made = models.tokenizer(template=False), model()
    found = kind_named("tokens").predict(made, {"labels": TAGS}, ["", " "], None, words,
                                         max_length=16, batch=2)  # fmt: skip
    assert [each.label for each in found] == [(), ()]


def test_what_is_predicted_lies_in_the_text() -> None:
    kind, words, made = kind_named("tokens"), pieces(), model()
    texts = ["the city, who?", "", "river"]
    found = kind.predict(made, {"labels": TAGS}, texts, None, words, max_length=16, batch=2)
    assert len(found) == 3 and not found[1].label
    spans = [s for each in found for s in each.label]
    assert spans and {s.label for s in spans} <= {"LOC", "PER"}
    edges = {(a, b) for _, a, b in words_in(texts[0])}
    assert {s.start for s in found[0].label} <= {a for a, _ in edges}
    assert {s.end for s in found[0].label} <= {b for _, b in edges}


def test_tags_that_differ_only_by_blanks_are_refused_and_by_case_told(tmp_path: Path) -> None:
    def rows(*tags: str) -> Path:
        words = [f"w{i} in Rome" for i in range(20)]
        return written(tmp_path, [{"tokens": text.split(), "tags": ["O", "O", tags[i % len(tags)]]}
                                  for i, text in enumerate(words)])  # fmt: skip

    for tags in (("B-LOC", "B-LOC "), ("B-LOC", "B- LOC"), ("S-LOC", " S-LOC")):
        with pytest.raises(Refused, match="tags in several spellings"):
            load_task(str(rows(*tags)))
    assert "tags that differ only by case: 'B-LOC', 'I-LOC', 'B-loc', 'I-loc'" in " ".join(
        load_task(str(rows("B-LOC", "B-loc"))).warnings
    )
    with pytest.raises(Refused, match=r"line 1: a tag -100; write O"):
        load_task(str(rows("-100", "B-LOC")))


def test_an_entity_may_have_a_name_of_several_words(tmp_path: Path) -> None:
    """Without it the score would be that of words, and no word could go on an entity."""
    rows = [{"text": f"{i} Ann Lee left", "spans": [
        {"start": len(f"{i} "), "end": len(f"{i} Ann Lee"), "label": "full name"}]}
        for i in range(20)]  # fmt: skip
    task = load_task(str(written(tmp_path, rows)))
    assert task.labels == ("O", "B-full name", "I-full name") and task.metric == "entity_f1"
    assert entities(["B-full name", "I-full name", "O"]) == [(0, 2, "full name")]
    rows[0]["spans"][0]["start"] = True  # type: ignore[index]
    with pytest.raises(Refused, match=r"line 1: .*is no span"):
        load_task(str(written(tmp_path, rows)))


def test_tags_of_another_scheme_are_told_to_be_scored_by_word(tmp_path: Path) -> None:
    rows = [{"tokens": [f"w{i}", "Rome"], "tags": ["O", "S-LOC"]} for i in range(20)]
    path = str(written(tmp_path, rows))
    said = "tags 'O', 'S-LOC' are scored word by word: entities are told by O, B-x and I-x"
    assert load_task(path).metric == "accuracy" and said in load_task(path).warnings
    assert said not in load_task(f"{path}?metric=accuracy").warnings


def test_other_names_of_tags_are_entities_too_or_refused(tmp_path: Path) -> None:
    rows = [{"tokens": [f"w{i}", "Rome"], "tags": ["O", "B-LOC"]} for i in range(20)]
    path = str(written(tmp_path, rows))
    assert load_task(f"{path}?labels=O|B-X|I-X").labels == ("O", "B-X", "I-X")
    with pytest.raises(Refused, match="entity_f1 is for tags O, B-x and I-x, not 'no', 'first'"):
        load_task(f"{path}?labels=no|first|next")
