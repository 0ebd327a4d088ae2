"""A recipe at work on a model and an optimizer: the engine, and the one place that holds state.

The work hangs on the optimizer's own step hooks, so that any loop, Accelerate and any Trainer is
served alike. Per step, in this order:

    unscaled gradients → penalty_grad_ of each → finite? → before_step of each → clip
                       → optimizer → after_step of each
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import distributed, mixing
from holdfast.attachment import (
    Attachment,
    Held,
    Hooks,
    check_served,
    default_shared,
    finite,
    regroup_,
    unwrap,
)
from holdfast.batches import Seen, without_labels
from holdfast.errors import Refused
from holdfast.forwarding import in_mode, own_randomness, replaced, returning, uncompiled, untrained
from holdfast.gradients import clip_, total_norm, unscale_
from holdfast.grams import Grams, measure
from holdfast.head_first import HeadFirst
from holdfast.method import Gradients, Method, View
from holdfast.parts import parts
from holdfast.rates import Rates
from holdfast.state import State, check_fit, describe, pack, unpack

Batches = Iterable[Mapping[str, Any]]


class Bound:
    """Methods bound to a model and an optimizer, for a whole sequence of tasks.

    Made by `Recipe.bind`. `skipped` counts the steps left out for non-finite gradients;
    `norm` is the gradient norm of the last step, before clipping.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        max_grad_norm: float | None = None,
        head_first: HeadFirst | None = None,
        parts: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.methods, self.head_first = tuple(methods), head_first
        self._parts = dict(parts or {})  # overrides, see `holdfast.parts`
        self.max_grad_norm = max_grad_norm
        self.generator = torch.Generator().manual_seed(seed)
        self.states = {m.name: State() for m in self.methods}
        self.views = {m.name: View(self, self.states[m.name]) for m in self.methods}
        self.models: dict[str, nn.Module] = {}
        self.finished: list[str] = []
        self.task, self.step, self.total_steps, self.skipped = "", 0, 0, 0
        self.norm: Tensor | None = None
        self.inputs: Mapping[str, Any] | None = None
        self.outputs: Any = None
        self.features: Any = None
        self.resuming = False
        self.fitted: dict[str, Any] | None = None  # what fitting the head of this task took
        self.start: Callable[[], Mapping[str, Tensor]] | None = None
        self._grams: dict[str, Grams] = {}
        self._core: nn.Module | None = None  # what tasks share, where it is a part of the model
        self.previous: dict[str, Tensor] = {}
        self.evaluate: Callable[[], Mapping[str, float]] = _nothing_to_evaluate
        self.data: Callable[[], Batches] = list
        self._undo: list[Callable[[], None]] = []
        self._wrapper: Any = None  # an AcceleratedOptimizer around ours
        self._asked = self._skip = False
        # The norm last asked for, and the gradients it is of, with torch's count of writes to each.
        self._measured: tuple[Tensor, list[tuple[Tensor, int]]] | None = None
        self.weights: Mapping[str, nn.Parameter] = {}
        self._signature: dict[str, list[Any]] = {}

    # --- tasks ------------------------------------------------------------------------------

    def begin_task(
        self,
        task: str,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        model: nn.Module | None = None,
        shared: nn.Module | None = None,
        data: Batches | Callable[[], Batches] | None = None,
        start: Callable[[], Mapping[str, Tensor]] | None = None,
        resuming: bool = False,
    ) -> None:
        """Attach to a task's optimizer (and model, where each task has its own head).

        `shared` is the module that all tasks share (default: see `attachment.default_shared`).
        Parameters outside of it are named `task/name` and never anchored across tasks. `data` are
        the task's training rows, as `end_task` takes them: the head is fitted to them first, if the
        recipe says so, and methods may read them. `start` returns the shared weights by name as
        they are now, whenever it is asked: where a checkpoint holds them, no method copies them.
        `resuming`: a saved state is loaded next, so the head is not fitted and no row is read.

        Raises `Refused` for what cannot be served: sparse gradients, an optimizer that runs its
        closure more than once, parameters that belong to no module of the model, an optimizer
        already bound; docs/optimizers.md has them all.
        """
        model = model if model is not None else self.models.get(self.task)
        if model is None:
            raise Refused("no model to bind", remedy="pass model=")
        if "/" in task or not task:
            raise Refused(f"{task!r} is no task name", remedy="use a name without '/'")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise Refused(f"total_steps must be a whole number above 0, not {total_steps!r}")
        distributed.refuse_unserved(model, optimizer)
        model = distributed.unwrapped(model)
        optimizer, wrapper = unwrap(optimizer)
        self.unbind()
        check_served(model, optimizer)
        self.task, self.step, self.total_steps = task, 0, total_steps
        learned = [m for t, m in self.models.items() if t in self.finished]
        self.optimizer, self._wrapper, self.models[task] = optimizer, wrapper, model
        self.resuming, self.start, self.fitted = resuming, start, None
        self._core = shared or default_shared(model)
        self._forget_step()
        try:
            self._adopt(Attachment.of(task, model, optimizer, shared, self._parts))
            recipe = {m.name: m.to_dict() for m in self.methods}
            distributed.align_(self.generator, self.weights, [task, total_steps, recipe])
            self._attach()
            for method in self._defining("unbound"):
                self._undo.append(functools.partial(method.unbound, self.views[method.name]))
            with self._offering(data):
                if not resuming:
                    self._read_rows(learned, offered=data is not None)
                for method in self._defining("begin_task"):
                    method.begin_task(self.views[method.name])
            self._install_mixing()
            if any(m.needs_features for m in self.methods):
                self._undo.append(self._seeing_features())
            self._drawn = self.generator.get_state()
        except BaseException:
            self.unbind()
            raise

    def _adopt(self, found: Attachment) -> None:
        """Take over a task's parameters; those shared with earlier tasks must not have changed."""
        shared = describe(found.shared)
        changed = [
            f"{k} was {self._signature[k]}, is {now}"
            for k, now in shared.items()
            if self._signature.get(k, now) != now
        ]
        changed += [f"{k} is gone" for k in self._signature if k not in found.part_of]
        if changed:
            raise Refused("shared parameters changed between tasks: " + ", ".join(changed[:5]))
        self._signature |= shared
        self.weights, self.shared = found.weights, found.shared
        self.part_of, self.group_of, self.owners = found.part_of, found.group_of, found.owners
        self.grads = Gradients(self.weights)
        for state in self.states.values():
            for slot in (*state.weights.values(), *state.tensors.values()):
                for name in slot.keys() & self.weights.keys():
                    slot[name] = distributed.beside(slot[name], self.weights[name])

    def _install_mixing(self) -> None:
        mixers: dict[str, list[Method]] = {}
        for method in self._defining("weights"):
            for name in method.mixed(self.views[method.name]):
                if distributed.sharded(self.weights[name]):
                    raise Refused(f"{method.name} cannot mix weights in shards", where=name,
                                  remedy="train with DistributedDataParallel")  # fmt: skip
                mixers.setdefault(name, []).append(method)
        if not mixers:
            return

        def mix(name: str, w: Tensor) -> Tensor:
            for method in mixers[name]:
                w = method.weights(self.views[method.name], name, w)
            return w

        chosen = {name: self.weights[name] for name in mixers}
        self._undo.append(mixing.install(chosen, self.owners, mix))

    def end_task(self, data: Batches | Callable[[], Batches] | None = None) -> None:
        """The task is learned: methods estimate importance, keep rows, and may change weights.

        `data` are the task's training rows in batches as the model takes them, re-iterable or a
        function that returns them. Runs in evaluation mode, without touching the global
        random state. Every rank calls this, and with all rows: methods divide them.
        """
        model = self._model()
        needing = [m.name for m in self.methods if m.needs_data]
        if needing and data is None:
            raise Refused(f"{', '.join(needing)} reads the rows of a finished task",
                          where="end_task", remedy="pass data=")  # fmt: skip
        steps = self.step, self.skipped
        distributed.require_aligned(self.generator, self.weights, steps)
        with (
            self._offering(data),
            in_mode(model.modules(), training=False),
            own_randomness(self.generator),
        ):
            for method in self._defining("end_task"):
                method.end_task(self.views[method.name])
        self._grams = {}
        self.finished.append(self.task)

    def remember(
        self,
        task: str,
        model: nn.Module,
        data: Batches | Callable[[], Batches],
        *,
        shared: nn.Module | None = None,
    ) -> None:
        """Take over a task that was learned elsewhere: what `end_task` would have left of it.

        One pass over its rows, nothing is trained: so a deployed model is protected from the
        first task that it learns here.
        """
        still = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        self.begin_task(task, still, 1, model=model, shared=shared, data=data, resuming=True)
        self.unbind()
        self.resuming = False  # no state is loaded
        self.end_task(data)

    @contextlib.contextmanager
    def _offering(self, data: Batches | Callable[[], Batches] | None) -> Iterator[None]:
        """Within the block methods can read the task's rows, as often as they like."""
        if isinstance(data, Iterator):
            raise Refused("an iterator can be read once only", where="data",
                          remedy="pass a list, a loader, or a function returning one")  # fmt: skip
        if data is not None:
            self.data = data if callable(data) else lambda: data
        try:
            yield
        finally:
            self.data = list

    @torch.no_grad()
    def _read_rows(self, learned: Sequence[nn.Module], *, offered: bool) -> None:
        """One pass over the rows before the first step: for methods, and to fit the head.

        `learned` are the models of finished tasks: their heads are not fitted again.
        """
        readers = [m for m in self._defining("read_rows") if m.wants_rows(self.views[m.name])]
        model, head = self.models[self.task], None
        if self.head_first is not None:
            steps = self.total_steps
            head = self.head_first.of(model, self._core, steps, learned=learned)
        if not readers and head is None:
            return
        if not offered:
            who = [*(m.name for m in readers), *(["head_first"] if head else [])]
            raise Refused(f"{', '.join(who)} reads the rows of a task before its first step",
                          where="begin_task", remedy="pass data=")  # fmt: skip

        def wanted(_: Any) -> bool:
            return bool(readers) or (head is not None and head.looking)

        began, undo, rows = time.monotonic(), self._seeing_features(always=True), Seen()
        try:
            with in_mode(model.modules(), training=False):
                for batch in itertools.takewhile(wanted, rows.through(self.data())):
                    self.inputs = batch
                    with head.watching() if head is not None else contextlib.nullcontext():
                        self.outputs = self.forward(batch)
                    if head is not None:
                        head.see(batch, self.outputs)
                    for method in readers:
                        method.read_rows(self.views[method.name])
                self._forget_step()
                if head is not None:
                    with own_randomness(self.generator):
                        self.fitted = head.fit(lambda: rows.through(self.data()))
                    self.fitted["seconds"] = round(time.monotonic() - began, 3)
            rows.require_equal(next(model.parameters()).device)
        finally:
            undo()
            self._forget_step()

    def _seeing_features(self, *, always: bool = False) -> Callable[[], None]:
        """Keep what the shared module returns, until the step or the next forward pass."""

        def see(module: nn.Module, _: Any, outputs: Any) -> None:
            if always or (module.training and torch.is_grad_enabled()):
                self.features = outputs

        return self._core.register_forward_hook(see).remove if self._core else lambda: None

    def unbind(self) -> None:
        """Take every hook off the optimizer and the model; state stays."""
        while self._undo:
            self._undo.pop()()

    # --- a step -----------------------------------------------------------------------------

    def _attach(self) -> None:
        self._held = Held(self.optimizer)
        self._undo.append(Hooks(self.optimizer, self._before_step, self._after_step).remove)

    def _model(self) -> nn.Module:
        if not self.task:
            raise Refused("no task has begun", remedy="call bound.begin_task(...) first")
        return self.models[self.task]

    def _defining(self, hook: str) -> list[Method]:
        return [m for m in self.methods if m.defines(hook)]

    @torch.no_grad()
    def _before_step(self) -> None:
        self.group_of = self._held.changed(self.weights) or self.group_of
        if self.has_penalty and not self._asked:
            raise RuntimeError("this recipe has penalties: add bound.penalty(...) to the loss")
        unscale_(self.optimizer, self._gradients())
        # Pulls come before the one pass that measures: what is not finite is so after them too.
        for method in self._defining("penalty_grad_"):
            method.penalty_grad_(self.views[method.name])
        self.norm = self.gradient_norm()
        if not self._skip_unless(bool(finite(self.optimizer, self.norm))):
            return
        for method in self._defining("before_step"):
            method.before_step(self.views[method.name])
        if self.max_grad_norm is not None:
            clip_(self._gradients(), self.gradient_norm(), self.max_grad_norm)
        asking = (m for m in self.methods if m.needs_previous)
        kept = {n for m in asking for n in m.previous_of(self.views[m.name])}
        self.previous = {n: w.detach().clone() for n, w in self.weights.items() if n in kept}

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._skip:
            self.skipped += 1
            self.generator.set_state(self._drawn)
            for group, before in zip(self.optimizer.param_groups, self._options, strict=True):
                group.update(before)
        else:
            for method in self._defining("after_step"):
                method.after_step(self.views[method.name])
            self.step += 1
        self._forget_step()

    def _forget_step(self) -> None:
        self._asked = False
        self._measured = None
        self._drawn = self.generator.get_state()  # a step that is left out has drawn nothing
        self.inputs = self.outputs = self.features = None
        self.previous = {}
        for view in self.views.values():
            view.scratch.clear()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients as they are: under a GradScaler, `unscale_` them first.

        Measured where a gradient was written since it was last asked for in this step (writes
        through `.data` are not seen). Of shards it always is: all ranks must ask at once, whatever
        each has written.
        """
        grads = self._gradients()
        now = [(g, distributed.local(g)._version) for g in grads]
        norm, then = self._measured or (None, [])
        same = len(now) == len(then) and all(
            g is h and writes == before for (g, writes), (h, before) in zip(now, then, strict=True)
        )
        if norm is None or not same or any(map(distributed.sharded, grads)):
            norm = total_norm(grads)
            self._measured = norm, now
        return norm

    def _gradients(self) -> list[Tensor]:
        grads = [w.grad for w in self.weights.values() if w.grad is not None]
        if any(g.is_sparse for g in grads):
            raise Refused("a gradient is sparse", remedy="build the embedding with sparse=False")
        return grads

    def _skip_unless(self, good: bool) -> bool:
        """Leave this step out of training altogether, unless its gradients are good."""
        self._skip = not good
        if self._skip:
            for w in self.weights.values():
                w.grad = None  # the optimizer passes over tensors without a gradient
            # Some count their steps in the groups nevertheless.
            self._options = [{**group} for group in self.optimizer.param_groups]
        # Accelerate judges by whether step() was called; tell it what really happened.
        if self._wrapper is not None:
            self._wrapper._is_overflow = self._skip
            if self._skip:
                self._wrapper._accelerate_step_called = False
        return good

    # --- what hooks and loops call ------------------------------------------------------------

    def penalty(self, inputs: Mapping[str, Any] | None = None, outputs: Any = None) -> Tensor:
        """The methods' penalties for a micro-batch: add them to its loss."""
        self._asked, self.inputs, self.outputs = True, inputs, outputs
        device = next(self._model().parameters()).device
        total = torch.zeros((), device=device)
        features = self.features
        for method in self._defining("penalty"):
            self.features = features  # the forward pass of another method has had its own
            total = total + method.penalty(self.views[method.name])
        self.features = None  # it holds the graph of this micro-batch
        return total

    def set_rates(self, rates: Rates, scheduler: Any = None) -> None:
        """Train the task on with other rates over the same base rate; see `attachment.regroup_`."""
        model = self._model()
        placed = parts(model, self._parts)
        self.group_of = regroup_(self.optimizer, model, self.weights, rates, scheduler, placed)

    @property
    def has_penalty(self) -> bool:
        """Whether a loop must add `penalty` to its loss."""
        return bool(self._defining("penalty"))

    def forward(
        self,
        inputs: Mapping[str, Any] | None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        task: str | None = None,
        training: bool | None = None,
        features: Any = None,
    ) -> Any:
        """See `View.forward`; with `features` the shared module returns these."""
        task = task or self.task
        if task not in self.models:
            raise Refused(f"no model of task {task!r}", where="view.forward",
                          remedy=f"set bound.models[{task!r}] after loading a state")  # fmt: skip
        model, ours = self.models[task], self.models[self.task]
        batch = inputs if inputs is not None else self.inputs
        if batch is None:
            raise Refused("no batch here", where="view.forward", remedy="pass inputs=")
        with contextlib.ExitStack() as stack:
            stack.enter_context(own_randomness(self.generator))
            stack.enter_context(replaced(self.weights, weights or {}))
            stack.enter_context(untrained(model, self.weights))
            stack.enter_context(uncompiled())
            concerned = {*model.modules()}
            if features is not None and self._core is not None:
                stack.enter_context(returning(self._core, features))
                concerned -= {*self._core.modules()}
            if training is not None:
                stack.enter_context(in_mode(concerned, training))
            elif model.training != ours.training:  # another task's; loaded ones are in evaluation
                stack.enter_context(in_mode(concerned - {*ours.modules()}, ours.training))
            return model(**batch)

    def old_outputs(self, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """See `View.old_outputs`."""
        batch = without_labels(inputs if inputs is not None else self.inputs or {})
        features = self.features if inputs is None else None
        found = {}
        for task in dict.fromkeys(self.finished):
            found[task] = self.forward(batch, task=task, training=False, features=features)
        return found

    def measured_grams(self, *, merged: bool = False, **how: Any) -> Grams:
        """See `View.grams`; methods that ask alike share one pass over the rows."""
        key = repr([merged, sorted(how.items())])
        if key not in self._grams:
            self._grams[key] = measure(self, **how)
        return self._grams[key]

    # --- saving -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as ``{"tensors": {key: tensor}, "meta": JSON}``.

        Tensors are not copied. Keys are ``method/kind/slot/name``. Those of weights in shards are
        put together on rank 0; then every rank must call this, and others are given no tensors.
        """
        tensors, numbers = pack(self.states)
        meta = {
            "schema": 1,
            "methods": {m.name: m.to_dict() for m in self.methods},
            "numbers": numbers,
            "task": self.task,
            "step": self.step,
            "total_steps": self.total_steps,
            "skipped": self.skipped,
            "finished": list(self.finished),
            "parameters": describe(self.weights),
            "shared": dict(self._signature),
        }
        if distributed.rank() == 0 or not any(map(distributed.sharded, self.weights.values())):
            tensors["generator"] = self.generator.get_state()
        return {"tensors": tensors, "meta": meta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; nothing is captured anew.

        Call it after `begin_task` of the same task, or before any. Raises `Refused` where the
        methods, or the names, shapes or types of the parameters differ. Between tasks, a method's
        `tunable` settings may be others than those of the saved state.
        """
        meta, tensors = state["meta"], dict(state["tensors"])
        between = meta["finished"][-1:] == [meta["task"]]
        ours = {m.name: m.to_dict() for m in self.methods}
        loose = {m.name: m.tunable if between else () for m in self.methods}
        if _firm(meta["methods"], loose) != _firm(ours, loose):
            raise Refused(f"the state was saved by {meta['methods']}, not by {ours}")
        attached = bool(self.weights)
        if attached:
            check_fit(meta["parameters"], describe(self.weights))
        if attached and meta["task"] != self.task:
            raise Refused(f"the state is of task {meta['task']!r}, not of {self.task!r}")
        self.generator.set_state(tensors.pop("generator"))
        unpack(self.states, tensors, meta["numbers"], self.weights)
        self.finished, self.skipped = list(meta["finished"]), meta["skipped"]
        if attached:
            self.step, self.total_steps = meta["step"], meta["total_steps"]
        self._signature = dict(meta["shared"])
        self.resuming = False
        self._forget_step()
        for method in self._defining("loaded"):
            method.loaded(self.views[method.name])


def _firm(
    methods: Mapping[str, Mapping[str, Any]], loose: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The settings of each method without those that may differ."""
    return {
        name: {k: v for k, v in settings.items() if k not in loose.get(name, ())}
        for name, settings in methods.items()
    }


def _nothing_to_evaluate() -> Mapping[str, float]:
    raise RuntimeError("no evaluation was offered: set bound.evaluate")
