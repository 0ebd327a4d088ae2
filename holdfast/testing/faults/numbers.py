"""Numbers: infinite, scaled, summed in too few bits, frozen, tied, sparse, in another order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import Refused, TrainingDiverged
from holdfast.methods import DPS, EWC, L2SP
from holdfast.ops.selection import select, top
from holdfast.recipe import Recipe
from holdfast.testing.faults.place import (
    Loop,
    Place,
    classifier,
    collate,
    encoded,
    equal,
    refuses,
    same,
    warned,
    weights,
)
from holdfast.testing.faults.suite import Wrong, tried, untried

METHODS = (DPS(stage=2, drop=0.5), DPS(stage=2, drop=0.5, mix=True), L2SP(strength=0.5))


@tried("N1", "plain loop")
def n1(place: Place) -> None:
    for method in METHODS:
        for bad in (math.inf, -math.inf, math.nan):
            for at in (0, 2, 3):
                whole, loop = Loop(method).steps(0, 6), Loop(method)
                loop.steps(0, at).step(9, bad=bad)
                loop.steps(at, 6)
                equal((loop.bound.skipped, loop.bound.step), (1, 6), "steps")
                same(loop.everything(), whole.everything(), f"{method.name}, {bad} at step {at}")


class _Bad(nn.Module):
    """A classifier whose loss is `bad` on the n-th pass of a training step."""

    def __init__(self, inner: nn.Module, at: int, bad: float) -> None:
        super().__init__()
        self.inner, self.at, self.bad, self.seen = inner, at, bad, 0
        self.config = inner.config

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        out = self.inner(input_ids=input_ids, labels=labels)
        if self.training:
            self.seen += 1
            if self.seen == self.at or self.at == 0:
                out["loss"] = out["loss"] * self.bad
        return out


@tried("N1", "Trainer")
def n1_trainer(place: Place) -> None:
    with warned() as lines:
        trainer = place.trainer(model=_Bad(classifier(), 3, math.nan), learning_rate=1e-3)
        trainer.train()
    if trainer.bound.skipped != 1 or not lines:
        raise Wrong("a step of NaN was made, or left out without a word")
    if not all(w.isfinite().all() for w in weights(trainer.model).values()):
        raise Wrong("weights are not finite")


@tried("N1", "plain loop")
def n1_fisher(place: Place) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[EWC(rows=8)]).bind(model, optimizer, total_steps=1)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[6] = math.inf  # type: ignore[union-attr,operator]
    rows = encoded(8)
    refuses(lambda: bound.end_task([collate(rows[:4]), collate(rows[4:])]), "not finite")


@tried("N2", "plain loop")
def n2(place: Place) -> None:
    for bad in (math.inf, math.nan, 3e38):
        loop = Loop(DPS(stage=2), dtype=torch.bfloat16, clip=1.0).steps(0, 2)
        before = loop.everything()
        loop.step(9, bad=bad)
        same(loop.everything(), before, f"a step with a gradient of {bad}")
        equal(loop.bound.skipped, 1, "skipped steps")


@tried("N3", "command line")
def n3(place: Place) -> None:
    code, said = place.train(place.rows(), lr="1e30", epochs=40, batch_size=2, schedule="constant",
                             warmup=0)  # fmt: skip
    if code == 0:
        raise Wrong("a run that diverged ended as if it had not")
    assert code == 2 and "diverged" in said, said[-300:]
    record = place.record()
    equal(record["scores"][0][0] if record["scores"] else None, None, "its score")


@tried("N3", "Trainer")
def n3_trainer(place: Place) -> None:
    trainer = place.trainer(model=_Bad(classifier(), 0, math.nan), num_train_epochs=20)
    try:
        trainer.train()
    except TrainingDiverged:
        return
    raise Wrong("80 steps of NaN, and training ended as usual")


@tried("N3", "plain loop")
def n3_loop(place: Place) -> None:
    loop = Loop(DPS(stage=2))
    try:
        for at in range(80):
            loop.step(at, bad=math.nan)
    except TrainingDiverged:
        return
    raise Wrong("80 steps of NaN, and nothing stopped")


@tried("N4", "plain loop")
def n4(place: Place) -> None:
    for method in METHODS:
        whole = Loop(method).steps(0, 6).everything()
        for scale in (1.0, 65536.0, 2.0**24):
            loop, scaler = Loop(method), torch.amp.GradScaler("cpu", init_scale=scale)
            for at in range(6):
                draw = torch.Generator().manual_seed(at)
                loss = loop.model(torch.randn(4, 3, generator=draw)).square().sum()
                if loop.bound.has_penalty:
                    loss = loss + loop.bound.penalty({}, None)
                scaler.scale(loss).backward()
                scaler.step(loop.optimizer)
                scaler.update()
                loop.optimizer.zero_grad()
            same(loop.everything(), whole, f"{method.name} at scale {scale}")


@tried("N5", "Trainer")
def n5(place: Place) -> None:
    ends = []  # by SGD: Adam makes steps of one size of what is rounding, as of a key's bias
    for size, pieces in ((8, 1), (4, 2), (2, 4)):
        model = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = place.trainer(encoded(20), model=model, per_device_train_batch_size=size,
                                gradient_accumulation_steps=pieces, optim="sgd",
                                recipe=Recipe(methods=[DPS(stage=2)]))  # fmt: skip
        trainer.train()
        equal(trainer.bound.step, 6, "steps")
        ends.append(weights(trainer.model))
    for other in ends[1:]:
        far = max(float((other[n] - w).abs().max()) for n, w in ends[0].items())
        if far > 1e-4:
            raise Wrong(f"weights differ by {far:.1e} with accumulation")


@tried("N5", "plain loop")
def n5_loop(place: Place) -> None:
    one, two = Loop(DPS(stage=2)), Loop(DPS(stage=2))
    for at in range(6):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(at))
        one.model(x).square().sum().backward()
        for piece in x.split(1):
            two.model(piece).square().sum().backward()
        for loop in (one, two):
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    equal(two.bound.step, 6, "steps")
    far = max(float((a - b).abs().max()) for a, b in zip(
        one.model.parameters(), two.model.parameters(), strict=True))  # fmt: skip
    if far > 1e-5:
        raise Wrong(f"weights differ by {far:.1e} with accumulation")


@tried("N6", "plain loop")
def n6(place: Place) -> None:
    for method in METHODS:
        loop = Loop(method, frozen="2.").steps(0, 3)
        held = loop.model[2]._parameters["weight"]
        assert held is not None
        same({"w": held.detach()}, {"w": weights(Loop().model)["2.weight"]}, "a frozen weight")
        equal(bool(loop.optimizer.state.get(held)), False, "a frozen weight has state")
        loop.model[2].weight.requires_grad_(True)
        before = held.detach().clone()
        loop.steps(3, 6)
        if torch.equal(before, held):
            raise Wrong(f"{method.name}: a weight that was switched on does not train")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.embed(ids))
        return found


@tried("N7", "plain loop")
def n7(place: Place) -> None:
    from holdfast.training.loop import load_checkpoint, save_checkpoint

    def made() -> tuple[Any, torch.optim.Optimizer, Any]:
        model = _Tied()
        optimizer = torch.optim.AdamW(Recipe().param_groups(model, lr=0.1))
        recipe = Recipe(methods=[L2SP()])
        return model, optimizer, recipe.bind(model, optimizer, total_steps=9)

    model, optimizer, bound = made()
    equal(len(bound.weights), 1, "weights of a tied pair")
    (model(torch.arange(7)).square().sum() + bound.penalty({}, None)).backward()
    optimizer.step()
    save_checkpoint(place / "checkpoint-1", bound, position={})
    again, _, other = made()
    load_checkpoint(place / "checkpoint-1", other)
    equal(again.out.weight is again.embed.weight, True, "tied after loading")
    same(weights(again), weights(model))


@tried("N8", "plain loop")
def n8(place: Place) -> None:
    model: Any = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refuses(lambda: Recipe(methods=[DPS()]).bind(model, optimizer, total_steps=3), "sparse")


@tried("N9", "plain loop")
def n9(place: Place) -> None:
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bound = Recipe(methods=[DPS(stage=2000)]).bind(model, optimizer, total_steps=4000)
    for _ in range(1000):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    sums = [t for t in bound.state_dict()["tensors"].values() if t.shape == model.weight.shape]
    found = [float(t.max()) for t in sums]
    if 1000.0 not in found:
        raise Wrong(f"1,000 gradients of 1 sum up to {found}")


def _state_of(loop: Loop) -> dict[str, Any]:
    return {k: v for k, v in loop.everything().items() if k.startswith(("state", "optimizer"))}


@tried("N10", "plain loop")
def n10(place: Place) -> None:
    from holdfast.training.loop import load_checkpoint, save_checkpoint

    loop = Loop(DPS(stage=4), dtype=torch.bfloat16).steps(0, 3)
    for state in loop.optimizer.state.values():
        state["index"] = torch.tensor([300000001])
        state["mask"] = torch.tensor([True, False])
        state["exp_avg"] = state["exp_avg"].float() / 3
    save_checkpoint(place / "checkpoint-3", loop.bound, position={})
    again = Loop(DPS(stage=4), dtype=torch.bfloat16)
    load_checkpoint(place / "checkpoint-3", again.bound)
    same(_state_of(again), _state_of(loop), "state")


@tried("N11", "plain loop")
def n11(place: Place) -> None:
    from holdfast.training.loop import load_checkpoint, save_checkpoint

    whole = Loop(DPS(stage=2)).steps(0, 6)
    save_checkpoint(place / "checkpoint-3", Loop(DPS(stage=2)).steps(0, 3).bound, position={})
    turned = Loop(DPS(stage=2), backwards=True, seed=4)
    try:
        load_checkpoint(place / "checkpoint-3", turned.bound)
    except Refused:
        pass
    else:
        same(turned.steps(3, 6).everything(), whole.everything(), "parameters in another order")
    for other in (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
                  nn.Sequential(nn.Tanh(), nn.Linear(3, 4), nn.Linear(4, 2))):  # fmt: skip
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.1)
        bound = Recipe(methods=[DPS(stage=2)]).bind(other, optimizer, total_steps=20)
        refuses(lambda b=bound: load_checkpoint(place / "checkpoint-3", b))  # type: ignore[misc]


@tried("N12", "plain loop", slow=True)
def n12(place: Place) -> None:
    for method in METHODS:
        whole, loop = Loop(method).steps(0, 8), Loop(method)
        frames: list[int] = []

        def counting(graph: Any, inputs: Any, frames: list[int] = frames) -> Any:
            frames.append(1)
            return graph.forward

        loop.model = torch.compile(loop.model, backend=counting)  # type: ignore[assignment]
        loop.steps(0, 8)
        found = {k.replace("_orig_mod.", ""): v for k, v in loop.everything().items()}
        same(found, whole.everything(), f"{method.name}, compiled")
        assert len(frames) <= 2, f"compiled {len(frames)} times"


@tried("N13", "command line")
def n13(place: Place) -> None:
    from holdfast.experiments.record import Record

    task = place.rows()
    code, said = place.train(task)
    assert code == 0, said
    text = (place / "run/record.json").read_text()
    body = place.record()
    for bad in (math.inf, math.nan, 5.0):
        refuses(lambda b=bad: Record.from_dict(body | {"scores": [[b]]}))  # type: ignore[misc]
    score = str(body["scores"][0][0])
    for word in ("NaN", "Infinity", "1e999"):
        (place / "run/record.json").write_text(text.replace(f"{score}", word, 1))
        for verb in ("report", "verify"):
            code, said = place.command(verb, place / "run")
            equal(code != 0, True, f"{verb} of a score of {word} refuses")


untried(
    "N13",
    "Trainer",
    "a metric is the trainer's own; a search's trials: tests/search/test_worker.py",
)


@tried("N14", "plain loop")
def n14(place: Place) -> None:
    tied = {"zero": torch.zeros(4, 5), "equal": torch.ones(20), "one": torch.ones(1),
            "small": torch.full((3, 3), 1e-45), "inf": torch.full((6,), math.inf)}  # fmt: skip
    for share in (0.01, 0.3, 0.99):
        for name, scores in tied.items():
            for choose in (select, top):
                one, two = (choose({name: scores}, share)[name] for _ in range(2))
                same({"m": one}, {"m": two}, f"{choose.__name__} of {name}")
            equal(int(top({name: scores}, share)[name].sum()), math.ceil(scores.numel() * share),
                  f"entries of {name}")  # fmt: skip
    equal(bool(select({"z": torch.zeros(9)}, 0.5)["z"].all()), True, "ties are kept")
