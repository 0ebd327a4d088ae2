"""Any nn.Module, with rows, losses and scores of its own: see `holdfast.tasks.program`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import default_collate
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from holdfast.engine.batches import LABELS
from holdfast.engine.forwarding import in_mode
from holdfast.errors import Refused, TrainingDiverged
from holdfast.files import write_text_atomic
from holdfast.tasks.kinds.packed import Packed
from holdfast.tasks.kinds.sharing import Whole
from holdfast.tasks.program import described, named, opened, parted
from holdfast.tasks.task import Prediction, Row, Task

PROGRAM, CONFIG, WEIGHTS = "module.py", "config.json", "model.safetensors"
BATCH = 64


class Net(nn.Module):
    """A network with one task's loss, as Trainer calls models."""

    def __init__(self, net: nn.Module, task: Mapping[str, Any], file: Path) -> None:
        super().__init__()
        self.net, self.task, self.file = net, task, file

    @property
    def base_model(self) -> nn.Module:
        return self.net

    def forward(self, **batch: Any) -> SequenceClassifierOutput:
        try:
            found = self.task["loss"](self.net, batch)
        except KeyError as lacking:  # outputs are asked for without labels
            if lacking.args[0] not in LABELS:
                raise
            return SequenceClassifierOutput()
        loss, logits = found if isinstance(found, tuple) else (found, None)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Weights, and which file makes the network: `Program` writes that file itself."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.net, str(folder / WEIGHTS))
        body = {"model_type": "module", "architectures": [type(self.net).__name__],
                "file": str(self.file.resolve())}  # fmt: skip
        write_text_atomic(folder / CONFIG, json.dumps(body, indent=1))


class Program:
    """The Python file, kept beside the weights."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.file, Path(folder) / PROGRAM)


class Module(Whole):
    """One network of any kind; its tasks share all of it."""

    TEXT = False

    def check(self, source: str, *, max_length: int) -> None:
        """Refuse what is no Python file with a model."""
        opened(_file(source))

    def load_config(self, source: str) -> None:
        """There is none."""

    def load_processor(self, source: str) -> Program:
        return Program(_file(source))

    def load_model(self, source: str, task: Task, *, seed: int) -> nn.Module:
        """What `model()` returns."""
        torch.manual_seed(seed)
        return Net(_made(_file(source)), _functions(task.source), _file(source))

    def open_saved(self, folder: str, about: Mapping[str, Any] | None = None) -> Any:
        file = _file(folder)
        net, weights = _made(file), str(Path(folder) / WEIGHTS)
        try:
            load_model(net, weights)
        except (OSError, RuntimeError, SafetensorError) as error:
            why = str(error).splitlines()[0]
            raise Refused(f"does not fit the network of {file} ({why})", where=weights,
                          remedy="take the file it was learned with") from None  # fmt: skip
        return Net(net, described(file, about["name"])[1] if about else {}, file)

    def add_head(self, model: Any, task: Task, *, seed: int) -> nn.Module:
        """The same network with another task's loss."""
        return Net(model.net, _functions(task.source), model.file)

    def with_head(self, model: Any, about: Mapping[str, Any], file: Path) -> Any:
        return Net(model.net, described(model.file, about["name"])[1], model.file).eval()

    # --- rows -------------------------------------------------------------------------------------

    def encode(
        self,
        rows: Sequence[Row],
        task: Task,
        processor: Any,
        *,
        max_length: int,
        config: Any = None,
    ) -> Any:
        """Arrays (rows, …) by name; a list of rows where their shapes differ."""
        each = [row.values for row in rows]  # type: ignore[attr-defined]
        names = list(each[0]) if each else []
        if any(len({row[name].shape for row in each}) > 1 for name in names):
            return [dict(row) for row in each]
        columns = {name: (np.stack([row[name] for row in each]), None) for name in names}
        return Packed(columns, range(len(rows)))

    def count_cut(
        self, rows: Sequence[Row], encoded: Any, task: Task, processor: Any, *, max_length: int
    ) -> int:
        """None."""
        return 0

    def collator(self, processor: Any) -> Any:
        """Batches of tensors by name."""
        own = getattr(opened(processor.file), "collate", _collate)
        return lambda rows: BatchEncoding(own(rows))

    def measure(self, model: Any, rows: Any, task: Task, collate: Any) -> Any:
        """Each row's score: (rows, 1)."""
        device, found = next(model.parameters()).device, []
        with in_mode(model.modules(), training=False), torch.no_grad():
            for at in range(0, len(rows), BATCH):
                few = [rows[i] for i in range(at, min(at + BATCH, len(rows)))]
                scores = torch.as_tensor(model.task["score"](model.net, collate(few).to(device)))
                if scores.shape != (len(few),):
                    raise Refused(f"score() returned {tuple(scores.shape)} for {len(few)} rows",
                                  where=task.name, remedy="return a number for each")  # fmt: skip
                found.append(scores.double().cpu().numpy())
        measured = np.concatenate(found)[:, None]
        if not np.isfinite(measured).all():
            raise TrainingDiverged("diverged: its scores are not finite", where=task.name,
                                   remedy="lower --lr")  # fmt: skip
        return measured

    def total(self, task: Task, measured: Any) -> float:
        """Their mean."""
        return float(measured.mean())

    def predict(
        self, model: Any, about: Mapping[str, Any], texts: Sequence[Any],
        pairs: Sequence[str] | None, processor: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """What the task's `predict(model, batch)` says of each row. texts: rows, arrays by name."""
        if "predict" not in model.task:
            raise Refused("its file says no predict(model, batch)", where=about["name"])
        collate, device = self.collator(processor), next(model.parameters()).device
        with in_mode(model.modules(), training=False), torch.no_grad():
            said = [
                each for at in range(0, len(texts), batch)
                for each in model.task["predict"](
                    model.net, collate([dict(row) for row in texts[at : at + batch]]).to(device)
                )
            ]  # fmt: skip
        return [Prediction(each, {}) for each in said]


def _file(source: str) -> Path:
    """The Python file of a model: `source` itself, or for a folder the file that was named when it
    was written, if it is named now too, and else the copy in the folder."""
    if source.endswith(".py"):
        return Path(source)
    folder = Path(source)
    if not (folder / PROGRAM).is_file():
        raise Refused("is no Python file", where=source, remedy="name one that has a model()")
    try:
        first = Path(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["file"])
    except (OSError, ValueError, KeyError, TypeError):
        first = folder / PROGRAM
    return first if first.is_file() and named(first) else folder / PROGRAM


def _made(file: Path) -> nn.Module:
    net = opened(file).model()
    if not isinstance(net, nn.Module):
        raise Refused(f"model() returns a {type(net).__name__}, no nn.Module", where=str(file))
    return net


def _collate(rows: Any) -> dict[str, Any]:
    """Batches as torch makes them; Python's numbers in float32, as arrays of them are."""
    made = default_collate(rows)
    return {n: v.float() if getattr(v, "dtype", None) == torch.float64 else v
            for n, v in made.items()}  # fmt: skip


def _functions(source: str) -> Mapping[str, Any]:
    return described(*parted(source.partition("?")[0]))[1]


KIND = Module()
