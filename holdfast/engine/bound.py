"""A recipe at work on a model and an optimizer: the engine, and the one place that holds state.

Everything runs in the optimizer's own step hooks, so that any loop, Accelerate and any Trainer
works the same way. Per step, in this order:

    unscaled gradients → penalty_grad_ of each → finite? → before_step of each → clip
                       → optimizer → after_step of each

It has three layers: `Stepping` is such a step, `Passes` adds extra passes over the rows, and
`Bound` adds tasks, what is attached for each, and saving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engine import mixing
from holdfast.engine.attachment import (
    Attachment,
    Held,
    Hooks,
    check_served,
    default_shared,
    groups_by_id,
    unwrap,
)
from holdfast.engine.batches import Data
from holdfast.engine.forwarding import gradients_on, in_mode
from holdfast.engine.head_first import HeadFirst
from holdfast.engine.head_last import HeadLast
from holdfast.engine.method import Gradients, Method, View
from holdfast.engine.passes import Passes, nothing_to_evaluate
from holdfast.engine.plan import compare, options_of
from holdfast.engine.state import (
    SCHEMA,
    State,
    check_fit,
    check_schema,
    describe,
    ended,
    pack,
    refuse_not_finite,
    saved_by,
    unpack,
)  # fmt: skip
from holdfast.errors import Refused, tell_once
from holdfast.network.groups import regroup_
from holdfast.network.parts import parts
from holdfast.network.rates import Rates
from holdfast.ops import distributed
from holdfast.ops.gradients import switch_on_


class Bound(Passes):
    """Methods bound to a model and an optimizer, for a whole sequence of tasks.

    Made by `Recipe.bind`. `skipped` counts the steps left out for non-finite gradients;
    `norm` is the gradient norm of the last step, before `before_step` and clipping. `plan` returns
    what else a resumed run has to share with this one, as JSON: see `holdfast.engine.plan`.
    `changes` tells what did not agree where it went on nevertheless.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        *,
        max_grad_norm: float | None = None,
        head_first: HeadFirst | None = None,
        head_last: HeadLast | None = None,
        parts: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.methods, self.head_first, self.head_last = tuple(methods), head_first, head_last
        self.max_grad_norm, self.parts = max_grad_norm, dict(parts or {})  # overrides
        self.generator = torch.Generator().manual_seed(seed)
        # One generator per method, so that adding a method changes no draw of the others.
        self.states = {m.name: State(distributed.number_of([seed, m.name])) for m in self.methods}
        self.views = {m.name: View(self, self.states[m.name]) for m in self.methods}
        self.models, self.finished = {}, []
        self.task, self.step, self.total_steps, self.skipped = "", 0, 0, 0
        self.weights, self.previous, self._grams, self._added, self.rates = {}, {}, {}, {}, {}
        self.plan: Callable[[], Mapping[str, Any]] = dict
        self.changes: list[str] = []
        self._began: dict[str, Any] = {}  # of the optimizer, as the task began
        self.data = list
        self.start: Callable[[], Mapping[str, Tensor]] | None = None
        self.evaluate: Callable[[], Mapping[str, float]] = nothing_to_evaluate
        self.resuming = False
        self._signature: dict[str, list[Any]] = {}
        self._trained: set[str] = set()  # what tasks share, as far as it trained in any
        self._ended: int | None = None  # the step at which `end_task` closed the task
        self._undo = contextlib.ExitStack()  # what is attached for this task

    # --- tasks ------------------------------------------------------------------------------

    def begin_task(
        self,
        task: str,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        model: nn.Module | None = None,
        shared: nn.Module | None = None,
        data: Data | None = None,
        start: Callable[[], Mapping[str, Tensor]] | None = None,
        resuming: bool = False,
    ) -> None:
        """Attach to a task's optimizer (and model, where each task has its own head).

        `shared` is the module that all tasks share (default: see `attachment.default_shared`).
        Parameters outside of it are named `task/name` and never anchored across tasks. `data` are
        the task's training rows, as `end_task` takes them: the head is fitted to them first, if the
        recipe says so, and methods may read them. `start`, called at any later time, returns the
        shared weights by name as they are now (from a checkpoint), so that no method copies them.
        `resuming`: a saved state is loaded next, so the head is not fitted and `read_rows` not run.

        Raises `Refused` for what is not supported: sparse gradients, an optimizer that runs its
        closure more than once, parameters that are not in the model, an optimizer already bound;
        docs/optimizers.md lists them all.
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
        if task in self.finished and self.models.get(task, model) is not model:
            raise Refused(f"a task {task!r} is learned already, by another model",
                          where="begin_task", remedy="give this one its own name")  # fmt: skip
        if task != self.task and self._ended is None and self.step and self._defining("end_task"):
            tell_once(f"task {self.task!r} was never ended, so nothing of it is remembered: call "
                      "end_task after its last step")  # fmt: skip
        optimizer, wrapper = unwrap(optimizer)
        self.unbind()
        check_served(model, optimizer)
        self.task, self.step, self.total_steps, self._ended = task, 0, total_steps, None
        self.plan, self.in_a_row, self.fitted, self.fitted_last = dict, 0, None, None
        learned = [m for t, m in self.models.items() if t in self.finished]
        self.optimizer, self._wrapper, self.models[task] = optimizer, wrapper, model
        self.resuming, self.start, self._added = resuming, start, {}
        self.core, self._blocks = shared or default_shared(model), None
        self._forget_step()
        self._pieces = {}
        for method in self.methods:
            if method.per_task:
                self.states[method.name].weights.clear()
        try:
            self._adopt(Attachment.of(task, model, optimizer, shared, self.parts))
            names = {id(w): name for name, w in self.weights.items()}
            self._began = options_of(self.optimizer, names)
            recipe = {m.name: m.to_dict() for m in self.methods}
            plan = [task, total_steps, recipe]
            self.randomness = distributed.align_(self.randomness, self.weights, plan)
            self._held = Held(self.optimizer)
            self._undo.callback(Hooks(self.optimizer, self._before_step, self._after_step).remove)
            for view in self.views.values():
                self._undo.callback(switch_on_, view.cut)
            for method in self._defining("unbound"):
                self._undo.callback(method.unbound, self.views[method.name])
            with self._offering(data), gradients_on(), self._locating():
                if not resuming:
                    self._read_rows(learned, offered=data is not None)
                for method in self._defining("begin_task"):
                    method.begin_task(self.views[method.name])
            self._refuse_idle()
            self._install_mixing()
            if any(m.needs_features for m in self.methods):
                self._undo.enter_context(self._seeing_features())
            asked = [m.watched(self.views[m.name]) for m in self.methods]
            self._undo.enter_context(self._watching({m for each in asked for m in each}))
            self._await_steps()
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
        train = {name for name, w in found.shared.items() if w.requires_grad}
        thawed = sorted(train - self._trained) if self.finished and self._trained else []
        if thawed and any(m.needs_old_task for m in self.methods):
            tell_once(f"{len(thawed)} of {len(shared)} shared weights ({thawed[0]}, …) did not "
                      "train in earlier tasks: nothing is remembered of these")  # fmt: skip
        if changed:
            raise Refused("shared parameters changed between tasks: " + ", ".join(changed[:5]))
        self._signature |= shared
        self._trained |= train
        self.weights, self.shared = found.weights, found.shared
        self.part_of, self.group_of, self.owners = found.part_of, found.group_of, found.owners
        self.grads = Gradients(self.weights)
        for state in self.states.values():
            for slot in (*state.weights.values(), *state.tensors.values()):
                for name in slot.keys() & self.weights.keys():
                    slot[name] = distributed.beside(slot[name], self.weights[name])

    def _refuse_idle(self) -> None:
        """Refuse methods that remember other weights than those that train: they would do nothing.

        Where nothing that tasks share trains, there is nothing to hold.
        """
        for method, state in self.states.items() if self.shared else ():
            for names in state.remembered():
                if names.isdisjoint(self.shared):
                    raise Refused(f"of the {len(names)} weights that {method} remembers "
                                  f"({min(names)}, …) none trains now", where=self.task,
                                  remedy="remember old tasks with the adapters attached that "
                                  "train now, or take replay, lwf or kl_anchor")  # fmt: skip

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
        self._undo.callback(mixing.install(chosen, self.owners, mix))

    def end_task(self, data: Data | None = None) -> None:
        """Finish a task: methods may change weights, the head is fitted last, others measure it.

        `data` are the task's training rows in batches as the model takes them, re-iterable or a
        function that returns them. Runs in evaluation mode and leaves the global random state as
        it is. Every rank must call this with all rows: methods divide them.
        """
        model = self._model()
        if data is None and (needing := [m.name for m in self.methods if m.needs_data]):
            raise Refused(f"{', '.join(needing)} reads the rows of a finished task",
                          where="end_task", remedy="pass data=")  # fmt: skip
        self.check_made()
        if self._ended == self.step:
            raise Refused(f"task {self.task!r} has ended, and made no step since",
                          where="end_task", remedy="call it once a task")  # fmt: skip
        steps = self.step, self.skipped
        distributed.require_aligned(self.randomness, self.weights, steps)
        for view in self.views.values():  # other methods measure all, and so does the next task
            switch_on_(view.cut)
        with (
            self._as_before(),
            self._offering(data),
            in_mode(model.modules(), training=False),
            self._locating(),
            gradients_on(),
        ):
            # Weights are changed first: the other methods measure, and remember, what stays.
            if self._end_methods(changing=True):
                refuse_not_finite(self.shared, "this weight would become one that is not finite")
            self._fit_last()
            self._end_methods(changing=False)
        self.finished.append(self.task)
        self._ended = self.step

    def remember(
        self,
        task: str,
        model: nn.Module,
        data: Data,
        *,
        shared: nn.Module | None = None,
    ) -> None:
        """Take over a task learned elsewhere, with the state that `end_task` would have left.

        Nothing is trained: methods only read the task's rows, so that a deployed model is
        protected from the first task that it learns here.
        """
        if not any(p.requires_grad for p in model.parameters()):
            raise Refused("no weight of the model trains", where="remember",
                          remedy="let train what will train in the next task")  # fmt: skip
        still = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        self.begin_task(task, still, 1, model=model, shared=shared, data=data, resuming=True)
        self.unbind()
        self.resuming = False  # no state is loaded
        self.end_task(data)

    def unbind(self) -> None:
        """Take every hook off the optimizer and the model; state stays."""
        self._undo.close()

    # --- what hooks and loops call ------------------------------------------------------------

    def set_rates(self, rates: Rates, scheduler: Any = None) -> None:
        """Continue the task with other rates over the same base rate; see `groups.regroup_`."""
        if self.scheduled is not None or rates.pieces:
            raise Refused("are not for rates that come in pieces", where="set_rates")
        model = self._model()
        regroup_(self.optimizer, model, rates, scheduler, parts(model, self.parts))
        by_id = groups_by_id(self.optimizer)
        self.group_of = {name: by_id[id(w)] for name, w in self.weights.items()}

    # --- saving -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume, as ``{"tensors": {key: tensor}, "meta": JSON}``.

        Tensors are not copied. Keys are ``method/kind/slot/name``. Sharded tensors are gathered
        on rank 0; then every rank must call this, and other ranks get no tensors.
        """
        closed = self._ended is not None
        tensors, numbers = pack(
            self.states, without={m.name for m in self.methods if closed and m.per_task}
        )
        meta = {
            "schema": SCHEMA,
            "methods": {m.name: m.to_dict() for m in self.methods},
            "numbers": numbers,
            "task": self.task,
            "step": self.step,
            "total_steps": self.total_steps,
            "skipped": self.skipped,
            "finished": list(self.finished),
            "ended": closed,
            "parameters": describe(self.weights),
            "shared": dict(self._signature),
            "plan": self.planned(),
            "changes": list(self.changes),
        }
        if distributed.rank() == 0 or not any(map(distributed.sharded, self.weights.values())):
            tensors["generator"] = self.randomness
        return {"tensors": tensors, "meta": meta}

    def planned(self) -> dict[str, Any]:
        """What a run that goes on from here has to share with this one, as JSON."""
        if not self.weights:
            return {}
        settings: dict[str, Any] = {"steps": self.total_steps, "max_grad_norm": self.max_grad_norm}
        for name in ("head_first", "head_last"):
            settings[name] = (how := getattr(self, name)) and how.to_dict()
        settings |= {"parts": self.parts, "methods": [m.name for m in self.methods]}
        kind = type(self.optimizer).__name__
        if self.scheduled is not None:
            settings["pieces"] = [piece.to_dict() for piece in self.scheduled.pieces]
        return {"optimizer": kind, "options": self._began, **settings, **self.plan()}

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """Load a saved state; nothing is measured again.

        Call it after `begin_task` of the same task, or before any. Raises `Refused` where the
        methods, or the names, shapes or types of the parameters differ, and where the settings of
        the training do: with `exact=False` these are told and noted in `changes`. Between tasks, a
        method's `tunable` settings may differ from those saved.
        """
        meta, tensors = state["meta"], dict(state["tensors"])
        check_schema(meta, "a state")
        if not saved_by(meta, self.methods):
            ours = {m.name: m.to_dict() for m in self.methods}
            raise Refused(f"the state was saved by {meta['methods']}, not by {ours}")
        attached = bool(self.weights)
        if not attached and meta["step"] and not ended(meta):
            raise Refused(f"the state is of the middle of task {meta['task']!r}",
                          where="load_state_dict",
                          remedy="begin that task first, with resuming=True")  # fmt: skip
        if attached:
            check_fit(meta["parameters"], describe(self.weights))
        if attached and meta["task"] != self.task:
            raise Refused(f"the state is of task {meta['task']!r}, not of {self.task!r}")
        told = compare(meta.get("plan", {}), self.planned(), exact=exact) if attached else []
        drawn = tensors.pop("generator")
        if drawn.ndim == 1:  # an earlier version had one for all methods
            tell_once("the state holds one random state for all methods: they go on from new ones")
            self.generator.set_state(drawn)
            for name, each in self.states.items():
                each.generator.manual_seed(distributed.number_of([drawn.tolist(), name]))
        else:
            self.randomness = drawn
        unpack(self.states, tensors, meta["numbers"], self.weights)
        self.finished, self.skipped = list(meta["finished"]), meta["skipped"]
        if attached:
            self.step = meta["step"]
            if exact:  # fewer are refused, and with more the training goes on
                self.total_steps = max(self.total_steps, meta["total_steps"])
            self._ended = self.step if ended(meta) else None
        self._signature = dict(meta["shared"])
        self.changes = [*meta.get("changes", []), *(f"step {self.step}: {line}" for line in told)]
        self.resuming = False
        self._forget_step()
        for method in self._defining("loaded"):
            method.loaded(self.views[method.name])
