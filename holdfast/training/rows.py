"""How methods read a trainer's rows: in batches the model takes, or by the trainer's own loss."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler

from holdfast.engine.batches import Whole, rows_in
from holdfast.engine.bound import Bound
from holdfast.engine.forwarding import in_mode, own_randomness
from holdfast.engine.stepping import SKIPS
from holdfast.errors import Refused
from holdfast.ops import distributed
from holdfast.training.lengths import ByLength

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


LOG = logging.getLogger("holdfast")
CLASSIFYING = ("ForSequenceClassification", "ForTokenClassification")
UNTAKEN = "it does not take the"  # batches, in an error


class Windows:
    """Counts steps whose labels are all -100, which train nothing."""

    def __init__(self, task: str) -> None:
        self.task, self.empty, self.others, self.told = task, 0, 0, False

    def see(self, weight: float, *, alone: bool) -> None:
        """A step of so many labels that count; alone: other ranks have none that do."""
        if weight:
            self.empty, self.others = 0, self.others + 1
            return
        self.empty += 1
        if not self.told:
            self.told = True
            LOG.warning(f"{self.task}: all labels of a step are -100: it has no loss")
        if alone and self.empty >= SKIPS:
            self.refuse()

    def refuse(self) -> None:
        raise Refused(f"all labels of {self.empty} steps are -100, which no loss counts",
                      where=self.task, remedy="look at the labels")  # fmt: skip


class RowsMixin(_Base):
    """The part of `RecipeMixin` that gives methods the training rows."""

    bound: Bound | None
    _problem: str | None = None  # what the model's configuration said before any pass
    _labels_seen = False
    _own_loss = False  # whether methods are given this trainer's loss, not the model's

    def _check_rows(self) -> None:
        """See whether the model takes this trainer's batches, and returns a loss or class logits.

        If not, methods are given the trainer's own loss of a batch, which cannot be split into
        rows. Methods that cannot do with it are refused before the first step.
        """
        assert self.bound is not None
        methods = self.bound.methods
        reads = {m.name: m.reads_whole for m in methods if m.needs_data}
        running = [m.name for m in methods if m.defines("penalty") or m.defines("read_rows")]
        if not reads and not running:
            return
        model = self.accelerator.unwrap_model(self.model)
        with own_randomness(torch.Generator()), in_mode(model.modules(), training=False):
            try:
                batch = next(self._batches(order=None)(), None)
            except (RuntimeError, ValueError) as error:
                raise Refused(
                    f"its rows cannot be read for methods: {error}",
                    where=type(self).__name__,
                    remedy="set per_device_eval_batch_size as for evaluation",
                ) from None
            if batch is None or not (why := _unserved(model, batch)):
                return
            if why == UNTAKEN:
                reads |= dict.fromkeys(set(running) - reads.keys())
            if not isinstance(batch, Mapping) or distributed.world() > 1:
                reads = dict.fromkeys(reads)
            elif "gradients" in reads.values():
                try:
                    loss = self._loss_of(model, batch).loss
                    learned = [p for p in model.parameters() if p.requires_grad]
                    grads = torch.autograd.grad(loss, learned, allow_unused=True)
                    none = all(grad is None for grad in grads)  # as of losses that cache them
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:
                    none = True
                if none:
                    why = "in evaluation mode there are no gradients of the"
                    reads = {n: what if what == "inputs" else None for n, what in reads.items()}
        if unable := ", ".join(name for name, what in reads.items() if what is None):
            raise Refused(
                f"{unable} runs the model on rows, and {why} batches of {type(self).__name__}",
                where="recipe",
                remedy="dps and l2sp need no rows; merge, gpm and ewc do with the trainer's loss "
                "on one process, ewc where it has gradients",
            )
        self._own_loss = True

    def _another_loss(self) -> bool:
        """Whether what is minimised is not the model's own loss."""
        makers = [c for c in type(self).__mro__ if "compute_loss" in vars(c)]
        given: Any = self
        return (
            given.compute_loss_func is not None
            or given.label_smoother is not None
            or len(makers) > 2  # Trainer, and what a recipe adds to it
        )

    def _check_labels(self, batch: Mapping[str, Any]) -> None:
        """Refuse whole numbers that a model with one output has silently taken for a regression."""
        self._labels_seen = True
        config, labels = getattr(self.model, "config", None), batch.get("labels")
        whole = isinstance(labels, torch.Tensor) and not labels.is_floating_point()
        decided = getattr(config, "problem_type", None) == "regression" and self._problem is None
        if config is not None and whole and decided and getattr(config, "num_labels", None) == 1:
            config.problem_type = None
            raise Refused("one output and whole numbers for labels: classes, or a regression?",
                          where="config.num_labels",
                          remedy="set it to the number of classes, or config.problem_type = "
                          '"regression"')  # fmt: skip

    def _check_range(self, batch: Mapping[str, Any]) -> None:
        """Refuse a class the model has no output for: on a GPU it would end the process's CUDA.

        There only before the first step: a look at each batch would wait for the device.
        """
        labels = batch.get("labels")
        if getattr(self.model, "loss_type", None) not in CLASSIFYING or self.compute_loss_func:
            return
        outputs = getattr(getattr(self.model, "config", None), "num_labels", 1)
        if outputs == 1 or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            return
        if labels.device.type != "cpu" and self.state.global_step:
            return
        wrong = labels[(labels >= outputs) | (labels < 0) & (labels != -100)]
        if len(wrong):
            raise Refused(f"label {int(wrong[0])} is outside 0 to {outputs - 1}", where=self.task,
                          remedy="set config.num_labels, or mend the row")  # fmt: skip

    def _loss_of(self, model: nn.Module, batch: Any) -> Any:
        """The trainer's own loss of a whole batch."""
        with self._logs_kept():
            return SimpleNamespace(loss=super().compute_loss(model, dict(batch)))

    @contextlib.contextmanager
    def _logs_kept(self) -> Iterator[None]:
        """TRL and Sentence Transformers log averages over every call of `compute_loss`."""
        averaged = ("_metrics", "accum_loss_components")
        kept = {k: copy.deepcopy(v) for k, v in vars(self).items() if k in averaged}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _batches(self, *, order: torch.Generator | None) -> Callable[[], Iterator[Any]]:
        """The training rows in batches, on this device, in an order drawn from `order`.

        Not in file order: a file sorted by label would show a method only one class. None draws
        from the data seed, which leaves the bound's own generator untouched.
        """
        rows = self.train_dataset
        if hasattr(rows, "__len__") and not isinstance(rows, Mapping):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            order = order or torch.Generator().manual_seed(seed)
            picked = torch.randperm(len(rows), generator=order).tolist()
            rows = rows.select(picked) if hasattr(rows, "select") else Subset(rows, picked)

        def batches() -> Iterator[Mapping[str, Any]]:
            each, loader = None, iter(self._undivided(rows))
            while True:
                with self._logs_kept():  # online trainers generate here
                    if (batch := next(loader, None)) is None:
                        return
                    prepared = self._prepare_inputs(batch)
                if self._own_loss:
                    size, most = rows_in(prepared), self.args.eval_batch_size
                    # Tensors' rows per example: preferences have two.
                    first = min(most, len(rows)) if hasattr(rows, "__len__") else most
                    each = each or max(1, size // first)
                    prepared = Whole(prepared, max(1, size // each), self._loss_of)
                yield prepared

        return batches

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; of like lengths in an order that a resumed run finds again."""
        try:
            theirs = super()._get_train_sampler(*args, **kwargs)
        except ValueError as error:  # rows that are no mappings, or without the model's input
            if self.args.train_sampling_strategy != "group_by_length":
                raise
            raise Refused(f"the rows have no length to be grouped by: {error}",
                          where="group_by_length", remedy="leave it out") from None  # fmt: skip
        if not isinstance(theirs, LengthGroupedSampler):
            return theirs
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return ByLength(theirs.lengths, theirs.batch_size * self.args.world_size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Trainer's, but in the order of the rows where it would group them too, by chance."""
        theirs = super()._get_eval_sampler(eval_dataset)
        grouped = isinstance(theirs, LengthGroupedSampler)
        return SequentialSampler(eval_dataset) if grouped else theirs

    def _undivided(self, rows: Any) -> Any:
        """A loader of all rows, each once, on every rank: methods split them over ranks themselves.

        Accelerate would give each rank its own batches and repeat rows to fill the last ones, and
        Trainer, with persistent workers, would return the cached loader of its evaluation rows.
        """
        kept = self.__dict__.pop("_eval_dataloaders", None)
        if self.args.world_size > 1:
            self.accelerator.prepare = lambda loader: loader
        try:
            return self.get_eval_dataloader(rows)
        finally:
            self.accelerator.__dict__.pop("prepare", None)
            self.__dict__.pop("_eval_dataloaders", None)
            if kept is not None:
                self._eval_dataloaders = kept


def _unserved(model: nn.Module, batch: Any) -> str | None:
    """Why methods cannot run the model on such batches; None if they can."""
    try:
        with torch.no_grad():
            outputs = model(**batch)
    except (TypeError, ValueError, KeyError, AttributeError):
        return UNTAKEN
    logits = getattr(outputs, "logits", None)
    per_row = logits is not None and logits.ndim == 2 and logits.shape[1] > 1
    served = per_row or getattr(outputs, "loss", None) is not None
    return None if served else "it returns no loss for the"
