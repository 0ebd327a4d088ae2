"""LEVI: the mean and the loss of an ensemble by hand, on an encoder that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from holdfast import Refused
from holdfast.tasks.kinds import kind_named
from holdfast.tasks.kinds.heads import headed
from holdfast.tasks.kinds.levi import POSITIONS, ensemble
from holdfast.tasks.task import Row, Task

TEXTS = ["the film was good", "a plot", "who is not cold ?"]
INPUTS = dict(models.tokenizer()(TEXTS, padding=True, return_tensors="pt"))


def made(**config: Any) -> Any:
    """On four layers, of which two are read; a small model of eight."""
    model: Any = models.bert(num_hidden_layers=4, **{"num_labels": 3} | config)
    return ensemble(model, members=2, width=8)


def slowly(model: Any) -> list[Tensor]:
    """ŷ_l of each member, (rows, outputs), one row at a time and without padding."""
    rows = []
    for ids, mask in zip(INPUTS["input_ids"], INPUTS["attention_mask"], strict=True):
        own = ids[mask.bool()][None]
        inside = model.encoder(own, output_hidden_states=True).hidden_states
        places = model.small.positions.weight[: own.shape[1]]
        s = model.small.layers(model.small.tokens(own) + places)[0].mean(0)
        members = []
        for layer, (one, _, two) in zip((2, 4), model.adapting, strict=True):
            x = torch.cat([inside[layer][0].mean(0), s])
            members.append(two.weight @ functional.gelu(one.weight @ x + one.bias) + two.bias)
        rows.append(torch.stack(members))
    return list(torch.stack(rows, 1))


def test_the_answer_is_the_mean_and_the_loss_the_sum_over_members() -> None:
    model, labels = made().eval(), torch.tensor([2, 0, 1])
    out, members = model(**INPUTS, labels=labels), slowly(model)
    assert model.config.layers == [2, 4] and not torch.allclose(*members)
    torch.testing.assert_close(out.logits, (members[0] + members[1]) / 2)
    by_hand = -sum(y.log_softmax(1)[i, t] for y in members for i, t in enumerate(labels)) / 3
    torch.testing.assert_close(out.loss, by_hand)  # of the mean it would be less


def test_numbers_and_several_labels_have_losses_of_their_own() -> None:
    model = made(num_labels=1, problem_type="regression").eval()
    truth = torch.tensor([0.5, -1.0, 2.0])
    wanted = sum((y[:, 0] - truth).square().mean() for y in slowly(model))
    torch.testing.assert_close(model(**INPUTS, labels=truth).loss, wanted)
    model = made(problem_type="multi_label_classification").eval()
    truth = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]])
    wanted = sum(functional.binary_cross_entropy_with_logits(y, truth) for y in slowly(model))
    torch.testing.assert_close(model(**INPUTS, labels=truth).loss, wanted)


@pytest.mark.parametrize(
    ("layers", "read"), [(1, [1]), (2, [1, 2]), (4, [1, 3, 4]), (6, [2, 4, 6]), (12, [4, 8, 12])]
)
def test_layers_lie_at_equal_shares_of_the_depth(layers: int, read: list[int]) -> None:
    model: Any = models.bert(num_hidden_layers=layers)
    assert ensemble(model, width=4).config.layers == read


def test_what_has_an_encoder_and_a_decoder_is_refused() -> None:
    model = models.t5()
    with pytest.raises(Refused, match="whose layers could be read"):
        ensemble(model)


def test_what_is_learned_is_counted_and_the_encoder_is_not() -> None:
    model, w, d = made(), 8, 16
    small = models.SIZE * w + POSITIONS * w + 2 * (12 * w * w + 13 * w) + 2 * w
    adapting = 2 * ((d + w + 1) * w + (w + 1) * 3)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == small + adapting
    assert not any(p.requires_grad for p in model.base_model.parameters())


def test_training_moves_all_but_the_encoder_bit_for_bit() -> None:
    """With dropout and weight decay over all parameters; in training its outputs are the same."""
    model = made(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    before = models.weights(model)
    features = model.encoder(**INPUTS).last_hidden_state
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(**INPUTS, labels=torch.tensor([2, 0, 1])).loss.backward()
        optimizer.step()
    after = models.weights(model)
    still = {n for n, w in after.items() if torch.equal(w, before[n])}
    assert still == {n for n in after if n.startswith("encoder.")}
    assert torch.equal(model.encoder(**INPUTS).last_hidden_state, features)


def test_a_saved_ensemble_answers_bit_for_bit_and_stays_frozen(tmp_path: Path) -> None:
    model = made().eval()
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert models.same(models.weights(loaded), models.weights(model))
    assert torch.equal(loaded(**INPUTS).logits, model(**INPUTS).logits)
    for one in (loaded.train(), loaded.eval()):
        frozen = {n for n, p in one.named_parameters() if not p.requires_grad}
        assert frozen == {n for n in models.weights(model) if n.startswith("encoder.")}
        assert not one.encoder.training


def test_rows_longer_than_its_positions_are_read() -> None:
    model = made(max_position_embeddings=POSITIONS + 40).eval()
    ids = torch.randint(5, models.SIZE, (1, POSITIONS + 30))
    one, two = ids.clone(), ids.clone()
    two[0, -1] = 5 if one[0, -1] != 5 else 6
    assert not torch.equal(model.small(one, torch.ones_like(one)),
                           model.small(two, torch.ones_like(two)))  # fmt: skip


def test_decoders_are_read_too() -> None:
    config = models.llama().config
    config.num_labels = 3
    torch.manual_seed(0)
    plain = LlamaForSequenceClassification(config)
    model = ensemble(plain, members=2, width=8).eval()
    inputs = {k: INPUTS[k] for k in ("input_ids", "attention_mask")}
    inside = plain.base_model(**inputs, output_hidden_states=True).hidden_states
    rows = [h[1][INPUTS["attention_mask"][1].bool()].mean(0) for h in inside[1:]]
    s = model.small(**{"ids": inputs["input_ids"], "mask": inputs["attention_mask"]})[1]
    members = [a(torch.cat([h, s])) for h, a in zip(rows, model.adapting, strict=True)]
    torch.testing.assert_close(model(**inputs).logits[1], sum(members) / 2)


# --- as the heads of a kind -----------------------------------------------------------------------


def task(kind: str = "classification", **more: Any) -> Task:
    rows = tuple(Row(text, None, i % 2) for i, text in enumerate(TEXTS))
    return Task(**{"name": "one", "labels": ("no", "yes"), "metric": "accuracy", "train": rows,
                   "selection": (), "evaluation": rows, "source": "here",
                   "kind": kind} | more)  # fmt: skip


def test_each_task_has_an_ensemble_on_one_encoder(tmp_path: Path) -> None:
    """Drawn anew, with its own labels; saved without the encoder and put back on it."""
    source = models.save_bert(tmp_path / "bert")
    kind: Any = headed(kind_named("classification"), "levi", [task()])
    one = kind.load_model(str(source), task(), seed=3)
    two = kind.add_head(one, task(name="two", labels=("a", "b", "c")), seed=4)
    assert two.encoder is one.encoder and two.config.num_labels == 3
    encoder = BertModel.from_pretrained(source)
    assert models.same(models.weights(encoder), models.weights(one.encoder))
    assert models.same(models.weights(kind.load_model(str(source), task(), seed=3)),
                       models.weights(one))  # fmt: skip
    kind.save_head(one, tmp_path / "one.safetensors")
    again = kind.with_head(two, {"labels": ("no", "yes")}, tmp_path / "one.safetensors")
    assert again.encoder is one.encoder
    assert torch.equal(again(**INPUTS).logits, one.eval()(**INPUTS).logits)


def test_an_ensemble_is_gone_on_from_as_one(tmp_path: Path) -> None:
    """As `--model`: its heads are dropped, its encoder is taken; another head is refused."""
    kind: Any = headed(kind_named("classification"), "levi", [task()])
    saved = made(num_labels=2)
    saved.save_pretrained(tmp_path)
    kind.check(str(tmp_path), max_length=16)
    found = kind.load_model(str(tmp_path), task(), seed=3)
    assert models.same(models.weights(found.encoder), models.weights(saved.encoder))
    assert not torch.equal(found.small.tokens.weight, saved.small.tokens.weight)
    with pytest.raises(Refused, match="learned with --head levi"):
        kind_named("classification").check(str(tmp_path), max_length=16)


@pytest.mark.parametrize("name", ["tokens", "images"])
def test_other_kinds_have_no_ensembles(name: str) -> None:
    with pytest.raises(Refused, match=f"of texts, not {name}"):
        headed(kind_named(name), "levi", [task(kind=name)])
