"""The head first: fit a task's fresh head on frozen features, then train everything (LP-FT).

A random head sends large, wrong gradients into the encoder, which distort it before the head makes
sense of it (Kumar et al., ICLR 2022, arXiv 2202.10054). Fitting the head first is a convex problem
where the head is one linear layer: the features of all rows are computed once, then

    logistic   argmin_W  Σ −log softmax(W x + b)_y + ‖W‖² / (2 C)     (scikit-learn's L-BFGS)
    ridge      for regression,  argmin_w  Σ (w x + b − y)² + ‖w‖² / C

With two classes the logits are ∓ half of scikit-learn's one, Σ −log σ(±(w x + b)) + ‖w‖² / (2 C);
with several labels per row each label has its own such fit. A class without rows gets zero weights
and a bias 2 below the smallest. The bias is not regularised.

Where tasks share one head that grows, only the outputs of new labels are fitted, among the task's
own classes; the others are trained.

A head of several layers, or one with fit="steps", is trained alone with AdamW; the encoder runs in
evaluation mode without gradients. With several ranks each reads all rows and fits the same head.
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

from holdfast.config import Checked, Share, count
from holdfast.engine.batches import LABELS, Batch, rows_in
from holdfast.engine.forwarding import returning
from holdfast.errors import Refused, tell_once
from holdfast.network.groups import learning
from holdfast.ops import distributed

Array = np.ndarray[Any, Any]
KNOWN = "known_outputs"  # of a model whose head tasks share: how many are of labels before its task


def known_outputs(model: nn.Module) -> int | None:
    """How many outputs of a head that tasks share are of earlier tasks' labels, the first ones;
    None where each task has a head of its own."""
    return getattr(model, KNOWN, None)


@dataclass(frozen=True, kw_only=True)
class HeadFirst(Checked):
    """How the head of a task is fitted before its own steps.

    fit: `logistic` (convex, where the head is one linear layer; ridge for regression) or `steps`
        (default: `steps` where `steps` is given, else `logistic`).
    inverse_decay: C > 0 of the convex fit; a larger C regularises less.
    steps: AdamW steps on the head alone: a share of the task's steps, or a number (default: .1).
    lr: learning rate of those steps.
    rows: the most rows that the convex fit uses (tokens, where each has a label).
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

    def of(
        self,
        model: nn.Module,
        shared: nn.Module | None,
        total_steps: int,
        *,
        learned: Iterable[nn.Module] = (),
    ) -> Head | None:
        """The head of a model above what tasks share.

        None, with one warning, if the model has no fresh head: a language model's is pre-trained,
        and one shared with a model in `learned` (finished tasks) has been trained, but for the last
        layer's outputs from `known_outputs` on.
        """
        head, learned = None, list(learned)
        trained = known_outputs(model) or 0 if any(m is model for m in learned) else 0
        if shared is not None and shared is not model:
            own = own_weights(model, shared, (m for m in learned if not (trained and m is model)))
            head = Head(self, model, shared, own, total_steps, trained) if own else None
        if head is None or (trained and not head.grown):
            name = type(model).__name__
            tell_once(f"head_first: {name} has no fresh head to train, so none is fitted first")
            return None
        return head


class Watched:
    """A linear layer whose output is the logits: its inputs, and the labels, of the rows seen.

    `layer` becomes None where it turns out to be no such layer. `known`: outputs that are not
    written, the first ones.
    """

    def __init__(
        self, model: nn.Module, layer: nn.Linear | None, rows: int, known: int = 0
    ) -> None:
        self.model, self.layer, self.most, self.known = model, layer, rows, known
        self._passed: list[tuple[Tensor, Tensor]] = []  # by the layer: its input and its output
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self.rows = 0

    @property
    def looking(self) -> bool:
        """Whether more rows are needed."""
        return self.layer is not None and self.rows < self.most

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the layer's inputs and outputs in the forward pass within the block."""
        if self.layer is None:
            yield
            return
        self._passed = []
        handle = self.layer.register_forward_hook(
            lambda _, args, output: self._passed.append((args[0], output))
        )
        try:
            yield
        finally:
            handle.remove()

    def see(self, batch: Batch, outputs: Any) -> None:
        """Keep the features and labels of a batch that ran while `watching`."""
        if self.layer is None or not self.looking:
            return
        labels = next((v for k, v in batch.items() if k in LABELS), None)
        x, returned = self._passed[0] if len(self._passed) == 1 else (None, None)
        if labels is None or x is None or not _same(returned, field_of(outputs, "logits")):
            self.layer = None  # no labels, or its output is not the logits
            return
        # One row of labels for each input of the layer: (rows,), (rows, tokens) or (rows, labels).
        if labels.ndim > x.ndim or labels.shape[: x.ndim - 1] != x.shape[:-1]:
            self.layer = None
            return
        x = x.detach().float().reshape(-1, x.shape[-1])
        labels = labels.detach().reshape(len(x), -1)
        if not labels.is_floating_point():
            known = (labels != -100).all(1)
            x, labels = x[known], labels[known]
        left = self.most - self.rows  # cut, so that the batch size does not matter
        self._features.append(x[:left].cpu())
        self._labels.append(labels[:left].cpu())
        self.rows += len(self._features[-1])

    def seen(self) -> tuple[Problem | None, Array, Array]:
        """What `problem` says, features (n, inputs) and labels (n, ·) of the rows."""
        if not self._features:
            raise Refused("no rows to fit the head to", remedy="pass the task's rows as data=")
        x, y = torch.cat(self._features).double().numpy(), torch.cat(self._labels).numpy()
        return self.problem(y), x, y

    def problem(self, y: Array) -> Problem | None:
        """How the loss reads the labels y (n, ·)."""
        assert self.layer is not None
        told = getattr(getattr(self.model, "config", None), "problem_type", None)
        return _problem(told, y, self.layer.out_features)

    def write_(self, weight: Array, bias: Array) -> None:
        """Put these into the layer, but for the outputs that are known."""
        assert self.layer is not None
        for p, value in ((self.layer.weight, weight), (self.layer.bias, bias)):
            if p is not None:
                new = torch.from_numpy(value).to(p.dtype)
                new[: self.known] = distributed.full(p.detach())[: self.known].cpu()
                distributed.local(p.detach()).copy_(
                    distributed.local(distributed.beside(new, p.detach()))
                )


class Head(Watched):
    """A model's own parameters above the shared module, and the inputs of its last layer."""

    def __init__(
        self,
        how: HeadFirst,
        model: nn.Module,
        shared: nn.Module,
        own: list[nn.Parameter],
        total_steps: int,
        trained: int = 0,
    ) -> None:
        wanted = how.fit or ("logistic" if how.steps is None else "steps")
        layer = only_layer(model, own) if wanted == "logistic" else None
        super().__init__(model, layer, how.rows, trained)  # outputs that earlier tasks trained
        self.how, self.shared, self.own, self.total_steps = how, shared, own, total_steps

    @property
    def grown(self) -> bool:
        """Whether the layer has outputs that no earlier task trained."""
        return self.layer is not None and self.layer.out_features > self.known

    def fit(self, data: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
        """Fit the head to the rows seen, or by steps over `data`; returns what was done."""
        if self.layer is None:
            return self._steps(data)
        problem, x, y = self.seen()
        if problem is None:
            return self._steps(data)
        found = _solved(problem, x, y, self.layer.out_features, self.how.inverse_decay)
        if found is None:  # one class: nothing to tell apart
            return {"fit": "none", "steps": 0, "rows": self.rows}
        self.write_(*found)
        kind = "ridge" if problem == "regression" else "logistic"
        return {"fit": kind, "steps": 0, "rows": self.rows}

    def _steps(self, data: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
        if self.known:  # steps would move what earlier tasks trained
            return {"fit": "none", "steps": 0, "rows": self.rows}
        steps = count(self.how.steps or 0.1, self.total_steps, what="head_first.steps")
        frozen = [p.requires_grad_() for p in self.own if not p.requires_grad]  # by the rates
        optimizer, done, rows = torch.optim.AdamW(self.own, lr=self.how.lr), 0, 0
        while done < steps:
            before = done
            for batch in data():
                if done == steps:
                    break
                optimizer.zero_grad()
                self._loss(batch).backward(inputs=self.own)
                optimizer.step()
                done += 1
                rows += rows_in(batch)
            if done == before:
                raise Refused("no rows to fit the head to", where="head_first")
        optimizer.zero_grad()
        for p in frozen:
            p.requires_grad_(False)
        return {"fit": "steps", "steps": done, "rows": rows}

    def _loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, with a graph through the head only."""
        seen: list[Any] = []
        handle = self.shared.register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            with torch.no_grad():
                self.model(**batch)
        finally:
            handle.remove()
        with torch.enable_grad(), returning(self.shared, seen[-1]):
            loss = field_of(self.model(**batch), "loss")
        if not isinstance(loss, Tensor):
            raise Refused("the model returned no loss", where="head_first",
                          remedy="put labels into the batches")  # fmt: skip
        return loss


def field_of(outputs: Any, name: str) -> Any:
    """What a model returned by this name; None where it did not."""
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)


def _same(returned: Tensor | None, logits: Any) -> bool:
    """Whether a layer's output is the logits, up to dtype and a trailing dimension of 1."""
    if returned is None or not isinstance(logits, Tensor) or returned.numel() != logits.numel():
        return False
    return torch.equal(returned.float().flatten(), logits.float().flatten())


def own_weights(
    model: nn.Module, shared: nn.Module, others: Iterable[nn.Module]
) -> list[nn.Parameter]:
    """The parameters of a model's own head, also of one that its rates have frozen."""
    able = learning(model) - {id(p) for m in (shared, *others) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) in able]


def only_layer(model: nn.Module, own: list[nn.Parameter]) -> nn.Linear | None:
    """The linear layer that owns all of a head's parameters, if there is one."""
    ids = {id(p) for p in own}
    owners = [m for m in model.modules() if any(id(p) in ids for p in m.parameters(recurse=False))]
    one = owners[0] if len(owners) == 1 else None
    trained = one is not None and {id(p) for p in one.parameters()} == ids
    return one if isinstance(one, nn.Linear) and trained else None


Problem = Literal["regression", "single_label_classification", "multi_label_classification"]


def _problem(told: Problem | None, y: Array, outputs: int) -> Problem | None:
    """How the model's loss reads the labels y (n, ·); None where no convex fit applies."""
    binary = bool(np.isin(y, (0, 1)).all())
    if told is None and y.dtype.kind != "f" and outputs > 1:
        told = "single_label_classification"
    elif told is None:
        told = "multi_label_classification" if binary and outputs > 1 else "regression"
    fits = {
        "regression": y.shape[1] == outputs,
        "single_label_classification": y.shape[1] == 1 and y.dtype.kind != "f" and outputs > 1,
        "multi_label_classification": y.shape[1] == outputs and binary,
    }
    return told if told is not None and fits.get(told) else None


def _solved(
    problem: Problem, x: Array, y: Array, outputs: int, c: float
) -> tuple[Array, Array] | None:
    """Weight (outputs, inputs) and bias of the convex fit of y (n, ·) to x (n, inputs)."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if problem == "regression":
        fitted = Ridge(alpha=1 / c).fit(x, y)
        return np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)

    def logistic(target: Array) -> Any:
        return LogisticRegression(C=c, max_iter=1000).fit(x, target)

    if problem == "multi_label_classification":
        weight, bias = np.zeros((outputs, x.shape[1])), np.zeros(outputs)
        for label in range(outputs):
            if len(np.unique(y[:, label])) == 2:
                one = logistic(y[:, label])
                weight[label], bias[label] = one.coef_[0], one.intercept_[0]
            elif len(y):  # all rows have this label, or none
                bias[label] = 2.0 if y[0, label] else -2.0
        return weight, bias
    classes = np.unique(y[:, 0])
    if len(classes) < 2:
        return None
    fitted = logistic(y[:, 0])
    # For two classes scikit-learn returns the difference of their logits.
    coef, intercept = fitted.coef_, fitted.intercept_
    if len(classes) == 2:
        coef = np.concatenate([-coef, coef]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weight, bias = np.zeros((outputs, x.shape[1])), np.full(outputs, intercept.min() - 2.0)
    weight[classes], bias[classes] = coef, intercept
    return weight, bias
