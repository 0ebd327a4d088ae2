"""What the tasks of a sequence share: an encoder below a head of each, or the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from holdfast.errors import Refused
from holdfast.tasks.kinds.pretrained import (
    load_config,
    load_saved,
    load_tokenizer,
    padding_id,
    positions_from_padding,
)
from holdfast.tasks.task import Task


class Headed:
    """A kind whose models are `AUTO`'s: an encoder, shared by all tasks, below a task's head."""

    HEADS: ClassVar[bool] = True
    TEXT: ClassVar[bool] = True
    AUTO: ClassVar[Any]  # one of Transformers' Auto classes
    ENDING: ClassVar[str]  # how the names of its models end: ForSequenceClassification

    def head_config(self, labels: Sequence[str] | None) -> dict[str, Any]:
        """What a model's configuration says of a head for these labels."""
        names = dict(enumerate(labels or ()))
        back = {label: i for i, label in names.items()}
        return {"num_labels": len(names), "id2label": names, "label2id": back}

    load_config = staticmethod(load_config)
    load_processor = staticmethod(load_tokenizer)

    def has_head(self, config: Any) -> bool:
        """Whether a model was saved with a head of this kind."""
        return any(name.endswith(self.ENDING) for name in config.architectures or ())

    def _deployed(self, source: str) -> bool:
        """Whether `source` has a head of this or another kind: both may have one name."""
        names = self.load_config(source).architectures or ()
        return any(name.endswith("Classification") for name in names)

    def dropped(self, source: str) -> str | None:
        """A line on what a first task's model leaves out of `source`, if anything."""
        if self._deployed(source):
            return "The model was a classifier: its own head was dropped."
        return None

    def load_model(self, source: str, task: Task, *, seed: int) -> nn.Module:
        """The pre-trained encoder below a fresh head for `task`; a saved head is dropped."""
        torch.manual_seed(seed)
        deployed = self._deployed(source)
        more = {} if deployed else self.head_config(task.labels)
        model = load_saved(self.AUTO, source, **more, **self._padding(source))
        return self.add_head(model, task, seed=seed) if deployed else model

    def open_saved(self, folder: str, about: Mapping[str, Any] | None = None) -> Any:
        """A model with its head, as it was saved."""
        return load_saved(self.AUTO, folder, **self._padding(folder))

    def _padding(self, source: str) -> dict[str, Any]:
        """The tokenizer's padding token, where a configuration names none or another: heads of
        decoders read the last token before it."""
        config = self.load_config(source)
        here = padding_id(config)
        if here is not None and positions_from_padding(config):
            return {}
        try:
            return {"pad_token_id": self.load_processor(source).pad_token_id}
        except Refused:  # of a model that lies there without its tokenizer
            if here is None:
                raise
            return {}

    def add_head(self, model: Any, task: Task, *, seed: int) -> nn.Module:
        """A fresh head for `task` on `model`'s own encoder: its weights are shared."""
        torch.manual_seed(seed)
        fresh = self.AUTO.from_config(self._config(model, task.labels))
        share_encoder(model, fresh)
        return fresh

    def grow(self, model: Any, labels: Sequence[str], *, seed: int) -> None:
        """Let `model`'s head have an output for each of `labels`, which begin with its own.

        Weights that it has are kept, bit for bit; those of new labels are drawn.
        """
        torch.manual_seed(seed)
        fresh = self.AUTO.from_config(self._config(model, labels))
        old, inside = dict(model.named_parameters()), f"{fresh.base_model_prefix}."
        for name, made in fresh.named_parameters():
            kept = old.get(name)
            # What tasks share stays as it is, with the adapters that may lie in it.
            if name.startswith(inside) or (kept is not None and made.shape == kept.shape):
                continue
            if kept is None or made.shape[1:] != kept.shape[1:] or len(made) != len(labels):
                raise Refused(f"{name} of {type(model).__name__} cannot grow by labels",
                              where="--head", remedy="--head task")  # fmt: skip
            with torch.no_grad():
                made[: len(kept)] = kept.cpu()
            path, _, own = name.rpartition(".")
            layer: Any = model.get_submodule(path)
            layer.register_parameter(own, nn.Parameter(made.detach().to(kept.device)))
            layer.out_features = len(labels)
        model.config.update(self.head_config(labels))
        model.num_labels = len(labels)

    def _config(self, model: Any, labels: Sequence[str] | None) -> Any:
        return AutoConfig.for_model(**{**model.config.to_dict(), **self.head_config(labels)})

    def shared(self, model: Any) -> nn.Module:
        """What all tasks share: the encoder."""
        return model.base_model

    def save_head(self, model: Any, file: Path) -> None:
        """Write a model's tensors outside of its encoder."""
        inside = f"{model.base_model_prefix}."
        named = model.state_dict()
        save_file({k: v.detach().cpu().contiguous() for k, v in named.items()
                   if not k.startswith(inside)}, file)  # fmt: skip

    def with_head(self, model: Any, about: Mapping[str, Any], file: Path) -> Any:
        """A model on `model`'s encoder, with the head that `save_head` wrote."""
        with torch.device("meta"):  # without storage: the encoder is there, the head is read
            made: Any = self.AUTO.from_config(self._config(model, about["labels"]))
        share_encoder(model, made)
        inside = f"{made.base_model_prefix}."
        try:
            lacking, unknown = made.load_state_dict(load_file(file), strict=False, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            raise Refused(f"cannot be read ({said})", where=str(file)) from None
        if unknown or any(not name.startswith(inside) for name in lacking):
            raise Refused("does not fit the model beside it", where=str(file),
                          remedy="run its sequence again")  # fmt: skip
        if left := [n for n, b in made.named_buffers() if b.is_meta]:
            raise Refused(f"a head with a buffer that is not saved ({left[0]})", where=str(file))
        return made.eval()


class Whole:
    """A kind whose tasks share all of the model."""

    HEADS: ClassVar[bool] = False
    TEXT: ClassVar[bool] = True

    def dropped(self, source: str) -> str | None:
        """Nothing is left out."""
        return None

    def add_head(self, model: Any, task: Task, *, seed: int) -> nn.Module:
        """The model itself."""
        return model

    def shared(self, model: Any) -> nn.Module:
        return model

    def save_head(self, model: Any, file: Path) -> None:
        """There is none."""

    def with_head(self, model: Any, about: Mapping[str, Any], file: Path) -> Any:
        return model

    def aligned(self, measured: Any, labels: Sequence[str] | None, ours: Sequence[str]) -> Any:
        return measured


def share_encoder(model: Any, other: Any) -> None:
    """Put `model`'s encoder, the same object, in place of `other`'s."""
    setattr(other, str(other.base_model_prefix), model.base_model)
