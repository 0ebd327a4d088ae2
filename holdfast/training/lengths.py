"""Batches of rows of like length, which pad little: a function of (seed, epoch).

The sampler of Transformers draws from the global random state, which a resumed run has no more as
it was when the epoch began; and within fifty batches it goes from long rows to short ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from holdfast.ops import distributed

POOL = 50  # batches whose rows are sorted together: the fewer, the more of chance is left


class ByLength(Sampler[int]):
    """Every row once an epoch: rows in random order, sorted by length within each `POOL` batches,
    whose batches then come in random order; the one that is not full comes last.

    lengths: of each row. batch: rows of a step, of all its micro-batches and ranks.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before an epoch, also before one that is resumed."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        number = distributed.number_of([self.seed, self.epoch])
        draws = torch.Generator().manual_seed(number)
        order, pool = torch.randperm(len(self), generator=draws).tolist(), POOL * self.batch
        pools = [order[at : at + pool] for at in range(0, len(order), pool)]
        rows = [i for each in pools for i in sorted(each, key=self.lengths.__getitem__)]
        full = len(rows) // self.batch
        for turn in [*torch.randperm(full, generator=draws).tolist(), full]:
            yield from rows[turn * self.batch : (turn + 1) * self.batch]
