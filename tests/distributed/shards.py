"""Checks of tensors in shards (DTensor, FSDP2); run by `ranks.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import Grid, Rounded, batch, learn, mine, rank, same_throughout
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from holdfast.engine.method import Method
from holdfast.engine.state import State, pack, unpack
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, L2SP, SIFT, BitFit, ChildTuning, DynamicSubset, MoFO, Replay
from holdfast.methods.common.anchor import important_rows, pull_
from holdfast.ops import distributed, selection
from holdfast.ops.gradients import clip_, total_norm
from holdfast.ops.selection import select, threshold, top
from holdfast.recipe import Recipe

LINEAR = ("a.weight", "b.weight")
SHARDED: dict[str, list[Method]] = {
    "l2sp": [L2SP(strength=0.25)],
    "ewc": [EWC(strength=0.5, labels="true", rows=24)],
    "both": [EWC(strength=0.5, labels="true", online=True, decay=0.5), L2SP(strength=0.25)],
    "replay": [Replay(memory=6, share=0.5, weight=0.5)],
    "dense": [DPS(stage=1, drop=0.5, modules=LINEAR)],
    "global": [DPS(stage=1, drop=0.25, modules=LINEAR, select="global")],
    "gradient": [DPS(stage=1, drop=0.5, modules="all", freeze="gradient")],
    "retention": [
        DPS(stage=1, drop=0.5, modules=LINEAR, score="retention", fisher_labels="true")
    ],
    "sift": [SIFT(share=0.3, batches=2, modules=("a.*",))],
    "sift at random": [SIFT(share=0.3, score="random", modules="all")],
    "child network": [ChildTuning(score="random", share=0.5, modules="all")],
    "bitfit": [BitFit()],
    "dynamic subset": [DynamicSubset(share=0.3)],
}  # fmt: skip


def shard(t: Tensor, axis: int = 0) -> DTensor:
    return distribute_tensor(t, init_device_mesh("cpu", (2,)), [Shard(axis)])


def by_sort(scores: Tensor, drop: float) -> Tensor:
    n = scores.numel()
    rank = min(max(math.ceil(n * (1 - Fraction(str(drop)))), 1), n)
    return scores.flatten().sort(descending=True).values[rank - 1]


def awkward() -> dict[str, Tensor]:
    """Scores of one and of several dimensions, tied, zero, tiny, infinite, of both signs."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(37, 5, generator=draw)
    return {
        "uneven": normal.square(),  # 19 and 18 rows
        "signed": normal * 1e-3,
        "alone": torch.tensor([3.0]),  # the second shard is empty
        "ties": torch.randint(0, 3, (50,), generator=draw).float(),
        "zeros": torch.zeros(9),
        "minus": torch.tensor([0.0, -0.0, -0.0, 0.0, -1.0]),
        "denormal": torch.tensor([1e-45, 3e-45, 0.0, 2e-45, -1e-45, 1e-40]),
        "inf": torch.tensor([math.inf, 1.0, math.inf, -math.inf, 2.0, 3.0]),
        "double": torch.rand(23, generator=draw, dtype=torch.float64) + 1e-12,
    }


def check_selection_is_global() -> Iterator[None]:
    """As a sort of the whole tensor, and not of a shard (R3): each tensor, and all together."""
    yield
    whole = awkward()
    parts = {n: shard(t) for n, t in whole.items()}
    for drop in (0.01, 0.3, 0.5, 0.9, 0.999):
        masks = select(parts, drop)
        for name, t in whole.items():
            assert isinstance(masks[name], DTensor)
            assert torch.equal(masks[name].full_tensor(), t >= by_sort(t, drop)), (name, drop)
            assert threshold(parts[name], drop) == by_sort(t, drop)
        joined = torch.cat([t.double().flatten() for t in whole.values()])
        masks = select(parts, drop, "global")
        found = torch.cat([m.full_tensor().flatten() for m in masks.values()])
        assert torch.equal(found, joined >= by_sort(joined, drop))
        # Some whole on every rank, some in shards, along another axis or replicated: counted once.
        mesh = init_device_mesh("cpu", (2,))
        mixed = {"a": whole["uneven"], "b": shard(whole["signed"], 1),
                 "c": distribute_tensor(whole["ties"], mesh, [Replicate()])}  # fmt: skip
        joined = torch.cat([whole[n].flatten() for n in ("uneven", "signed", "ties")])
        masks = select(mixed, drop, "global")
        found = torch.cat([distributed.full(m).flatten() for m in masks.values()])
        assert torch.equal(found, joined >= by_sort(joined, drop))


def check_exact_selection_breaks_ties_as_one_process() -> Iterator[None]:
    """The first of equal entries, in the order of the whole tensor, over one axis of shards or two;
    a tensor on every rank counts once."""
    yield
    whole, line = awkward(), init_device_mesh("cpu", (2,))
    for share in (0.01, 0.3, 0.5, 0.999):
        for scope in ("tensor", "global"):
            expected = top(whole, share, scope)
            for mesh, laid in (
                (line, [Shard(0)]),
                (line, [Replicate()]),
                (init_device_mesh("cpu", (1, 2)), [Shard(0), Shard(0)]),
            ):
                parts = {n: distribute_tensor(t, mesh, laid) for n, t in whole.items()}
                found = top(parts, share, scope)
                for name, mask in expected.items():
                    assert torch.equal(distributed.full(found[name]), mask), (name, share, scope)


def check_selection_tells_little() -> Iterator[None]:
    """One all-reduce a digit for all tensors together: 4 for float32, of 2 KiB a tensor."""
    yield
    parts = {n: shard(t) for n, t in awkward().items() if n != "double"}
    sent: list[int] = []
    plain = torch.distributed.all_reduce

    def counted(t: Tensor, *args: Any, **how: Any) -> Any:
        sent.append(t.nbytes)
        return plain(t, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", counted)
        patch.setattr(selection, "CHUNK", 7)
        select(parts, 0.3)
    assert sent == [256 * 8 * len(parts)] * 4


def check_norms_over_meshes() -> Iterator[None]:
    """Of shards, replicas and whole tensors together: each entry once, equal on all ranks."""
    yield
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randn(s, generator=draw) for s in ((5, 3), (1, 4), (7,), (2, 2))]
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    spread = [
        distribute_tensor(whole[0], line, [Shard(0)]),
        distribute_tensor(whole[1], square, [Replicate(), Shard(0)]),  # an empty shard
        distribute_tensor(whole[2].clone(), line, [Replicate()]),
        whole[3].clone(),
    ]
    norm = total_norm(spread)
    torch.testing.assert_close(norm, total_norm(whole), rtol=1e-6, atol=0)
    assert len({tuple(r) for r in distributed.gather([norm.view(torch.int32).item()],
                                                     norm.device)}) == 1  # fmt: skip
    clip_(spread, norm, 0.5)
    for t, g in zip(whole, spread, strict=True):
        torch.testing.assert_close(distributed.full(g), t * 0.5 / (norm + 1e-6))
    large = [distribute_tensor(torch.full((4,), 1e19), line, [Shard(0)])]
    assert total_norm(large) == 2e19  # its square is above float32
    one_bad = torch.ones(4)
    one_bad[3] = torch.nan  # in the shard of rank 1
    assert not torch.isfinite(total_norm([distribute_tensor(one_bad, line, [Shard(0)])]))


def whole_state(bound: Any) -> dict[str, Tensor]:
    """All state and weights, put together on every rank."""
    found = {f"weight {n}": distributed.full(w.detach()).clone() for n, w in bound.weights.items()}
    for method, state in bound.states.items():
        for slot, entries in state.weights.items():
            for name, t in entries.items():
                lies = distributed.sharded(t) == distributed.sharded(bound.weights[name])
                assert lies, f"{slot} of {name} does not lie where its weight does"
                found[f"{method} {slot} {name}"] = distributed.full(t).clone()
    return found | {"generator": bound.generator.get_state()}


def fsdp(model: nn.Module) -> nn.Module:
    if not torch.distributed.is_initialized() or hasattr(model, "unshard"):
        return model
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.a, mesh=mesh)  # type: ignore[arg-type]
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def check_methods_over_fsdp() -> Iterator[None]:
    """State and weights after every step and task are those of one process, bit for bit."""
    alone = {n: list(learn(m, seen=whole_state)) for n, m in SHARDED.items()}
    yield
    for name, methods in SHARDED.items():
        try:
            same_throughout(alone[name],
                            learn(methods, wrap=fsdp, seen=whole_state))  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_momentum_is_ranked_over_shards() -> Iterator[None]:
    """MoFO moves the entries that it moves in one process."""

    def moved(model: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
        methods = [MoFO(share=0.3, head=False), Rounded()]
        bound = Recipe(methods=methods).bind(model, optimizer, total_steps=4)
        for step in range(4):
            optimizer.zero_grad()
            model(**mine(batch("one", step))).loss.backward()
            optimizer.step()
        return {n: distributed.full(w.detach()).clone() for n, w in bound.weights.items()}

    alone = moved(Grid())
    yield
    for name, w in moved(fsdp(Grid())).items():
        assert torch.equal(w, alone[name]), name


def check_nan_in_one_shard() -> Iterator[None]:
    """It reaches only some ranks' shards; all leave the step out, and count it."""
    yield
    model = fsdp(Grid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    bound = Recipe(methods=[L2SP()], max_grad_norm=1.0).bind(model, optimizer, total_steps=4)
    before = whole_state(bound)
    model(**mine(batch("one", 0))).loss.backward()
    if rank() == 1:
        bound.weights["b.weight"].grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
    optimizer.step()
    assert (bound.step, bound.skipped) == (0, 1)
    assert all(torch.equal(t, before[n]) for n, t in whole_state(bound).items())


def check_rows_found_by_one_process_serve_shards() -> Iterator[None]:
    """EWC's state of one process names the rows that matter; in shards the pull is the same."""
    yield
    draw = torch.Generator().manual_seed(0)
    w, aim, f = (torch.rand((6, 3), generator=draw) for _ in range(3))
    f[[0, 2, 3, 5]] = 0
    rows = important_rows({"w": f})
    assert rows["w"].tolist() == [1, 4]
    pulled = []
    for lay in (lambda t: t, shard):
        grads: dict[str, Tensor | None] = {"w": lay(torch.ones(6, 3))}
        pull_(grads, {"w": lay(w)}, {"w": lay(aim)}, 2.0, {"w": lay(f)}, rows)
        assert grads["w"] is not None
        pulled.append(distributed.full(grads["w"]))
    torch.testing.assert_close(*pulled)


def check_mixing_is_refused() -> Iterator[None]:
    yield
    model = fsdp(Grid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with pytest.raises(Refused, match=r"dps cannot mix weights in shards.*Distributed"):
        Recipe(methods=[DPS(mix=True, modules=LINEAR)]).bind(model, optimizer, total_steps=4)


def check_state_follows_the_world() -> Iterator[None]:
    """Two ranks, one, two again: bit for bit. Rank 0 alone is given what is saved; shards are
    parts of their own; only a tensor at a time is put together."""
    yield
    draw = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(s, generator=draw) for n, s in
             {"w": (5, 3), "one": (1,), "plain": (4,)}.items()}  # fmt: skip
    whole["w"][0, 0] = torch.nan
    weights: dict[str, Tensor] = {n: shard(t) if n != "plain" else t for n, t in whole.items()}
    state, two = {"m": State()}, {"m": State()}
    kept = {n: distributed.beside(t, weights[n]) for n, t in whole.items()}
    state["m"].slot("kept").update(kept)
    state["m"].tensors["rows"] = {"ids": torch.arange(3)}
    tensors, numbers = pack(state)
    assert bool(tensors) == (rank() == 0)
    if rank() == 0:
        assert all(not distributed.sharded(t) for t in tensors.values())
        for name, t in whole.items():
            assert torch.equal(tensors[f"m/weights/kept/{name}"].view(torch.int32),
                               t.view(torch.int32))  # fmt: skip
    files = [tensors]
    torch.distributed.broadcast_object_list(files, 0)  # what a shared disk does
    one = {"m": State()}
    unpack(one, files[0], numbers, whole)  # one process: whole weights
    again, _ = pack(one)
    unpack(two, again, numbers, weights)
    for name, t in two["m"].slot("kept").items():
        mine_, theirs = distributed.local(t), distributed.local(state["m"].slot("kept")[name])
        assert distributed.sharded(t) == (name != "plain")
        assert torch.equal(mine_.view(torch.int32), theirs.view(torch.int32))
        assert mine_.untyped_storage().nbytes() == mine_.nbytes
    rows, part = 3 - rank(), 1 - rank()  # of five rows, of one number
    assert two["m"].bytes() == 4 * (3 * rows + part + 4) + 8 * 3


def check_a_run_goes_on_in_another_world() -> Iterator[None]:
    """EWC and L2-SP under FSDP2, saved in the second task, go on in one process as undisturbed."""
    methods = [EWC(strength=0.5, labels="true"), L2SP(strength=0.25)]
    moments = list(learn(methods, seen=whole_state))
    yield
    saved: dict[str, Any] = {}

    def seen(bound: Any) -> dict[str, Tensor]:
        saved["state"] = bound.state_dict()
        return whole_state(bound)

    run = learn(methods, wrap=fsdp, seen=seen)
    for _ in range(7):  # two steps into the second task
        last = next(run)
    assert bool(saved["state"]["tensors"]) == (rank() == 0)
    files = [saved["state"]]
    torch.distributed.broadcast_object_list(files, 0)
    # One process and two ranks take it up, each from the same files, and take the next step.
    for wrap in (fsdp, None):
        model: nn.Module = Grid()
        for name, p in model.named_parameters():
            p.data.copy_(last[f"weight {name}"])
        model = wrap(model) if wrap else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        bound = Recipe(methods=[*methods, Rounded()]).unbound()
        with pytest.MonkeyPatch.context() as patch:
            if wrap is None:
                patch.setattr(distributed, "world", lambda: 1)
            bound.begin_task("two", optimizer, 4, model=model)
            bound.load_state_dict(files[0])
            whole = batch("two", 2)
            model(**(mine(whole) if wrap else whole)).loss.backward()
            optimizer.step()
        for name, t in whole_state(bound).items():
            assert torch.equal(t, moments[7][name]), (name, wrap)


def check_fisher_of_shards() -> Iterator[None]:
    """Every class and drawn labels too; every rank is at every row, and gradients are put back."""
    from holdfast.methods.common.importance import diagonal_fisher

    class Two(Grid):
        def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.a(x) + self.b(x))

    def estimate(model: nn.Module, labels: Any) -> dict[str, Tensor]:
        first, other = model.a.weight, model.b.weight  # type: ignore[union-attr]
        first.grad = torch.ones_like(first)  # type: ignore[arg-type]
        named = dict(model.named_parameters())
        owners = {n: (model.get_submodule(n.rpartition(".")[0]),) for n in named}
        del named["b.weight"]
        found = diagonal_fisher(lambda b: model(**b), [batch("one", 0), batch("one", 1, 3)], named,
                                modules=owners, labels=labels,
                                generator=torch.Generator().manual_seed(5))  # fmt: skip
        # What it read stays, and what it was not asked for is left without a gradient.
        assert bool((distributed.full(first.grad) == 1).all()) and other.grad is None
        return {n: distributed.full(f) for n, f in found.items()}

    alone = {labels: estimate(Two(), labels) for labels in ("sampled", "expected")}
    yield
    for labels, expected in alone.items():
        found = estimate(fsdp(Two()), labels)
        for name, f in expected.items():
            torch.testing.assert_close(found[name], f, rtol=1e-12, atol=0)
