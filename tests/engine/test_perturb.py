"""Passes with other values on the way: places found in any model, what is watched, dropout."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.engine.batches import Whole
from holdfast.engine.bound import Bound
from holdfast.engine.forwarding import entrance
from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.network.stacks import blocks
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, make_batch


@dataclass(frozen=True, kw_only=True)
class Watching(Method):
    """Watches every block, and adds nothing."""

    name: ClassVar[str] = "watching"

    def watched(self, view: View) -> Any:
        return [view.bound.models[view.task], *view.blocks]

    def penalty(self, view: View) -> Tensor:
        return torch.zeros(())


def bind(model: nn.Module) -> Bound:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    return Recipe(methods=[Watching()]).bind(model, optimizer, total_steps=9, task="one")


def text() -> dict[str, Tensor]:
    ids = torch.randint(5, models.SIZE, (3, 7), generator=torch.Generator().manual_seed(1))
    return {"attention_mask": torch.ones_like(ids), "input_ids": ids, "labels": ids.clone()}


def lora(model: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False)
    return peft.get_peft_model(model, config)  # type: ignore[return-value]


# --- where inputs enter ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [lambda: models.bert("MaskedLM"), models.gpt2, models.llama, models.t5,
     lambda: lora(models.bert("MaskedLM"))],
    ids=["bert", "gpt2", "llama", "t5", "lora on the table"],
)  # fmt: skip
def test_text_is_perturbed_as_if_it_came_as_embeddings(made: Any) -> None:
    """Of an encoder-decoder the encoder's text alone; adapters of the table are part of it."""
    model, batch = made().eval(), text()
    bound = bind(model)
    assert entrance(model, batch) == "input_ids"
    delta = torch.randn(3, 7, 16, requires_grad=True)
    calls = []

    def add(x: Tensor) -> Tensor:
        calls.append(x)
        return x + delta

    ours = bound.forward(batch, perturb={"input_ids": add}).logits
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    theirs = model(inputs_embeds=embedded + delta, **batch).logits
    torch.testing.assert_close(ours, theirs)
    assert len(calls) == 1 and torch.equal(calls[0], embedded)
    one, two = (torch.autograd.grad(x.square().sum(), delta)[0] for x in (ours, theirs))
    torch.testing.assert_close(one, two)
    assert one.abs().sum() > 0


def test_tokens_of_any_name_and_numbers_of_any_model() -> None:
    toy, batch = Classifier().eval(), make_batch("one", 0)
    found = bind(toy).forward(batch, perturb={entrance(toy, batch): lambda x: x * 0 + 1}).logits
    assert torch.allclose(found, found[:1])  # all rows are alike
    picture = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 2))

    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = picture

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=self.net(pixel_values))

    model, x = Pictures(), torch.randn(4, 1, 5, 5)
    rows = {"labels": torch.zeros(4), "pixel_mask": torch.ones(4), "pixel_values": x}
    bound = bind(model)
    assert entrance(model, rows) == "pixel_values"
    del rows["pixel_mask"]
    norm = picture[1]
    before = {k: b.clone() for k, b in norm.state_dict().items()}
    ours = bound.forward(rows, perturb={"pixel_values": lambda v: v + 1}).logits
    # The pass trains: norms use the batch's statistics, but the running ones stay.
    for k, b in norm.state_dict().items():
        assert torch.equal(b, before[k])
    assert torch.equal(ours, model(x + 1).logits)
    assert not torch.equal(norm.running_mean, before["running_mean"])  # type: ignore[arg-type]


def test_a_module_is_perturbed_at_every_call_and_several_at_once() -> None:
    model, batch = Classifier().eval(), make_batch("one", 0)
    bound, (one, two) = bind(model), model.encoder.layers  # type: ignore[misc]
    with torch.no_grad():
        x = one(model.encoder.embeddings(batch["tokens"])) * 2  # type: ignore[operator]
        expected = model.classifier((two(x) + 3).mean(1))
    found = bound.forward(batch, perturb={one: lambda y: y * 2, two: lambda y: y + 3}).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(bound.forward(batch).logits, model(**batch).logits)  # and is as it was


def test_what_a_pass_does_not_come_by_is_refused() -> None:
    class Looked(Classifier):
        def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
            x = nn.functional.embedding(tokens, self.encoder.embeddings.weight)  # type: ignore
            return SimpleNamespace(logits=self.classifier(x.mean(1)))

    model, batch = Looked(), make_batch("one", 0)
    bound = bind(model)
    for where, name in (("tokens", "tokens"), (model.encoder.layers[0], "Block")):  # type: ignore
        with pytest.raises(Refused, match=f"did not come by {name}.*nn.Embedding"):
            bound.forward(batch, perturb={where: lambda x: x})
    whole = Whole(batch, 8, lambda model, batch: None)
    with pytest.raises(Refused, match="only the trainer's loss takes this batch"):
        bound.forward(whole, perturb={"tokens": lambda x: x})
    with pytest.raises(Refused, match="a batch holds no inputs"):
        entrance(model, {"labels": batch["labels"]})


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_place_within_a_checkpoint_is_refused_and_one_outside_served(reentrant: bool) -> None:
    """Computed again, what follows the change within the checkpoint would go without it."""

    class Again(Classifier):
        def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
            x = self.encoder.embeddings(tokens)  # type: ignore[operator]
            for layer in self.encoder.layers:  # type: ignore[union-attr]
                x = checkpoint(lambda y, layer=layer: layer.norm(layer.up(y)[..., :6]), x,
                               use_reentrant=reentrant)  # fmt: skip
            return SimpleNamespace(logits=self.classifier(x.mean(1)))

    model, batch = Again(), make_batch("one", 0)
    bound, delta = bind(model), torch.randn(8, 5, 6)
    inner: Any = model.encoder.layers[1]  # type: ignore[index]
    with pytest.raises(Refused, match="a Linear lies within an activation checkpoint"):
        bound.forward(batch, perturb={inner.up: lambda x: x * 2})
    found = bound.forward(batch, perturb={"tokens": lambda x: x + delta}).logits
    x = model.encoder.embeddings(batch["tokens"]) + delta  # type: ignore[operator]
    for layer in model.encoder.layers:  # type: ignore[union-attr]
        x = layer.norm(layer.up(x)[..., :6])
    expected = model.classifier(x.mean(1))
    grads = []
    for logits in (found, expected):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, msg=name)


# --- the training pass ----------------------------------------------------------------------------

DROPPING: dict[str, Any] = {
    "toy": (Classifier, lambda: make_batch("one", 0)),
    "bert": (lambda: models.bert("MaskedLM", hidden_dropout_prob=0.3), text),
    "gpt2": (lambda: models.gpt2(attn_pdrop=0.3, embd_pdrop=0.3), text),
}


@pytest.mark.parametrize("case", DROPPING.values(), ids=DROPPING)
def test_the_same_dropout_gives_the_training_pass_again(case: Any) -> None:
    """Bit for bit, also above blocks that return what they did, whatever is run in between."""
    model, batch = case[0]().train(), case[1]()
    bound = bind(model)
    out = model(**batch)
    torch.rand(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert not torch.equal(bound.forward(batch).logits, out.logits)  # its own
    again = bound.forward(batch, dropout="same").logits
    assert torch.equal(again, out.logits) and again.requires_grad
    first = next(iter(bound.blocks))
    returns = {first: bound.seen[first]}
    above = bound.forward(batch, dropout="same", returns=returns).logits
    assert torch.equal(above, out.logits)
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()(**batch)  # neither evaluation nor other passes are taken for the training pass
    model.train()
    assert torch.equal(bound.forward(batch, dropout="same").logits, out.logits)
    bound.penalty(batch, out)
    assert not bound.seen
    with pytest.raises(Refused, match="the training pass was not seen"):
        bound.forward(batch, dropout="same")


def test_only_the_training_pass_is_watched() -> None:
    model, batch = Classifier(), make_batch("one", 0)
    bound = bind(model)
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    bound.forward(batch)
    assert not bound.seen
    model(**batch)
    assert list(bound.seen) == list(bound.blocks) == [*model.encoder.layers]  # type: ignore[misc]
    bound.unbind()
    model(**batch)
    assert not [*model._forward_hooks, *model._forward_pre_hooks]


def test_blocks_are_modules_from_input_to_output() -> None:
    t5: Any = models.t5()
    expected = dict.fromkeys(t5.encoder.block, "encoder") | dict.fromkeys(
        t5.decoder.block, "decoder"
    )
    assert list(blocks(t5).items()) == list(expected.items())
    gpt2: Any = models.gpt2()
    assert blocks(gpt2) == dict.fromkeys(gpt2.transformer.h, "")
    assert blocks(nn.LSTM(3, 4, num_layers=2)) == {} == blocks(models.Plain())
