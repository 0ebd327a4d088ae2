"""Classes of pictures: models of AutoModelForImageClassification, a head of each task's own.

Pictures are decoded and resized once, and kept as bytes: width × height × channels of the model's
input a row. Its own image processor does both, and scales them batch by batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from holdfast.errors import Refused
from holdfast.tasks.kinds.classification import Classification
from holdfast.tasks.kinds.packed import CHUNK, Packed
from holdfast.tasks.kinds.pretrained import first_line, reading
from holdfast.tasks.pictures import FORMATS
from holdfast.tasks.task import Prediction, Row, Task

STEPS = ("do_resize", "do_center_crop", "do_pad", "do_convert_rgb")  # done once
SCALING = ("do_rescale", "do_normalize")  # done for each batch


class Images(Classification):
    """One class a picture."""

    TEXT = False
    AUTO = AutoModelForImageClassification
    ENDING = "ForImageClassification"

    def check(self, source: str, *, max_length: int) -> None:
        """Refuse a model of text."""
        config = self.load_config(source)
        if type(config) not in self.AUTO._model_mapping:
            raise Refused(f"is no model of pictures ({config.model_type})", where=source,
                          remedy=f"name one that {self.AUTO.__name__} loads")  # fmt: skip

    def load_processor(self, source: str) -> Any:
        """The model's image processor; without torchvision the one that uses Pillow."""
        try:
            name, how = reading(source)
            return AutoImageProcessor.from_pretrained(name, **how)
        except Exception as error:  # readers raise many kinds on broken files
            raise Refused(f"no image processor: {first_line(error)}", where=source,
                          remedy="save the model's own beside it") from None  # fmt: skip

    def _padding(self, source: str) -> dict[str, Any]:
        return {}

    def encode(
        self,
        rows: Sequence[Row],
        task: Task,
        processor: Any,
        *,
        max_length: int,
        config: Any = None,
    ) -> Packed:
        """Pictures of the model's size, as uint8 (channels, height, width), and their classes."""
        mode = _mode(config)
        whole = np.zeros((0, 1, 1, 1), np.uint8)
        for at in range(0, len(rows), CHUNK):
            files = [row.file for row in rows[at : at + CHUNK]]  # type: ignore[attr-defined]
            few = _resized(files, processor, mode)
            if not at:
                whole = np.empty((len(rows), *few.shape[1:]), np.uint8)
            whole[at : at + len(few)] = few
        labels = np.array([row.label for row in rows])
        return Packed({"pixel_values": (whole, None), "labels": (labels, None)}, range(len(rows)))

    def count_cut(
        self, rows: Sequence[Row], encoded: Packed, task: Task, processor: Any, *, max_length: int
    ) -> int:
        """None: pictures are resized."""
        return 0

    def collator(self, processor: Any) -> Any:
        """Batches scaled as the model was trained on them."""
        return _Collator(processor)

    def predict(
        self, model: nn.Module, about: Mapping[str, Any], texts: Sequence[str],
        pairs: Sequence[str] | None, processor: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """What a model says of each picture. texts: their files."""
        pixels = _resized(texts, processor, _mode(model.config))
        rows = Packed({"pixel_values": (pixels, None)}, range(len(texts)))
        return self.predictions(model, rows, self.collator(processor), about["labels"], batch=batch)


class _Collator:
    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.off = {step: False for step in STEPS if hasattr(processor, step)}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.processor(images=[row["pixel_values"] for row in rows], return_tensors="pt",
                               input_data_format="channels_first", **self.off)  # fmt: skip
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def _resized(files: Sequence[Any], processor: Any, mode: str) -> Any:
    """Pictures in the model's size, not scaled: uint8 (rows, channels, height, width)."""
    pictures = [_opened(file, mode) for file in files]
    off = {step: False for step in SCALING if hasattr(processor, step)}
    made = processor(images=pictures, return_tensors="np", **off)["pixel_values"]
    return np.asarray(made).round().clip(0, 255).astype(np.uint8)


def _opened(file: Any, mode: str) -> Any:
    """A picture the right way up, as its camera says; of 16 bits the upper 8."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            picture: Any = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):  # Pillow would make everything above 255 white
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            return picture.convert(mode)
    except Exception as error:  # decoders raise many kinds on broken bytes
        raise Refused(f"no picture that can be read ({error})", where=str(file)) from None


def _mode(config: Any) -> str:
    return "L" if getattr(config, "num_channels", 3) == 1 else "RGB"


KIND = Images()
