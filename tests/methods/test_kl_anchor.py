"""KL anchor: the divergence from copies of the model, of classes and tokens, and ASFT's total."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast.engine.bound import Bound
from holdfast.engine.head_first import HeadFirst
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import KLAnchor
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, Encoder, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (KLAnchor(), 0),
    (KLAnchor(keep="weights", direction="reverse", strength=1.0), 4),
    (KLAnchor(anchor="base", keep="logits", token_weight="detached_probability"), 4),
    (KLAnchor(anchor="base", keep="weights"), 4),
]

Batch = dict[str, Tensor]
KEEP = pytest.mark.parametrize("keep", ["logits", "weights"])


def kl(before: Tensor, now: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(before) ‖ softmax(now))."""
    p, q = before.softmax(-1), now.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def logits_of(model: Any, batch: Batch) -> Tensor:
    """A copy's logits, in evaluation mode."""
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).eval()(**batch).logits
    return found


def stir(model: nn.Module, size: float = 0.1) -> None:
    """Other weights of all that is trained, as training would leave them."""
    with torch.no_grad():
        for w in model.parameters():
            if w.requires_grad:
                w.add_(torch.randn_like(w) * size)


def bind(model: nn.Module, method: KLAnchor, data: Any = None, **more: Any) -> Bound:
    learned = [p for p in model.parameters() if p.requires_grad]
    recipe = Recipe(methods=[method], **more)
    return recipe.bind(
        model, torch.optim.SGD(learned, lr=0.1), total_steps=9, task="one", data=data
    )


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def same(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Equal values, and equal gradients."""
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    one, two = gradients(model, ours), gradients(model, theirs)
    assert one.keys() == two.keys()
    for name, grad in two.items():
        torch.testing.assert_close(one[name], grad, atol=1e-6, rtol=1e-4, msg=name)


# --- classifiers ----------------------------------------------------------------------------------


@KEEP
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_penalty_is_the_divergence_from_a_copy_of_the_start(keep: Any, direction: Any) -> None:
    """The start is in evaluation mode, the model in the training pass itself, dropout and all."""
    torch.manual_seed(0)
    model, batches = Classifier(), [make_batch("one", step) for step in range(3)]
    bound = bind(model, KLAnchor(strength=3.0, keep=keep, direction=direction), batches)
    start = copy.deepcopy(model)
    stir(model)
    for batch in reversed(batches):
        out = model(**batch)
        before = logits_of(start, batch)
        pair = (before, out.logits) if direction == "forward" else (out.logits, before)
        ours = bound.penalty(batch, out)
        same(model, ours, 3.0 * kl(*pair))
        assert ours > 1e-3


@KEEP
def test_the_start_has_a_head_that_was_fitted_first(keep: Any) -> None:
    torch.manual_seed(0)
    model, batches = Classifier(), [make_batch("one", step) for step in range(4)]
    random = model.classifier.weight.detach().clone()
    bound = bind(model, KLAnchor(strength=1.0, keep=keep), batches, head_first=HeadFirst())
    assert not torch.equal(model.classifier.weight, random)
    start = copy.deepcopy(model)
    stir(model)
    out = model(**batches[0])
    same(model, bound.penalty(batches[0], out), kl(logits_of(start, batches[0]), out.logits))


@KEEP
def test_in_a_later_task_the_base_is_what_was_before_the_first(keep: Any) -> None:
    """The encoder of before the first task under the head that this task began with."""
    torch.manual_seed(0)
    encoder: nn.Module = Encoder()
    method = KLAnchor(strength=1.0, anchor="base", keep=keep)
    bound, base = Recipe(methods=[method]).unbound(), copy.deepcopy(encoder)
    for task in ("one", "two", "three"):
        model = Classifier(encoder=encoder)
        batch = make_batch("one", 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound.begin_task(task, optimizer, 9, model=model, data=[batch])
        anchor = Classifier(encoder=copy.deepcopy(base))
        anchor.classifier.load_state_dict(model.classifier.state_dict())
        stir(model)
        out = model(**batch)
        same(model, bound.penalty(batch, out), kl(logits_of(anchor, batch), out.logits))
        held = bound.states["kl_anchor"].weights["anchor"]
        assert held.keys() >= bound.shared.keys()
        bound.end_task()
        assert bound.states["kl_anchor"].weights["anchor"].keys() == bound.shared.keys()


@pytest.mark.parametrize(
    ("method", "bytes_a_weight", "bytes_a_row"),
    [
        (KLAnchor(), 0, 3 * 4 + 8),
        (KLAnchor(keep="weights"), 4, 0),
    ],
    ids=["logits", "weights"],
)
def test_what_is_kept_costs_what_is_said(
    method: KLAnchor, bytes_a_weight: int, bytes_a_row: int
) -> None:
    toy = ToyTraining(method)
    toy.begin("one")
    weights = sum(w.numel() for w in toy.bound.weights.values())
    state = toy.bound.states["kl_anchor"]
    assert state.bytes() == bytes_a_weight * weights + bytes_a_row * toy.steps * 8
    toy.end()
    assert state.bytes() == 0


def test_without_rows_weights_are_remembered_and_logits_refused() -> None:
    bound = bind(Classifier(), KLAnchor())
    assert bound.states["kl_anchor"].weights["anchor"].keys() == bound.weights.keys()
    with pytest.raises(Refused, match=r"kl_anchor: no rows.*pass data="):
        bind(Classifier(), KLAnchor(keep="logits"))


def test_a_row_changed_at_random_is_refused_or_run_again() -> None:
    batch, other = make_batch("one", 0), make_batch("one", 1)
    model = Classifier()
    with pytest.raises(Refused, match=r"kl_anchor: a row was not.*use keep='weights'"):
        bind(model, KLAnchor(), [batch]).penalty(other, model(**other))
    again = bind(model, KLAnchor(keep="weights", strength=1.0), [batch])
    start = copy.deepcopy(model)
    stir(model)
    out = model(**other)
    same(model, again.penalty(other, out), kl(logits_of(start, other), out.logits))


def test_numbers_are_held_by_half_their_squared_way() -> None:
    model = Classifier(1)
    rows = {"tokens": make_batch("one", 0)["tokens"]}
    bound = bind(model, KLAnchor(strength=1.0), [rows])
    start = copy.deepcopy(model)
    stir(model)
    out = model(**rows)
    # Labels of a regression are numbers, and count in every row.
    found = bound.penalty(rows | {"labels": torch.rand(8)}, out)
    same(model, found, (logits_of(start, rows) - out.logits).square().mean() / 2)


def test_rows_without_a_label_do_not_count() -> None:
    model, batch = Classifier(), make_batch("one", 0)
    bound = bind(model, KLAnchor(strength=1.0), [batch])
    start = copy.deepcopy(model)
    stir(model)
    batch["labels"][[0, 3, 4]] = -100
    out, known = model(**batch), batch["labels"] != -100
    same(model, bound.penalty(batch, out), kl(logits_of(start, batch)[known], out.logits[known]))
    batch["labels"][:] = -100
    assert bound.penalty(batch, out) == 0


def test_bfloat16_models_are_compared_in_float32() -> None:
    torch.manual_seed(0)
    model, batch = Classifier().bfloat16(), make_batch("one", 0)
    bound = bind(model, KLAnchor(strength=1.0, keep="weights"))
    start = copy.deepcopy(model)
    stir(model, 0.02)
    out = model(**batch)
    ours = bound.penalty(batch, out)
    exact = kl(logits_of(start, batch).double(), out.logits.double())
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)


# --- language models ------------------------------------------------------------------------------


def tokens() -> Batch:
    """Three rows of which some labels do not count; how many differs from row to row."""
    ids = torch.randint(5, models.SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3], labels[1, 5:], labels[2, :] = -100, -100, -100
    labels[2, 2] = ids[2, 2]
    labels[:, 0] = ids[:, 0]  # nothing predicts the first token, whatever its label
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def places(batch: Batch, shift: int) -> list[tuple[int, int]]:
    """Row and place of the logits that count."""
    rows, length = batch["labels"].shape
    return [
        (r, t - shift) for r in range(rows) for t in range(shift, length)
        if batch["labels"][r, t] != -100
    ]  # fmt: skip


def picked(logits: Tensor, where: list[tuple[int, int]]) -> Tensor:
    return torch.stack([logits[r, t] for r, t in where])


@pytest.mark.parametrize("made", [models.gpt2, models.llama], ids=["gpt2", "llama"])
def test_tokens_with_a_label_count_each_where_it_is_predicted(made: Any) -> None:
    model, batch = made(), tokens()
    bound = bind(model, KLAnchor(strength=2.0), [batch])
    state = bound.states["kl_anchor"]
    assert state.weights["anchor"].keys() == bound.weights.keys() and not state.tensors
    start, where = copy.deepcopy(model), places(batch, 1)
    assert len(where) == 4 + 4 + 1
    stir(model)
    model.train()
    out = model(**batch)
    expected = kl(picked(logits_of(start, batch), where), picked(out.logits, where))
    same(model, bound.penalty(batch, out), 2.0 * expected)
    with pytest.raises(Refused, match=r"keep: logits of shape \(3, 7, .*use weights"):
        bind(made(), KLAnchor(keep="logits"), [batch])


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification"])
def test_of_other_models_a_label_stands_at_its_own_place(head: str) -> None:
    model, batch = models.bert(head), tokens()
    if head == "TokenClassification":
        batch["labels"] = batch["labels"].clamp(max=1)
    bound = bind(model, KLAnchor(strength=1.0))
    start, where = copy.deepcopy(model), places(batch, 0)
    stir(model)
    out = model(**batch)
    expected = kl(picked(logits_of(start, batch), where), picked(out.logits, where))
    same(model, bound.penalty(batch, out), expected)


def test_a_decoder_with_an_encoder_is_held_at_its_own_places() -> None:
    model, batch = models.t5(), tokens()
    bound = bind(model, KLAnchor(strength=1.0))
    start, where = copy.deepcopy(model), places(batch, 0)
    stir(model)
    out = model(**batch)
    expected = kl(picked(logits_of(start, batch), where), picked(out.logits, where))
    same(model, bound.penalty(batch, out), expected)


def test_without_labels_all_but_padding_counts() -> None:
    model, batch = models.gpt2(), tokens()
    del batch["labels"]
    batch["attention_mask"][1, 4:] = 0
    bound = bind(model, KLAnchor(strength=1.0))
    start = copy.deepcopy(model)
    stir(model)
    out = model(**batch)
    where = [(r, t) for r in range(3) for t in range(6) if batch["attention_mask"][r, t + 1]]
    assert len(where) == 6 + 3 + 6
    expected = kl(picked(logits_of(start, batch), where), picked(out.logits, where))
    same(model, bound.penalty(batch, out), expected)


# --- ASFT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.05])
def test_own_loss_and_penalty_add_up_to_asft(strength: float) -> None:
    """Σ sg[p(y)] (−log p(y)) / n + λ KL, with the gradient of p held still."""
    model, batch = models.gpt2(), tokens()
    how = KLAnchor(strength=strength, token_weight="detached_probability")
    bound = bind(model, how)
    start, where = copy.deepcopy(model), places(batch, 1)
    stir(model)
    out = model(**batch)
    log_p = picked(out.logits, where).log_softmax(-1)
    total = torch.zeros(())
    for i, (r, t) in enumerate(where):
        one = log_p[i, batch["labels"][r, t + 1]]
        total = total + math.exp(one.item()) * -one / len(where)
    if strength:
        total = total + strength * kl(picked(logits_of(start, batch), where), log_p)
    same(model, out.loss + bound.penalty(batch, out), total)


@pytest.mark.parametrize("size", [2, 5])
def test_trainer_accumulates_asft_over_all_labels(size: int, tmp_path: Path) -> None:
    """Of micro-batches with other numbers of labels, the sum over all labels of the window."""
    rows, how = models.rows(10, labels="tokens"), KLAnchor(
        strength=0.0, token_weight="detached_probability"
    )  # fmt: skip
    for made in (models.gpt2, models.llama):
        model = made()
        start = copy.deepcopy(model)
        args = models.arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=10 // size,
            optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=0.5,
        )  # fmt: skip
        recipe = Recipe(methods=[how])
        holdfast.Trainer(
            model=model, args=args, train_dataset=rows, data_collator=models.collate, recipe=recipe
        ).train()
        batch = models.collate(rows)
        where = places(batch, 1)
        log_p = picked(start(**batch).logits, where).log_softmax(-1)
        y = torch.stack([batch["labels"][r, t + 1] for r, t in where])
        each = -log_p.gather(1, y[:, None])
        # Trainer counts the first tokens too where it does not know that a model shifts labels.
        known = len(where) if made is models.llama else int((batch["labels"] != -100).sum())
        ((-each).exp().detach() * each).sum().div(known).backward()
        for (name, w), v in zip(model.named_parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(w, v - 0.5 * v.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_classes_are_weighed_alike_and_numbers_refused() -> None:
    model, batch = Classifier(), make_batch("one", 0)
    how = KLAnchor(strength=0.0, token_weight="detached_probability")
    out = model(**batch)
    log_p = out.logits.log_softmax(-1)[range(8), batch["labels"]]
    total = -(log_p.exp().detach() * log_p).mean()
    same(model, out.loss + bind(model, how).penalty(batch, out), total)
    one = Classifier(1)
    rows = {"tokens": batch["tokens"]}
    with pytest.raises(Refused, match=r"token_weight: only labels of classes"):
        bind(one, how).penalty(rows, one(**rows))


def test_a_pass_that_returns_no_logits_is_made_again() -> None:
    """As TRL's is, whose last layer is fused with the loss."""
    model, batch = models.gpt2(), tokens()
    how = KLAnchor(strength=0.5, token_weight="detached_probability")
    bound = bind(model, how)
    stir(model)
    out = model(**batch)
    fused = SimpleNamespace(loss=None, logits=None)
    same(model, bound.penalty(batch, fused, out.loss), bound.penalty(batch, out))


# --- adapters -------------------------------------------------------------------------------------


def lora(model: nn.Module, **more: Any) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **more))


def test_the_base_below_adapters_needs_no_copy() -> None:
    """The adapter here was trained before: its start is not the base."""
    model, batch = lora(models.llama(), task_type="CAUSAL_LM"), tokens()
    bound = bind(model, KLAnchor(strength=1.0, anchor="base"))
    assert bound.states["kl_anchor"].bytes() == 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    out, where = model(**batch), places(batch, 1)
    ours = bound.penalty(batch, out)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with model.disable_adapter():
        before = logits_of(model, batch)
    same(model, ours, kl(picked(before, where), picked(out.logits, where)))
    assert ours > 1e-3 and not torch.equal(before, logits_of(model, batch))


def test_the_start_of_adapters_is_a_copy_of_them_alone() -> None:
    model, batch = lora(models.llama(), task_type="CAUSAL_LM"), tokens()
    bound = bind(model, KLAnchor(strength=1.0))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert bound.states["kl_anchor"].bytes() == 4 * count
    before, where = logits_of(model, batch), places(batch, 1)
    stir(model)
    out = model(**batch)
    same(model, bound.penalty(batch, out), kl(picked(before, where), picked(out.logits, where)))


@KEEP
def test_a_head_beside_adapters_stays_when_these_are_switched_off(keep: Any) -> None:
    """PEFT's own switch would take the head's copy back to a random one."""
    classifier = models.bert()
    model = lora(classifier, task_type="SEQ_CLS", target_modules=["query", "value"])
    batch = models.collate(models.rows(4))
    stir(model)  # so that the trained head is not the original one
    bound = bind(model, KLAnchor(strength=1.0, anchor="base", keep=keep), [batch])
    anchor = copy.deepcopy(model)
    with torch.no_grad():
        for name, w in anchor.named_parameters():
            if "lora_B" in name:
                w.zero_()
    before = logits_of(anchor, batch)
    stir(model)
    out = model(**batch)
    same(model, bound.penalty(batch, out), kl(before, out.logits))


def test_an_adapter_that_was_frozen_stays_so() -> None:
    model, batch = lora(models.llama(), task_type="CAUSAL_LM"), tokens()
    name = next(n for n, p in model.named_parameters() if "lora_A" in n)
    bound = bind(model, KLAnchor(strength=1.0, anchor="base"))
    dict(model.named_parameters())[name].requires_grad_(False)
    bound.penalty(batch, model(**batch))
    assert not dict(model.named_parameters())[name].requires_grad


# --- what a second pass must not spoil ------------------------------------------------------------


def test_autocast_does_not_hand_the_new_weights_to_the_anchor() -> None:
    """Within one autocast block torch keeps the narrow copy of each weight it has seen."""
    batch, found = tokens(), []
    for inside in (False, True):
        model = models.gpt2()
        bound = bind(model, KLAnchor(strength=1.0))
        stir(model, 0.3)
        block = torch.autocast("cpu", torch.bfloat16)
        with block if inside else contextlib.nullcontext():
            out = model(**batch)
            value = bound.penalty(batch, out)
            after = model(**batch).logits  # and the model its own again
        assert torch.equal(after, out.logits)
        found.append((value, gradients(model, value)))
    (exact, wanted), (value, got) = found
    assert exact > 0.01 and value.item() == pytest.approx(exact.item(), rel=0.05)
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.cosine_similarity(got[name].flatten(), grad.flatten(), 0) > 0.95, name


def test_weights_gradients_and_mode_are_as_before_it() -> None:
    model, batch = models.gpt2(), tokens()
    bound = bind(model, KLAnchor(strength=1.0))
    stir(model)
    model.train()
    before = models.weights(model)
    bound.penalty(batch, model(**batch)).backward()
    assert models.same(models.weights(model), before)
    assert all(module.training for module in model.modules())


def test_a_weight_frozen_after_an_earlier_task_cannot_be_put_back() -> None:
    encoder: nn.Module = Encoder()
    bound = Recipe(methods=[KLAnchor(anchor="base")]).unbound()
    for task in ("one", "two"):
        model = Classifier(encoder=encoder)
        held = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(held, lr=0.1)
        if task == "one":
            bound.begin_task(task, optimizer, 9, model=model)
            bound.end_task()
            encoder.embeddings.weight.requires_grad_(False)
            continue
        with pytest.raises(Refused, match=r"encoder.embeddings.weight was trained in an earlier"):
            bound.begin_task(task, optimizer, 9, model=model)


def test_outputs_must_be_there_and_fit() -> None:
    model, batch = models.gpt2(), tokens()
    bound = bind(model, KLAnchor())
    out = model(**batch)
    for outputs, inputs, message in [
        (None, batch, r"no outputs here.*penalty\(batch, outputs\)"),
        (out, batch | {"labels": batch["labels"][:, :5]}, r"do not fit logits of \(3, 7"),
    ]:
        with pytest.raises(Refused, match=message):
            bound.penalty(inputs, outputs)
