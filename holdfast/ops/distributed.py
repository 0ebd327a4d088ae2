"""Several processes that train one model: the one place that knows of ranks and shards.

Nothing here costs a single process anything: without an initialised process group every function
returns at once and communicates nothing. All ranks of the default group train one model on
different rows (data parallel: replicated, or in shards by FSDP2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from holdfast.errors import Refused

PIECE = 1 << 20  # entries that a fingerprint reads at a time
Placement = tuple[Any, ...]  # the process groups over which a tensor is sharded


def world() -> int:
    """How many ranks train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait() -> None:
    """Return when every rank has come here."""
    if world() > 1:
        dist.barrier()


def bound_waiting(seconds: float, *, usual: float) -> None:
    """Give the process group the time-out that was asked for, if it is not the `usual` one.

    Accelerate sets none on CPUs: there a rank that hangs would hold the others for 30 minutes.
    """
    if world() > 1 and seconds != usual:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


# --- shards ---------------------------------------------------------------------------------------


def sharded(t: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this rank holds only a part."""
    return type(t) is not Tensor and hasattr(type(t), "to_local")


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; all of a plain one."""
    return cast(Any, t).to_local() if sharded(t) else t


def like(part: Tensor, whole: Tensor) -> Tensor:
    """A tensor laid out as `whole`, of which this rank holds `part`."""
    if not sharded(whole):
        return part
    kind, laid = cast(Any, type(whole)), cast(Any, whole)
    made: Tensor = kind.from_local(
        part, laid.device_mesh, laid.placements, shape=whole.shape, stride=whole.stride()
    )
    return made


def full(t: Tensor) -> Tensor:
    """All of a tensor, on every rank; all must call it."""
    return cast(Tensor, cast(Any, t).full_tensor()) if sharded(t) else t


def beside(t: Tensor, weight: Tensor) -> Tensor:
    """`t` on the device of `weight` and, if both have the same shape, in the same shards.

    Nothing is communicated: each rank keeps its own part.
    """
    if not sharded(weight) or sharded(t) or t.shape != weight.shape:
        return t.to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    laid = cast(Any, weight)
    on = t.to(weight.device)
    return distribute_tensor(on, laid.device_mesh, laid.placements, src_data_rank=None)


def reshard_(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward pass that no backward pass follows.

    Until then modules hold whole weights, which would miss writes to the shards.
    """
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()


def placement(t: Tensor) -> Placement:
    """The groups whose ranks hold different parts of a tensor; () where every rank holds it all."""
    if not sharded(t):
        return ()
    laid, groups = cast(Any, t), []
    for axis, laid_out in enumerate(laid.placements):
        if laid_out.is_partial():
            raise Refused("a tensor lies in partial sums", remedy="reduce gradients before a step")
        if not laid_out.is_replicate():
            groups.append(laid.device_mesh.get_group(axis))
    return tuple(groups)


def sum_(t: Tensor, over: Placement) -> Tensor:
    """`t` summed in place over the ranks of each group."""
    for group in over:
        dist.all_reduce(t, group=group)
    return t


def before(count: Tensor, over: Placement) -> tuple[int, int]:
    """Of what the shards of a tensor hold `count` (0-dim) each: how many lie before this rank's
    shard, and how many in all."""
    first, total = 0, int(count)
    for group in reversed(over):
        mine = torch.tensor(total, device=count.device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        counts = [int(t) for t in every]
        first, total = first + sum(counts[: dist.get_rank(group)]), sum(counts)
    return first, total


def mean(t: Tensor) -> Tensor:
    """The mean of all entries of a tensor, sharded or not: 0-dim, equal on all ranks."""
    if not sharded(t):
        return t.mean()
    return sum_(local(t).sum(), placement(t)) / t.numel()


# --- agreement ------------------------------------------------------------------------------------


def reduce_(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all ranks, in place; one at a time, as they may be large."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)


def gather(numbers: list[int], device: torch.device) -> list[list[int]]:
    """The `numbers` of every rank, in the order of ranks."""
    if world() == 1:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(every, mine)
    return [t.tolist() for t in every]


def require_equal(values: Mapping[str, int], device: torch.device, *, remedy: str) -> None:
    """`Refused`, on every rank, if ranks differ in one of the numbers, naming it."""
    every = gather(list(values.values()), device)
    for column, what in enumerate(values):
        for other, row in enumerate(every):
            if row[column] != every[0][column]:
                raise Refused(f"rank {other} differs from rank 0 in {what}", remedy=remedy)


def number_of(value: Any) -> int:
    """A 64-bit hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True)


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A 64-bit hash of all entries and their positions; one pass, on the tensors' device."""
    total = 0
    for t in tensors:
        bits = t.detach().contiguous().flatten()
        size = min(bits.element_size(), 8)
        bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        total = 31 * total + t.numel()
        for piece in bits.split(PIECE):
            # An odd factor per position: a plain sum would miss two swapped entries, or a draw from
            # a generator, whose state counts numbers drawn up and numbers left down.
            odd = torch.arange(1, 2 * len(piece), 2, device=t.device)
            total = 31 * total + int((odd * piece).sum())
    return (total + 2**63) % 2**64 - 2**63


@torch.no_grad()
def align_(randomness: Tensor, weights: Mapping[str, Tensor], plan: Any) -> Tensor:
    """Give every rank the weights of rank 0, as DDP does with its module; returns rank 0's
    random states.

    Ranks may have been seeded differently, even before a new head was drawn. Sharded weights are
    left as they are: their parts differ by design. `Refused` where ranks differ in `plan` (plain
    values) or in the names, shapes or types of the weights.
    """
    if world() == 1:
        return randomness
    device = next(iter(weights.values())).device
    shapes = [[n, list(w.shape), str(w.dtype)] for n, w in weights.items()]
    values = {"the plan of the task": number_of(plan), "its parameters": number_of(shapes)}
    remedy = "bind the same model, recipe and number of steps on every rank"
    require_equal(values, device, remedy=remedy)
    randomness = randomness.to(device)
    dist.broadcast(randomness, 0)
    for w in weights.values():
        if not sharded(w):
            same = w.detach().contiguous()  # a copy if the weight is transposed
            dist.broadcast(same, 0)
            if same.data_ptr() != w.data_ptr():
                w.copy_(same)
    return randomness.cpu()


def require_aligned(
    randomness: Tensor, weights: Mapping[str, Tensor], steps: tuple[int, int]
) -> None:
    """`Refused` if ranks have diverged: each stepped with gradients of its own.

    steps: taken and left out. Takes one pass over the weights, and gathers four numbers.
    """
    if world() == 1:
        return
    every = [w for w in weights.values() if not sharded(w)]
    values = {
        "the number of steps": steps[0],
        "the number of skipped steps": steps[1],
        "its weights": fingerprint(every),
        "the random state of its methods": fingerprint([randomness]),
    }
    require_equal(values, next(iter(weights.values())).device,
                  remedy="train a DistributedDataParallel of the model, on every rank")  # fmt: skip


# --- what cannot be served ------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel: extra forward passes bypass its bookkeeping."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def refuse_unserved(model: nn.Module, optimizer: Any) -> None:
    """Refuse sharded training whose gradients or weights are not accessible by name.

    DeepSpeed and FSDP1 are recognised by attributes and class names: neither need be installed.
    """
    remedy = "use DistributedDataParallel, or fully_shard (FSDP2)"
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id") or hasattr(p, "ds_tensor"):
            raise Refused("DeepSpeed ZeRO-3 holds this weight in pieces without a name",
                          where=name, remedy=remedy)  # fmt: skip
        if getattr(p, "_is_flat_param", False) or type(p).__name__ == "FlatParameter":
            raise Refused("FSDP1 flattens weights into one without names", where=name,
                          remedy="use fully_shard (FSDP2)")  # fmt: skip
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise Refused("FSDP1 flattens weights into one without names",
                          where=name or "model", remedy="use fully_shard (FSDP2)")  # fmt: skip
        if _from("deepspeed", module):
            raise Refused("DeepSpeed steps behind torch's optimizer, where no hook sees gradients",
                          where=name or "model", remedy=remedy)  # fmt: skip
    link, seen = optimizer, set[int]()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        kind = type(link).__name__
        if _from("deepspeed", link) or _from("accelerate.utils.deepspeed", link):
            raise Refused(f"{kind}: under DeepSpeed ZeRO a step sees no gradient of its own rank's"
                          " weights", where="optimizer", remedy=remedy)  # fmt: skip
        if _from("torch.distributed.optim.zero_redundancy_optimizer", link):
            raise Refused("ZeroRedundancyOptimizer steps only a part of the weights on each rank",
                          where="optimizer", remedy=remedy)  # fmt: skip
        link = getattr(link, "optimizer", None)


def _from(package: str, thing: Any) -> bool:
    """Whether a class from `package` is among the classes of an object."""
    return any(f"{c.__module__}.".startswith(f"{package}.") for c in type(thing).__mro__)
