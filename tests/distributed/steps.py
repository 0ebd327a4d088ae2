"""Checks of DistributedDataParallel in a plain loop; run by `ranks.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from learning import Grid, batch, ddp, everything, learn, mine, rank, same_throughout
from torch import distributed as dist
from torch import nn

from holdfast.engine.head_first import HeadFirst
from holdfast.engine.head_last import HeadLast
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import (
    DPS,
    EWC,
    L2SP,
    SAM,
    SIFT,
    BitFit,
    ChildTuning,
    Extrapolation,
    LwF,
    Mixout,
    RecAdam,
    Replay,
)
from holdfast.methods.common.importance import diagonal_fisher
from holdfast.ops import distributed
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, make_batch
from holdfast.training.loop import load_checkpoint, save_checkpoint
from holdfast.training.manifest import commit, damage

LINEAR = ("a.weight", "b.weight")
RECIPES: dict[str, list[Method]] = {
    "dense": [DPS(stage=1, drop=0.5, modules=LINEAR)],
    "global": [DPS(stage=1, drop=0.25, modules=LINEAR, select="global")],
    "mix": [DPS(stage=2, drop=0.5, modules=LINEAR, mix=True)],
    "mix_weight": [DPS(stage=2, drop=0.5, modules=LINEAR, mix=True, noise="weight")],
    "retention": [
        DPS(stage=1, drop=0.5, modules=LINEAR, score="retention", fisher_labels="true")
    ],
    "ewc": [EWC(strength=0.5, labels="true", rows=24)],
    "l2sp": [L2SP(strength=0.25)],
    "replay": [Replay(memory=6, share=0.5, weight=0.5)],
    "sift": [SIFT(share=0.3, score="random", modules=("a.*",))],
    "child network": [ChildTuning(score="random", share=0.5, modules="all")],
    "bitfit": [BitFit()],
    "feedback": [Replay(memory=6, share=0.5, every=3, feedback=0.4)],
    "mixout": [Mixout(drop=0.5)],
    "recadam": [RecAdam(strength=0.5, slope=0.5, middle=2)],
    "extrapolation": [Extrapolation(rate=0.25)],
    "sam": [SAM(radius=0.25)],  # its last bits depend on the order of sums; the grid hides them
    "all": [DPS(stage=1, drop=0.5, modules=LINEAR), EWC(strength=0.5, labels="true"),
            L2SP(strength=0.25), Replay(memory=6, share=0.5)],
}  # fmt: skip


def check_methods_are_those_of_one_process() -> Iterator[None]:
    """State, weights and random state after every step and task, bit for bit on each rank.

    Fails where a seed is not shared, an anchor is taken before weights are aligned, a Fisher
    information is of a rank's own rows or a mean over ranks, a row is counted twice, a rank keeps
    or replays other rows, or a forward pass on one rank draws from the methods' generator.
    """
    alone = {name: list(learn(m)) for name, m in RECIPES.items()}
    yield
    for name, methods in RECIPES.items():
        try:
            same_throughout(alone[name], learn(methods))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_accumulation_without_sync() -> Iterator[None]:
    """Two micro-batches, the first of which is not reduced, are one batch of their rows."""
    methods = [*RECIPES["dense"], *RECIPES["ewc"]]
    alone = list(learn(methods))
    yield
    same_throughout(alone, learn(methods, pieces=2))


def check_nan_on_one_rank() -> Iterator[None]:
    """All ranks leave the step out, count it, and go on as one process that met it."""
    methods = [*RECIPES["mix"], *RECIPES["ewc"]]

    def seen(bound):  # type: ignore[no-untyped-def]
        return everything(bound) | {"counts": torch.tensor([bound.skipped, bound.step])}

    # In the very first step too: what is then undone are draws of this step, not the alignment.
    where = [("one", 0), ("two", 1)]
    alone = [list(learn(methods, poison=at, seen=seen)) for at in where]
    assert [a[-1]["counts"].tolist() for a in alone] == [[1, 4], [1, 3]]
    yield
    for expected, at in zip(alone, where, strict=True):
        same_throughout(expected, learn(methods, poison=at, seen=seen))


def check_clipping_norm() -> Iterator[None]:
    """The norm of reduced gradients; clipped weights stay equal on all ranks."""

    def seen(bound):  # type: ignore[no-untyped-def]
        return {"norm": bound.norm.clone()} | {n: w.detach().clone() for n, w in
                                               bound.weights.items()}  # fmt: skip

    alone = list(learn(RECIPES["dense"], clip=0.5, seen=seen))
    assert max(float(a["norm"]) for a in alone) > 0.5
    yield
    same_throughout(alone, learn(RECIPES["dense"], clip=0.5, seen=seen))


def fisher(model: nn.Module, sizes: list[int], **how):  # type: ignore[no-untyped-def]
    rows = {k: torch.cat([make_batch("one", i)[k] for i in range(3)]) for k in ("tokens", "labels")}
    cut = {k: v[: sum(sizes)].split(sizes) for k, v in rows.items()}
    batches = [dict(zip(cut, part, strict=True)) for part in zip(*cut.values(), strict=True)]
    generator = torch.Generator().manual_seed(3)
    owners = {n: (m,) for m_name, m in model.named_modules() for n in
              [f"{m_name}.{a}" for a in m._parameters]}  # fmt: skip
    found = diagonal_fisher(lambda b: model(**b), batches, dict(model.named_parameters()),
                            modules=owners, generator=generator, **how)  # fmt: skip
    return found | {"generator": generator.get_state()}


def check_fisher_is_of_all_rows() -> Iterator[None]:
    """Labels drawn for a row, not for a rank; batches of any sizes; only the first rows."""
    torch.manual_seed(0)
    model = Classifier().double().eval()
    cases = [
        ([8, 8, 8], {"labels": "sampled"}),
        ([5, 3, 7, 1, 2], {"labels": "sampled", "rows": 13}),
        ([7], {"labels": "expected"}),  # the second rank has nothing to do
        ([3, 4, 5], {"labels": "true"}),
    ]
    alone = [fisher(model, sizes, **how) for sizes, how in cases]
    yield
    for expected, (sizes, how) in zip(alone, cases, strict=True):
        found = fisher(model, sizes, **how)
        for name, f in expected.items():
            torch.testing.assert_close(found[name], f, rtol=1e-12, atol=0)
        prints = distributed.fingerprint(found.values())
        distributed.require_equal({"fisher": prints}, torch.device("cpu"), remedy="")


def check_other_rows_on_a_rank_are_refused() -> Iterator[None]:
    """A DistributedSampler's slices, at the end of a task: on both ranks, not on one."""
    yield
    for method in (EWC(labels="true"), Replay(memory=3)):
        model = Grid()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=2)
        slices = [mine(batch("one", i)) for i in range(2)]
        with pytest.raises(Refused, match=r"rank 1 differs from rank 0 in the rows.*all rows"):
            bound.end_task(slices)
        uneven = [batch("one", i) for i in range(2 - rank())]
        with pytest.raises(Refused, match="differs from rank 0 in the number of rows"):
            bound.end_task(uneven)


def check_forgotten_ddp_is_noticed() -> Iterator[None]:
    """Ranks that step each with gradients of its own are told so when the task ends (R1)."""
    yield
    model = Grid()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    bound = Recipe(methods=[L2SP()]).bind(model, optimizer, total_steps=2)
    bound.end_task()  # equal so far
    model(**mine(batch("one", 0))).loss.backward()
    optimizer.step()
    with pytest.raises(Refused, match=r"in its weights.*DistributedDataParallel"):
        bound.end_task()


def check_another_plan_is_refused() -> Iterator[None]:
    """Before anything is sent that the other rank would wait for."""
    yield
    model = Grid()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with pytest.raises(Refused, match="in the plan of the task"):
        Recipe(methods=[L2SP()]).bind(model, optimizer, total_steps=2 + rank())
    with pytest.raises(Refused, match="in the plan of the task"):
        Recipe(methods=[L2SP(strength=1.0 + rank())]).bind(model, optimizer, total_steps=2)
    if rank():
        model.b = nn.Linear(6, 3, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with pytest.raises(Refused, match="in its parameters"):
        Recipe().bind(model, optimizer, total_steps=2)


def check_uneven_micro_batches_replay_in_step() -> Iterator[None]:
    """Five rows on one rank and three on the other: draws and weights stay equal."""
    yield
    model = Grid()
    bound = Recipe(methods=[Replay(memory=6, share=0.5)]).unbound(seed=7)
    net = None
    for task in ("one", "two", "three"):
        optimizer = torch.optim.SGD(model.parameters(), lr=1 / 64)
        bound.begin_task(task, optimizer, 4, model=model)
        net = net or ddp(model)
        for step in range(4):
            optimizer.zero_grad()
            cut = slice(0, 5) if rank() == 0 else slice(5, 8)
            part = {k: v[cut] for k, v in batch("one", step).items()}
            out = net(**part)
            (out.loss + bound.penalty(part, out)).backward()
            optimizer.step()
        bound.end_task([batch(task, step) for step in range(2)])  # it compares the ranks


def check_checkpoints_of_a_loop_go_on() -> Iterator[None]:
    """One manifest over all that ranks write, each its own place and draws; others are refused."""

    def bind(seed):  # type: ignore[no-untyped-def]
        model = Grid()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
        recipe = Recipe(methods=[DPS(stage=2, drop=0.5, modules=LINEAR, mix=True)])
        return recipe.unbound(seed=seed), model, optimizer

    def went_on(bound, net, optimizer, data, until):  # type: ignore[no-untyped-def]
        while bound.step < until:
            optimizer.zero_grad()
            own = torch.randint(0, 2, (), generator=data) + torch.rand(()).round()
            part = mine(batch("one", bound.step + 10 * int(own)))
            net(**part).loss.backward()
            optimizer.step()
        return everything(bound) | {"drawn": torch.rand(3), "data": data.get_state()}

    yield
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, 0)
        saved = Path(shared[0]) / "checkpoint-3"
        data = torch.Generator().manual_seed(rank())
        torch.manual_seed(rank())
        bound, model, optimizer = bind(7)
        bound.begin_task("one", optimizer, 8, model=model)
        went_on(bound, ddp(model), optimizer, data, 3)
        for _ in range(2):  # also where the folder is written anew
            save_checkpoint(saved, bound, position={"rank": rank()}, data=data)
            assert damage(saved) is None
        whole = went_on(bound, ddp(model), optimizer, data, 8)
        data, (bound, model, optimizer) = torch.Generator(), bind(8)
        bound.begin_task("one", optimizer, 8, model=model)
        assert load_checkpoint(saved, bound, data=data) == {"rank": rank()}
        again = went_on(bound, ddp(model), optimizer, data, 8)
        assert all(torch.equal(whole[k], again[k]) for k in whole.keys() | again.keys())
        dist.barrier()
        own = saved / f"loop-{rank()}.json"
        own.write_text(own.read_text().replace('"ranks": 2', '"ranks": 4'))
        dist.barrier()
        for says in ("was saved on 4 ranks, not on 2", "is missing; .* on as many ranks"):
            if rank() == 0:
                commit(saved)
            dist.barrier()
            with pytest.raises(Refused, match=says):
                load_checkpoint(saved, bound, data=data)
            dist.barrier()
            own.unlink(missing_ok=True)
            dist.barrier()


def check_a_folder_that_ranks_do_not_share_is_refused() -> Iterator[None]:
    """At the save, on both: what was missing showed only when rank 1 had to load it (R8)."""
    yield
    with tempfile.TemporaryDirectory() as folder:
        model = Grid()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        bound = Recipe(methods=[L2SP()]).bind(model, optimizer, total_steps=2)
        saved = Path(folder) / "checkpoint-1"
        with pytest.raises(Refused, match=r"rank 0 does not see loop-1\.json, others-1\.safetens"):
            save_checkpoint(saved, bound, position={})
        assert damage(saved) is not None  # not declared whole
        dist.barrier()


def check_ddp_may_be_bound_itself() -> Iterator[None]:
    """The wrapper is taken off: names are canonical, extra forward passes send nothing."""
    yield
    net = ddp(Grid())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    bound = Recipe(methods=[EWC(labels="true")]).bind(net, optimizer, total_steps=2)
    assert list(bound.weights) == ["a.weight", "a.bias", "b.weight"]
    assert bound.models["task"] is net.module
    bound.end_task([batch("one", 0)])  # rank 1 runs no forward pass: DDP's would wait for it
    out = net(**mine(batch("one", 1)))
    out.loss.backward()
    optimizer.step()
    assert bound.step == 1


def check_agreement_by_content() -> Iterator[None]:
    """Fingerprints see an exchange, a sign of zero, a shape and draws; `gather` keeps the order."""
    yield
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    drawn = torch.Generator().manual_seed(0)
    states = [drawn.get_state()]
    torch.rand(3, generator=drawn)
    states.append(drawn.get_state())
    kinds: list[list[list[torch.Tensor]]] = [
        [[one, two], [two, one], [one], [two], [torch.cat([one, two])]],
        [[-torch.zeros(2)], [torch.zeros(2)], [torch.zeros(3)], [torch.ones(2).bool()]],
        [[states[0]], [states[1]]],
        [[one.bfloat16()], [two.bfloat16()]],
    ]
    for prints in kinds:
        assert len({distributed.fingerprint(p) for p in prints}) == len(prints)
    assert distributed.gather([rank(), 5], torch.device("cpu")) == [[0, 5], [1, 5]]
    assert dist.get_world_size() == distributed.world() == 2


def check_a_head_fitted_first_is_that_of_one_process() -> Iterator[None]:
    """Every rank fits the same head to all rows, and rows of a rank's own are refused."""
    rows = [make_batch("one", step) for step in range(4)]

    def fitted(how: HeadFirst, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        torch.manual_seed(rank())
        model = Classifier()
        net = ddp(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound = Recipe(head_first=how).bind(net, optimizer, total_steps=20, data=rows)
        assert bound.fitted is not None
        return model.classifier.weight.detach()

    kinds = [HeadFirst(), HeadFirst(steps=6)]
    alone = [fitted(how, rows) for how in kinds]
    yield
    for how, head in zip(kinds, alone, strict=True):
        assert torch.equal(fitted(how, rows), head)
        with pytest.raises(Refused, match="the rows"):
            fitted(how, rows[rank() : rank() + 2])


def check_a_head_fitted_last_is_that_of_one_process() -> Iterator[None]:
    """Every rank fits the same head to all rows, and rows of a rank's own are refused."""
    rows = [make_batch("one", step) for step in range(4)]

    def fitted(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        torch.manual_seed(0)
        model = Classifier()
        net = ddp(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound = Recipe(head_last=HeadLast()).bind(net, optimizer, total_steps=20)
        bound.step = 1
        bound.end_task(rows)
        assert bound.fitted_last is not None
        return model.classifier.weight.detach()

    alone = fitted(rows)
    yield
    assert torch.equal(fitted(rows), alone)
    with pytest.raises(Refused, match="the rows"):
        fitted(rows[rank() : rank() + 2])


def check_a_child_network_is_that_of_one_process() -> Iterator[None]:
    """Of Fisher information by rows, which ranks divide, and by batches, which they do not."""
    rows = [make_batch("one", step) for step in range(3)]

    def held(estimate: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(rank())
        net = ddp(Classifier())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        method = ChildTuning.from_dict({"estimate": estimate, "labels": "true"})
        bound = Recipe(methods=[method]).bind(net, optimizer, total_steps=20, data=rows)
        return {
            n: t.nan_to_num(nan=7.0) for n, t in bound.states["child_tuning"].slot("held").items()
        }

    alone = {estimate: held(estimate) for estimate in ("rows", "batches")}
    yield
    for estimate, expected in alone.items():
        found = held(estimate)
        assert found.keys() == expected.keys() and len(found) > 4
        assert all(torch.equal(found[n], t) for n, t in expected.items()), estimate


def check_near_rows_are_those_of_one_process() -> Iterator[None]:
    """Every rank measures all old rows and asks for all new ones; rows of its own are refused."""
    rows = {task: [make_batch(task, step) for step in range(4)] for task in ("one", "two")}

    def kept(part: slice = slice(None)) -> dict[str, torch.Tensor]:
        torch.manual_seed(rank())
        bound, encoder = Recipe(methods=[LwF(rows="near")]).unbound(), Classifier().encoder
        for task in rows:
            net = ddp(Classifier(encoder=encoder))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            bound.begin_task(task, optimizer, 20, model=net, data=rows[task])
            if task == "one":
                bound.end_task(rows[task][part])
        return {**bound.states["lwf"].tensors["moments"], **bound.states["lwf"].tensors["answers"]}

    alone = kept()
    assert alone.keys() == {"one", "one/shares"} and alone["one/shares"].min() < 0.9
    yield
    found = kept()
    for name, tensor in alone.items():
        assert torch.equal(found[name], tensor), name
    with pytest.raises(Refused, match="the rows"):
        kept(slice(rank(), rank() + 2))
