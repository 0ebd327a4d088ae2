"""Diagonal Fisher information, estimated one example at a time.

    F_i = E_x E_y [ (∂ log p(y|x; w) / ∂w_i)² ]          unit: (nats / weight)² per example

Squaring the gradient of a *batch mean* instead shrinks the estimate by about the batch size
(measured: 130-fold between batches of 1 and 128); here the batch size changes nothing.

With W ranks each is given all rows, takes every W-th batch of them, and the sums are added: all
ranks get the same numbers as one process would, but for the order of addition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from holdfast.engine.batches import (
    LABELS,
    Batch,
    Seen,
    Whole,
    first_rows,
    loss_of,
    rows_in,
    rows_of,
)
from holdfast.engine.state import refuse_not_finite
from holdfast.errors import Refused
from holdfast.methods.common.squares import Layers
from holdfast.ops import distributed

Labels = Literal["auto", "true", "sampled", "expected"]
Kind = Literal["classes", "labels", "numbers"]


def diagonal_fisher(
    forward: Callable[[Batch], Any],
    batches: Iterable[Batch],
    weights: Mapping[str, nn.Parameter],
    *,
    modules: Mapping[str, tuple[nn.Module, ...]] | None = None,
    model: nn.Module | None = None,
    labels: Labels = "auto",
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of each weight, float32, mean over rows.

    `labels` chooses y: ``true``, the row's own (the empirical Fisher, and the only choice for
    regression and language models, where −log p is the model's own loss, a mean over tokens for
    the latter); ``sampled``, one drawn from the model's prediction (unbiased); ``expected``,
    every class weighted by its predicted probability (exact, one backward pass per class);
    ``auto``, ``sampled`` if the model returns class logits and ``true`` otherwise.
    If `config.problem_type` of `model` declares several labels per row, each is drawn, or
    weighted, separately, and −log p is their sum; several numbers per row are a regression.
    `forward(batch)` must return an object with `logits` (rows × classes) and, for
    ``true``, `loss`. A `Whole` batch of B rows is not split: F is the mean of B (its mean
    gradient)², as that of single rows is where they are independent and their mean is 0. At most
    the first `rows` rows are used. Frozen weights are left out. Raises `Refused` if there are no
    rows.

    `modules` names the owners of each weight: with it, and only layers of known kinds called once
    per forward pass, a whole batch takes one backward pass (`squares`; the same numbers).

    All ranks must call this with the same rows in the same order, or it is refused. With sharded
    weights (FSDP2) every rank goes through every row: a backward pass averages gradients over
    ranks, and the square of a mean is not the mean of squares.
    """
    learned = {n: w for n, w in weights.items() if w.requires_grad}
    total = {n: torch.zeros_like(w, dtype=wide(w.dtype)) for n, w in learned.items()}
    # One draw per row from a separate generator: the same labels whatever the batch size.
    seed = int(torch.randint(2**62, (), generator=generator))
    draws = torch.Generator().manual_seed(seed)
    # Restored at the end: how often `forward` draws depends on ranks and batch size.
    after = generator.get_state() if generator is not None else None
    shards = any(distributed.sharded(w) for w in learned.values())
    layers = Layers.owning(learned, modules) if modules is not None and labels != "true" else None
    layers = None if shards else layers
    owners = {m for each in modules.values() for m in each} if shards and modules else set()
    held = (p for m in owners for p in m._parameters.values() if p is not None)
    touched = [*learned.values(), *held]
    seen, ranks = Seen(), 1 if shards else distributed.world()
    for turn, batch in enumerate(seen.through(first_rows(batches, rows))):
        size = rows_in(batch)
        if turn % ranks != distributed.rank() % ranks:
            torch.rand(size, 1, generator=draws, dtype=torch.float64)  # used by another rank
            continue
        if layers is not None and size > 1 and not isinstance(batch, Whole):
            output, calls = layers.run(functools.partial(forward, batch), size)
            known = labels != "auto" or _drawable(output, batch, model) is not None
            if calls is not None and known:
                terms = _log_likelihoods(output, batch, labels, draws, model)
                for index, term in enumerate(terms):
                    layers.add_squares_(total, term, calls, keep=index + 1 < len(terms))
                continue
            layers = None
        for row in rows_of([batch]):
            if shards:
                run = functools.partial(forward, row)
                likelihoods = functools.partial(_log_likelihoods, batch=row, labels=labels,
                                                draws=draws, model=model)  # fmt: skip
                _add_squares_of_shards_(total, run, likelihoods, draws, learned, touched)
                continue
            terms = _log_likelihoods(forward(row), row, labels, draws, model)
            for index, term in enumerate(terms):
                _add_squares_(total, term, learned, keep=index + 1 < len(terms))
    if generator is not None and after is not None:
        generator.set_state(after)
    seen.require_equal(next(iter(weights.values())).device)
    if not seen.count:
        raise Refused("no rows to estimate the Fisher information from", remedy="pass data")
    if not shards:
        distributed.reduce_(total.values())
    refuse_not_finite(total, "the importance of this weight is not finite")
    torch._foreach_div_([distributed.local(t) for t in total.values()], seen.count)
    return total


def _add_squares_of_shards_(
    total: Mapping[str, Tensor],
    forward: Callable[[], Any],
    likelihoods: Callable[[Any], list[Tensor]],
    draws: torch.Generator,
    weights: Mapping[str, nn.Parameter],
    touched: Iterable[nn.Parameter],
) -> None:
    """Add the squared gradient of one row, the same on every rank, each in its own shards.

    FSDP2 reduces gradients into `.grad`, as a mean over ranks, here of equal ones. It frees what a
    second backward pass would need, so every term has its own forward pass. The gradients of all
    `touched` parameters are restored.
    """
    kept = [(p, p.grad) for p in touched]
    state, index, count = draws.get_state(), 0, 1
    try:
        while index < count:
            for p, _ in kept:
                p.grad = None
            draws.set_state(state)
            terms = likelihoods(forward())
            terms[index].backward()
            index, count = index + 1, len(terms)
            for name, w in weights.items():
                if w.grad is not None:
                    square = distributed.local(w.grad).to(total[name].dtype).square_()
                    distributed.local(total[name]).add_(square)
    finally:
        for p, grad in kept:
            p.grad = grad


def _add_squares_(
    total: Mapping[str, Tensor], term: Tensor, weights: Mapping[str, Tensor], *, keep: bool
) -> None:
    """Add the squared gradient of one example's term: any model, one backward pass per row."""
    inputs = list(weights.values())
    grads = torch.autograd.grad(term, inputs, retain_graph=keep, allow_unused=True)
    for name, grad in zip(weights, grads, strict=True):
        if grad is not None:
            grad = grad.to(total[name].dtype)
            total[name].addcmul_(grad, grad)


def _log_likelihoods(
    output: Any, batch: Batch, labels: Labels, draws: torch.Generator, model: nn.Module | None
) -> list[Tensor]:
    """The terms to differentiate, each a sum over rows; their squared gradients add up to F.

    An expectation over y enters as √p(y|x) log p(y|x) for every y, with √p held constant. For
    independent binary labels with logits z and p = σ(z) it is √(p (1 − p)) z for every label.
    """
    kind = None if labels == "true" else _drawable(output, batch, model)
    if kind is None and labels in ("true", "auto"):
        loss = loss_of(output)
        # The sum over a batch: squared, its gradient is as large as the rows' squares together
        # where they are independent. All is divided by the number of rows in the end.
        return [-loss * (batch.rows if isinstance(batch, Whole) else 1)]
    logits = getattr(output, "logits", None)
    if kind is None or logits is None:
        shape = None if logits is None else tuple(logits.shape)
        raise Refused(
            f"labels={labels!r} needs class logits of each row, not shape {shape}"
            " or a regression", remedy="use labels='true'",
        )  # fmt: skip
    z = logits.to(wide(logits.dtype))
    if kind == "labels":
        p = z.detach().sigmoid()
        if labels == "expected":
            return [((p * (1 - p)).sqrt() * z)[:, y].sum() for y in range(p.shape[1])]
        held = (_uniform(p.shape[0], p.shape[1], draws) < p.cpu()).to(p.device)
        return [-functional.binary_cross_entropy_with_logits(z, held.to(z.dtype), reduction="sum")]
    log_p = z.log_softmax(-1)
    p = log_p.detach().exp()
    if labels == "expected":
        return [(p[:, y].sqrt() * log_p[:, y]).sum() for y in range(p.shape[1])]
    # On the CPU: elsewhere sums of floats may vary, or there is no float64.
    upto = p.cpu().double().cumsum(-1)[:, :-1]
    y = (_uniform(len(p), 1, draws) > upto).sum(-1, keepdim=True).to(p.device)
    return [log_p.gather(1, y).sum()]


def _uniform(rows: int, each: int, draws: torch.Generator) -> Tensor:
    """Uniform float64 (rows, each) from one draw per row, which other ranks can skip."""
    u = torch.rand(rows, 1, generator=draws, dtype=torch.float64)
    if each == 1:
        return u
    seeded = (torch.Generator().manual_seed(int(v * 2**53)) for v in u.flatten().tolist())
    return torch.stack([torch.rand(each, generator=g, dtype=torch.float64) for g in seeded])


def kind_of(model: Any, logits: Tensor) -> Kind:
    """What the last axis of a model's logits is: classes, one or several numbers, or independent
    binary labels. Hugging Face models declare the last by `config.problem_type`."""
    declared = getattr(getattr(model, "config", None), "problem_type", None)
    if declared == "multi_label_classification":
        return "labels"
    return "numbers" if logits.shape[-1] == 1 or declared == "regression" else "classes"


def told_kind(model: Any, logits: Tensor, batch: Batch) -> Kind:
    """`kind_of`; `Refused` where labels are numbers and nothing says what they stand for."""
    kind = kind_of(model, logits)
    told = getattr(getattr(model, "config", None), "problem_type", None) is not None
    given = (v for k, v in batch.items() if k in LABELS and isinstance(v, Tensor))
    if kind == "classes" and not told and any(v.is_floating_point() for v in given):
        raise Refused("numbers for labels: of a regression, or of several labels a row?",
                      where="config.problem_type",
                      remedy='say "regression" or "multi_label_classification"')  # fmt: skip
    return kind


def _drawable(output: Any, batch: Batch, model: nn.Module | None) -> Kind | None:
    """The kind of a row's logits if labels can be drawn from them, else None."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 2:
        return None
    kind = told_kind(model, logits, batch)
    return None if kind == "numbers" else kind


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: sums in bfloat16 stop growing at 256."""
    return torch.promote_types(dtype, torch.float32)
