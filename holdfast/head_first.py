"""The head first: fit a task's fresh head on frozen features, then train everything (LP-FT).

A random head sends large, wrong gradients into the encoder, which distort it before the head makes
sense of it (Kumar et al., ICLR 2022, arXiv 2202.10054). Fitting the head first is a convex problem
where the head is one linear layer: the features of all rows are computed once, then

    logistic   argmin_W  Σ −log softmax(W x + b)_y + ‖W‖² / (2 C)     (scikit-learn's L-BFGS)
    ridge      for regression,  argmin_w  Σ (w x + b − y)² + ‖w‖² / C

A head of several layers, or fit="steps", is trained by AdamW by itself; the encoder runs in
evaluation mode and without gradients. Every rank of several reads all rows and fits the same head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast import distributed
from holdfast.batches import LABELS, Batch
from holdfast.config import Checked, Share, count
from holdfast.errors import Refused
from holdfast.forwarding import returning


@dataclass(frozen=True, kw_only=True)
class HeadFirst(Checked):
    """How the head of a task is fitted before its own steps.

    fit: `logistic` (convex, where the head is one linear layer; ridge for regression) or `steps`
        (default: `steps` where `steps` is given, else `logistic`).
    inverse_decay: C > 0 of the convex fit; the larger, the more the rows count.
    steps: of AdamW on the head by itself: a share of the task's own, or a number (default: .1).
    lr: of those steps.
    rows: that the convex fit takes, at most.
    """

    shares: ClassVar[tuple[str, ...]] = ("steps",)

    fit: Literal["logistic", "steps"] | None = None
    inverse_decay: Annotated[float, Field(gt=0)] = 1.0
    steps: Share | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    rows: Annotated[int, Field(gt=0)] = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit == "logistic" and self.steps is not None:
            raise Refused("a logistic fit takes no steps", where=self.where("steps"),
                          remedy="leave out one of fit and steps")  # fmt: skip

    @classmethod
    def where(cls, name: str) -> str:
        return f"head_first.{name}"

    def of(self, model: nn.Module, shared: nn.Module | None, total_steps: int) -> Head | None:
        """The head of a model above what tasks share; None where it has none of its own."""
        if shared is None or shared is model:
            return None
        below = {id(p) for p in shared.parameters()}
        own = [p for p in model.parameters() if id(p) not in below and p.requires_grad]
        return Head(self, model, shared, own, total_steps) if own else None


class Head:
    """A model's own parameters above the shared module, and what its last layer is given."""

    def __init__(
        self,
        how: HeadFirst,
        model: nn.Module,
        shared: nn.Module,
        own: list[nn.Parameter],
        total_steps: int,
    ) -> None:
        self.how, self.model, self.shared, self.own = how, model, shared, own
        self.total_steps = total_steps
        wanted = how.fit or ("logistic" if how.steps is None else "steps")
        self.layer = _only_layer(model, own) if wanted == "logistic" else None
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._rows = 0

    @contextlib.contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """While the model runs on `batch` in evaluation mode: keep what its last layer is given."""
        if self.layer is None or self._rows >= self.how.rows:
            yield
            return
        given: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        try:
            yield
        finally:
            handle.remove()
        labels = next((v for k, v in batch.items() if k in LABELS), None)
        x = given[0] if len(given) == 1 else None
        if labels is None or x is None or x.shape[: labels.ndim] != labels.shape[: x.ndim - 1]:
            self.layer = None  # not what the logits of a row hang on: steps, then
            return
        counts = labels.reshape(x[..., 0].numel(), -1)
        x, counts = x.detach().float().reshape(-1, x.shape[-1]).cpu(), counts.cpu()
        if not counts.is_floating_point():
            known = (counts != -100).all(1)
            x, counts = x[known], counts[known]
        self._features.append(x)
        self._labels.append(counts)
        self._rows += len(labels)

    def fit(self, data: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
        """Fit the head to what was seen, or by steps over `data`; says what was done."""
        if self.layer is None:
            return self._steps(data)
        x = torch.cat(self._features).double().numpy()
        y = torch.cat(self._labels).numpy()
        found = _solved(x, y, self.layer.out_features, self.how.inverse_decay)
        if found is None:  # one class: nothing to tell apart
            return {"fit": "none", "steps": 0, "rows": self._rows}
        values = {self.layer.weight: found[0], self.layer.bias: found[1]}
        for p, value in values.items():
            if p is not None:
                new = torch.from_numpy(value).to(p.dtype)
                distributed.local(p.detach()).copy_(
                    distributed.local(distributed.beside(new, p.detach()))
                )
        kind = "ridge" if self.layer.out_features == 1 else "logistic"
        return {"fit": kind, "steps": 0, "rows": self._rows}

    def _steps(self, data: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
        steps = count(self.how.steps or 0.1, self.total_steps, what="head_first.steps")
        optimizer, done, rows = torch.optim.AdamW(self.own, lr=self.how.lr), 0, 0
        seen: list[Any] = []
        while done < steps:
            before = done
            for batch in data():
                if done == steps:
                    break
                seen.clear()
                handle = self.shared.register_forward_hook(lambda _, __, out: seen.append(out))
                try:
                    with torch.no_grad():
                        self.model(**batch)
                finally:
                    handle.remove()
                with torch.enable_grad(), returning(self.shared, seen[-1]):
                    loss = self.model(**batch).loss
                    loss.backward(inputs=self.own)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                rows += len(next(v for v in batch.values() if isinstance(v, Tensor)))
            if done == before:
                raise Refused("no rows to fit the head to", where="head_first")
        return {"fit": "steps", "steps": done, "rows": rows}


def _only_layer(model: nn.Module, own: list[nn.Parameter]) -> nn.Linear | None:
    """The linear layer that owns all of a head's parameters, if there is one."""
    ids = {id(p) for p in own}
    owners = [m for m in model.modules() if any(id(p) in ids for p in m.parameters(recurse=False))]
    one = owners[0] if len(owners) == 1 else None
    return one if isinstance(one, nn.Linear) else None


def _solved(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], outputs: int, c: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Weight (outputs, inputs) and bias of the convex fit of y (n, ·) to x (n, inputs)."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if outputs == 1 or (y.dtype.kind == "f" and not np.isin(y, (0, 1)).all()):
        fitted = Ridge(alpha=1 / c).fit(x, y)
        return np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)

    def logistic(target: np.ndarray[Any, Any]) -> Any:
        return LogisticRegression(C=c, max_iter=1000).fit(x, target)

    if y.shape[1] == outputs > 1:  # several labels a row: one classifier each
        weight, bias = np.zeros((outputs, x.shape[1])), np.zeros(outputs)
        for label in range(outputs):
            if len(np.unique(y[:, label])) == 2:
                one = logistic(y[:, label])
                weight[label], bias[label] = one.coef_[0], one.intercept_[0]
        return weight, bias
    classes = np.unique(y[:, 0])
    if len(classes) < 2:
        return None
    fitted = logistic(y[:, 0])
    # Of two classes scikit-learn returns the difference of their logits.
    coef, intercept = fitted.coef_, fitted.intercept_
    if len(classes) == 2:
        coef = np.concatenate([-coef, coef]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weight, bias = np.zeros((outputs, x.shape[1])), np.full(outputs, intercept.min() - 2.0)
    weight[classes], bias[classes] = coef, intercept
    return weight, bias
