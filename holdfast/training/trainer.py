"""Any Hugging Face Trainer class with a recipe: `with_recipe(SFTTrainer)(…, recipe=recipe)`.

Trainer stays the training engine. The mixin builds the optimizer's groups from the recipe's rates,
binds the recipe once the number of steps is known, clips after the methods' work on gradients, and
saves the methods' state beside Trainer's checkpoints. It also fixes two faults of Trainer: the
weighting of micro-batches if a model's loss ignores `num_items_in_batch`, and the scheduler's
advance over a skipped step.
"""

from __future__ import annotations

import copyreg
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainingArguments

from holdfast.engine.bound import Bound
from holdfast.engine.forwarding import Hook, in_mode, uncompiled
from holdfast.engine.peft import check_adapted
from holdfast.engine.stepping import SKIPS
from holdfast.errors import Refused, tell_once
from holdfast.network.groups import follows_rates
from holdfast.network.parts import canonical, named_parameters
from holdfast.network.rates import Rates
from holdfast.ops import distributed
from holdfast.recipe import Recipe
from holdfast.training.rows import RowsMixin
from holdfast.training.saving import SavingMixin, refuse_found_batches

DEFAULT_CLIP = TrainingArguments.max_grad_norm  # counts as "not set"


class RecipeMixin(RowsMixin, SavingMixin):
    """What `with_recipe` puts in front of a Trainer class.

    recipe: the `Recipe` (default: plain).
    bound: the `Bound` of earlier tasks, to continue a sequence: made by the same recipe, except
        for rates and clipping.
    task: this task's name; shared: the module that tasks share (default: see `bound`).
    start: returns the shared weights as the task began, if you keep them; see `Bound`.
    exact_resume: refuse a checkpoint of other settings or rows; False only warns and notes it in
        `bound.changes`, unless the order of the parameters changed.
    max_skipped: after how many steps in a row with gradients that are not finite training stops;
        None: never. Under a GradScaler, which needs some to find its scale, not before 60.
    stop_on_signals: on SIGTERM or Ctrl-C finish the step, save, and leave with 143 or 130.
    """

    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *args: Any,
        recipe: Recipe | None = None,
        bound: Bound | None = None,
        task: str = "task",
        shared: nn.Module | None = None,
        start: Callable[[], Mapping[str, Tensor]] | None = None,
        exact_resume: bool = True,
        max_skipped: int | None = SKIPS,
        stop_on_signals: bool = False,
        **kwargs: Any,
    ) -> None:
        self.recipe = recipe or Recipe(name="plain")
        self.bound, self._continues = bound, bound is not None
        self.task, self._shared, self.start = task, shared, start
        self.exact_resume, self.stop_on_signals = exact_resume, stop_on_signals
        self.max_skipped = max_skipped
        self._window: float | None = 0.0
        self._ignores_items: bool | None = None
        self._outputs: Any = None
        self._watch: Any = None
        super().__init__(*args, **kwargs)
        self._check_arguments()
        if self.model_init is None:
            self.model = self.model_wrapped = self._prepared(self.model)

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model, prepared by the recipe's methods."""
        return self._prepared(super().call_model_init(trial))

    def _prepared(self, model: Any) -> Any:
        self._problem = getattr(getattr(model, "config", None), "problem_type", None)
        if self._continues:
            check_adapted(model, self.recipe.peft)
            return model
        preparing = self.recipe.peft or any(m.defines("prepare") for m in self.recipe.methods)
        return self.recipe.prepare(model) if preparing else model

    def _check_arguments(self) -> None:
        for name, served in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
            if getattr(self, f"is_{name}_enabled", False):
                raise Refused(f"Trainer over {served} is not served", where=name,
                              remedy="torchrun alone gives DistributedDataParallel")  # fmt: skip
        if self.args.n_gpu > 1:
            raise Refused(
                f"Trainer would spread batches over {self.args.n_gpu} devices by DataParallel",
                where="devices",
                remedy="start it by torchrun, or set CUDA_VISIBLE_DEVICES=0",
            )
        refuse_found_batches(self.args, self.recipe)
        if self.max_skipped is not None and self.max_skipped < 1:
            raise Refused(f"must be above 0 or None, not {self.max_skipped}", where="max_skipped")
        distributed.bound_waiting(self.args.ddp_timeout, usual=TrainingArguments.ddp_timeout)
        if self.bound is not None:
            self.recipe.check_bound(self.bound)
        ours, theirs = self.recipe.max_grad_norm, self.args.max_grad_norm
        if ours is not None and theirs not in (ours, DEFAULT_CLIP):
            raise Refused(
                f"the recipe clips at {ours}, TrainingArguments at {theirs}",
                where="max_grad_norm",
                remedy="set one of them",
            )
        if self.optimizer is not None and not self._at_recipes_rates():
            raise Refused(
                "the recipe's rates need an optimizer of their own",
                where="optimizers",
                remedy="drop optimizers=, or build it with recipe.param_groups(model, ...)",
            )

    def _at_recipes_rates(self) -> bool:
        return self.recipe.rates == Rates.flat() or follows_rates(self.optimizer)

    # --- optimizer and binding ------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's choice of optimizer over the recipe's groups; a class that makes its own
        optimizer keeps it."""
        theirs: Any = super().create_optimizer
        if theirs.__func__ is not transformers.Trainer.create_optimizer:
            return theirs() if model is None else theirs(model)
        if self.optimizer is None:
            net = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, net
            )
            if isinstance(kwargs.get("optimizer_dict"), list):
                return super().create_optimizer(net)  # groups that hold a loss's own weights too
            own = {"params", "model", "optimizer_dict"} & kwargs.keys()
            if own or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
                raise Refused(
                    f"{self.args.optim} builds its own parameter groups",
                    where="optim",
                    remedy="use adamw_torch_fused",
                )
            decayed = {canonical(name) for name in self.get_decay_parameter_names(net)}
            groups = self.recipe.param_groups(
                net,
                lr=self.args.learning_rate,
                weight_decay=1.0 if self._before else self.args.weight_decay,
                no_decay=[name for name in named_parameters(net) if name not in decayed],
            )
            if self._before:  # saved with two groups even where nothing decays
                for group in groups:
                    group["weight_decay"] *= self.args.weight_decay
            chosen = self.optimizer_cls_and_kwargs
            self.optimizer_cls_and_kwargs = cls, kwargs | {"params": groups}
            try:
                super().create_optimizer(net)
            finally:
                self.optimizer_cls_and_kwargs = chosen
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's scheduler; also binds the recipe, as the number of steps is now known."""
        if not self._at_recipes_rates():
            raise Refused(f"{type(self).__name__} makes an optimizer of its own, at other rates",
                          where="recipe.rates",
                          remedy="build it with recipe.param_groups(model, …)")  # fmt: skip
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.bound is None or (self.model_init is not None and not self._continues):
            self.bound = self.recipe.unbound(seed=self.args.seed)
            # A task that was given a name is taken for the first of several.
            if self.task == "task" and (idle := self.recipe.idle_alone()) and self.args.should_log:
                logging.getLogger("holdfast").warning(idle)
        clip = self.recipe.max_grad_norm
        self.bound.max_grad_norm = self.args.max_grad_norm or None if clip is None else clip
        self.bound.evaluate, self.bound.scheduled = self.evaluate, self.recipe.scheduled
        self._check_rows()
        fitted = self.bound.head_first
        self.bound.head_first = None if self._bare else fitted
        try:
            self.bound.begin_task(
                self.task,
                self.optimizer,
                num_training_steps - self._before,
                model=self.accelerator.unwrap_model(self.model),
                shared=self._shared,
                data=lambda: self._batches(order=None)(),
                start=self.start,
                resuming=self._resuming and not self._bare,
            )
        finally:
            self.bound.head_first = fitted
        self.bound.plan = functools.cache(self._planned)
        if self.args.save_strategy != "no":
            self.bound.plan()  # of rows as they are before a collator or a draw changes them
        self.bound.max_skipped = self.max_skipped
        self._labels_seen = False
        self._at_work = True
        if self.bound.has_penalty and self._watch is None:
            self._watch = self.model.register_forward_hook(Hook(self._see))
        return scheduler

    def _see(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        # Not through return_outputs: TRL would run the model once more, with new dropout.
        self._outputs = outputs

    def end_task(self) -> None:
        """Close the task after `train()`: methods estimate importance and keep rows."""
        if self.bound is None:
            raise Refused("nothing was trained yet", where="end_task", remedy="call train() first")

        last = self.bound.head_last
        if last is not None and self._another_loss():
            tell_once("head_last: this Trainer has a loss of its own, by which the head is not "
                      "fitted: it stays as it was")  # fmt: skip
            self.bound.head_last = None
        try:
            self.bound.end_task(self._batches(order=self.bound.generator))
        finally:
            self.bound.head_last = last

    # --- loss -------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's window of micro-batches; also notes their total weight."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        # Batches that are not mappings yet are split into steps later, as TRL's generated ones are.
        told = all(isinstance(batch, Mapping) for batch in samples)
        if told and self.is_in_train:
            for batch in samples:
                self._check_range(batch)
        self._window = sum(self._weight(batch) for batch in samples) if told else None
        if self._window is not None and samples and self.is_in_train:
            self._windows.see(self._window, alone=self.args.world_size == 1)
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Trainer's loss, weighted within its accumulation window, plus the methods' penalties."""
        batch, weight = dict(inputs), self._weight(inputs)
        learning = model.training and torch.is_grad_enabled()
        if learning and self.is_in_train and not self._at_work:
            raise Refused("create_scheduler was not called, so that the recipe is not at work",
                          where=type(self).__name__,
                          remedy="call super().create_scheduler(…) in yours")  # fmt: skip
        compute = functools.partial(
            super().compute_loss, num_items_in_batch=num_items_in_batch, **kwargs
        )
        result = compute(model, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        if learning and not self._labels_seen:
            self._check_labels(batch)
        if learning and self._at_work and self.bound is not None:
            divides = not self._scaled(num_items_in_batch)
            steps = self.current_gradient_accumulation_steps
            factor = 1.0
            many = (steps > 1 or self.args.world_size > 1) and self._window is not None
            if many and (divides or self._ignores(model, batch, num_items_in_batch)):
                # Σ over the window must be the mean over its rows, however they are split, also
                # over ranks: Trainer has multiplied a loss that ignores items by their number.
                assert self._window is not None
                every = self._window if divides else float(num_items_in_batch)
                share = weight / every if every else 0.0
                factor = share * (steps if divides else 1)
                loss = loss * factor
            if self.bound.has_penalty:
                part = 1 if divides else 1 / steps  # of each micro-batch

                def again(bare: nn.Module) -> Tensor:
                    with self._logs_kept():
                        return cast(Tensor, compute(bare, dict(batch)) * (factor / part))

                penalty = self.bound.penalty(batch, self._outputs, loss / part, again)
                self._outputs = None
                loss = loss + penalty * part
        return (loss, outputs) if return_outputs else loss

    def _scaled(self, items: Any) -> bool:
        """Whether Trainer takes the loss as scaled for accumulation already."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return bool(declared)
        return (self.model_accepts_loss_kwargs and items is not None) or bool(
            self.compute_loss_func
        )

    def _ignores(self, model: nn.Module, batch: dict[str, Any], items: Any) -> bool:
        """Whether the loss ignores `num_items_in_batch`: computed twice to find out, once a run.

        Every sequence-classification head of Transformers does, so that Trainer's accumulated
        gradient is too large by the number of micro-batches.
        """
        if self.compute_loss_func is not None or self.label_smoother is not None or items is None:
            return False
        if self._ignores_items is None:
            seen, bare = self._outputs, self.accelerator.unwrap_model(model)
            # The bare model communicates with no other rank, which may be doing something else.
            as_told = in_mode(bare.modules(), training=False)
            with torch.no_grad(), as_told, uncompiled(), self._logs_kept():
                compute = functools.partial(super().compute_loss, bare)
                one = compute(dict(batch), num_items_in_batch=items)
                two = compute(dict(batch), num_items_in_batch=items * 2)
            self._outputs = seen
            # `two` is half of `one`, or the same up to rounding: passes need not agree bit by bit.
            # A loss of zero decides nothing; if no rank can decide, all of them try again later.
            telling = bool(torch.isfinite(one)) and one != 0
            answer = int(two.abs() > 0.75 * one.abs()) if telling else -1
            found = max(distributed.gather([answer], one.device))[0]
            if found < 0:
                return False
            self._ignores_items = bool(found)
        return self._ignores_items

    def _weight(self, batch: Mapping[str, Any]) -> float:
        """A micro-batch's weight in the mean: its number of counted labels, or else of rows."""
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            counted = labels[..., 1:] if self._loss_shifts_labels else labels
            return float(counted.ne(-100).sum())
        return float(next((len(v) for v in batch.values() if isinstance(v, Tensor)), 0))

    # --- clipping and logs ------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Unscale and return the norm; clipping itself comes after the methods, inside the step."""
        self.accelerator.unscale_gradients()
        assert self.bound is not None
        return self.bound.gradient_norm()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's logs, with the rate of each part, if they differ, and methods' penalties."""
        if self.bound is not None and "learning_rate" in logs:
            # Of the step that was made, as `learning_rate` is: the groups have the next one's.
            part_of, made = self.bound.part_of, self.bound.rates
            groups = self.bound.group_of
            rates = {part_of[k]: float(made.get(id(g), g["lr"])) for k, g in groups.items()}
            if len(set(rates.values())) > 1:
                logs |= {f"holdfast/rate/{part}": lr for part, lr in rates.items()}
            penalties = self.bound.penalties()
            logs |= {f"holdfast/penalty/{name}": value for name, value in penalties.items()}
            if self.bound.skipped:
                logs["holdfast/skipped_steps"] = self.bound.skipped
        super().log(logs, *args, **kwargs)


class _Recipied(type):
    """The metaclass of what `with_recipe` makes: pickles a class by the class it extends."""


@functools.cache
def _type_for(theirs: type) -> type:
    """`_Recipied`, or a metaclass that also derives from `theirs`, such as ABCMeta."""
    if theirs is type:
        return _Recipied
    both = type("_Recipied", (_Recipied, theirs), {})
    copyreg.pickle(both, _rebuild)
    return both


def _rebuild(cls: type) -> Any:
    # A subclass of one of ours has a name of its own and is pickled by that.
    return (
        (with_recipe, (cls.__bases__[1],)) if cls.__bases__[0] is RecipeMixin else cls.__qualname__
    )


copyreg.pickle(_Recipied, _rebuild)


@functools.cache
def with_recipe(trainer_class: type) -> Any:
    """`trainer_class` with the keywords of `RecipeMixin`; made once per class."""
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, transformers.Trainer)):
        raise Refused(f"{trainer_class!r} is no Trainer class", where="with_recipe")
    if issubclass(trainer_class, RecipeMixin):
        return trainer_class
    name = f"{trainer_class.__name__}WithRecipe"
    body = {"__module__": __name__, "__doc__": trainer_class.__doc__}
    return cast(Any, _type_for)(type(trainer_class))(name, (RecipeMixin, trainer_class), body)


Trainer = with_recipe(transformers.Trainer)
