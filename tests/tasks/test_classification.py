"""Models by name, one encoder between several heads, rows as batches, the metric of a task."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import same, weights
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    RobertaConfig,
    T5Config,
)

from holdfast.errors import Refused
from holdfast.experiments.sequence import run_sequence
from holdfast.tasks import Row, Task
from holdfast.tasks.kinds import classification, pretrained
from holdfast.tasks.kinds.classification import KIND
from holdfast.tasks.kinds.pretrained import check_length, load_tokenizer, locate


def evaluate(model: Any, rows: Any, asked: Task, collate: Any, *, batch: int = 64) -> float:
    measured = classification.KIND.measure(model, rows, asked, collate, batch=batch)
    return classification.KIND.total(asked, measured)


def task(
    labels: tuple[str, ...] | None = ("no", "yes"), *, pairs: bool = False, **more: Any
) -> Task:
    words = ["the film was good", "a plot", "who is not cold ?", "red " * 30, "blue book"]
    rows = tuple(
        Row(w, "a river" if pairs else None, i % len(labels) if labels else i / 4)
        for i, w in enumerate(words)
    )
    metric = "accuracy" if labels else "spearman"
    plain = {"name": "t", "metric": metric, "source": "here", "selection": ()}
    return Task(**plain | more, labels=labels, train=rows, evaluation=rows)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.tasks.hub.answers", lambda _: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.save_bert(tmp_path_factory.mktemp("encoder")))


# --- locate -----------------------------------------------------------------------------------


def test_a_folder_and_a_hub_id_are_taken_as_they_are(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate(encoder) == encoder
    monkeypatch.setattr("holdfast.tasks.hub.answers", lambda _: True)
    assert locate("owner/model") == "owner/model"
    assert locate("bert-base-uncased") == "bert-base-uncased"


def test_a_hub_id_without_a_network_is_refused_at_once() -> None:
    with pytest.raises(Refused, match=r"^owner/model: no network: .*; .*local path.*OFFLINE=1"):
        locate("owner/model")


@pytest.mark.parametrize("name", ["minlm", "MiniLM", "mini-lm", "minilmm"])
def test_a_misspelt_minilm_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(Refused, match="did you mean 'minilm'"):
        locate(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"config\.json"):
        locate(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(Refused, match="no such folder"):
        locate(name)


def test_minilm_is_checked_by_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(locate("minilm"))
    assert (folder / "config.json").is_file()
    monkeypatch.setitem(pretrained.MINILM, "sha256", "0" * 64)
    with pytest.raises(Refused, match="hash to 53aa51172d14"):
        locate("minilm")


def test_minilm_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrained.MINILM, "package", "no_such_package_of_ours")
    with pytest.raises(Refused, match=r"holdfast\[demo\]"):
        locate("minilm")


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(Refused, match=str(tmp_path)) as refusal:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refusal.value)
    with pytest.raises(Refused, match="cannot be loaded") as refusal:
        KIND.load_model(str(tmp_path), task(), seed=0)
    assert "\n" not in str(refusal.value)


def test_weights_that_are_no_safetensors_are_not_opened(encoder: str, tmp_path: Path) -> None:
    """A pickle runs what its author wrote: here, it would leave a mark."""
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    torch.save({"x": Payload(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"model\.safetensors.*; save it with save_pretrained"):
        KIND.load_model(str(tmp_path), task(), seed=0)
    assert not mark.exists()
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(Refused, match="cannot be loaded"):
        KIND.load_model(str(tmp_path), task(), seed=0)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_folder_without_a_tokenizer_is_refused(encoder: str, tmp_path: Path) -> None:
    """Transformers makes one up of five tokens, and every word is unknown to it."""
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(Refused, match="no tokenizer: 5 tokens for the 38 of the model; save"):
        load_tokenizer(str(tmp_path))


def test_rows_longer_than_the_positions_are_refused(encoder: str, tmp_path: Path) -> None:
    check_length(encoder, 64)
    with pytest.raises(Refused, match=r"^--max-length: 65 tokens, .*; say --max-length 64$"):
        check_length(encoder, 65)
    gpt2 = models.gpt2().config  # calls them n_positions
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(Refused, match="for 64"):
        check_length(str(tmp_path / "gpt2"), 65)
    roberta = RobertaConfig(max_position_embeddings=66, pad_token_id=1)
    roberta.save_pretrained(tmp_path / "roberta")
    check_length(str(tmp_path / "roberta"), 64)
    with pytest.raises(Refused, match="for 64"):
        check_length(str(tmp_path / "roberta"), 65)
    T5Config().save_pretrained(tmp_path / "t5")  # relative positions
    check_length(str(tmp_path / "t5"), 10**6)


# --- heads ------------------------------------------------------------------------------------


def test_tasks_share_the_very_same_encoder(encoder: str) -> None:
    first = KIND.load_model(encoder, task(), seed=0)
    second = KIND.add_head(first, task(("a", "b", "c")), seed=1)
    third = KIND.add_head(second, task(None), seed=2)
    assert first.base_model is second.base_model is third.base_model
    assert [m.config.num_labels for m in (first, second, third)] == [2, 3, 1]
    assert second.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert third.config.problem_type == "regression"
    assert first.config.id2label == {0: "no", 1: "yes"}  # not shared


def test_heads_depend_on_the_seed_alone(encoder: str) -> None:
    one, two, other = (KIND.load_model(encoder, task(), seed=s) for s in (3, 3, 4))
    assert same(weights(one), weights(two))
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert not torch.equal(KIND.add_head(one, task(), seed=4).classifier.weight,
                           KIND.add_head(one, task(), seed=5).classifier.weight)  # fmt: skip


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")])
def test_a_deployed_classifier_keeps_its_encoder_and_gets_a_fresh_head(
    labels: tuple[str, ...], encoder: str, tmp_path: Path
) -> None:
    """The next task for a deployed model, with as many labels as its last one or not."""
    old = KIND.load_model(encoder, task(("x", "y")), seed=0)
    with torch.no_grad():
        old.classifier.weight.fill_(7.0)
    old.save_pretrained(tmp_path)
    new = KIND.load_model(str(tmp_path), task(labels), seed=1)
    assert same(weights(new.base_model), weights(old.base_model))
    assert new.classifier.weight.shape == (len(labels), 16)
    assert not (new.classifier.weight == 7.0).any()


def test_a_checkpoint_of_a_task_gives_the_same_predictions(encoder: str, tmp_path: Path) -> None:
    """Also after the shared encoder has moved on with another task."""
    first = KIND.load_model(encoder, task(("a", "b", "c")), seed=0).eval()
    rows = list(KIND.encode(task().train, task(), load_tokenizer(encoder), max_length=16))
    collate = DataCollatorWithPadding(load_tokenizer(encoder))
    batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in rows])
    with torch.no_grad():
        before = first(**batch).logits
        first.save_pretrained(tmp_path)
        KIND.add_head(first, task(), seed=1).base_model.embeddings.word_embeddings.weight.add_(1)
        assert not torch.equal(first(**batch).logits, before)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**batch).logits, before)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32(
    kind: torch.dtype, head: str, encoder: str, tmp_path: Path
) -> None:
    getattr(transformers, f"Bert{head}").from_pretrained(encoder, dtype=kind).save_pretrained(
        tmp_path
    )
    model = KIND.load_model(str(tmp_path), task(), seed=0)
    other = KIND.add_head(model, task(("a", "b", "c")), seed=1)
    for made in (model, other):
        assert {p.dtype for p in made.parameters()} == {torch.float32}


def gpt2_folder(folder: Path, *, padding: bool = False, **config: Any) -> str:
    """As GPT-2 is published: neither its tokenizer nor its configuration knows of padding."""
    models.gpt2(**config).save_pretrained(folder)
    tokens = models.tokenizer(template=False)
    if not padding:
        tokens.pad_token = None
    tokens.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("padding", "config", "expected"),
    [(False, None, 3), (False, -1, 3), (False, 0, 0), (True, None, 0), (True, 5, 0)],
    ids=["neither", "minus one", "the model's", "the tokenizer's", "each its own"],
)
def test_tokenizer_and_model_pad_with_one_token(
    padding: bool, config: int | None, expected: int, tmp_path: Path
) -> None:
    source = gpt2_folder(tmp_path, padding=padding, pad_token_id=config)
    assert load_tokenizer(source).pad_token_id == expected
    first = KIND.load_model(source, task(), seed=0)
    second = KIND.add_head(first, task(("a", "b", "c")), seed=1)
    assert first.config.pad_token_id == second.config.pad_token_id == expected


@pytest.mark.parametrize("own", [None, 7], ids=["no padding", "other padding"])
def test_gpt2_learns_two_tasks_and_reads_the_last_word_of_each_row(
    own: int | None, tmp_path: Path
) -> None:
    """Padded beside a longer row, a row scores as it does by itself."""
    source = gpt2_folder(tmp_path / "gpt2", padding=own is not None, pad_token_id=own)
    tokens = load_tokenizer(source)
    collate = DataCollatorWithPadding(tokens)
    tasks = [task(), task(("a", "b", "c"), name="other")]
    first = KIND.load_model(source, tasks[0], seed=0)
    made = [first, KIND.add_head(first, tasks[1], seed=1)]
    for asked, model in zip(tasks, made, strict=True):
        rows = list(KIND.encode(asked.train, asked, tokens, max_length=16))
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**collate(rows)).loss.backward()
        step.step()
        assert 0 <= evaluate(model, rows, asked, collate) <= 1
        bare = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
        model.eval()
        with torch.no_grad():
            together = model(**collate(bare)).logits
            alone = torch.cat([model(**collate([row])).logits for row in bare])
        torch.testing.assert_close(together, alone)
    assert made[0].base_model is made[1].base_model


def test_a_padding_token_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    source = gpt2_folder(tmp_path, padding=True)
    tokens = load_tokenizer(source)
    tokens.add_special_tokens({"pad_token": "[MORE]"})
    tokens.save_pretrained(source)
    with pytest.raises(Refused, match=f"id {len(tokens) - 1}, the model has"):
        load_tokenizer(source)


def test_gpt2_without_padding_works_end_to_end(tmp_path: Path) -> None:
    source = gpt2_folder(tmp_path / "gpt2", pad_token_id=None)
    data = [models.write_task(tmp_path, topic) for topic in ("mood", "colour")]
    settings: dict[str, Any] = {"epochs": 0.5, "batch_size": 4, "max_length": 16}
    record = run_sequence(source, data, "plain", out=tmp_path / "run", progress=False, **settings)
    assert record.new_plus_old is not None


# --- rows -------------------------------------------------------------------------------------


def test_rows_are_cut_and_not_padded(encoder: str) -> None:
    rows = list(KIND.encode(task().train, task(), load_tokenizer(encoder), max_length=8))
    assert [len(r["input_ids"]) for r in rows] == [6, 4, 7, 8, 4]
    assert rows[3]["input_ids"][-1] == 3  # [SEP] stands at the end of a cut row too
    assert [r["labels"] for r in rows] == [0, 1, 0, 1, 0]
    assert all(isinstance(r["labels"], int) for r in rows)


def test_rows_that_were_cut_are_counted(encoder: str) -> None:
    """A row of just as many tokens as there may be was not cut."""
    tokens = load_tokenizer(encoder)
    for pairs, lengths in ((False, [6, 4, 7, 32, 4]), (True, [9, 7, 10, 35, 7])):
        asked = task(pairs=pairs)
        for most in (5, 7, 10, 32, 35, 64):
            rows = KIND.encode(asked.train, asked, tokens, max_length=most)
            cut = KIND.count_cut(asked.train, rows, asked, tokens, max_length=most)
            assert cut == sum(length > most for length in lengths)


def test_pairs_and_numbers(encoder: str) -> None:
    asked = task(None, pairs=True)
    rows = list(KIND.encode(asked.train, asked, load_tokenizer(encoder), max_length=64))
    a, river = models.VOCABULARY.index("a"), models.VOCABULARY.index("river")
    assert rows[1]["input_ids"][-4:] == [3, a, river, 3]
    assert rows[1]["token_type_ids"][-3:] == [1, 1, 1]
    assert [r["labels"] for r in rows] == [0.0, 0.25, 0.5, 0.75, 1.0]


class Told(torch.nn.Module):
    """Predicts from the first word after [CLS], and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        self.calls.append((self.training, torch.is_grad_enabled()))
        first = input_ids[:, 1].float()
        logits = torch.stack([20.0 - first, first - 20.0], 1)
        return type("Out", (), {"logits": logits})


def test_evaluation_pairs_each_prediction_with_its_row(encoder: str) -> None:
    """Rows are scored by length; were results not put back in place, this would be 0.6."""
    tokens = load_tokenizer(encoder)
    asked = task()
    rows = list(KIND.encode(asked.train, asked, tokens, max_length=64))
    for row in rows:
        row["labels"] = int(row["input_ids"][1] > 20)
    model = Told().train()
    state = torch.get_rng_state()
    collate = DataCollatorWithPadding(tokens)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 4, 1, 0, 2]):
        got = evaluate(model, [rows[i] for i in order], asked, collate, batch=2)
        assert got == 1.0
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and set(model.calls) == {(False, False)}


def test_evaluation_does_not_depend_on_order_or_batch(encoder: str) -> None:
    model = KIND.load_model(encoder, task(), seed=0).train()
    tokens = load_tokenizer(encoder)
    rows = list(KIND.encode(task().train, task(), tokens, max_length=64))
    collate = DataCollatorWithPadding(tokens)
    state = torch.get_rng_state()
    scores = {
        evaluate(model, r, task(), collate, batch=b) for r in (rows, rows[::-1]) for b in (1, 64)
    }
    assert len(scores) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_training_goes_on_after_an_evaluation(encoder: str) -> None:
    """No tensor of inference mode may be left behind in the model."""
    model = KIND.load_model(encoder, task(), seed=0).train()
    tokens = load_tokenizer(encoder)
    rows = list(KIND.encode(task().train, task(), tokens, max_length=64))
    collate = DataCollatorWithPadding(tokens)
    evaluate(model, rows, task(), collate)
    model(**collate(rows)).loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("labels", [("a", "b"), None])
def test_a_model_that_diverged_has_no_score(value: float, labels: Any, encoder: str) -> None:
    """The position of the largest of NaN is 0: that would be the first class's share."""
    asked = task(labels)
    model = KIND.load_model(encoder, asked, seed=0)
    torch.nn.init.constant_(model.classifier.bias, value)
    tokens = load_tokenizer(encoder)
    rows = list(KIND.encode(asked.train, asked, tokens, max_length=64))
    with pytest.raises(Refused, match=r"^t: diverged: .*; lower --lr$"):
        evaluate(model, rows, asked, DataCollatorWithPadding(tokens))


def test_regression_is_scored_by_rank(encoder: str) -> None:
    asked = task(None)
    model = KIND.load_model(encoder, asked, seed=0)
    tokens = load_tokenizer(encoder)
    rows = list(KIND.encode(asked.train, asked, tokens, max_length=64))
    collate = DataCollatorWithPadding(tokens)
    with torch.no_grad():
        model.eval()
        values = [float(model(**collate([{k: v for k, v in r.items() if k != "labels"}])).logits)
                  for r in rows]  # fmt: skip
    for row, value in zip(rows, values, strict=True):
        row["labels"] = 3 * value + 1
    assert evaluate(model, rows, asked, collate) == pytest.approx(1.0)
