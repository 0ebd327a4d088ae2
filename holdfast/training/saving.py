"""What `with_recipe` adds to a Trainer's checkpoints: our state, a commit mark, exact resume."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from holdfast.engine.bound import Bound
from holdfast.engine.peft import folded
from holdfast.engine.plan import arguments_of, changed, refuse_changed, rows_hash, weights_hash
from holdfast.errors import Refused
from holdfast.network.parts import named_parameters
from holdfast.ops import distributed
from holdfast.recipe import Recipe
from holdfast.training import stopping
from holdfast.training.checkpoints import (
    META,
    Files,
    kept,
    load_adapters,
    load_state,
    require_shared,
    save_adapters,
    save_state,
)
from holdfast.training.manifest import ANEW, commit, damage, newest_complete, rotate, spot
from holdfast.training.options import (
    check_groups,
    exact_moments_,
    refuse_other_optimizer,
    take_options_,
)
from holdfast.training.rows import Windows

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


STATE = "trainer_state.json"  # Trainer's own, written last
LOGGED = "logged"  # the key of the losses since the last log


def _inert(load: Callable[[Any, str | None], None]) -> Callable[[Any, str | None], None]:
    """Refuse a checkpoint whose pickles hold more than tensors: torch unpickles nothing else."""

    @functools.wraps(load)
    def loaded(self: Any, checkpoint: str | None) -> None:
        try:
            load(self, checkpoint)
        except UnpicklingError:
            raise Refused("holds objects that could run code", where=str(checkpoint),
                          remedy="resume from another checkpoint") from None  # fmt: skip

    return loaded


class SavingMixin(_Base):
    """The part of `RecipeMixin` that saves, resumes and stops."""

    model: Any  # set by Trainer
    optimizer: Any
    bound: Bound | None
    recipe: Recipe
    task: str
    exact_resume: bool
    stop_on_signals: bool
    _watch: Any
    _outputs: Any
    _ours: Files
    _windows: Windows
    _limit: int | None = None
    _to_push: str | None = None
    _at = ANEW  # the checkpoint saved last, or gone on from
    _resuming = False
    _bare = False  # resuming from a checkpoint of a Trainer without a recipe
    _before = 0  # steps made without a recipe before the methods began
    _at_work = False  # whether the recipe is bound to the model in training
    _resumed_sums: dict[str, Any]  # of losses, as the checkpoint has them
    _summed_from = 0  # the step after which losses are in Trainer's sums

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the recipe is bound only while it runs.

        True resumes from the newest whole checkpoint; a checkpoint given by path must be whole.
        Raises `Stopped`, once a checkpoint is saved, if a handled signal asks for it.
        """
        with contextlib.suppress(TypeError):  # of what is streamed, or not given
            if len(cast(Any, self.train_dataset)) == 0:
                raise Refused("there are no rows to train on", where="train_dataset",
                              remedy="look at how they are read")  # fmt: skip
        if resume_from_checkpoint is True:
            found = newest_complete(self.args.output_dir)
            if found is None:
                raise Refused("holds no whole checkpoint", where=self.args.output_dir,
                              remedy="train without resume_from_checkpoint")  # fmt: skip
            resume_from_checkpoint, wrong = str(found), None  # its files were read just now
        elif resume_from_checkpoint:
            wrong = damage(resume_from_checkpoint)
        self._resuming, self._bare, self._before = bool(resume_from_checkpoint), False, 0
        self._resumed_sums, self._windows, self._at = {}, Windows(self.task), ANEW
        if resume_from_checkpoint:
            self._accept(Path(resume_from_checkpoint), wrong)
        saver = _StopSaved(self._go_on_logging)
        self.add_callback(saver)
        # Trainer's own rotation is off, even the one at the end, which would delete the newest.
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with stopping.handled() if self.stop_on_signals else contextlib.nullcontext():
                with stopping.looking():
                    done = super().train(resume_from_checkpoint, *args, **kwargs)
                    # A signal after the last step must not lose what was learned.
                    late = _asked(self.args) and saver.saved != self.state.global_step
                    if late and not self.args.load_best_model_at_end:
                        self._save_checkpoint(self.model, None)
                        saver.saved = self.state.global_step
                if self._windows.empty and not self._windows.others and self.args.world_size == 1:
                    self._windows.refuse()
                cast(Bound, self.bound).check_made()
                if isinstance(done, TrainOutput):
                    done = done._replace(
                        training_loss=done.metrics.get("train_loss", done.training_loss)
                    )
                return done
        except stopping.Stopped as stopped:
            if self.stop_on_signals:
                saved = (f"step {saver.saved} is saved in {self.args.output_dir}; "
                         "train(resume_from_checkpoint=True) goes on")  # fmt: skip
                print(f"holdfast: {stopped}; {saved if saver.saved >= 0 else 'nothing was saved'}",
                      file=sys.stderr)  # fmt: skip
            raise
        finally:
            self.args.save_total_limit = self._limit
            self.remove_callback(saver)
            if self.bound is not None:
                self.bound.unbind()
            if self._watch is not None:
                self._watch.remove()
            self._watch = self._outputs = None
            self._at_work = False

    def _accept(self, checkpoint: Path, wrong: str | None) -> None:
        """Refuse a checkpoint that is not as a recipe saved it, unless told not to be exact.

        wrong: what `damage` found.
        """
        self._at, remedy = spot(checkpoint), "resume from one saved with a recipe"
        ours, whole = (checkpoint / META).exists(), (checkpoint / STATE).is_file()
        if whole and not (checkpoint / "optimizer.pt").is_file():
            raise Refused("holds weights only", where=str(checkpoint),
                          remedy="load them as the model")  # fmt: skip
        if whole and not ours:
            wrong = "was saved by a Trainer without a recipe"
            remedy = "pass exact_resume=False, and methods begin at its step"
        if wrong and (self.exact_resume or not whole):
            raise Refused(wrong, where=str(checkpoint), remedy=remedy)
        if wrong:
            warnings.warn(f"{checkpoint}: {wrong}", stacklevel=3)
        self._bare = not ours
        if ours:
            self._resumed_sums = kept(checkpoint, LOGGED) or {}
            self._before = (kept(checkpoint, "plan") or {}).get("before", 0)
        else:
            self._before = int(json.loads((checkpoint / STATE).read_text())["global_step"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, committed once it is whole; older ones are deleted only then."""
        self._ours, self._to_push = {}, None
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        saved = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        ranks = range(self.args.world_size)
        require_shared(saved, [f"rng_state_{rank}.pth" for rank in ranks], self.args.device)
        if self.args.should_save:
            self._at = commit(saved, self._ours, after=self._at)
        if self._to_push is not None:
            super()._push_from_checkpoint(self._to_push)
        if self.args.should_save:
            rotate(saved, self._limit, best=self.state.best_model_checkpoint)

    def _without_adapters(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the recipe's adapters are folded into the model's weights."""
        return folded(self.model) if self.recipe.peft else contextlib.nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's: an ordinary model, with the recipe's adapters folded in."""
        with self._without_adapters():
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._without_adapters():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.recipe.peft:
            load_adapters(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._without_adapters():
            super()._load_best_model()
        if self.recipe.peft:
            load_adapters(self.model, cast(str, self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._to_push = checkpoint_folder  # once its manifest is there

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.bound is not None:
            state = self.bound.state_dict()  # called on every rank: it gathers shards
            logged = self._logged()
            if self.args.should_save:
                self._ours = save_state(self.bound, output_dir, more={LOGGED: logged}, state=state)
                if self.recipe.peft:
                    self._ours |= save_adapters(self.model, output_dir)

    def _load_callback_state(self) -> None:
        """Callbacks go on as they were, such as one that stops early: Transformers restores them
        only when told to, and then with the settings of before."""
        super()._load_callback_state()
        if self._bare or self.args.restore_callback_states_from_checkpoint:
            return
        kinds: dict[str, list[Any]] = {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                kinds.setdefault(type(callback).__name__, []).append(callback)
        for kind, callbacks in kinds.items():
            saved = self.state.stateful_callbacks.get(kind, [])
            states = saved if isinstance(saved, list) else [saved]
            # Of several of a kind each save adds its states to those of the saves before.
            for callback, state in zip(callbacks, states[-len(callbacks) :], strict=False):
                vars(callback).update(state.get("attributes", {}))

    @_inert
    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)

    @_inert
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        told, ours, rates, plan = list[str](), list[dict[str, Any]](), None, dict[str, Any]()
        if self._bare:
            check_groups(cast(Bound, self.bound).optimizer, Path(cast(str, checkpoint)))
        elif checkpoint is not None and self.bound is not None:
            # Before torch loads moments, which it matches by position.
            plan = kept(checkpoint, "plan") or {}
            told = changed(plan, self.bound.planned())
            refuse_other_optimizer(told, where=checkpoint)
            refuse_changed(told, exact=self.exact_resume, where=checkpoint)
            ours = [{**group} for group in self.bound.optimizer.param_groups]
            rates = getattr(self.lr_scheduler, "base_lrs", None)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.bound is not None and not self._bare:
            exact_moments_(self.bound.optimizer, Path(checkpoint) / "optimizer.pt")
            steps = self.bound.total_steps
            load_state(self.bound, checkpoint, exact=self.exact_resume)
            self.bound.total_steps = steps
            if told:
                take_options_(self.bound, self.lr_scheduler, ours, rates, plan)

    def _logged(self) -> dict[str, Any]:
        """What Trainer has summed up since it logged last, and forgets: each rank's sum of losses
        (as the bits of a float32), the step of that log, and the sum of all losses before it."""
        if not hasattr(self, "_tr_loss"):
            return {}
        bits = self._tr_loss.detach().float().view(torch.int32)
        sums = [one for (one,) in distributed.gather([int(bits)], bits.device)]
        step, before = self._globalstep_last_logged, self._total_loss_scalar
        return {"sums": sums, "step": step, "before": before, "from": self._summed_from}

    def _go_on_logging(self) -> None:
        """Take up those sums, so that what is logged next is what would have been."""
        logged, self._resumed_sums = self._resumed_sums, {}
        self._summed_from = self.state.global_step
        if len(sums := logged.get("sums", [])) == self.args.world_size and self._tr_loss.ndim == 0:
            mine = torch.tensor(sums[distributed.rank()], dtype=torch.int32)
            self._tr_loss.copy_(mine.view(torch.float32))
            self._globalstep_last_logged = logged["step"]
            self._total_loss_scalar = logged["before"]
            self._summed_from = logged.get("from", self._before)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which divides the losses of all steps by the number of those since it was
        resumed to give `train_loss`."""
        if "train_loss" in logs and "train_runtime" in logs:
            steps = self.state.global_step - self._summed_from
            logs["train_loss"] = self._total_loss_scalar / max(steps, 0.001)
        super().log(logs, *args, **kwargs)

    def _planned(self) -> dict[str, Any]:
        """What a resumed run must share with this one, beside what the bound knows."""
        assert self.bound is not None
        return {
            "arguments": arguments_of(self.args),
            "rows": rows_hash(self.train_dataset),
            "ranks": self.args.world_size,
            "before": self._before,
            **parameters_of(self.bound, self.accelerator.unwrap_model(self.model)),
        }


def refuse_found_batches(args: Any, recipe: Recipe) -> None:
    """Refuse Trainer's search for a batch size that fits, which begins a task more than once."""
    if args.auto_find_batch_size and recipe.methods:
        raise Refused("would begin the task again from weights of its middle",
                      where="auto_find_batch_size", remedy="set per_device_train_batch_size "
                      "and gradient_accumulation_steps")  # fmt: skip


def parameters_of(bound: Bound, model: nn.Module) -> dict[str, Any]:
    """A plan's part on parameters: a hash of those that do not train, the order of the others."""
    names = {id(w): name for name, w in bound.weights.items()}
    frozen = ((n, p) for n, p in named_parameters(model).items() if id(p) not in names)
    held = (w for group in bound.optimizer.param_groups for w in group["params"])
    return {"frozen": weights_hash(frozen), "order": [names.get(id(w), "") for w in held]}


class _StopSaved(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint of that step."""

    saved = -1

    def __init__(self, go_on_logging: Callable[[], None]) -> None:
        self.go_on_logging = go_on_logging

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.go_on_logging()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _asked(args):
            control.should_training_stop = True  # Trainer closes the epoch next

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _asked(args):
            control.should_training_stop = True
            control.should_save = self.saved != state.global_step
            control.should_evaluate &= epoch_is_over(state)


def epoch_is_over(state: Any) -> bool:
    """Whether the step just made is the last of an epoch, or of the training."""
    return state.global_step >= state.max_steps or float(state.epoch).is_integer()


def _asked(args: Any) -> bool:
    """Whether any rank was asked to end: all ranks have to stop after the same step."""
    if stopping.active() and args.world_size > 1:
        told = torch.tensor(stopping.asked(), device=args.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        stopping.ask(int(told))
    return stopping.asked() > 0
