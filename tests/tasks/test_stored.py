"""Weights that are not in a model's file must not be drawn at random without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast import Refused
from holdfast.tasks.kinds.pretrained import load_saved

CLASSIFIER = transformers.AutoModelForSequenceClassification
Weights = dict[str, Tensor]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """An encoder without a head."""
    torch.manual_seed(0)
    transformers.BertModel(models.bert_config()).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def configure(folder: Path, **keys: Any) -> Path:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | keys))
    return folder


def told(folder: Path, auto: Any = CLASSIFIER) -> str:
    with pytest.raises(Refused) as refusal:
        load_saved(auto, str(folder))
    return str(refusal.value)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "holdfast"]


def test_an_encoder_gets_a_fresh_head_and_keeps_every_weight(
    bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_saved(CLASSIFIER, str(bert))
    stored = load_file(bert / "model.safetensors")
    assert stored and all(torch.equal(w, stored[n]) for n, w in model.bert.state_dict().items())
    assert not said(caplog)


LOST: dict[str, Callable[[Weights], Weights]] = {
    "renamed": lambda w: {f"foo.{k}": v for k, v in w.items()},
    "a layer gone": lambda w: {k: v for k, v in w.items() if "layer.1." not in k},
    "one bias gone": lambda w: {k: v for k, v in w.items() if k != "embeddings.LayerNorm.bias"},
    "another model's": lambda w: {"x": torch.ones(2)},
}


@pytest.mark.parametrize("lost", LOST)
def test_a_file_without_weights_of_the_encoder_is_refused(lost: str, bert: Path) -> None:
    assert "of its weights are not in its file, such as bert." in told(rewrite(bert, LOST[lost]))


def test_more_layers_than_were_saved_are_refused(bert: Path) -> None:
    assert "32 of its weights" in told(configure(bert, num_hidden_layers=4))


@pytest.mark.parametrize("count", [0, -1])
def test_a_model_without_layers_is_refused(count: int, bert: Path) -> None:
    assert f"says {count} layers" in told(configure(bert, num_hidden_layers=count))


def test_layers_that_no_file_could_hold_are_refused_before_they_are_built(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = lambda *_, **__: pytest.fail("was built")  # noqa: E731
    monkeypatch.setattr(CLASSIFIER, "from_pretrained", built)
    configure(bert, num_hidden_layers=300_000)
    assert "num_hidden_layers is 300,000, its file has 39 tensors" in told(bert)


def test_whole_numbers_are_no_weights(bert: Path) -> None:
    rewrite(bert, lambda w: {k: v.to(torch.int32) for k, v in w.items()})
    assert "stored as whole numbers (I32)" in told(bert)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_and_counters_are_taken(half: torch.dtype, bert: Path) -> None:
    """Old checkpoints also hold the positions' ids, which are whole numbers and no weights."""
    ids = {"embeddings.position_ids": torch.arange(64)[None]}
    rewrite(bert, lambda w: {k: v.to(half) for k, v in w.items()} | ids)
    assert load_saved(CLASSIFIER, str(bert)).dtype == torch.float32


def test_an_encoder_saved_without_its_pooler_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """BERT's language models have none."""
    models.bert("MaskedLM").save_pretrained(tmp_path)
    load_saved(CLASSIFIER, str(tmp_path))
    assert [m for m in said(caplog) if "without its pooler, which begins at random" in m]
    caplog.clear()
    load_saved(transformers.AutoModelForMaskedLM, str(tmp_path))
    load_saved(transformers.AutoModelForTokenClassification, str(tmp_path))
    assert not said(caplog)


def test_a_saved_classifier_has_its_head(tmp_path: Path) -> None:
    models.bert().save_pretrained(tmp_path)
    load_saved(CLASSIFIER, str(tmp_path))
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if k != "classifier.bias"})
    assert "1 of its weights are not in its file, such as classifier.bias" in told(tmp_path)


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.t5])
def test_language_models_with_tied_or_own_outputs_load(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    pairs = model.config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if pairs else transformers.AutoModelForCausalLM
    load_saved(auto, str(tmp_path))
    load_saved(CLASSIFIER, str(tmp_path))  # a fresh head on it
    own = {"lm_head.weight"} & load_file(tmp_path / "model.safetensors").keys()
    if own:
        rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if k not in own})
        assert "1 of its weights are not in its file, such as lm_head.weight" in told(
            tmp_path, auto
        )


def test_weights_in_pieces_are_read_by_their_index(bert: Path, tmp_path: Path) -> None:
    model = transformers.BertModel.from_pretrained(bert)
    model.save_pretrained(tmp_path / "pieces", max_shard_size="8KB")
    assert len([*(tmp_path / "pieces").glob("*.safetensors")]) > 1
    load_saved(CLASSIFIER, str(tmp_path / "pieces"))
    shutil.copy(bert / "model.safetensors", tmp_path / "pieces" / "stray.safetensors")
    configure(tmp_path / "pieces", num_hidden_layers=10**6)
    assert "its file has 39 tensors" in told(tmp_path / "pieces")
