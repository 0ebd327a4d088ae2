"""Noise on what enters a model, and its outputs then: what r3f, smart and lnsr share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from holdfast.engine.forwarding import entrance, own_randomness
from holdfast.engine.method import View
from holdfast.methods.common import answers
from holdfast.methods.common.importance import Kind, told_kind, wide
from holdfast.ops import distributed

Dropout = Literal["own", "same"]
Change = Callable[[Tensor], Tensor]


def seed(view: View) -> int:
    """A number for one noise: one draw on every rank, and another number on each."""
    return int(torch.randint(2**62, (), generator=view.generator)) + distributed.rank()


def normal(like: Tensor, seed: int) -> Tensor:
    """Standard normal noise in the shape of a tensor, in at least float32."""
    draws = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=draws, device=like.device, dtype=wide(like.dtype))


def uniform(like: Tensor, seed: int) -> Tensor:
    """The same, uniform in [−1, 1)."""
    draws = torch.Generator(like.device).manual_seed(seed)
    dtype = wide(like.dtype)
    return torch.rand(like.shape, generator=draws, device=like.device, dtype=dtype) * 2 - 1


def places(x: Tensor) -> tuple[int, ...]:
    """The axes of one place of a tensor: of (rows, tokens, width) the width, else all of a row."""
    return (-1,) if x.ndim == 3 else tuple(range(1, x.ndim))


def moved(view: View, change: Change, dropout: Dropout, where: str) -> Tensor:
    """Logits of the micro-batch where what enters the model is a function of itself."""
    assert view.inputs is not None
    name = entrance(view.bound.models[view.task], view.inputs)
    return answers.logits_of(view.forward(perturb={name: change}, dropout=dropout), where)


def counting(view: View, logits: Tensor, kind: Kind | None = None) -> Tensor:
    """The outputs that count, (n, classes), in at least float32; see `answers.aligned`.

    Of numbers those of every row, and of (rows, tokens, numbers) those of every token.
    """
    if kind == "numbers":
        return answers.exact(logits.flatten(0, -2))
    logits, counted, _ = answers.aligned(view, logits)
    return answers.exact(logits[counted])


def mean_of(value: Tensor, *used: Tensor) -> Tensor:
    """A mean over outputs that count, and 0, with a graph, where none does."""
    return value if len(used[0]) else torch.stack([u.sum() for u in used]).sum()


@torch.no_grad()
def tried(view: View, where: str) -> Kind | None:
    """What the model's outputs are, told by the task's first rows before any step; None without
    rows. `Refused` if what enters the model cannot be reached."""
    if view.resuming:
        return None
    model, drawn = view.bound.models[view.task], view.generator.get_state()
    try:
        with own_randomness(view.generator):
            for batch in view.data():
                name = entrance(model, batch)
                same: Change = lambda x: x  # noqa: E731
                outputs = view.forward(batch, training=False, perturb={name: same})
                distributed.reshard_(model)
                return told_kind(model, answers.logits_of(outputs, where), batch)
    finally:
        view.generator.set_state(drawn)  # later draws do not depend on whether rows are offered
    return None
