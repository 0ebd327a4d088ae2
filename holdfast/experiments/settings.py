"""How every task of a run is trained: one schema for Python, `run.json` and the command line."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from holdfast.config import Checked, Share
from holdfast.errors import Refused
from holdfast.experiments.ranks import ranks

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The schedules of Transformers that need no arguments of their own.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
]  # fmt: skip
# A head for each task; one over all labels so far; one of class means, which nothing trains; an
# ensemble for each task on a frozen encoder.
Head = Literal["task", "shared", "prototype", "variance_prototype", "levi"]
SIZES = ("train_size", "selection", "evaluation_size")  # what chooses a task's rows
HISTORY_ROWS = 128  # selection rows of each task that are scored while training


def about(description: str, **bounds: Any) -> Any:
    """A field's bounds, and its help text on the command line."""
    return Field(description=description, **bounds)


MOST = 2**31  # what Trainer and torch count in takes no more


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """How every task of a sequence is trained; checked when it is made.

    warmup and selection are a share below 1 or a number (of steps, of rows).
    save_steps: steps between checkpoints within a task; 0 saves none, null at every epoch's end.
    bf16: "auto" becomes True or False here, by the machine it is made on.
    compile: numbers then agree with uncompiled ones, and after a stop, up to rounding only.
    mix: see `holdfast.experiments.mix`; for language models.
    alone: also train each later task alone, which forward transfer needs.
    """

    shares: ClassVar[tuple[str, ...]] = ("warmup", "selection")

    train_size: (
        Annotated[int, about("a stratified subset of the training rows", gt=0, lt=MOST)] | None
    ) = None
    evaluation_size: (
        Annotated[int, about("a stratified subset of the evaluation rows", gt=0, lt=MOST)] | None
    ) = None
    epochs: Annotated[float, about("passes over the training rows", gt=0, lt=MOST)] = 3.0
    batch_size: Annotated[int, about("rows a micro-batch", gt=0, lt=MOST)] = 16
    accumulation: Annotated[int, about("micro-batches a step", gt=0, lt=MOST)] = 1
    lr: Annotated[float, about("base learning rate; larger models take less", gt=0)] = 2e-4
    weight_decay: Annotated[float, about("decoupled weight decay", ge=0)] = 0.01
    warmup: Annotated[float | int, about("steps of warm-up, or a share below 1", ge=0, lt=MOST)] = (
        0.1
    )
    schedule: Annotated[Schedule, about("a learning-rate schedule of Transformers")] = "linear"
    head: Annotated[
        Head, about("task: one each; shared: one for all; prototype, variance_prototype; levi")
    ] = "task"
    max_length: Annotated[int, about("tokens a row is cut at", gt=1, lt=MOST)] = 128
    selection: Annotated[Share, about("training rows kept for choosing, or a share")] = 0.1
    save_steps: (
        Annotated[int, about("steps between checkpoints; 0: none (each epoch)", ge=0, lt=MOST)]
        | None
    ) = None
    group_by_length: Annotated[
        bool, about("steps of rows of like length: faster, and may forget more")
    ] = False
    bf16: Annotated[
        bool | Literal["auto"],
        about("train in bfloat16 mixed precision; auto: where this machine is faster in it"),
    ] = False
    compile: Annotated[bool, about("compile what tasks share: pays in long runs only")] = False
    bf16_eval: Annotated[bool, about("score in bfloat16 mixed precision")] = False
    mix: Annotated[str, about("FILE:SHARE, rows of FILE among those of each task")] | None = None
    alone: Annotated[bool, about("train later tasks alone too: gives forward transfer")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 == "auto":
            from holdfast.tasks.kinds.pretrained import bf16_pays

            object.__setattr__(self, "bf16", bf16_pays())

    @property
    def sizes(self) -> dict[str, Any]:
        """How many rows of a task are read, as `load_task` takes them."""
        return {name: getattr(self, name) for name in SIZES}

    def total(self, rows: int) -> int:
        """The steps of a task of so many rows, over all its epochs."""
        return math.ceil(self.steps(rows) * self.epochs)

    @classmethod
    def where(cls, name: str) -> str:
        return "--" + name.replace("_", "-")

    def steps(self, rows: int) -> int:
        """Steps of an epoch over so many rows."""
        return math.ceil(rows / (self.batch_size * self.accumulation))

    def machine(self, source: str) -> dict[str, str]:
        """What the last bits of a run hang on, besides the packages; `source`: of its model."""
        import torch

        from holdfast.tasks.kinds.pretrained import device, source_hash

        found = {
            "device": str(device()),
            "precision": "bfloat16 autocast" if self.bf16 else "float32",
            "threads": str(torch.get_num_threads()),
            "processes": str(ranks()),
        }
        if source.endswith(".py"):
            found[Path(source).name] = str(source_hash(source))[:12]
        return found

    def arguments(self, out: Path, *, seed: int, rows: int) -> TrainingArguments:
        """What Trainer is told about a task of so many rows, its checkpoints in `out`."""
        import torch
        from transformers import TrainingArguments

        saving = {None: "epoch", 0: "no"}.get(self.save_steps, "steps")
        return TrainingArguments(
            output_dir=str(out),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size // ranks(),
            gradient_accumulation_steps=self.accumulation,
            learning_rate=self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup,
            lr_scheduler_type=self.schedule,
            bf16=self.bf16 is True,
            optim="adamw_torch_fused",
            seed=seed,
            data_seed=seed,
            save_strategy=saving,
            save_steps=self.save_steps or 500,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=min(10, self.steps(rows)),  # at least once an epoch
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
            log_level_replica="error",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            per_device_eval_batch_size=32,
            remove_unused_columns=False,  # collators keep what models take
            **({"train_sampling_strategy": "group_by_length"} if self.group_by_length else {}),
        )


@dataclass(frozen=True, kw_only=True)
class SelfTraining(Checked):
    """How rows without a label are used; checked when it is made."""

    shares: ClassVar[tuple[str, ...]] = ("pseudo",)

    rounds: Annotated[int, about("students; 0: the labelled rows only", ge=0, le=15)] = 3
    rows: Annotated[int, about("at most so many rows are answered a round", gt=0)] = 4096
    passes: Annotated[int, about("passes with dropout over them", gt=1)] = 20
    pseudo: Annotated[Share, about("rows to learn from, or a share of those answered")] = 0.25
    choose: Annotated[
        Literal["bald", "confidence", "random"],
        about("bald: drawn where passes agree; controls: confidence (the surest), random"),
    ] = "bald"
    alpha: Annotated[float, about("of bald: how much the mean probability counts", ge=0, le=1)] = (
        0.0
    )
    phce: Annotated[float, about("students take the loss PHCE with this tau", gt=1)] | None = None
    student_lr: (
        Annotated[float, about("learning rate of students (that of the teacher)", gt=0)] | None
    ) = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha and self.choose != "bald":
            raise Refused(f"is of bald, not of {self.choose}", where="--alpha",
                          remedy="leave it out")  # fmt: skip

    @classmethod
    def where(cls, name: str) -> str:
        return Settings.where(name)


@functools.cache
def defaults() -> dict[str, Any]:
    """The value of every setting that is not given; runs older than a setting had this one."""
    return Settings().to_dict()
