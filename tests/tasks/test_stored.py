"""What a model's files lack or get wrong is refused: nothing is drawn at random without a word."""

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
from holdfast.tasks.kinds import kind_named
from holdfast.tasks.kinds.pretrained import load_saved, load_tokenizer
from holdfast.tasks.kinds.stored import check_ids
from holdfast.tasks.task import Row, Task

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


@pytest.mark.parametrize("headed", [False, True])
def test_fewer_layers_than_were_saved_are_refused(headed: bool, bert: Path) -> None:
    """Transformers would leave the others out; a head that is not wanted it may leave."""
    if headed:
        load_saved(transformers.AutoModelForMaskedLM, str(bert)).save_pretrained(bert)
        load_saved(CLASSIFIER, str(bert))
    path = f"{'bert.' * headed}encoder.layer"
    assert f"has 1 of {path}, its file has {path}.1." in told(configure(bert, num_hidden_layers=1))


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


# --- configurations and tokenizers that are broken ------------------------------------------------

BROKEN: dict[str, dict[str, Any]] = {
    "NaN for hidden_dropout_prob": {"hidden_dropout_prob": float("nan")},
    "integer modulo by zero": {"num_attention_heads": 0},
    "expected int, got str": {"num_hidden_layers": "two"},
    "unhashable type: 'list'": {"model_type": ["bert"]},
    "pad_token_id 999, of 38 tokens": {"pad_token_id": 999},
    "is quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "no attribute 'nosuch'": {"dtype": "nosuch"},
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_configuration_is_refused_in_one_line(said: str, bert: Path) -> None:
    line = told(configure(bert, **BROKEN[said]))
    assert said in line and line.startswith(str(bert)) and "\n" not in line


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{", '{"weight_map": [1]}', "\xff"])
@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_is_refused_in_one_line(file: str, content: str, bert: Path) -> None:
    models.tokenizer().save_pretrained(bert)
    (bert / file).write_text(content, encoding="latin-1")
    if "index" in file:
        (bert / "model.safetensors").unlink()
    load = load_tokenizer if "token" in file else lambda source: load_saved(CLASSIFIER, source)
    if file == "tokenizer_config.json" and content[0] == "{" and content[-1] == "}":
        load(str(bert))  # it says nothing
        return
    with pytest.raises(Refused) as refusal:
        load(str(bert))
    assert "\n" not in str(refusal.value)


def test_outputs_and_chunks_are_not_a_configurations_to_choose(bert: Path) -> None:
    plain = load_saved(CLASSIFIER, str(bert)).eval()
    configure(bert, return_dict=False, output_attentions=True, output_hidden_states=True,
              chunk_size_feed_forward=3)  # fmt: skip
    torch.manual_seed(0)
    odd = load_saved(CLASSIFIER, str(bert)).eval()
    odd.classifier.load_state_dict(plain.classifier.state_dict())
    ids = torch.tensor([[2, 5, 7, 3]])
    assert torch.equal(odd(ids).logits, plain(ids).logits)
    assert odd(ids).attentions is None and odd(ids).hidden_states is None


def test_a_token_without_a_row_in_the_embedding_is_refused() -> None:
    """One that no text has does no harm."""
    config = models.bert_config()
    check_ids(models.SIZE - 1, config, "mood")
    with pytest.raises(Refused, match=f"^mood: has a token with id {models.SIZE}, the model has "):
        check_ids(models.SIZE, config, "mood")


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_a_tokenizer_of_another_model_is_refused_by_its_texts(kind: str) -> None:
    tokenizer = models.tokenizer()
    tokenizer.add_tokens(["zebra"])
    config = models.gpt2().config if kind == "generation" else models.bert_config()

    def encode(text: str) -> None:
        row = Row(text, None, "a film" if kind == "generation" else 0)
        task = Task(name="mood", labels=None if kind == "generation" else ("a", "b"), train=(row,),
                    metric="likelihood" if kind == "generation" else "accuracy", selection=(),
                    evaluation=(), source="", kind=kind)  # fmt: skip
        kind_named(kind).encode([row], task, tokenizer, max_length=16, config=config)

    encode("a film")
    with pytest.raises(Refused, match="mood: has a token with id 38, the model has 38 tokens"):
        encode("a zebra")
