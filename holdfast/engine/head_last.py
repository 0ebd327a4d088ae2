"""The head last: fit the last layer of a task's head once more, when everything else is learned.

Training moves the encoder until the last step, methods may move it once more at the task's end (as
merging does), and the head follows with the rate and in the number of steps that the encoder could
bear. So it is seldom the best head for the features that remain. To find that one is again a convex
problem (see `head_first`): the features x of some rows, a 1 appended, are computed once in
evaluation mode, and the last layer W₁ is fitted near where it is:

    classes          argmin_W  Σ −log softmax(W x)_y + ‖W − W₁‖² / (2 C)
    several labels   the same for each label against its absence
    regression       argmin_w  Σ (w x − y)² + ‖w − w₁‖² / C

Of classes the fit is among those that the rows have: the weights of others stay. So does a head
that tasks share, one that does not train, one whose last layer does not return the logits, and one
that was trained by another loss than these (of weighted classes, say).
With several ranks each reads the rows and fits the same head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from holdfast.config import Checked
from holdfast.engine.batches import LABELS, Batch
from holdfast.engine.head_first import (
    Array,
    Problem,
    Watched,
    field_of,
    known_outputs,
    own_weights,
)
from holdfast.engine.state import refuse_not_finite
from holdfast.ops import distributed


@dataclass(frozen=True, kw_only=True)
class HeadLast(Checked):
    """How the head of a task is fitted at the task's end.

    inverse_decay: C > 0; the smaller, the nearer to the head as it was trained.
    rows: the most rows that are used (tokens, where each has a label).
    """

    inverse_decay: Annotated[float, Field(gt=0)] = 0.3
    rows: Annotated[int, Field(gt=0)] = 1000

    @classmethod
    def where(cls, name: str) -> str:
        return f"head_last.{name}"

    def of(
        self, model: nn.Module, shared: nn.Module | None, learned: Iterable[nn.Module]
    ) -> Last | None:
        """The last layer of a head that is this model's own, and that trains."""
        if shared is None or known_outputs(model) is not None:
            return None
        own = {id(p) for p in own_weights(model, shared, learned) if p.requires_grad}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _plain(m)
                  and own.issuperset(map(id, m.parameters()))]  # fmt: skip
        return Last(self, model, layers[-1]) if layers else None


def _plain(layer: nn.Linear) -> bool:
    """Whether its weights are its own parameters, and not computed from others."""
    return {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}


class Last(Watched):
    """The last layer of a head."""

    def __init__(self, how: HeadLast, model: nn.Module, layer: nn.Linear) -> None:
        super().__init__(model, layer, how.rows)
        self.how = how

    def see(self, batch: Batch, outputs: Any) -> None:
        """Keep features and labels of a batch; no more if the model's own loss is another."""
        super().see(batch, outputs)
        loss = field_of(outputs, "loss")
        if self.layer is None or not isinstance(loss, Tensor) or not len(self._labels[-1]):
            return
        problem = self.problem(self._labels[-1].numpy())
        if problem is not None:
            logits = field_of(outputs, "logits").float().reshape(-1, self.layer.out_features)
            labels = next(v for k, v in batch.items() if k in LABELS).reshape(len(logits), -1)
            if not torch.allclose(mean_loss(problem, logits, labels), loss.float(),
                                  rtol=0.05, atol=0.01):  # fmt: skip
                self.layer = None

    def fit(self) -> int:
        """Fit the layer to the rows seen; returns how many that were, 0 where it stays."""
        if self.layer is None:
            return 0
        problem, x, y = self.seen()
        if problem is None:
            return 0
        weight, bias = self.layer.weight, self.layer.bias
        start = distributed.full(weight.detach()).double().cpu().numpy()
        if bias is not None:
            column = distributed.full(bias.detach()).double().cpu().numpy()[:, None]
            start, x = np.hstack([start, column]), np.hstack([x, np.ones((len(x), 1))])
        outputs = np.arange(len(start))
        if problem == "single_label_classification":
            outputs, y = np.unique(y[:, 0], return_inverse=True)
            if len(outputs) == 1:
                return 0
            y = y.reshape(-1, 1)
        found = start.copy()
        found[outputs] = near(problem, start[outputs], x, y, self.how.inverse_decay)
        refuse_not_finite({"head": torch.from_numpy(found)}, "not finite where it is fitted last")
        self.write_(found[:, : self.layer.in_features], found[:, -1])
        return self.rows


def mean_loss(problem: Problem, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of logits (n, outputs) and labels (n, ·) whose minimum is sought, a mean."""
    if problem == "regression":
        return functional.mse_loss(logits, labels.to(logits.dtype))
    if problem == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels[:, 0])


def near(problem: Problem, start: Array, x: Array, y: Array, c: float) -> Array:
    """The fit (outputs, inputs) of y (n, ·) to x (n, inputs) that is held near `start`."""
    if problem == "regression":
        from sklearn.linear_model import Ridge

        left = Ridge(alpha=1 / c, fit_intercept=False).fit(x, y - x @ start.T)
        return start + np.atleast_2d(left.coef_)
    begun, inputs, labels = torch.from_numpy(start), torch.from_numpy(x), torch.from_numpy(y)
    w = begun.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")
    count = labels.numel()  # a mean over rows, or over rows and labels

    def loss() -> Tensor:
        optimizer.zero_grad()
        wrong = count * mean_loss(problem, inputs @ w.T, labels)
        total = wrong + (w - begun).square().sum() / (2 * c)
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return w.detach().numpy()
