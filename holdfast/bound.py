"""A recipe at work on a model and an optimizer: the engine, and the one place that holds state.

The work hangs on the optimizer's own step hooks, so that any loop, Accelerate and any Trainer is
served alike. Per step, in this order:

    unscaled gradients → finite? → penalty_grad_ of each → before_step of each → clip
                       → optimizer → after_step of each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import mixing
from holdfast.attachment import MARK, Attachment, check_served, regroup_, unwrap
from holdfast.errors import Refused
from holdfast.forwarding import own_randomness, replaced, untrained
from holdfast.gradients import clip_, total_norm, unscale_
from holdfast.method import Gradients, Method, View
from holdfast.rates import Rates
from holdfast.state import State, check_fit, describe, pack, unpack

Batches = Iterable[Mapping[str, Any]]


class Bound:
    """Methods bound to a model and an optimizer, for a whole sequence of tasks.

    Made by `Recipe.bind`. `skipped` counts the steps left out for non-finite gradients;
    `norm` is the gradient norm of the last step, before clipping.
    """

    def __init__(
        self, methods: Sequence[Method], *, max_grad_norm: float | None = None, seed: int = 0
    ) -> None:
        self.methods = tuple(methods)
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
        self.previous: dict[str, Tensor] = {}
        self.evaluate: Callable[[], Mapping[str, float]] = _nothing_to_evaluate
        self.data: Callable[[], Batches] = list
        self._undo: list[Callable[[], None]] = []
        self._wrapper: Any = None  # an AcceleratedOptimizer around ours
        self._asked = self._skip = False
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
    ) -> None:
        """Attach to a task's optimizer (and model, where each task has its own head).

        `shared` is the module that all tasks share (default: see `attachment.default_shared`).
        Parameters outside of it are named `task/name` and never anchored across tasks. Raises
        `Refused` for what cannot be served: sparse gradients, an optimizer that runs its closure
        more than once, parameters that belong to no module of the model, an optimizer already
        bound.
        """
        model = model if model is not None else self.models.get(self.task)
        if model is None:
            raise Refused("no model to bind", remedy="pass model=")
        if "/" in task or not task:
            raise Refused(f"{task!r} is no task name", remedy="use a name without '/'")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise Refused(f"total_steps must be a whole number above 0, not {total_steps!r}")
        optimizer, wrapper = unwrap(optimizer)
        self.unbind()
        check_served(model, optimizer)
        self.task, self.step, self.total_steps = task, 0, total_steps
        self.optimizer, self._wrapper, self.models[task] = optimizer, wrapper, model
        self._forget_step()
        try:
            self._adopt(Attachment.of(task, model, optimizer, shared))
            self._attach()
            for method in self._defining("begin_task"):
                method.begin_task(self.views[method.name])
            self._install_mixing()
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
            for slot in state.weights.values():
                for name in slot.keys() & self.weights.keys():
                    slot[name] = slot[name].to(self.weights[name].device)

    def _install_mixing(self) -> None:
        mixers: dict[str, list[Method]] = {}
        for method in self._defining("weights"):
            for name in method.mixed(self.views[method.name]):
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
        """The task is learned: let methods estimate importance and keep rows.

        `data` are the task's training rows in batches as the model takes them, re-iterable or a
        function that returns them. Runs in evaluation mode, without touching the global
        random state.
        """
        needing = [m.name for m in self.methods if m.needs_data]
        if needing and data is None:
            raise Refused(f"{', '.join(needing)} reads the rows of a finished task",
                          where="end_task", remedy="pass data=")  # fmt: skip
        if data is not None:
            batches = data
            self.data = batches if callable(batches) else lambda: batches
        model = self.models[self.task]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with own_randomness(self.generator):
                for method in self._defining("end_task"):
                    method.end_task(self.views[method.name])
        finally:
            for module, training in modes:
                module.training = training
            self.data = list
        self.finished.append(self.task)

    def unbind(self) -> None:
        """Take every hook off the optimizer and the model; state stays."""
        while self._undo:
            self._undo.pop()()

    # --- a step -----------------------------------------------------------------------------

    def _attach(self) -> None:
        optimizer = self.optimizer
        hooks = (
            optimizer.register_step_pre_hook(self._pre_step),
            optimizer.register_step_post_hook(self._post_step),
        )
        setattr(optimizer, MARK, True)
        self._undo += [h.remove for h in hooks] + [lambda: delattr(optimizer, MARK)]

    def _defining(self, hook: str) -> list[Method]:
        return [m for m in self.methods if m.defines(hook)]

    def _pre_step(self, _: Any, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_step()
            return None

        ran = False

        def wrapped() -> Any:
            nonlocal ran
            if ran:
                raise RuntimeError("this optimizer runs its closure more than once a step")
            ran = True
            loss = closure()
            self._before_step()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    @torch.no_grad()
    def _before_step(self) -> None:
        norm = self.gradient_norm() if self._unscaled is None else self._unscaled
        self.norm, self._unscaled = norm, None
        found = getattr(self.optimizer, "found_inf", None)
        overflow = found is not None and bool(found.item())
        if not self._skip_unless(bool(torch.isfinite(norm)) and not overflow):
            return
        if self._defining("penalty") and not self._asked:
            raise RuntimeError("this recipe has penalties: add bound.penalty(...) to the loss")
        pulling, changing = self._defining("penalty_grad_"), self._defining("before_step")
        for method in pulling:
            method.penalty_grad_(self.views[method.name])
        if pulling:
            norm = total_norm(self._gradients())
            if not self._skip_unless(bool(torch.isfinite(norm))):
                return
        for method in changing:
            method.before_step(self.views[method.name])
        if self.max_grad_norm is not None:
            if changing:
                norm = total_norm(self._gradients())
            clip_(self._gradients(), norm, self.max_grad_norm)
        if any(m.needs_previous for m in self.methods):
            self.previous = {n: w.detach().clone() for n, w in self.weights.items()}

    @torch.no_grad()
    def _post_step(self, *_: Any) -> None:
        if self._skip:
            self.skipped += 1
        else:
            for method in self._defining("after_step"):
                method.after_step(self.views[method.name])
            self.step += 1
        self._forget_step()

    def _forget_step(self) -> None:
        self._asked = False
        self.inputs = self.outputs = None
        self.previous = {}
        for view in self.views.values():
            view.scratch.clear()

    _unscaled: Tensor | None = None  # the norm, once gradients of this step are unscaled

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global norm of this step's gradients, after undoing a GradScaler's scale.

        Always measured anew: a GradScaler may have left out the step it was last measured for.
        """
        grads = self._gradients()
        unscale_(self.optimizer, grads)
        self._unscaled = total_norm(grads)
        return self._unscaled

    def _gradients(self) -> list[Tensor]:
        return [w.grad for w in self.weights.values() if w.grad is not None]

    def _skip_unless(self, good: bool) -> bool:
        """Leave this step out of training altogether, unless its gradients are good."""
        self._skip = not good
        if self._skip:
            for w in self.weights.values():
                w.grad = None  # the optimizer passes over tensors without a gradient
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
        device = next(iter(self.weights.values())).device
        total = torch.zeros((), device=device)
        for method in self._defining("penalty"):
            total = total + method.penalty(self.views[method.name])
        return total

    def set_rates(self, rates: Rates, scheduler: Any = None) -> None:
        """Train the task on with other rates over the same base rate; see `attachment.regroup_`."""
        model = self.models[self.task]
        self.group_of = regroup_(self.optimizer, model, self.weights, rates, scheduler)

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
    ) -> Any:
        """See `View.forward`."""
        task = task or self.task
        if task not in self.models:
            raise Refused(f"no model of task {task!r}", where="view.forward",
                          remedy=f"set bound.models[{task!r}] after loading a state")  # fmt: skip
        model = self.models[task]
        now = self.models[self.task].training
        if model.training != now:  # the head of another task; loaded ones are in evaluation mode
            model.train(now)
        batch = inputs if inputs is not None else self.inputs
        if batch is None:
            raise Refused("no batch here", where="view.forward", remedy="pass inputs=")
        with (
            own_randomness(self.generator),
            replaced(self.weights, weights or {}),
            untrained(model, self.weights),
        ):
            return model(**batch)

    # --- saving -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as ``{"tensors": {key: tensor}, "meta": JSON}``.

        Tensors are not copied. Keys are ``method/kind/slot/name``.
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
            "parameters": describe(getattr(self, "weights", {})),
            "shared": dict(self._signature),
        }
        return {"tensors": tensors | {"generator": self.generator.get_state()}, "meta": meta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; nothing is captured anew.

        Call it after `begin_task` of the same task, or before any. Raises `Refused` where the
        methods, or the names, shapes or types of the parameters differ.
        """
        meta, tensors = state["meta"], dict(state["tensors"])
        ours = {m.name: m.to_dict() for m in self.methods}
        if meta["methods"] != ours:
            raise Refused(f"the state was saved by {meta['methods']}, not by {ours}")
        attached = bool(self.task)
        weights: Mapping[str, Tensor] = self.weights if attached else {}
        if attached:
            check_fit(meta["parameters"], describe(weights))
        if attached and meta["task"] != self.task:
            raise Refused(f"the state is of task {meta['task']!r}, not of {self.task!r}")
        self.generator.set_state(tensors.pop("generator"))
        unpack(self.states, tensors, meta["numbers"], weights)
        self.finished, self.skipped = list(meta["finished"]), meta["skipped"]
        if attached:
            self.step, self.total_steps = meta["step"], meta["total_steps"]
        self._signature = dict(meta["shared"])
        self._forget_step()


def _nothing_to_evaluate() -> Mapping[str, float]:
    raise RuntimeError("no evaluation was offered: set bound.evaluate")
