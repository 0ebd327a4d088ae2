"""Forward passes outside training: over a task's rows before its first step, and for methods."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.engine.batches import (
    Batch,
    Batches,
    Data,
    Seen,
    Whole,
    first_rows,
    rows_in,
    without_labels,
)
from holdfast.engine.forwarding import (
    Hook,
    draw_on,
    in_mode,
    own_randomness,
    perturbed,
    random_state,
    replaced,
    returning,
    uncompiled,
    untrained,
)
from holdfast.engine.grams import Grams, measure
from holdfast.engine.head_first import HeadFirst, known_outputs
from holdfast.engine.head_last import HeadLast
from holdfast.engine.stepping import Stepping
from holdfast.errors import NotFinite, Refused, tell_once
from holdfast.network.stacks import blocks
from holdfast.ops import distributed


class Passes(Stepping):
    """The part of `Bound` that reads rows and runs the models of all tasks."""

    head_first: HeadFirst | None
    head_last: HeadLast | None
    finished: list[str]
    total_steps: int
    data: Callable[[], Batches]
    shared: Mapping[str, nn.Parameter]
    owners: Mapping[str, tuple[nn.Module, ...]]  # the modules that own each weight
    _grams: dict[str, Grams]  # measured on `data`, by settings
    fitted: dict[str, Any] | None = None  # how this task's head was fitted first
    fitted_last: dict[str, Any] | None = None
    core: nn.Module | None = None  # what tasks share, if that is a part of the model
    _blocks: Mapping[nn.Module, str] | None = None
    _aside = False  # within `forward`
    _at_work = False  # within a training pass that is watched

    @contextlib.contextmanager
    def _as_before(self) -> Iterator[None]:
        """Undo what a block does to state and weights where it fails."""
        states = {name: state.copy() for name, state in self.states.items()}
        changing = any(m.changes_weights for m in self.methods)
        weights = {n: w.detach().clone() for n, w in self.shared.items()} if changing else {}
        drawn = self.randomness
        try:
            yield
        except BaseException:
            for name, state in states.items():
                self.states[name].take(state)
            with torch.no_grad():
                for name, w in weights.items():
                    self.shared[name].copy_(w)
            self.randomness = drawn
            raise

    @contextlib.contextmanager
    def _locating(self) -> Iterator[None]:
        """Within the block, say of numbers that are not finite which row they come from."""
        try:
            yield
        except NotFinite as error:
            raise error.within(self._not_finite()) from None

    @torch.no_grad()
    def _not_finite(self) -> str | None:
        """The first weight, or else row of the data, that is not finite, or gives such outputs."""
        for name, w in self.weights.items():
            if not distributed.local(w).isfinite().all():
                return f"weight {name}"
        for number, batch in enumerate(self.data()):
            given = [v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point()]
            row = _first_bad(given, batch)
            if row is None:
                out = self.forward(batch, training=False)
                told = (getattr(out, name, None) for name in ("logits", "loss"))
                row = _first_bad([t for t in told if isinstance(t, Tensor)], batch)
            if row is not None:
                return f"batch {number}{row} of the data (from 0)"
        return None

    @contextlib.contextmanager
    def _offering(self, data: Data | None) -> Iterator[None]:
        """Within the block methods can read the task's rows any number of times."""
        if isinstance(data, Iterator):
            raise Refused("an iterator can be read once only", where="data",
                          remedy="pass a list, a loader, or a function returning one")  # fmt: skip
        if data is not None:
            self.data = data if callable(data) else lambda: data
        try:
            yield
        finally:
            self.data, self._grams = list, {}

    @torch.no_grad()
    def _read_rows(self, learned: Sequence[nn.Module], *, offered: bool) -> None:
        """One pass over the rows before the first step: for methods, and to fit the head.

        `learned` are the models of finished tasks: their heads are not fitted again.
        """
        readers = [m for m in self._defining("read_rows") if m.wants_rows(self.views[m.name])]
        model, head = self.models[self.task], None
        if self.head_first is not None:
            steps = self.total_steps
            head = self.head_first.of(model, self.core, steps, learned=learned)
        if not readers and head is None:
            return
        if not offered:
            who = [*(m.name for m in readers), *(["head_first"] if head else [])]
            raise Refused(f"{', '.join(who)} reads the rows of a task before its first step",
                          where="begin_task", remedy="pass data=")  # fmt: skip
        began, rows, drawn = time.monotonic(), Seen(), self.generator.get_state()
        try:
            with self._seeing_features(always=True), in_mode(model.modules(), training=False):
                for batch in rows.through(self.data()):
                    if not (readers or (head and head.looking)):
                        break
                    self.inputs = batch
                    with head.watching() if head else contextlib.nullcontext():
                        self.outputs = self.forward(batch)
                    if head:
                        head.see(batch, self.outputs)
                    for method in readers:
                        method.read_rows(self.views[method.name])
                self.generator.set_state(drawn)  # later draws do not depend on who reads rows
                self._forget_step()
                if head:
                    with own_randomness(self.generator):
                        self.fitted = head.fit(lambda: rows.through(self.data()))
                    self.fitted["seconds"] = round(time.monotonic() - began, 3)
            rows.require_equal(next(model.parameters()).device)
        finally:
            self._forget_step()

    def _end_methods(self, *, changing: bool) -> bool:
        """Run `end_task` of the methods that change weights, or of the others; whether any did."""
        ending = [m for m in self._defining("end_task") if m.changes_weights is changing]
        for method in ending:
            with own_randomness(self.views[method.name].generator):
                method.end_task(self.views[method.name])
            if changing:
                self._grams = {}  # of inputs that the layers no longer get
        return bool(ending)

    @torch.no_grad()
    def _fit_last(self) -> None:
        """Fit the task's head once more, to features of the weights as they are now.

        Not that of a task learned elsewhere, which takes no step here.
        """
        model, began = self.models[self.task], time.monotonic()
        if self.head_last is None or not self.step:
            return
        if missing := [t for t in self.finished if t not in self.models]:
            raise Refused(f"cannot tell whether task {missing[0]!r} has the same head",
                          where="head_last",
                          remedy=f"set bound.models[{missing[0]!r}] after loading")  # fmt: skip
        head = self.head_last.of(model, self.core, [self.models[t] for t in self.finished])
        if head is None:
            return
        rows, drawn = Seen(), self.generator.get_state()
        for batch in rows.through(first_rows(self.data(), head.most)):
            if not head.looking:
                break
            with head.watching():
                outputs = self.forward(batch)
            head.see(batch, outputs)
        self.generator.set_state(drawn)  # later draws do not depend on how many batches there were
        rows.require_equal(next(model.parameters()).device)
        if not (fitted := head.fit()):
            tell_once("head_last: the head stays as it was: its last layer does not return the "
                      "logits, its loss is another, or all rows are of one class")  # fmt: skip
        self.fitted_last = {"rows": fitted, "seconds": round(time.monotonic() - began, 3)}

    def _seeing_features(
        self, *, always: bool = False
    ) -> contextlib.AbstractContextManager[Any, None]:
        """Keep the shared module's outputs until the penalty.

        Those of one pass: of two, nothing tells which one the penalty will be of.
        """

        def see(module: nn.Module, _: Any, outputs: Any) -> None:
            if always:
                self.features = outputs
            elif torch.compiler.is_compiling() or self._aside:
                return
            elif module.training and torch.is_grad_enabled():
                self.features = None if self._ran else outputs
                self._ran = True

        return self.core.register_forward_hook(Hook(see)) if self.core else contextlib.nullcontext()

    def _watching(self, watched: Collection[nn.Module]) -> contextlib.AbstractContextManager[Any]:
        """Keep what some modules return in the training pass, and the random states there.

        Not in passes of `forward`, nor where activations are computed again.
        """
        stack, model = contextlib.ExitStack(), self._model()
        if not watched:
            return stack

        def enter(*_: Any) -> None:
            if torch.compiler.is_compiling() or self._aside:
                return
            if model.training and torch.is_grad_enabled():
                self.seen, self._drew, self._at_work = {}, {model: random_state()}, True

        def see(module: nn.Module, _: Any, outputs: Any) -> None:
            if not torch.compiler.is_compiling() and self._at_work and torch.is_grad_enabled():
                self.seen[module], self._drew[module] = outputs, random_state()

        def leave(*_: Any) -> None:
            if not torch.compiler.is_compiling():
                self._at_work = False

        stack.callback(model.register_forward_pre_hook(Hook(enter)).remove)
        for module in watched:
            if module is not model:
                stack.callback(module.register_forward_hook(Hook(see)).remove)
        stack.callback(model.register_forward_hook(Hook(leave)).remove)
        return stack

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """See `View.blocks`."""
        if self._blocks is None:
            self._blocks = blocks(self._model())
        return self._blocks

    def forward(
        self,
        inputs: Mapping[str, Any] | None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        task: str | None = None,
        training: bool | None = None,
        perturb: Mapping[nn.Module | str, Callable[[Tensor], Tensor]] | None = None,
        returns: Mapping[nn.Module, Any] | None = None,
        dropout: Literal["own", "same"] = "own",
        generator: torch.Generator | None = None,
    ) -> Any:
        """See `View.forward`; dropout draws from `generator` (default: the bound's own)."""
        task = task or self.task
        if task not in self.models:
            raise Refused(f"no model of task {task!r}", where="view.forward",
                          remedy=f"set bound.models[{task!r}] after loading a state")  # fmt: skip
        model, ours = self.models[task], self.models[self.task]
        batch = inputs if inputs is not None else self.inputs
        if batch is None:
            raise Refused("no batch here", where="view.forward", remedy="pass inputs=")
        with contextlib.ExitStack() as stack:
            aside, self._aside = self._aside, True
            stack.callback(setattr, self, "_aside", aside)
            stack.enter_context(own_randomness(generator or self.generator))
            stack.enter_context(replaced(self.weights, weights or {}))
            stack.enter_context(untrained(model, self.weights))
            stack.enter_context(uncompiled())
            concerned, drew = {*model.modules()}, self._drew if dropout == "same" else {}
            for module, outputs in (returns or {}).items():
                stack.enter_context(returning(module, outputs, drew.get(module)))
                concerned -= {*module.modules()}
            if perturb:
                batch = stack.enter_context(perturbed(model, batch, perturb))
            if dropout == "same":
                if model not in drew:
                    raise Refused("the training pass was not seen", where="view.forward",
                                  remedy="train a model that is not compiled")  # fmt: skip
                draw_on(drew[model])
            if training is not None:
                stack.enter_context(in_mode(concerned, training))
            elif model.training != ours.training:  # another task's: match this model's mode
                stack.enter_context(in_mode(concerned - {*ours.modules()}, ours.training))
            try:
                return batch.run(model, batch) if isinstance(batch, Whole) else model(**batch)
            except TypeError as error:
                if not re.search(r"missing \d+ required .*'label", str(error)):
                    raise
                raise Refused(f"the model does not run without labels ({error})",
                              where="view.forward", remedy="give them a default: labels=None, and "
                              "return logits alone then") from None  # fmt: skip

    def old_outputs(
        self,
        inputs: Mapping[str, Any] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """See `View.old_outputs`."""
        batch = without_labels(inputs if inputs is not None else self.inputs or {})
        returns = {}
        if self.core is not None and self.features is not None and inputs is None:
            returns = {self.core: self.features}
        tasks, known = list(dict.fromkeys(self.finished)), known_outputs(self._model())
        found = {
            task: self.forward(
                batch, task=task, training=False, returns=returns, generator=generator
            )
            for task in (tasks if known is None else tasks[-1:])
        }
        for output in () if known is None else found.values():
            output.logits = output.logits[:, :known]
        return found

    def measured_grams(self, *, merged: bool = False, **how: Any) -> Grams:
        """See `View.grams`; calls with the same settings share one pass, while weights stay."""
        key = repr([merged, sorted(how.items())])
        if key not in self._grams:
            self._grams[key] = measure(self, **how)
        return self._grams[key]


def nothing_to_evaluate() -> Mapping[str, float]:
    """What `Bound.evaluate` is until it is set."""
    raise RuntimeError("no evaluation was offered: set bound.evaluate")


def _first_bad(values: Sequence[Tensor], batch: Batch) -> str | None:
    """Where in a batch the first value that is not finite stands; None if all are."""
    rows = rows_in(batch)
    for value in values:
        bad = ~value.isfinite()
        if bad.any():
            each = bad.reshape(rows, -1).any(1) if bad.ndim and len(bad) == rows else None
            return "" if each is None else f", row {int(each.nonzero()[0])}"
    return None
