"""Checks of merging and of Gram matrices on ranks; run by `ranks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layered import Net, begin
from learning import STEPS, Grid, batch, ddp, learn, rank, same_throughout
from shards import fsdp, whole_state
from torch import Tensor, nn

from holdfast.engine.grams import measure
from holdfast.errors import Refused
from holdfast.methods import Merge
from holdfast.ops import distributed
from holdfast.recipe import Recipe

METHODS = {
    "whole": Merge(strength=2.0, rows=14),  # of batches of 8, 5 and 3 rows
    "blocks": Merge(structure="block", width=3, again=True),
    "one row": Merge(rows=1, strength=0.5),
}


def seen(bound: Any) -> dict[str, Tensor]:
    """All weights and state, put together, and what the model answers: it must see what was
    written. Just before the end of a task FSDP2 is left with whole weights in the modules."""
    found = whole_state(bound)
    for slot, entries in bound.states["merge"].tensors.items():
        found |= {f"{slot} {n}": t.clone() for n, t in entries.items()}
    model = bound.models[bound.task]
    if bound.task in bound.finished:  # the next optimizer takes what it finds in the modules
        assert {id(p) for p in model.parameters()} == {id(w) for w in bound.weights.values()}
    with torch.no_grad():
        found["answers"] = model(**batch("one", 9)).logits.clone()
    if bound.step < STEPS or bound.task in bound.finished:
        distributed.reshard_(model)
    return found


def close_throughout(expected: list[dict[str, Tensor]], found: Iterator[Any]) -> None:
    for one, two in zip(expected, found, strict=True):
        factors = {n for n in one if n.startswith("factor")}  # equal up to a rotation
        assert factors == {n for n in two if n.startswith("factor")}
        for name in one:
            ours, theirs = ((t[name].double() if name not in factors else
                             (t[name].T @ t[name]).double()) for t in (two, one))  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


def check_merging_is_that_of_one_process() -> Iterator[None]:
    """Replicated and in shards; every sum is of whole numbers: bit for bit.

    Fails where a rank's own rows are all that is measured, where some count twice, where modules
    still hold weights that were gathered before the merge, and where ranks gather in other orders.
    """
    alone = {n: list(learn([m], seen=seen)) for n, m in METHODS.items()}
    yield
    for name, method in METHODS.items():
        for wrap in (ddp, fsdp):
            try:
                same_throughout(alone[name], learn([method], wrap=wrap, seen=seen))
            except AssertionError as error:
                raise AssertionError(f"{name}, {wrap.__name__}: {error}") from error


def check_low_ranks_of_enough_rank_add_up() -> Iterator[None]:
    method = Merge(structure="low_rank", width=2, rank=7)
    alone = list(learn([method], seen=seen))
    yield
    for wrap in (ddp, fsdp):
        close_throughout(alone, learn([method], wrap=wrap, seen=seen))


class Routed(nn.Module):
    """`inner` is called only in batches of long rows, `words` in short ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.words = nn.Linear(4, 3), nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.shape[1] > 3 else x + self.words(x[..., 0].long().abs())


def grams_of(sizes: list[int], *, low: bool = False, bad: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    bound = Recipe().unbound(seed=0)
    begin(bound, "one", Net(Routed()))
    draw = torch.Generator().manual_seed(1)
    data = [{"x": torch.randint(-2, 3, (2, size, 4), generator=draw).float()} for size in sizes]
    if bad is not None:
        data[bad]["x"][0, 0, 0] = torch.inf
    bound.data = lambda: data
    found = measure(bound, structure="low_rank" if low else "full", width=1, rank=5)
    return {n: t for key, m in found.moments.items() for n, t in
            {f"{key} {k}": t for k, t in m.tensors().items()}.items()} | found.counts  # fmt: skip


def check_ranks_that_see_other_layers_add_up() -> Iterator[None]:
    """Each layer is called on one rank only; and a rank may have no batch at all."""
    cases = [[5, 3], [3, 5], [5], [3, 5, 5, 5, 3]]
    alone = [grams_of(sizes) for sizes in cases]
    low = grams_of([5, 5, 3, 5], low=True)
    assert [len(a) for a in alone] == [2, 2, 1, 2]
    yield
    for sizes, expected in zip(cases, alone, strict=True):
        found = grams_of(sizes)
        assert found.keys() == expected.keys(), sizes
        assert all(torch.equal(found[n], t) for n, t in expected.items()), sizes
    found = grams_of([5, 5, 3, 5], low=True)
    for name in low:
        ours, theirs = ((t[name].T @ t[name]) if name.endswith("factor") else t[name]
                        for t in (found, low))  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, msg=name)
    distributed.require_equal(
        {"sums": distributed.fingerprint(found.values())}, torch.device("cpu"), remedy=""
    )


def check_inputs_that_are_not_finite_are_refused_on_every_rank() -> Iterator[None]:
    """Though one rank alone has met them: the other would wait for ever."""
    yield
    for low in (False, True):
        for bad in (0, 1):
            with pytest.raises(Refused, match=r"inner\.weight: the inputs of this layer are not"):
                grams_of([5, 5], low=low, bad=bad)


def check_other_rows_on_a_rank_are_refused_before_merging() -> Iterator[None]:
    yield
    model = Grid()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    bound = Recipe(methods=[Merge()]).bind(model, optimizer, total_steps=2)
    with pytest.raises(Refused, match=r"rank 1 differs from rank 0 in the rows"):
        bound.end_task([batch("one", rank())])
