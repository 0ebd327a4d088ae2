"""The contract: what a fine-tuning method is, which hooks it may define, what a hook can see.

A `Method` is a frozen configuration. Everything it remembers lives in the `Bound`, as a `State`
keyed by canonical parameter names, so that it is saved, resumed and counted in one place.

Hooks run in fixed phases; the order of methods in a recipe matters only within a phase::

    prepare → read_rows* → begin_task → loaded?
            → (weights → penalty → penalty_grad_ → before_step → after_step)*
            → unbound and end_task, in either order
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
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

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
# What methods act by; "other" is left to other packages.
GROUPS = ("regulariser", "subnetwork", "sharpness", "start", "old tasks", "other")


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
    group: ClassVar[str] = "other"  # one of `GROUPS`
    cost: ClassVar[str] = "–"  # what a step costs beyond plain training, in words
    use: ClassVar[str] = "–"  # the data or situation it is meant for
    head_first: ClassVar[bool] = False  # whether its preset fits a fresh head first
    ranges: ClassVar[Mapping[str, Range]] = {}
    needs_previous: ClassVar[bool] = False  # after_step reads the weights before the step
    needs_features: ClassVar[bool] = False  # penalty reads `view.features`
    needs_old_task: ClassVar[bool] = False  # does nothing before a second task
    changes_weights: ClassVar[bool] = False  # end_task may change weights: scores are taken after
    per_task: ClassVar[bool] = False  # `state.weights` is of one task: not saved after it
    excludes: ClassVar[Mapping[str, str]] = {}  # methods it cannot stand beside, and why
    holds: ClassVar[bool] = False  # after_step puts entries back, which no later method may move
    tunable: ClassVar[tuple[str, ...]] = ()  # fields that may change between tasks: state stays

    @classmethod
    def where(cls, name: str) -> str:
        return f"{cls.name}.{name}"

    @property
    def needs_data(self) -> bool:
        """Whether `end_task` reads the rows of the finished task."""
        return False

    @property
    def reads_whole(self) -> Literal["gradients", "inputs"] | None:
        """What `end_task` reads where only the trainer's loss takes a batch (`Whole`): its
        gradients, or layers' inputs; None: it needs batches that the model takes."""
        return None

    @property
    def idle_at_first(self) -> bool:
        """Whether the first task is trained as it would be without this method."""
        return self.needs_old_task

    @classmethod
    def defines(cls, hook: str) -> bool:
        """Whether this method overrides `hook`."""
        return getattr(cls, hook) is not getattr(Method, hook)

    def previous_of(self, view: View) -> Collection[str]:
        """Names whose weights before a step `after_step` reads (`needs_previous`); default all."""
        return list(view.weights)

    # --- the hooks -------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the network itself (PEFT), once, before the optimizer and any checkpoint."""
        return model

    def wants_rows(self, view: View) -> bool:
        """Whether `read_rows` is to be called before this task."""
        return self.defines("read_rows")

    def read_rows(self, view: View) -> None:
        """One batch of the task's rows before its first step, in evaluation mode, no gradients.

        `view.inputs`, `view.outputs` and `view.features` are those of the batch; all methods share
        this one pass. Not called if a saved state is loaded next (`view.resuming`).
        """

    def begin_task(self, view: View) -> None:
        """A task starts, after `read_rows`: create state, remember anchors."""

    def loaded(self, view: View) -> None:
        """A saved state was loaded: rebuild what is not saved (`view.state.cache`)."""

    def mixed(self, view: View) -> Collection[str]:
        """Names of the parameters that `weights` replaces, asked once per task; default all."""
        return list(view.weights)

    def weights(self, view: View, name: str, w: Tensor) -> Tensor:
        """The weight that the forward pass sees while training, in place of `w`."""
        return w

    def watched(self, view: View) -> Collection[nn.Module]:
        """Modules whose outputs in the training pass `penalty` finds in `view.seen`, asked once a
        task; the model itself for `view.forward(dropout="same")` alone. Default none."""
        return ()

    def penalty(self, view: View) -> Tensor:
        """A scalar added to the loss of one micro-batch."""
        raise NotImplementedError

    def penalty_grad_(self, view: View) -> None:
        """Add a penalty's exact gradient to `view.grads` in place, once a step."""

    def before_step(self, view: View) -> None:
        """Read or change gradients in place; `view.grads[name] = None` skips that tensor."""

    def after_step(self, view: View) -> None:
        """Read or change weights after the optimizer's step."""

    def unbound(self, view: View) -> None:
        """The recipe is detached from model and optimizer: remove what was attached to them.

        Also called if the task failed to begin, when there may be nothing to remove.
        """

    def end_task(self, view: View) -> None:
        """A task is learned: estimate importance, keep rows, merge weights.

        A method that writes to weights declares `changes_weights`; such come before the others.
        """


class Gradients(MutableMapping[str, Tensor | None]):
    """The gradients of this step by name; assigning None skips that tensor in the step."""

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
    # Weights whose gradients the method has switched off, until `end_task` or its `unbound`.
    cut: list[nn.Parameter] = field(default_factory=list)

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
        """The subset of `weights` that all tasks share: without the task's own head."""
        return self.bound.shared

    @property
    def encoder(self) -> nn.Module | None:
        """The module that all tasks share; None if they share the whole model."""
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
        """The micro-batch, inside `penalty` (in `read_rows` the batch)."""
        return self.bound.inputs

    @property
    def outputs(self) -> Any:
        """What the model returned for `inputs`."""
        return self.bound.outputs

    @property
    def loss(self) -> Tensor | None:
        """The task's own loss of the micro-batch, to which `penalty` is added, where it is known:
        its mean, or its share of a mean over several micro-batches."""
        return self.bound.loss

    @property
    def again(self) -> Callable[[nn.Module], Tensor] | None:
        """Computes `loss` anew, with a graph, in `penalty`; None where the loop gave no way."""
        return self.bound.again

    @property
    def rows(self) -> Tensor:
        """A hash of each row of the micro-batch by its content: int64 of shape (rows,).

        The same row has the same hash in any batch, whatever its padding; labels do not count.
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
    def seen(self) -> Mapping[nn.Module, Any]:
        """What each `watched` module returned in the training pass, with its graph; without those
        that it did not come by, and empty for a compiled model."""
        return self.bound.seen

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """The repeated blocks of the task's model from input to output, with the role of their
        stack: `encoder`, `decoder` or ``""``."""
        return self.bound.blocks

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
        """Whether a saved state is loaded next, so that `begin_task` can skip measurements."""
        return self.bound.resuming

    @property
    def generator(self) -> torch.Generator:
        """The method's own generator, and its only source of randomness: saved, and equal on all
        ranks."""
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
        perturb: Mapping[nn.Module | str, Callable[[Tensor], Tensor]] | None = None,
        returns: Mapping[nn.Module, Any] | None = None,
        dropout: Literal["own", "same"] = "own",
    ) -> Any:
        """Run a task's model (default: this one) on a batch (default: this micro-batch).

        Dropout draws from `generator`, so that a method never changes what the training forward
        draws; `same`: what the training pass drew (see `watched`). `weights` replaces parameters by
        name; only without gradients. `training=False` runs it in evaluation mode, whatever the
        model's mode is. `perturb` changes a module's output, or what an input enters as, by a
        function (see `forwarding.perturbed`). Modules in `returns` return what is given there, and
        do not run.
        """
        return self.bound.forward(inputs, weights=weights, task=task, training=training,
                                  perturb=perturb, returns=returns, dropout=dropout,
                                  generator=self.generator)  # fmt: skip

    def old_outputs(self, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the model of every finished task returns for a batch, in evaluation mode.

        For this micro-batch the heads read `features`, so that the encoder is not run again.
        Labels are left out: they belong to another task. Where tasks share one head there is one
        entry, of the last of them, with the outputs for labels of earlier tasks.
        """
        return self.bound.old_outputs(inputs, generator=self.generator)

    def grams(self, **how: Any) -> Grams:
        """The Gram matrices of the shared layers' inputs on `data`, cached during `end_task`.

        how: `rows`, `structure`, `width`, `rank`, `norms`, see `grams.measure`; `merged=True`
        measures anew, on the network as a method has just changed it.
        """
        return self.bound.measured_grams(**how)

    def start(self) -> Mapping[str, Tensor] | None:
        """The shared weights as the task began, if the caller kept them (a checkpoint)."""
        return self.bound.start() if self.bound.start is not None else None

    def score(self) -> float:
        """`evaluate` as one number, higher is better: its `score`, or minus its `eval_loss`."""
        found = self.evaluate()
        if "score" in found:
            return float(found["score"])
        return -float(found["eval_loss"])

    def evaluate(self) -> Mapping[str, float]:
        """Scores of the task on its selection rows, if the caller provides them."""
        return self.bound.evaluate()
