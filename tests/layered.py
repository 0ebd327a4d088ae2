"""A model around any one layer, bound as tasks of a sequence: what tests of Gram matrices share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.ops.moments import LowRank, Moment
from holdfast.recipe import Recipe

Batch = dict[str, Tensor]


class Net(nn.Module):
    """A shared encoder, any module of one tensor, below a head of one number a row."""

    encoder: Any

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(1, 1)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        y = self.encoder(x)
        mean = y.double().flatten(1).mean(1, keepdim=True).to(self.head.weight.dtype)
        return SimpleNamespace(logits=self.head(mean), features=y)


def batches(size: int, **tensors: Tensor) -> list[Batch]:
    """Rows in batches of `size`, the last one shorter."""
    pieces = {k: t.split(size) for k, t in tensors.items()}
    return [dict(zip(pieces, p, strict=True)) for p in zip(*pieces.values(), strict=True)]


def begin(
    bound: Bound, task: str, model: nn.Module, *, start: Callable[[], Any] | None = None
) -> None:
    encoder = getattr(model, "encoder", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound.begin_task(task, optimizer, 10, model=model, shared=encoder, start=start)


def wander(model: nn.Module, seed: int = 1, scale: float = 0.5) -> None:
    """Other weights, as training would leave them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((scale * torch.randn(p.shape, generator=draw)).to(p.dtype))


def learn(
    method: Method, model: nn.Module, tasks: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[Bound, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Tasks one after another; the bound, and weights at the start and the end of each task."""
    bound = Recipe(methods=[method]).unbound(seed=0)
    started, ended = [], []
    for place, rows in enumerate(tasks):
        begin(bound, f"task{place}", model)
        started.append(copied(model))
        wander(model, place)
        ended.append(copied(model))
        bound.end_task(rows)
    return bound, started, ended


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def matrix_of(layer: Any) -> Tensor:
    """The weight as (outputs, inputs), sharing its memory."""
    w = layer.weight.detach()
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return w.T
    return w.flatten(1)


def design(layer: Any, x: Tensor) -> Tensor:
    """What the first output is multiplied by, an input at a time, at every position of every row:
    (rows, positions, inputs), with the 1 of a bias last.

    The slow obvious way: the layer's own outputs with a single 1 among its weights.
    """
    kept = [(p, p.detach().clone()) for p in layer.parameters()]
    columns, last = [], not isinstance(layer, nn.Conv1d | nn.Conv2d)
    with torch.no_grad():
        for p, _ in kept:
            p.zero_()
        ones = [(matrix_of(layer), j) for j in range(matrix_of(layer).shape[1])]
        if getattr(layer, "bias", None) is not None:
            ones.append((layer.bias.detach()[:, None], 0))
        for matrix, j in ones:
            matrix[0, j] = 1
            y = layer(x)
            columns.append((y[..., 0] if last else y[:, 0]).reshape(len(x), -1).double())
            matrix[0, j] = 0
        for p, value in kept:
            p.copy_(value)
    return torch.stack(columns, -1)


def gram(rows: Tensor) -> Tensor:
    """1/rows Σ over rows and positions of x xᵀ, of (rows, positions, d)."""
    return torch.einsum("rpi,rpj->ij", rows.double(), rows.double()) / len(rows)


def merged(
    old: Tensor, new: Tensor, before: Tensor, after: Tensor, strength: float, ridge: float
) -> Tensor:
    """The argmin by stacked least squares in float64: rows (rows, positions, d), weights (·, d)."""
    both = gram(new) + strength * gram(old)
    eps = ridge * both.diagonal().mean()
    change = (after - before).double().T
    x = new.double().flatten(0, 1) / len(new) ** 0.5
    z = old.double().flatten(0, 1) * (strength / len(old)) ** 0.5
    i = eps.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    left = torch.cat([x, z, i])
    right = torch.cat([x @ change, torch.zeros(len(z) + len(i), change.shape[1]).double()])
    found = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return before.double() + found.T


def whole(moment: Moment) -> Tensor:
    """All of G, in float64, filled with zeros between blocks."""
    if isinstance(moment, LowRank):
        return moment.factor.double().T @ moment.factor.double() + moment.rest.double().diag()
    return torch.block_diag(*moment.matrix.double())[: moment.d, : moment.d]


def weights_of(layer: Any, weights: dict[str, Tensor], name: str = "encoder") -> Tensor:
    """Weight and bias of a layer as (outputs, inputs + 1)."""
    one = copy.deepcopy(layer)
    with torch.no_grad():
        for n, p in one.named_parameters():
            p.copy_(weights[f"{name}.{n}"])
    w, bias = matrix_of(one), getattr(one, "bias", None)
    return w if bias is None else torch.cat([w, bias.detach()[:, None]], 1)
