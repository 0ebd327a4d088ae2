"""Replay: a uniform memory, the gradient by hand, heads and randomness left alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import Replay
from holdfast.methods.replay import _trim
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (Replay(memory=4), 0),
    (Replay(memory=0.3, share=1.0, every=2, weight=2.0), 0),
    (Replay(memory=4, every=3, feedback=0.48), 0),
]
ACCUMULATES = False  # it draws other rows for each micro-batch


def numbered(count: int, size: int = 7) -> list[dict[str, Tensor]]:
    rows = torch.arange(count)
    return [{"tokens": r[:, None], "labels": r % 3} for r in rows.split(size)]


def bind(method: Replay, *, seed: int = 0) -> Bound:
    torch.manual_seed(0)
    model = Classifier().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Recipe(methods=[method]).bind(model, optimizer, total_steps=9, task="one", seed=seed)


def kept(bound: Bound, task: str = "one") -> list[int]:
    return bound.states["replay"].tensors[task]["tokens"][:, 0].tolist()


def test_reservoir_is_uniform() -> None:
    """Every row is kept with probability 5/40, whatever its place: chi-square over 2,000 draws."""
    bound = bind(Replay(memory=5))
    counts = torch.zeros(40)
    for _ in range(2000):
        bound.step += 1
        bound.end_task(numbered(40))
        rows = kept(bound)
        assert len(set(rows)) == 5
        counts[rows] += 1
    # Rows of one sample exclude each other: the statistic shrinks by (1 − 5/40).
    statistic = ((counts - 250) ** 2 / 250).sum().item() / (1 - 5 / 40)
    assert 0.001 < stats.chi2.sf(statistic, 39) < 0.999


@pytest.mark.parametrize(
    ("memory", "rows", "size"), [(0.2, 33, 6), (0.01, 33, 1), (50, 33, 33), (8, 33, 8)]
)
def test_memory_is_a_share_or_a_number_of_rows(memory: float | int, rows: int, size: int) -> None:
    bound = bind(Replay(memory=memory))
    bound.end_task(lambda: iter(numbered(rows)))
    assert len(kept(bound)) == len(set(kept(bound))) == size
    assert bound.states["replay"].numbers["rows"] == {"one": size}
    # Fields of a row stay together.
    labels = bound.states["replay"].tensors["one"]["labels"].tolist()
    assert labels == [r % 3 for r in kept(bound)]


def test_no_rows_are_refused() -> None:
    with pytest.raises(Refused, match="no rows to keep"):
        bind(Replay()).end_task([])


def second_task(method: Replay) -> tuple[Bound, list[Any]]:
    """A bound in its second task; replayed batches and tasks are recorded."""
    bound = bind(method)
    bound.end_task([make_batch("one", i) for i in range(4)])
    model = Classifier(encoder=bound.models["one"].base_model).double()  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound.begin_task("two", optimizer, 9, model=model)
    replayed: list[Any] = []
    forward = bound.forward

    def spy(inputs: Any, *, task: str | None = None, **how: Any) -> Any:
        replayed.append((task, inputs))
        return forward(inputs, task=task, **how)

    bound.forward = spy  # type: ignore[method-assign]
    return bound, replayed


def without_dropout(bound: Bound) -> None:
    for model in bound.models.values():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def test_gradient_is_of_new_loss_plus_weight_times_mean_old_loss() -> None:
    bound, replayed = second_task(Replay(memory=9, share=0.5, weight=3.0))
    without_dropout(bound)
    batch, (old, new) = make_batch("two", 0), bound.models.values()
    out = new(**batch)
    (out.loss + bound.penalty(batch, out)).backward()
    ours = {n: w.grad.clone() for n, w in bound.weights.items() if w.grad is not None}
    ((task, rows),) = replayed
    assert task == "one" and len(rows["labels"]) == 4
    loss = new(**batch).loss
    for i in range(4):
        logits = old(rows["tokens"][i : i + 1]).logits
        loss = loss + 3.0 / 4 * nn.functional.cross_entropy(logits, rows["labels"][i : i + 1])
    theirs = torch.autograd.grad(loss, list(bound.weights.values()))
    for n, expected in zip(bound.weights, theirs, strict=True):
        torch.testing.assert_close(ours[n], expected)


def test_old_head_gets_no_gradient_and_stays() -> None:
    bound, _ = second_task(Replay(memory=9, share=1.0))
    head = bound.models["one"].classifier
    assert isinstance(head, nn.Linear)
    before = head.weight.detach().clone()
    for step in range(3):
        bound.optimizer.zero_grad()
        batch = make_batch("two", step)
        out = bound.models["two"](**batch)
        (out.loss + bound.penalty(batch, out)).backward()
        assert head.weight.grad is None and head.weight.requires_grad
        bound.optimizer.step()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize(
    ("share", "rows", "wanted"),
    [(0.25, 8, 2), (0.3, 8, 3), (0.01, 3, 1), (1.0, 5, 5), (0.07, 100, 7)],
)
def test_share_is_rounded_up(share: float, rows: int, wanted: int) -> None:
    bound, replayed = second_task(Replay(memory=9, share=share))
    bound.penalty(make_batch("two", 0, rows))
    assert sum(len(batch["labels"]) for _, batch in replayed) == wanted


def test_every_counts_optimizer_steps() -> None:
    bound, replayed = second_task(Replay(memory=9, every=3))
    steps = []
    for step in range(7):
        batch, before = make_batch("two", step), len(replayed)
        for half in (0, 4):  # two micro-batches belong to one step
            piece = {k: v[half : half + 4] for k, v in batch.items()}
            out = bound.models["two"](**piece)
            (out.loss + bound.penalty(piece, out)).backward()
        bound.optimizer.step()
        steps.append(len(replayed) - before)
    assert steps == [2, 0, 0, 2, 0, 0, 2]


def scripted(method: Replay, losses: list[list[tuple[float, float]]]) -> tuple[Bound, list[int]]:
    """Steps whose micro-batches have these losses (old, new); in which of them rows came again."""
    bound, _ = second_task(method)
    replayed: list[int] = []
    say = SimpleNamespace(loss=torch.tensor(0.0))

    def forward(*_: Any, **__: Any) -> Any:
        replayed.append(step)
        return say

    bound.forward = forward  # type: ignore[method-assign]
    for step, pieces in enumerate(losses):
        for old, new in pieces:
            say.loss = torch.tensor(old)
            bound.penalty(make_batch("two", step), None, torch.tensor(new))
        bound.optimizer.step()
    return bound, replayed


def test_feedback_replays_while_the_old_share_is_above_it_and_looks_again() -> None:
    """Shares .8 and .5 go on; .3 stops; step 4 looks, and .4 is not above .4; step 8 looks."""
    old = [0.8, 0.5, 0.3, 9.0, 0.4, 9.0, 9.0, 9.0, 0.8, 0.1, 9.0]
    losses = [[(x, 1 - x if x < 1 else 9.0)] for x in old]
    # The weight of the replayed loss does not count.
    method = Replay(memory=9, every=4, feedback=0.4, weight=7.0)
    bound, replayed = scripted(method, losses)
    assert replayed == [0, 1, 2, 4, 8, 9]
    numbers = bound.states["replay"].numbers
    assert numbers["share"] == pytest.approx(0.1)
    assert numbers["rehearsed"] == {"two": 6 * 2}  # a quarter of eight rows


def test_feedback_is_of_all_micro_batches_of_a_step() -> None:
    """Shares .1 and .9 of losses 3 and 2: (.3 + 1.8)/5 = .42, neither their mean nor the last."""
    step = [(0.3, 2.7), (1.8, 0.2)]
    for threshold, again in ((0.41, 4), (0.43, 2)):
        bound, replayed = scripted(Replay(memory=9, every=5, feedback=threshold), [step] * 2)
        assert len(replayed) == again
        assert bound.states["replay"].numbers["rehearsed"] == {"two": 2 * again}


def test_without_feedback_nothing_is_counted() -> None:
    bound, replayed = scripted(Replay(memory=9, every=2), [[(9.0, 0.1)]] * 4)
    assert replayed == [0, 2]
    assert bound.states["replay"].numbers.keys() == {"rows"}


def test_feedback_needs_steps_to_decide_on_and_losses_to_decide_by() -> None:
    with pytest.raises(Refused, match=r"replay\.feedback.*every=10"):
        Replay(feedback=0.5)
    bound, _ = second_task(Replay(memory=9, every=2, feedback=0.5))
    with pytest.raises(Refused, match="loss of the new rows"):
        bound.penalty(make_batch("two", 0))


def test_several_old_tasks_are_drawn_by_their_rows() -> None:
    """Memories of 30 and 10 rows: three of four replayed rows are of the first, each alike."""
    bound = bind(Replay(memory=30, share=1.0))
    bound.end_task(numbered(30))
    model = Classifier(encoder=bound.models["one"].base_model).double()  # type: ignore[arg-type]
    bound.begin_task("two", torch.optim.SGD(model.parameters(), lr=0.1), 9, model=model)
    bound.end_task(numbered(10))
    drawn: dict[str | None, list[int]] = {"one": [], "two": []}

    def count(inputs: Any, *, task: str | None = None, **_: Any) -> Any:
        drawn[task] += inputs["tokens"][:, 0].tolist()
        mean = inputs["tokens"].double().mean()
        return SimpleNamespace(loss=mean + (1000.0 if task == "two" else 0.0))

    bound.forward = count  # type: ignore[method-assign]
    total = 0.0
    for _ in range(500):
        total += bound.penalty({"labels": torch.zeros(8)}).item()
    rows = [*drawn["one"], *(r + 1000 for r in drawn["two"])]
    assert total / 500 == pytest.approx(sum(rows) / len(rows), rel=1e-4)  # a mean over rows
    counts = [drawn["one"].count(r) for r in range(30)] + [drawn["two"].count(r) for r in range(10)]
    assert sum(counts) == 4000
    assert 0.001 < stats.chisquare(counts).pvalue < 0.999


def test_short_rows_are_padded_and_cut_again() -> None:
    bound = bind(Replay(memory=6))
    bound.models["one"].config = SimpleNamespace(pad_token_id=9)  # type: ignore[assignment]

    def rows(length: int, value: int) -> dict[str, Tensor]:
        ids = torch.full((2, length), value)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(),
                "label": torch.tensor([value, value])}  # fmt: skip

    bound.end_task([rows(2, 1), rows(5, 2), rows(3, 3)])
    stored = bound.states["replay"].tensors["one"]
    assert stored["input_ids"].tolist()[:2] == [[1, 1, 9, 9, 9]] * 2
    assert stored["attention_mask"].tolist()[:2] == [[1, 1, 0, 0, 0]] * 2
    assert stored["labels"].tolist()[4:] == [[3, 3, 3, -100, -100]] * 2
    assert stored["label"].tolist() == [1, 1, 2, 2, 3, 3]
    cut = _trim({k: v[[0, 5]] for k, v in stored.items()})
    assert cut["input_ids"].tolist() == [[1, 1, 9], [3, 3, 3]]
    assert cut["label"].tolist() == [1, 3]
    left = {"attention_mask": torch.tensor([[0, 1, 1]]), "x": torch.tensor([[7, 8, 9]])}
    assert _trim(left)["x"].tolist() == [[7, 8, 9]]


def test_several_labels_as_many_as_tokens_stay_whole() -> None:
    mask = torch.tensor([[1, 1, 0, 0]] * 2)
    tags, several = torch.arange(8).reshape(2, 4), torch.ones(2, 4)
    cut = _trim({"attention_mask": mask, "labels": tags})
    assert cut["labels"].tolist() == [[0, 1], [4, 5]] and cut["labels"].is_contiguous()
    assert torch.equal(_trim({"attention_mask": mask, "labels": several})["labels"], several)


def test_replay_without_its_batch_is_refused_not_silent() -> None:
    bound, _ = second_task(Replay(memory=9))
    with pytest.raises(Refused, match=r"penalty\(batch"):
        bound.penalty()


def test_models_of_old_tasks_are_asked_for_after_loading() -> None:
    bound, _ = second_task(Replay(memory=9))
    del bound.models["one"]
    with pytest.raises(Refused, match=r"no model of task 'one'.*bound\.models"):
        bound.penalty(make_batch("two", 0))


def test_replay_draws_neither_dropout_nor_rows_from_the_global_state() -> None:
    toy = ToyTraining(Replay(memory=5, share=1.0))
    toy.begin("one")
    toy.end()
    toy.begin("two")
    state = torch.get_rng_state()
    losses = {toy.bound.penalty(make_batch("two", 0)).item() for _ in range(5)}
    assert torch.equal(torch.get_rng_state(), state)
    assert len(losses) == 5 and all(math.isfinite(x) for x in losses)
