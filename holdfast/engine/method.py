"""The contract: what a fine-tuning method is, which hooks it may define, what a hook can see.

A `Method` is a frozen configuration. All that it remembers lives in the `Bound`, as a `State`
keyed by canonical parameter names, so that it is saved, resumed and counted in one place.

Hooks run in fixed phases; the order of methods in a recipe counts only within a phase::

    prepare → read_rows* → begin_task → loaded?
            → (weights → penalty → penalty_grad_ → before_step → after_step)* → unbound
            → end_task
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.config import Checked
from holdfast.engine.batches import identities
from holdfast.engine.state import State
from holdfast.errors import Refused

if TYPE_CHECKING:
    from holdfast.engine.bound import Bound
    from holdfast.engine.grams import Grams

HOOKS = (
    "prepare",
    "read_rows",
    "begin_task",
    "loaded",
    "weights",
    "penalty",
    "penalty_grad_",
    "before_step",
    "after_step",
    "unbound",
    "end_task",
)


class Range(NamedTuple):
    """Where a search may look for a parameter: inclusive bounds, on a log scale or not."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(Checked):
    """One paper's idea: a frozen configuration with up to eleven optional hooks.

    Subclasses are frozen dataclasses whose fields are checked against their annotations
    (`Refused` names the field). A hook that no method of a recipe defines costs nothing.
    """

    name: ClassVar[str]  # one name everywhere: file, YAML, command line, test, docs page
    summary: ClassVar[str]  # one line
    paper: ClassVar[str]
    bytes_per_weight: ClassVar[str]  # what the method adds to memory, in words and numbers
    ranges: ClassVar[Mapping[str, Range]] = {}
    needs_previous: ClassVar[bool] = False  # after_step reads the weights before the step
    needs_features: ClassVar[bool] = False  # penalty reads `view.features`
    needs_old_task: ClassVar[bool] = False  # does nothing before a second task
    changes_weights: ClassVar[bool] = False  # end_task may change weights: scores are taken after
    # Methods that it cannot stand beside in a recipe, and why.
    excludes: ClassVar[Mapping[str, str]] = {}
    # Fields that say how strongly what is remembered acts: between tasks they may be others.
    tunable: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def where(cls, name: str) -> str:
        return f"{cls.name}.{name}"

    @property
    def needs_data(self) -> bool:
        """Whether `end_task` reads the rows of the finished task."""
        return False

    @property
    def idle_at_first(self) -> bool:
        """Whether the first task is trained as it would be without this method."""
        return self.needs_old_task

    @classmethod
    def defines(cls, hook: str) -> bool:
        """Whether this method overrides `hook`."""
        return getattr(cls, hook) is not getattr(Method, hook)

    def previous_of(self, view: View) -> Collection[str]:
        """Names whose weights before a step `after_step` reads, if it `needs_previous`: all."""
        return list(view.weights)

    # --- the hooks -------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the network itself, once, before the optimizer and any checkpoint (PEFT)."""
        return model

    def wants_rows(self, view: View) -> bool:
        """Whether `read_rows` is to be called before this task."""
        return self.defines("read_rows")

    def read_rows(self, view: View) -> None:
        """A batch of the task's rows before its first step, in evaluation mode, without gradients.

        `view.inputs`, `view.outputs` and `view.features` are of this batch; all methods share the
        one pass. Not called where a saved state is to be loaded (`view.resuming`).
        """

    def begin_task(self, view: View) -> None:
        """A task starts, and its rows were read: make state, remember anchors."""

    def loaded(self, view: View) -> None:
        """A saved state was taken up: make again what is not saved (`view.state.cache`)."""

    def mixed(self, view: View) -> Collection[str]:
        """Names of the parameters that `weights` replaces, asked once a task: all by default."""
        return list(view.weights)

    def weights(self, view: View, name: str, w: Tensor) -> Tensor:
        """The weight that the forward pass sees while training, in place of `w`."""
        return w

    def penalty(self, view: View) -> Tensor:
        """A scalar added to the loss of one micro-batch."""
        raise NotImplementedError

    def penalty_grad_(self, view: View) -> None:
        """Add a penalty's exact gradient to `view.grads` in place, once a step."""

    def before_step(self, view: View) -> None:
        """Read or change gradients in place; `view.grads[name] = None` leaves a tensor out."""

    def after_step(self, view: View) -> None:
        """Read or change weights after the optimizer's step."""

    def unbound(self, view: View) -> None:
        """The recipe lets go of the model and the optimizer: take off what was put on them.

        Also called where the task failed to begin, and there may be nothing to take off.
        """

    def end_task(self, view: View) -> None:
        """A task is learned: estimate importance, keep rows, merge weights.

        A method that writes to weights declares `changes_weights`.
        """


class Gradients(MutableMapping[str, Tensor | None]):
    """The gradients of this step by name; assigning None leaves a tensor out of the step."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor | None:
        return self._weights[name].grad

    def __setitem__(self, name: str, grad: Tensor | None) -> None:
        self._weights[name].grad = grad

    def __delitem__(self, name: str) -> None:
        self._weights[name].grad = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@dataclass
class View:
    """What a hook can see and do. New fields never change a hook's signature.

    Names are canonical parameter names; those of a task's own head are `task/name`.
    """

    bound: Bound
    state: State  # this method's own
    scratch: dict[str, Any] = field(default_factory=dict)  # forgotten after every step

    @property
    def task(self) -> str:
        """The task being learned."""
        return self.bound.task

    @property
    def step(self) -> int:
        """Optimizer steps completed in this task: 0 throughout the first step."""
        return self.bound.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps planned for this task."""
        return self.bound.total_steps

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the optimizer holds, by name."""
        return self.bound.weights

    @property
    def shared(self) -> Mapping[str, nn.Parameter]:
        """Those of `weights` that all tasks share: without the task's own head."""
        return self.bound.shared

    @property
    def encoder(self) -> nn.Module | None:
        """The module that all tasks share; None where that is the whole model."""
        return self.bound.core

    @property
    def grads(self) -> Gradients:
        """The gradients by name: accumulated, reduced and unscaled."""
        return self.bound.grads

    @property
    def previous(self) -> Mapping[str, Tensor]:
        """The weights before this step, for methods that declare `needs_previous`."""
        return self.bound.previous

    @property
    def parts(self) -> Mapping[str, str]:
        """The part of each name."""
        return self.bound.part_of

    @property
    def modules(self) -> Mapping[str, tuple[nn.Module, ...]]:
        """The modules that own each name; several where weights are tied."""
        return self.bound.owners

    @property
    def inputs(self) -> Mapping[str, Any] | None:
        """The micro-batch, inside `penalty`."""
        return self.bound.inputs

    @property
    def outputs(self) -> Any:
        """What the model returned for the micro-batch, inside `penalty`."""
        return self.bound.outputs

    @property
    def loss(self) -> Tensor | None:
        """The task's own loss of the micro-batch, to which `penalty` is added, where it is known:
        its mean, or its share of a mean over several micro-batches."""
        return self.bound.loss

    @property
    def rows(self) -> Tensor:
        """What tells the rows of the micro-batch apart: int64 of shape (rows,), by their content.

        The same row has the same number in any batch, whatever its padding; labels do not count.
        """
        if self.inputs is None:
            raise Refused(
                "no batch here", where="view.rows", remedy="call bound.penalty(batch, outputs)"
            )
        return identities(self.inputs)

    @property
    def features(self) -> Any:
        """What the shared module returned for the micro-batch, with its graph, for methods that
        declare `needs_features`; None where it was not seen (a compiled model)."""
        return self.bound.features

    @property
    def data(self) -> Callable[[], Iterable[Mapping[str, Any]]]:
        """The task's training rows in batches, inside `begin_task` and `end_task`."""
        return self.bound.data

    @property
    def finished(self) -> Sequence[str]:
        """The tasks learned before this one, in order."""
        return self.bound.finished

    @property
    def resuming(self) -> bool:
        """Whether a saved state is loaded next, so that `begin_task` need measure nothing."""
        return self.bound.resuming

    @property
    def generator(self) -> torch.Generator:
        """The only source of randomness for this method, which is no other's: saved, and equal on
        all ranks."""
        return self.state.generator

    def lr(self, name: str) -> float:
        """The learning rate of a parameter at this step."""
        return float(self.bound.group_of[name]["lr"])

    def moments(self, name: str) -> Mapping[str, Any]:
        """The optimizer's own state of a parameter (`exp_avg`, …); empty before its first step."""
        return self.bound.optimizer.state.get(self.weights[name], {})

    def forward(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        task: str | None = None,
        training: bool | None = None,
    ) -> Any:
        """Run a task's model (default: this one) on a batch (default: this micro-batch).

        Dropout draws from `generator`, so that a method never changes what the training
        forward draws. `weights` replaces parameters by name; only without gradients.
        `training=False` runs it in evaluation mode, whatever the model is in.
        """
        return self.bound.forward(inputs, weights=weights, task=task, training=training,
                                  generator=self.generator)  # fmt: skip

    def old_outputs(self, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the model of every finished task returns for a batch, in evaluation mode.

        For this micro-batch the heads read `features`, so that the encoder is not run again;
        labels are left out, for they are of another task.
        """
        return self.bound.old_outputs(inputs, generator=self.generator)

    def grams(self, **how: Any) -> Grams:
        """The Gram matrices of the shared layers' inputs on `data`, measured once a task's end.

        how: `rows`, `structure`, `width`, `rank`, see `grams.measure`; `merged=True` asks
        for those of the network as a method of this task's end has changed it.
        """
        return self.bound.measured_grams(**how)

    def start(self) -> Mapping[str, Tensor] | None:
        """The shared weights as the task began, where the caller keeps them (a checkpoint)."""
        return self.bound.start() if self.bound.start is not None else None

    def score(self) -> float:
        """One number of `evaluate`, higher is better: its `score`, or minus its loss."""
        found = self.evaluate()
        if "score" in found:
            return float(found["score"])
        return -float(found["eval_loss"])

    def evaluate(self) -> Mapping[str, float]:
        """Scores of the task on rows kept for selection, where the caller offers them."""
        return self.bound.evaluate()
