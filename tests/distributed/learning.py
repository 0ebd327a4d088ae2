"""Two tasks learned by one process, or by the ranks of a group, each on its part of a batch.

`Grid` is a linear model with a quadratic loss on small whole numbers, and `Rounded` puts its
weights on a grid after every step. So every gradient is a sum of dyadic numbers of few bits, and so
is the Fisher information: float64 holds them exactly, in whatever order they are added up. Ranks
and one process must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method, View
from holdfast.ops.distributed import full, local
from holdfast.recipe import Recipe

ROWS, STEPS = 8, 4
Batch = dict[str, Tensor]
Wrap = Callable[[nn.Module], nn.Module]


@dataclass
class Output:
    """What a model returns; FSDP2 looks for tensors only in containers that torch knows."""

    loss: Tensor
    logits: Tensor


torch.utils._pytree.register_dataclass(Output)


class Grid(nn.Module):
    """y = a x + b x + c, of dyadic weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4).double(), nn.Linear(6, 4, bias=False).double()
        draw = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randint(-4, 5, p.shape, generator=draw).double() / 4

    def forward(self, x: Tensor, y: Tensor) -> Output:
        logits = self.a(x) + self.b(x)
        return Output(loss=(logits - y).square().sum(1).mean() / 2, logits=logits)


@dataclass(frozen=True, kw_only=True)
class Rounded(Method):
    """Weights are multiples of 2⁻¹⁰ after every step."""

    name: ClassVar[str] = "rounded"

    def after_step(self, view: View) -> None:
        for w in view.weights.values():
            part = local(w.detach())
            part.mul_(1024).round_().div_(1024)


def batch(task: str, step: int, rows: int = ROWS) -> Batch:
    draw = torch.Generator().manual_seed(100 * (task == "two") + step)
    x, y = (torch.randint(-1, 2, (rows, n), generator=draw).double() for n in (6, 4))
    return {"x": x, "y": y}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(whole: Batch) -> Batch:
    """This rank's rows of a batch."""
    return {k: v.chunk(ranks())[rank()] for k, v in whole.items()}


def everything(bound: Bound) -> dict[str, Tensor]:
    """A copy of all state, weights and random state."""
    state = bound.state_dict()["tensors"]
    found = {f"state {k}": t.clone() for k, t in state.items()}
    return found | {f"weight {n}": full(w.detach()).clone() for n, w in bound.weights.items()}


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def learn(
    methods: Sequence[Method],
    *,
    clip: float | None = None,
    wrap: Wrap = ddp,
    pieces: int = 1,
    seen: Callable[[Bound], Mapping[str, Any]] = everything,
    poison: tuple[str, int] | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Both tasks; yields what `seen` tells after every step and at the end of each task.

    pieces: micro-batches a step. poison: the task and step in which rank 0 meets a NaN. Other ranks
    than 0 begin with another random state and, but in shards, which fully_shard cuts from what a
    rank has, with other weights: binding aligns them.
    """
    model: nn.Module = Grid()
    if rank() and wrap is ddp:
        for p in model.parameters():
            p.data += rank()
    recipe = Recipe(methods=[*methods, Rounded()], max_grad_norm=clip)
    bound = recipe.unbound(seed=7 + rank())
    for task in ("one", "two"):
        if wrap is not ddp:
            model = wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        bound.begin_task(task, optimizer, STEPS, model=model)
        net = ddp(model) if wrap is ddp else model
        for step in range(STEPS):
            optimizer.zero_grad()
            rows = batch(task, step)
            if poison == (task, step):
                rows["x"][0, 0] = torch.nan
            parts = [{k: v.chunk(pieces)[i] for k, v in rows.items()} for i in range(pieces)]
            for i, part in enumerate(map(mine, parts)):
                net_sync = getattr(net, "require_backward_grad_sync", None)
                if net_sync is not None:
                    net.require_backward_grad_sync = i + 1 == pieces  # what no_sync() does
                out = net(**part)
                loss = out.loss + bound.penalty(part, out) if bound.has_penalty else out.loss
                (loss / pieces).backward()
            optimizer.step()
            yield seen(bound)
        bound.end_task([batch(task, i, rows) for i, rows in enumerate((8, 5, 3))])
        yield seen(bound)


def same_throughout(expected: list[Mapping[str, Any]], found: Iterator[Mapping[str, Any]]) -> None:
    """Bit for bit, NaN included, at every moment."""
    count = 0
    for moment, (one, two) in enumerate(zip(expected, found, strict=True)):
        assert one.keys() == two.keys(), (moment, one.keys() ^ two.keys())
        for name, t in one.items():
            other = two[name]
            same = t.shape == other.shape and t.dtype == other.dtype
            same = same and bool((t.eq(other) | (t.ne(t) & other.ne(other))).all())
            assert same, f"{name} differs at moment {moment}: {t} is not {other}"
        count += 1
    assert count == 2 * (STEPS + 1)
