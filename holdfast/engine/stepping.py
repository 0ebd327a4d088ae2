"""One step of a `Bound`: what methods do around the optimizer's; `bound.py` gives the order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from holdfast.engine.attachment import MARK, Held, finite
from holdfast.engine.method import Method, View
from holdfast.engine.state import State, refuse_not_finite
from holdfast.errors import Refused, TrainingDiverged, tell_once
from holdfast.network.groups import factors
from holdfast.network.parts import parts
from holdfast.network.rates import Rates
from holdfast.ops.gradients import Norms, clip_, unscale_

SKIPS = 20  # steps in a row that may be left out
HALVINGS = 60  # … under a GradScaler, which halves its scale at each until no gradient overflows


class Stepping:
    """The part of `Bound` that the optimizer's step hooks run."""

    methods: tuple[Method, ...]  # attributes without a value are set by `Bound`
    views: dict[str, View]
    generator: torch.Generator  # the bound's own; each method has one in its state
    states: dict[str, State]
    models: dict[str, nn.Module]
    parts: Mapping[str, str]
    task: str
    step: int
    total_steps: int
    finished: list[str]
    skipped: int
    max_grad_norm: float | None
    optimizer: torch.optim.Optimizer
    weights: Mapping[str, nn.Parameter]
    shared: Mapping[str, nn.Parameter]
    group_of: Mapping[str, dict[str, Any]]
    previous: dict[str, Tensor]
    norm: Tensor | None = None
    rates: Mapping[int, float | Tensor]  # of the last step, by the id of an optimizer's group
    resuming: bool
    scheduled: Rates | None = None  # the recipe's, where they come in pieces
    _pieces: Mapping[int, list[float]]  # by a piece's first step: a factor for each group
    _moved: Sequence[tuple[dict[str, Any], Any]] = ()  # groups, with their rates outside of a step
    inputs: Mapping[str, Any] | None = None
    outputs: Any = None
    loss: Tensor | None = None
    again: Callable[[nn.Module], Tensor] | None = None
    features: Any = None
    seen: dict[nn.Module, Any]  # what watched modules returned in the training pass
    _drew: dict[nn.Module, tuple[Tensor, ...]]  # and the random states there
    _held: Held
    _wrapper: Any = None  # an AcceleratedOptimizer around ours
    max_skipped: int | None = SKIPS  # in a row; None: any number
    in_a_row = 0  # steps left out since the last that was made
    _asked = _skip = _scaled = _told = False
    _ran = False  # whether the shared module was run since the last penalty
    _added: dict[str, tuple[Any, int]]  # by method: the sum of its penalties, and their number
    _drawn: Tensor  # the random states before the step
    _first: list[int]  # how often each shared weight was written, as the task began
    _options: list[dict[str, Any]]  # of the optimizer's groups, before a step that is left out
    _norms: Norms  # of this step's gradients

    @property
    def half_made(self) -> bool:
        """Whether a penalty was asked for whose step has not been made, nor given up."""
        return self._asked and any(w.grad is not None for w in self.weights.values())

    def _model(self) -> nn.Module:
        if not self.task:
            raise Refused("no task has begun", remedy="call bound.begin_task(...) first")
        return self.models[self.task]

    @property
    def randomness(self) -> Tensor:
        """The random states of the bound and of each method, by name: (1 + methods, bytes)."""
        return torch.stack([generator.get_state() for generator in self._generators()])

    @randomness.setter
    def randomness(self, states: Tensor) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state.clone())  # set_state misreads a view with an offset

    def _generators(self) -> list[torch.Generator]:
        return [self.generator, *(self.states[name].generator for name in sorted(self.states))]

    def _defining(self, hook: str) -> list[Method]:
        return [m for m in self.methods if m.defines(hook)]

    def __reduce_ex__(self, _: object) -> NoReturn:
        # The hooks of an optimizer stay behind where it is copied, so that a copy would train as if
        # there was no recipe.
        raise Refused("a Bound is not copied or pickled", where="copy",
                      remedy="bind the recipe to the copies with resuming=True, then "
                      "load_state_dict(bound.state_dict())")  # fmt: skip

    @property
    def has_penalty(self) -> bool:
        """Whether a loop must add `penalty` to its loss."""
        return bool(self._defining("penalty"))

    def penalty(
        self,
        inputs: Mapping[str, Any] | None = None,
        outputs: Any = None,
        loss: Tensor | None = None,
        again: Callable[[nn.Module], Tensor] | None = None,
    ) -> Tensor:
        """The methods' penalties for a micro-batch: add them to its loss.

        loss: the loss they are added to, if that is not `outputs.loss`; then `again` computes it
            for this micro-batch on the bare model (without DDP), for methods that need it twice.
        """
        self._asked, self.inputs, self.outputs, self.again = True, inputs, outputs, again
        self.loss = loss if loss is not None else getattr(outputs, "loss", None)
        total = torch.zeros((), device=next(self._model().parameters()).device)
        features = self.features
        for method in self._defining("penalty"):
            self.features = features  # a method's forward pass may replace them
            penalty = method.penalty(self.views[method.name])
            total = total + penalty
            if not penalty.is_leaf:  # one without a graph holds nothing
                kept, number = self._added.get(method.name, (0.0, 0))
                self._added[method.name] = kept + penalty.detach().float(), number + 1
        # They hold the graph of this micro-batch.
        self.features = self.loss = self.again = None
        self.seen, self._drew, self._ran = {}, {}, False
        return total

    def penalties(self) -> dict[str, float]:
        """By method, the mean of what it added to the loss of a micro-batch since this was last
        asked. Of methods that add to the loss: those that pull by a gradient compute no value."""
        added, self._added = self._added, {}
        return {name: float(total) / number for name, (total, number) in added.items()}

    def _take_piece(self) -> None:
        """Move every group to the rates in force, for this step only.

        Schedulers see the rates of the beginning, and what they make of them is kept.
        """
        self._put_back()
        groups = self.optimizer.param_groups
        if self.scheduled is None:
            return
        if not self._pieces:
            task, total, curve = len(self.finished) + 1, self.total_steps, self.scheduled
            named = parts(self._model(), self.parts)
            starts = {0, *(p.start(total) for p in curve.pieces if p.task == task)}
            self._pieces = {
                start: factors(groups, curve, curve.in_force(task, start, total), named)
                for start in starts
            }
        now = self._pieces[max(start for start in self._pieces if start <= self.step)]
        self._moved = [(group, group["lr"]) for group in groups]
        for group, factor in zip(groups, now, strict=True):
            group["lr"] = group["lr"] * factor

    def _put_back(self) -> None:
        for group, rate in self._moved:
            group["lr"] = rate
        self._moved = ()

    @torch.no_grad()
    def _before_step(self) -> None:
        if self.resuming:
            raise Refused("the task was begun to be resumed, and no state was loaded",
                          where=self.task, remedy="load it, or pass resuming=False")  # fmt: skip
        self.group_of = self._held.changed(self.weights) or self.group_of
        self._take_piece()
        if self.has_penalty and not self._asked:
            raise RuntimeError("this recipe has penalties: add bound.penalty(...) to the loss, "
                               "or in a Trainer call super().compute_loss(...)")  # fmt: skip
        unscale_(self.optimizer, self._gradients())
        # Penalties come before the one measurement: adding them cannot hide a non-finite gradient.
        for method in self._defining("penalty_grad_"):
            method.penalty_grad_(self.views[method.name])
        self.norm = self.gradient_norm()
        self._scaled = getattr(self.optimizer, "found_inf", None) is not None
        self._skip = False
        if self._wrapper is not None:
            self._wrapper._is_overflow = False
        if not finite(self.optimizer, self.norm):
            self.leave_out()
            return
        for method in self._defining("before_step"):
            method.before_step(self.views[method.name])
            if self._skip:
                return
        if self.max_grad_norm is not None:
            clip_(self._gradients(), self.gradient_norm(), self.max_grad_norm)
        asking = (m for m in self.methods if m.needs_previous)
        kept = {n for m in asking for n in m.previous_of(self.views[m.name])}
        self.previous = {n: w.detach().clone() for n, w in self.weights.items() if n in kept}

    def leave_out(self) -> None:
        """Leave this step out of training altogether, as a method's `before_step` may ask too."""
        self._skip = True
        for w in self.weights.values():
            w.grad = None  # the optimizer skips tensors without a gradient
        # Some optimizers count steps in their groups nevertheless.
        self._options = [{**group} for group in self.optimizer.param_groups]
        if self._wrapper is not None:  # Accelerate would only see that step() was called
            self._wrapper._is_overflow = True
            self._wrapper._accelerate_step_called = False

    @torch.no_grad()
    def _after_step(self) -> None:
        # Not as floats: of a rate that is a tensor that would wait for the device.
        rates = ((id(group), group["lr"]) for group in self.optimizer.param_groups)
        self.rates = {k: r.clone() if isinstance(r, Tensor) else r for k, r in rates}
        if self._skip:
            self.skipped += 1
            self.in_a_row += 1
            self.randomness = self._drawn
            for group, before in zip(self.optimizer.param_groups, self._options, strict=True):
                group.update(before)
        else:
            for method in self._defining("after_step"):
                method.after_step(self.views[method.name])
            self.step += 1
            self.in_a_row = 0
        self._forget_step()
        if self.in_a_row:
            self._tell_skipped()

    def _tell_skipped(self) -> None:
        """Say once that a step was left out, and stop where too many in a row were."""
        most = self.max_skipped
        if most is not None and self.in_a_row >= max(most, HALVINGS if self._scaled else 0):
            raise self._diverged(f"the gradients of {self.in_a_row} steps in a row were not finite")
        if not self._told and self.in_a_row >= (SKIPS if self._scaled else 1):
            self._told = True
            logging.getLogger("holdfast").warning(
                f"{self.task}: after {self.step} steps gradients are not finite: such steps are "
                "left out and counted"
            )

    def check_made(self) -> None:
        """Raise `TrainingDiverged` where the last steps were left out, more than were made before,
        and `NotFinite` for weights that are not finite."""
        if self.max_skipped is not None and self.in_a_row > self.step:
            made = f"the last {self.in_a_row}" if self.step else f"{self.in_a_row}"
            raise self._diverged(f"no gradient of {made} steps was finite")
        moved = getattr(self.optimizer, MARK, False) and self._written() != self._first
        if moved and not self.step and not self.skipped:
            tell_once(f"{self.task}: weights changed, and the bound "
                      f"{type(self.optimizer).__name__} made no step: another optimizer took "
                      "part, and the recipe none")  # fmt: skip
        refuse_not_finite(self.weights, "this weight is not finite")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"diverged: {what}",
            where=self.task,
            remedy="they changed nothing; lower the learning rate, or look for rows that are not "
            "finite",
        )

    def _await_steps(self) -> None:
        """A task has begun: what is drawn and written from now on is of its steps."""
        self._drawn, self._first = self.randomness, self._written()

    def _written(self) -> list[int]:
        """How often each weight that tasks share was written."""
        return [w._version for w in self.shared.values()]

    def _forget_step(self) -> None:
        self._put_back()
        self._asked, self._ran, self._norms = False, False, Norms()
        self._drawn = self.randomness  # restored if the step is left out
        self.inputs = self.outputs = self.loss = self.again = self.features = None
        self.previous, self.seen, self._drew = {}, {}, {}
        for view in self.views.values():
            view.scratch.clear()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients as they are: under a GradScaler, `unscale_` them first.

        Each gradient is measured once a step for every time that it is written (writes through
        `.data` are not seen). Shards always are: all ranks must call this together, whatever each
        has written.
        """
        return self._norms.total(self._gradients())

    def _gradients(self) -> list[Tensor]:
        grads = [w.grad for w in self.weights.values() if w.grad is not None]
        if any(g.is_sparse for g in grads):
            raise Refused("a gradient is sparse", remedy="build the embedding with sparse=False")
        return grads
