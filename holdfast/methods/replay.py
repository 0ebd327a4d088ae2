"""Replay: train on a few kept rows of every old task along with the new ones.

    L(new micro-batch) + weight · mean over replayed rows of their own task's loss

Each finished task leaves a uniform sample of its rows (reservoir sampling, Vitter 1985, algorithm
R), so keeping old rows must be *allowed*; where it is, replay is the bar to beat (Chaudhry et al.
2019, arXiv 1902.10486). The old task's head computes its loss and is not trained further. Dropout
in the replayed forward pass draws from the method's own generator.

With several ranks each holds the same rows, sampled from all rows of the task, and replays its own
part of one draw for the whole batch.

With `feedback` the losses say when: after a step that replayed, with the means ℓ of its replayed
and of its new rows over all micro-batches and ranks,

    share = ℓ_old / (ℓ_old + ℓ_new);   the next step replays if share > feedback

and every n-th step does anyway, to look again: a share that nothing measures would stay as it is.
The idea is that of dynamic scale training (Chen et al. 2020, arXiv 2004.12432), which chooses the
next batch by a share of losses; applied to old rows it is ours. What it is worth shows only beside
`every` and `share` alone at as many rows: the state counts them (`rehearsed`, by learned task).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from holdfast.config import Share, count, exactly
from holdfast.engine.batches import LABELS, Seen, loss_of, rows_in, rows_of
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.ops import distributed


@dataclass(frozen=True, kw_only=True)
class Replay(Method):
    """Rehearse kept rows of old tasks.

    memory: rows kept of each task, a share of its rows or a number.
    share: rows replayed per row of the micro-batch, 0 < share ≤ 1 (rounded up to whole rows).
    every: replay in every n-th optimizer step only.
    weight: weight of the replayed loss, ≥ 0.
    feedback: replay in the steps between too while the old rows' share of the loss is above this,
        0 < feedback < 1; needs `every` above 1, and losses that are not negative. None: do not.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "rehearses kept rows of old tasks"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv 1902.10486"
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "forward and backward of the replayed rows"
    use: ClassVar[str] = "the next task, where old rows may be kept"
    bytes_per_weight: ClassVar[str] = "0 (the kept rows: 8 bytes a token and field)"
    shares: ClassVar[tuple[str, ...]] = ("memory",)
    needs_old_task: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("share", "every", "weight", "feedback")
    ranges: ClassVar[Mapping[str, Range]] = {
        "share": Range(0.05, 1.0, log=True),
        "weight": Range(0.1, 10.0, log=True),
    }

    memory: Share = 0.05
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    every: Annotated[int, Field(gt=0)] = 1
    weight: Annotated[float, Field(ge=0)] = 1.0
    feedback: Annotated[float, Field(gt=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback is not None and self.every == 1:
            raise Refused("every step replays, so that there is nothing to decide",
                          where="replay.feedback", remedy="every=10, say")  # fmt: skip

    @property
    def needs_data(self) -> bool:
        return True

    def penalty(self, view: View) -> Tensor:
        sizes: dict[str, int] = view.state.numbers.get("rows", {})
        first = next(iter(view.weights.values()))
        if not sizes or (view.step % self.every and not self._above(view)):
            return torch.zeros((), device=first.device)
        if view.inputs is None:
            raise Refused("replay counts the rows of the micro-batch", where="bound.penalty",
                          remedy="call bound.penalty(batch, outputs)")  # fmt: skip
        wanted = math.ceil(exactly(self.share, rows_in(view.inputs)))
        ranks = [n for (n,) in distributed.gather([wanted], first.device)]
        every = torch.randint(sum(sizes.values()), (sum(ranks),), generator=view.generator)
        picked = every.split(ranks)[distributed.rank()]
        total, start = torch.zeros((), device=first.device), 0
        for task, size in sizes.items():
            mine = picked[(picked >= start) & (picked < start + size)] - start
            anywhere = bool(((every >= start) & (every < start + size)).any())
            start += size
            if not len(mine) and anywhere:  # matches the draw of another rank's forward pass
                torch.randint(2**62, (), generator=view.generator)
            if len(mine):
                batch = _trim({k: t[mine] for k, t in view.state.tensors[task].items()})
                batch = {k: t.to(first.device) for k, t in batch.items()}
                loss = loss_of(view.forward(batch, task=task))
                total = total + loss * (len(mine) / wanted)
        if self.feedback is not None:
            self._note(view, total, sum(ranks))
        return self.weight * total

    def _above(self, view: View) -> bool:
        share: float = view.state.numbers.get("share", 0.0)
        return self.feedback is not None and share > self.feedback

    def _note(self, view: View, old: Tensor, rows: int) -> None:
        """A micro-batch's losses and rows, forgotten if its step is left out."""
        if view.loss is None:
            raise Refused("feedback compares with the loss of the new rows", where="bound.penalty",
                          remedy="call bound.penalty(batch, outputs, loss)")  # fmt: skip
        losses = torch.stack([old.detach().float(), view.loss.detach().float()])
        view.scratch["losses"] = view.scratch.get("losses", 0.0) + losses
        view.scratch["rows"] = view.scratch.get("rows", 0) + rows

    def after_step(self, view: View) -> None:
        if "losses" not in view.scratch:
            return
        distributed.reduce_([view.scratch["losses"]])  # all ranks decide alike
        old, new = view.scratch["losses"].tolist()
        view.state.numbers["share"] = old / (old + new) if old + new > 0 else 0.0
        counts = view.state.numbers.setdefault("rehearsed", {})
        counts[view.task] = counts.get(view.task, 0) + view.scratch["rows"]

    def end_task(self, view: View) -> None:
        kept: list[dict[str, Tensor]] = []
        size = self.memory
        if isinstance(size, float):
            size = count(size, sum(1 for _ in rows_of(view.data())))
        seen = Seen()
        for i, row in enumerate(rows_of(seen.through(view.data()))):
            # Algorithm R: row i replaces a kept one with probability size / (i + 1).
            place = i if i < size else int(torch.randint(i + 1, (), generator=view.generator))
            if place < size:
                tensors = {k: v.cpu() for k, v in row.items() if isinstance(v, Tensor)}
                kept[place : place + 1] = [tensors]
        seen.require_equal(next(iter(view.weights.values())).device)
        if not kept:
            raise Refused("no rows to keep", where="replay", remedy="pass the task's rows as data=")
        view.state.tensors[view.task] = _stack(kept, _padding(view))
        view.state.numbers.setdefault("rows", {})[view.task] = len(kept)


def _padding(view: View) -> dict[str, float]:
    """The padding value after a shorter row, by field; 0 for other fields."""
    config = getattr(view.bound.models[view.task], "config", None)
    pad = getattr(config, "pad_token_id", None)
    return {"input_ids": pad if pad is not None else 0, "labels": -100}


def _stack(rows: list[dict[str, Tensor]], padding: Mapping[str, float]) -> dict[str, Tensor]:
    """Stack batches of one row, padded at the end of dimension 1 to one length."""
    return {key: _pad([row[key] for row in rows], padding.get(key, 0)) for key in rows[0]}


def _pad(tensors: Iterable[Tensor], value: float) -> Tensor:
    tensors = list(tensors)
    if tensors[0].ndim < 2:
        return torch.cat(tensors)
    longest = max(t.shape[1] for t in tensors)
    padded = [t.new_full((t.shape[0], longest, *t.shape[2:]), value) for t in tensors]
    for target, t in zip(padded, tensors, strict=True):
        target[:, : t.shape[1]] = t
    return torch.cat(padded)


def _trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut trailing columns that the attention mask hides in every row."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    width = mask.shape[1]
    used = int(mask.bool().any(0).nonzero().max()) + 1

    def tokens(key: str, t: Tensor) -> bool:
        # Labels that are yes or no each, (rows, labels), may be as many as there are tokens.
        several = key in LABELS and t.is_floating_point()
        return t.ndim > 1 and t.shape[1] == width and not several

    return {k: t[:, :used].contiguous() if tokens(k, t) else t for k, t in batch.items()}
