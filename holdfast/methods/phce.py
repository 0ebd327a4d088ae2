"""Partially Huberised cross-entropy: rows that the model takes for wrong pull no harder.

    ℓ(p) = −log p                if p > 1/τ            p: the probability of the row's label
           −τ p + log τ + 1      otherwise

(Menon et al., ICLR 2020; UPET, arXiv 2310.13022, trains on pseudo labels with it.) Both parts have
the value log τ and the slope −τ at p = 1/τ. The gradient of −log p has the factor 1/p, which grows
without bound on a label that the model finds absurd; here it is at most τ, so that a row weighs
min(1, τ p) times what it would.

Written as a penalty, P = mean (ℓ(p) + log p), added to the model's own loss, the mean of −log p.
That loss must weight all labels alike, without label smoothing; one of the model that does not is
refused in the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused


@dataclass(frozen=True, kw_only=True)
class PHCE(Method):
    """The loss of rows whose labels may be wrong, in place of cross-entropy; one class a row.

    tau: τ > 1; a row with p ≤ 1/τ pulls no harder for being less probable. UPET's τ was not found
        (its released code has no such loss).
    """

    name: ClassVar[str] = "phce"
    summary: ClassVar[str] = "bounds the pull of rows that the model takes for wrong"
    paper: ClassVar[str] = "Menon et al., ICLR 2020; UPET, arXiv 2310.13022"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "nothing measurable"
    use: ClassVar[str] = "classes of which some are wrong"
    bytes_per_weight: ClassVar[str] = "0"
    tunable: ClassVar[tuple[str, ...]] = ("tau",)
    ranges: ClassVar[Mapping[str, Range]] = {"tau": Range(1.1, 10.0, log=True)}

    tau: Annotated[float, Field(gt=1)] = 2.0

    def penalty(self, view: View) -> Tensor:
        logits = getattr(view.outputs, "logits", None)
        labels: Any = (view.inputs or {}).get("labels")
        if logits is None or logits.ndim != 2 or labels is None or labels.is_floating_point():
            raise Refused("is for rows of one class each", where="phce", remedy="leave it out")
        usual = functional.cross_entropy(logits.float(), labels.view(-1), reduction="none")
        own, told = view.loss, getattr(view.outputs, "loss", None)
        own = usual.mean() if own is None else own
        if told is not None and view.step == 0:
            mean = usual.detach().sum() / (labels != -100).sum()
            if not torch.isclose(told.detach().float(), mean, rtol=0.05, atol=0.01, equal_nan=True):
                raise Refused("the model's loss is not the cross-entropy of its logits, rows "
                              "weighted alike", where="phce", remedy="leave it out")  # fmt: skip
        share = own.detach() / usual.detach().sum().clamp(min=1e-30)  # 1/n of the model's own loss
        return share * (partial(usual, self.tau) - usual).sum()


def partial(surprise: Tensor, tau: float) -> Tensor:
    """ℓ of −log p, element by element."""
    linear = math.log(tau) + 1 - tau * torch.exp(-surprise)
    return torch.where(surprise < math.log(tau), surprise, linear)
