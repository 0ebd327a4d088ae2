"""A recipe for a Trainer that cannot be extended: `callbacks=[RecipeCallback(recipe)]`.

Prefer `with_recipe`, which does more. A callback cannot change the loss, the optimizer's groups or
when gradients are clipped: methods that add to the loss (replay, lwf, kl_anchor) and rates other
than flat are refused, and Trainer clips before the methods' work, not after.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast.engine.batches import Data
from holdfast.engine.bound import Bound
from holdfast.engine.plan import arguments_of, changed, rows_hash
from holdfast.errors import Refused
from holdfast.network.rates import Rates
from holdfast.ops import distributed
from holdfast.recipe import Recipe
from holdfast.training.checkpoints import META, kept, load_state, save_state
from holdfast.training.manifest import ANEW, Spot, commit, damage, newest_complete, rotate, spot
from holdfast.training.options import refuse_other_optimizer
from holdfast.training.saving import parameters_of, refuse_found_batches

# The arguments that Trainer loads with the moments, and goes on with whatever they are now.
OPTIONS = ("learning_rate", "weight_decay", "adam_")
LOG = logging.getLogger("holdfast")


class RecipeCallback(TrainerCallback):
    """Bind a recipe while a Trainer trains.

    recipe: without methods that add to the loss, at flat rates.
    bound: the `Bound` of earlier tasks, to continue a sequence.
    task, shared, start: as `with_recipe` takes them.
    data: the task's rows in batches, which `head_first`, `head_last` and some methods read; see
        `Bound`.
    exact_resume: refuse a checkpoint that is damaged or of other settings or rows; False only
        warns, but for another rate, weight decay or betas, which Trainer would not take.

    Call `end_task()` after `train()`. The state is saved beside Trainer's checkpoints, and loaded
    from `output_dir/checkpoint-<step>` when training resumes from there.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        bound: Bound | None = None,
        task: str = "task",
        shared: nn.Module | None = None,
        start: Callable[[], Mapping[str, Tensor]] | None = None,
        data: Data | None = None,
        exact_resume: bool = True,
    ) -> None:
        if recipe.rates != Rates.flat():
            raise Refused("a callback cannot give parts rates of their own", where="recipe.rates",
                          remedy="use with_recipe")  # fmt: skip
        self.bound = bound or recipe.unbound()
        recipe.check_bound(self.bound)
        for hook, what in (("penalty", "add its penalty to the loss"), ("prepare", "prepare it")):
            if asking := ", ".join(m.name for m in recipe.methods if m.defines(hook)):
                raise Refused(f"a callback cannot {what}: {asking}", where="recipe",
                              remedy="use with_recipe")  # fmt: skip
        if recipe.peft:
            raise Refused("a callback cannot put adapters on a model", where="recipe.peft",
                          remedy="use with_recipe")  # fmt: skip
        needing = [m.name for m in recipe.methods if m.needs_data]
        needing += ["recipe.head_last"] if recipe.head_last else []
        if needing and data is None:
            raise Refused("reads the rows at the task's end", where=", ".join(needing),
                          remedy="pass data=")  # fmt: skip
        self.recipe, self.task, self.data = recipe, task, data
        self.exact_resume = exact_resume
        self._shared, self._start, self._seeded = shared, start, bound is not None
        self._limit: int | None = None
        self._at = ANEW

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        refuse_found_batches(args, self.recipe)
        self._at = self._accept(args, state) if state.global_step else ANEW
        if not self._seeded:
            self.bound, self._seeded = self.recipe.unbound(seed=args.seed), True
        if not isinstance(model, nn.Module):
            raise Refused(f"a {type(model).__name__} is no torch module", where="RecipeCallback",
                          remedy="docs/trainers.md says how its network is trained")  # fmt: skip
        self.bound.max_grad_norm = self.recipe.max_grad_norm
        self.bound.begin_task(
            self.task, optimizer, state.max_steps, model=model, shared=self._shared, data=self.data,
            start=self._start, resuming=state.global_step > 0,
        )  # fmt: skip
        rows = getattr(train_dataloader, "dataset", None)
        self.bound.plan = functools.cache(
            lambda: {
                "arguments": arguments_of(args),
                "rows": rows_hash(rows),
                **parameters_of(self.bound, distributed.unwrapped(model)),
            }
        )
        if args.save_strategy != "no":
            self.bound.plan()  # of rows as they are before a collator or a draw changes them
        if state.global_step:
            checkpoint = _checkpoint(args, state)
            told = changed(kept(checkpoint, "plan") or {}, self.bound.planned())
            refuse_other_optimizer(told, where=str(checkpoint))
            old = [line for line in told if line.startswith(OPTIONS)]
            if old and not self.exact_resume:
                raise Refused(f"Trainer has taken the old one: {', '.join(old)}",
                              where=str(checkpoint), remedy="set it back, or use with_recipe"
                              )  # fmt: skip
            load_state(self.bound, checkpoint, exact=self.exact_resume)
        # Trainer would delete the last whole checkpoint before the state is beside the next one.
        self._limit, args.save_total_limit = args.save_total_limit or self._limit, None

    def _accept(self, args: Any, state: Any) -> Spot:
        """Refuse the checkpoint that Trainer has loaded where it is damaged; say where it is old.

        Trainer itself goes on without a file that is missing, and from the highest step.
        """
        checkpoint = _checkpoint(args, state)
        last = newest_complete(args.output_dir, lambda _: None)
        ours = (checkpoint / META).exists()  # if not, `load_state` says so
        if ours and last != checkpoint and (wrong := damage(checkpoint)) is not None:
            if self.exact_resume:
                raise Refused(wrong, where=str(checkpoint),
                              remedy=f"resume from {last or 'the beginning'}")  # fmt: skip
            warnings.warn(f"{checkpoint}: {wrong}", stacklevel=3)
        if last not in (None, checkpoint):
            LOG.warning("goes on from %s, but %s was saved last", checkpoint.name, last)
        return spot(checkpoint)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        made = self.bound.state_dict()  # called on every rank: it gathers shards
        if args.should_save:
            folder = _checkpoint(args, state)
            self._at = commit(folder, save_state(self.bound, folder, state=made), after=self._at)
            rotate(folder, self._limit, best=state.best_model_checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.save_total_limit, self._limit = self._limit, None
        self.bound.unbind()
        self.bound.check_made()

    def end_task(self) -> None:
        """Close the task: methods estimate importance, and may change weights."""
        self.bound.end_task(self.data)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
