"""What several runs of one model share, so that it is loaded once: a search's trials."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from holdfast.tasks.kinds import Kind
from holdfast.tasks.kinds.packed import Packed
from holdfast.tasks.kinds.sharing import share_encoder


class Loaded:
    """A model's processor, encoded rows and untrained models."""

    def __init__(self, source: str, kind: Kind) -> None:
        self.processor = kind.load_processor(source)
        # By seed, then by task and split: rows, and how many of them were cut.
        self.rows: dict[int, dict[tuple[str, str], tuple[Packed, int]]] = {}
        self._untrained: dict[tuple[int, int], nn.Module] = {}  # by task and seed

    def anew(self) -> Loaded:
        """The same without untrained models: for a run of seeds that no other one has."""
        other = copy.copy(self)
        other._untrained = {}
        return other

    def untrained(
        self, key: tuple[int, int], make: Callable[[], Any], before: nn.Module | None
    ) -> nn.Module:
        """A copy of what `make` made first, on the encoder of the task before, if there is one."""
        if key not in self._untrained:
            fresh = make()
            if fresh is before:
                return before
            if before is not None:  # the encoder is this run's, and not part of what is kept
                setattr(fresh, fresh.base_model_prefix, nn.Identity())
            self._untrained[key] = fresh
        model = copy.deepcopy(self._untrained[key])
        if before is not None:
            share_encoder(before, model)
        return model
