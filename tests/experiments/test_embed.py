"""Embeddings of rows: what is averaged, and what stays untouched."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers

from holdfast.errors import Refused
from holdfast.experiments.embed import embedder
from holdfast.tasks import Row
from holdfast.tasks.shifts import by_cluster
from holdfast.tasks.task import Task

TEXTS = ["a film", "the good book was very warm and not dull", "who", "where is the city ?"]
ROWS = [Row(text, None, 0) for text in TEXTS]


def alone(encoder: Any, tokenizer: Any, row: Row, pooling: str) -> np.ndarray:
    """The vector of one row without any padding: the slow way."""
    pair = () if row.pair is None else (row.pair,)
    with torch.no_grad():
        states = encoder(**tokenizer(row.text, *pair, return_tensors="pt")).last_hidden_state[0]
    return (states[0] if pooling == "cls" else states.mean(0)).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(("kind", "side"), [("bert", "right"), ("t5", "right"), ("t5", "left")])
def test_padding_and_batches_change_nothing(pooling: str, side: str, kind: str) -> None:
    model, tokenizer = getattr(models, kind)().eval(), models.tokenizer(template=kind == "bert")
    tokenizer.padding_side = side
    encoder = model.base_model if kind == "bert" else model.encoder
    expected = [alone(encoder, tokenizer, row, pooling) for row in ROWS]
    for batch in (1, 3, 64):
        found = embedder(model, tokenizer, pooling=pooling, batch=batch)(ROWS)
        assert found.shape == (4, 16) and found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-5)
    assert np.ptp(found, 0).max() > 1e-3  # rows do differ


def test_pairs_are_read_and_rows_are_cut() -> None:
    model, tokenizer = models.bert().eval(), models.tokenizer()
    rows = [Row("a film", other, 0) for other in ("was good", "was bad and cold")]
    found = embedder(model, tokenizer)(rows)
    assert np.allclose(found[1], alone(model.base_model, tokenizer, rows[1], "mean"), atol=1e-5)
    short = embedder(model, tokenizer, max_length=6)
    long = [Row("a film was good and warm", None, 0), Row("a film was good or cold", None, 0)]
    assert np.array_equal(*short(long)) and not np.array_equal(*embedder(model, tokenizer)(long))


def test_the_model_is_left_as_it_was_and_nothing_is_drawn() -> None:
    model = models.bert(hidden_dropout_prob=0.5).train()
    model.classifier.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    embed = embedder(model, models.tokenizer())
    first = embed(ROWS)
    assert np.array_equal(first, embed(ROWS))  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_bare_encoder_and_a_classifier_around_it_agree() -> None:
    torch.manual_seed(0)
    bare = transformers.BertModel(models.bert_config())
    around = models.bert(seed=1)
    around.bert = bare
    tokenizer = models.tokenizer()
    assert np.array_equal(embedder(bare, tokenizer)(ROWS), embedder(around, tokenizer)(ROWS))


def test_what_is_refused() -> None:
    model, tokenizer = models.bert(), models.tokenizer()
    with pytest.raises(Refused, match="pooling 'max'; known are mean, cls"):
        embedder(model, tokenizer, pooling="max")
    with pytest.raises(Refused, match="no rows"):
        embedder(model, tokenizer)([])
    with pytest.raises(Refused, match="without tokens"):
        embedder(models.gpt2(), models.tokenizer(template=False))([Row("", None, 0)])
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(torch.nan)
    model.train()
    with pytest.raises(Refused, match="not finite"):
        embedder(model, tokenizer)(ROWS)
    assert model.training


def test_a_model_clusters_its_rows() -> None:
    def rows(count: int, start: int) -> tuple[Row, ...]:
        sides = (["red", "blue", "green"], ["when", "year", "number"])
        return tuple(
            Row(" ".join(sides[i % 2][(i // j) % 3] for j in (1, 2, 3, 5)), None, (start + i) % 3)
            for i in range(start, start + count)
        )

    task = Task("made", ("a", "b", "c"), "accuracy", rows(60, 0), (), rows(40, 60), "made")
    one, two, facts = by_cluster(task, embedder(models.bert(), models.tokenizer()))
    for half, other in ((one, two), (two, one)):
        words = {word for row in half.train + half.evaluation for word in row.text.split()}
        assert not words & {w for row in other.train + other.evaluation for w in row.text.split()}
    assert facts["explained"] > 0.3
