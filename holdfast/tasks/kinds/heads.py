"""Other heads than a layer of each task's own on the shared encoder.

`levi`: each task has an ensemble of its own on the encoder, which is frozen, see `Ensembles`. The
others are one head for all tasks of a sequence. Its outputs are the labels of all tasks so far, by
name and in the order in which they came; one model serves every task. `shared`: a task with new
labels lets the head grow. What it had stays as it is, bit for bit, new outputs are drawn as the
model draws a head, and all of it is trained with each task. `prototype`: nothing is trained, see
`Prototypes`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from holdfast.engine.head_first import KNOWN
from holdfast.errors import Refused, TrainingDiverged
from holdfast.tasks.kinds import Encoded, Kind, Measured, kind_named
from holdfast.tasks.kinds.classification import outputs
from holdfast.tasks.kinds.levi import LeviForSequenceClassification, ensemble
from holdfast.tasks.kinds.packed import Packed, values
from holdfast.tasks.kinds.pretrained import check_length
from holdfast.tasks.task import Prediction, Row, Task

# In a model's configuration: the rows that each class's means are of, and whether d has tr Σ_c.
ROWS, SPREAD = "prototype_rows", "prototype_spread"
NEVER = -1e30  # the logit of a class without rows


class OneHead:
    """A kind whose tasks share one head; all else is as `kind` does it.

    labels: by task, those of the head once it is learned; None for numbers.
    """

    HEADS: ClassVar[bool] = False

    def __init__(self, kind: Kind, tasks: Sequence[Task]) -> None:
        self.kind, self.labels = kind, dict[str, tuple[str, ...] | None]()
        known: dict[str, None] = {}  # in the order of the head's outputs
        for task in tasks:
            known |= dict.fromkeys(task.labels or ())
            self.labels[task.name] = None if task.labels is None else tuple(known)
        self._every = None if tasks[-1].labels is None else tuple(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)

    def add_head(self, model: Any, task: Task, *, seed: int) -> nn.Module:
        """The model itself, its head grown by the task's new labels."""
        labels, before = self.labels[task.name], int(model.config.num_labels)
        if labels is not None and len(labels) > before:
            self.kind.grow(model, labels, seed=seed)  # type: ignore[attr-defined]
        setattr(model, KNOWN, before)
        return cast(nn.Module, model)

    def encode(
        self, rows: Sequence[Row], task: Task, processor: Any, *, max_length: int,
        config: Any = None,
    ) -> Packed:  # fmt: skip
        """As `kind` does, labels as outputs of the head."""
        made = replace(task, train=tuple(rows), selection=(), evaluation=())
        made = made.renumbered(self._every or ())
        return self.kind.encode(made.train, made, processor, max_length=max_length, config=config)

    def measure(
        self, model: nn.Module, rows: Sequence[Encoded], task: Task, collate: Any
    ) -> Measured:
        """As `kind` does, over all outputs of the head; ids are the task's own, others follow."""
        found = self.kind.measure(model, rows, task, collate)
        return self.kind.aligned(found, self._every, task.labels or ())


class Prototypes(OneHead):
    """One head without training: means μ_c of the encoder's features z over the rows of a class c,

        p(c|z) ∝ exp(−d(z, c)),   d(z, c) = ‖z − μ_c‖² = ‖z‖² − (2 μ_c·z − ‖μ_c‖²)

    and with `spread` tr Σ_c is added to d, Σ_c their variances (Sehanobish et al. 2022, arXiv
    2210.13979). As ‖z‖² is the same for all classes, this is the softmax of a linear layer with
    weight 2 μ_c and bias −‖μ_c‖² − tr Σ_c, which the model's last layer becomes: an ordinary saved
    model. z are that layer's inputs in evaluation mode; layers of the head below it stay as they
    were drawn. A class that comes again adds its rows to its means: the order of tasks makes no
    difference.

    Deviation: the paper also trains the encoder, by −log p(y|z) + λ ‖z − μ_y‖² over episodes, which
    would move the prototypes of old classes, whose rows are not kept. Here it stays as it is, and
    classes may differ more in tr Σ_c than in their means: one of little spread (of few rows) then
    takes most rows, so that `spread` is not the default.
    """

    def __init__(self, kind: Kind, tasks: Sequence[Task], *, spread: bool = False) -> None:
        super().__init__(kind, tasks)
        self.spread = spread

    def fit(self, model: Any, rows: Sequence[Encoded], task: Task, collate: Any) -> None:
        """Add a task's rows to the means of their classes, in place."""
        layer, given = _last_layer(model), list[torch.Tensor]()
        handle = layer.register_forward_pre_hook(lambda _, z: given.append(z[0].cpu().double()))
        truth, size = torch.as_tensor(values(rows, "labels")).long(), layer.out_features
        sums = torch.zeros(size, layer.in_features + 2, dtype=torch.float64)  # of z, ‖z‖² and 1
        try:
            for chosen, _ in outputs(model, rows, collate):
                z = given.pop()
                if not bool((fine := z.isfinite().all(1)).all()):
                    row = list(chosen)[int((~fine).nonzero()[0])]
                    raise TrainingDiverged(f"the encoder's features of row {row} are not finite",
                                           where=task.name)  # fmt: skip
                told = torch.cat([z, z.square().sum(1, keepdim=True), torch.ones(len(z), 1)], 1)
                sums += functional.one_hot(truth[chosen], size).double().T @ told
        finally:
            handle.remove()
        before = getattr(model.config, ROWS, [])
        count = torch.tensor([*before, *[0] * (size - len(before))], dtype=torch.float64)
        weight, bias = (p.detach().cpu().double() for p in (layer.weight, layer.bias))
        sums += torch.cat([weight / 2, -bias[:, None], torch.ones(size, 1)], 1) * count[:, None]
        means, count, before = sums / sums[:, -1:].clamp(min=1), sums[:, -1], count
        with torch.no_grad():
            weight = (2 * means[:, :-2]).to(layer.weight)
            squares = means[:, -2] if self.spread else (weight.cpu() / 2).square().sum(1)
            bias = torch.where(count > 0, -squares, NEVER).to(layer.bias)
            # What a class without new rows has stays as it is, bit for bit.
            still = ((count == before) & (count > 0)).to(weight.device)
            layer.weight.copy_(torch.where(still[:, None], layer.weight, weight))
            layer.bias.copy_(torch.where(still, layer.bias, bias))
        setattr(model.config, ROWS, count.long().tolist())
        setattr(model.config, SPREAD, self.spread)


def with_classes(
    model: Any, about: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], processor: Any, *,
    max_length: int,
) -> tuple[Any, list[str]]:  # fmt: skip
    """A model of prototypes with further classes, on the same encoder, and the labels of all.

    about: its task. rows: of each new class. What there was stays as it is, bit for bit.
    """
    where, known = str(about["name"]), list(about["labels"] or ())
    if (spread := getattr(getattr(model, "config", None), SPREAD, None)) is None:
        raise Refused("its head is not of prototypes: new classes need training", where=where,
                      remedy="learn them by holdfast sequence --from")  # fmt: skip
    if wrong := [name for name in rows if name in known or not rows[name]]:
        raise Refused(f"{wrong[0]!r} is a class already" if wrong[0] in known else
                      f"no rows of {wrong[0]!r}", where=where)  # fmt: skip
    labels = (*known, *rows)
    told = [replace(row, label=labels.index(name)) for name, few in rows.items() for row in few]
    task = Task(where, labels, about["metric"], tuple(told), (), (), source="", kind=about["kind"])
    kind = Prototypes(kind_named(task.kind), [task], spread=spread)
    encoder = model.base_model
    made = copy.deepcopy(model, {id(encoder): encoder})
    with torch.random.fork_rng():
        kind.add_head(made, task, seed=0)
    given = kind.encode(told, task, processor, max_length=max_length, config=made.config)
    kind.fit(made, given, task, kind.kind.collator(processor))
    return made, list(labels)


@contextlib.contextmanager
def answering(kind: Kind, model: Any) -> Iterator[Kind]:
    """What to predict with: `kind`; of prototypes it tells how far each row is from all classes.

    Within the block such a model's logits are −d(z, c), ‖z‖² below what they were.
    """
    if not hasattr(getattr(model, "config", None), ROWS):
        yield kind
        return

    def prediction(logits: torch.Tensor, labels: Sequence[str] | None) -> Prediction:
        far = max(0.0, -float(logits.max()))  # rounding may take it below
        return usual(logits, labels)._replace(out_of_domain=far)

    made: Any = copy.copy(kind)
    usual, made.prediction = made.prediction, prediction
    handle = _last_layer(model).register_forward_hook(
        lambda _, z, logits: logits - z[0].square().sum(-1, keepdim=True)
    )
    try:
        yield cast(Kind, made)
    finally:
        handle.remove()


def _last_layer(model: Any) -> nn.Linear:
    """The linear layer whose outputs are the logits of a row."""
    below = {*model.base_model.modules()}
    found = [m for m in model.modules() if m not in below and isinstance(m, nn.Linear)]
    if not found or found[-1].out_features != model.config.num_labels or found[-1].bias is None:
        raise Refused(f"the head of {type(model).__name__} does not end in a linear layer with a "
                      "bias, which prototypes need", where="--head",
                      remedy="take another model, or --head shared")  # fmt: skip
    return found[-1]


class Ensembles:
    """A kind whose tasks each have an ensemble on the frozen encoder, see `levi`; all else is as
    `kind` does it: what lies in a folder is a model of its own class."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)

    def check(self, source: str, *, max_length: int) -> None:
        """Encoders and decoders, and ensembles on them."""
        check_length(source, max_length)

    def load_model(self, source: str, task: Task, *, seed: int) -> nn.Module:
        """A fresh ensemble on the pre-trained encoder; a saved head is dropped."""
        model: Any = self.kind.load_model(source, task, seed=seed)
        return model if isinstance(model, LeviForSequenceClassification) else ensemble(model)


def headed(kind: Kind, head: str, tasks: Sequence[Task]) -> Kind:
    """`kind` with the heads that were asked for; `Refused` where it cannot have them."""
    if head == "task":
        return kind
    where = f"--head {head}"
    if not kind.HEADS:
        raise Refused(f"tasks of kind {tasks[0].kind} have no heads: they share the whole model",
                      where=where, remedy="leave it out")  # fmt: skip
    if head == "levi":
        if getattr(kind, "AUTO", None) is not AutoModelForSequenceClassification:
            raise Refused(f"an ensemble is for classes and numbers of texts, not {tasks[0].kind}",
                          where=where, remedy="--head task")  # fmt: skip
        return cast(Kind, Ensembles(kind))
    if not hasattr(kind, "grow"):
        raise Refused(f"the heads of kind {tasks[0].kind} cannot grow", where=where,
                      remedy="--head task")  # fmt: skip
    numbers = [t.name for t in tasks if t.labels is None]
    if numbers and ("prototype" in head or len(numbers) < len(tasks)):
        raise Refused(f"numbers have no classes ({', '.join(numbers)})", where=where,
                      remedy="--head task")  # fmt: skip
    for task in tasks:
        first = next(iter(task.train), None)
        if first is not None and task.labels is not None and not isinstance(first.label, int):
            raise Refused(f"the rows of {task.name} do not have one class each", where=where,
                          remedy="--head task")  # fmt: skip
    if head == "shared":
        return cast(Kind, OneHead(kind, tasks))
    return cast(Kind, Prototypes(kind, tasks, spread=head == "variance_prototype"))
