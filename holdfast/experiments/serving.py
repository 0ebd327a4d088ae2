"""One encoder and the head of every task learned so far: what a run leaves to be used.

A folder that `save` wrote is an ordinary Hugging Face model of its last task. Beside it lie the
heads of the earlier ones (`head-<task>.safetensors`, without the encoder) and `tasks.json`, which
names every task with its labels. A run has one for each task, and `final/` for those who use it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from holdfast.errors import Refused, nearest
from holdfast.experiments.heads import head_config, load_tokenizer, outputs, quiet, share_encoder
from holdfast.experiments.runs import FINAL, RECORD
from holdfast.files import write_text_atomic
from holdfast.network.parts import named_parameters
from holdfast.tasks import Task
from holdfast.training.manifest import MANIFEST, commit, damage

TASKS, HEAD = "tasks.json", "head-{}.safetensors"
STATE = "holdfast"  # files of this name hold the state of methods, which only learning needs


class Prediction(NamedTuple):
    """What a model says of one row.

    label: its most probable label, or the number that a regression gives. probabilities: of each
    label, summing to 1; empty for a regression.
    """

    label: str | float
    probabilities: Mapping[str, float]


def save(
    folder: Path, tasks: Sequence[Task], models: Sequence[Any], tokenizer: Any, max_length: int
) -> None:
    """Write the models of tasks that share one encoder; `commit` or the caller declares it whole.

    max_length: at how many tokens a row is cut.
    """
    models[-1].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for task, model in zip(tasks[:-1], models, strict=False):
        save_file(_head(model), folder / HEAD.format(task.name))
    told = [{"name": t.name, "labels": t.labels, "metric": t.metric, "pairs": t.pairs,
             "source": t.source} for t in tasks]  # fmt: skip
    body = {"schema": 1, "max_length": max_length, "tasks": told}
    write_text_atomic(folder / TASKS, json.dumps(body, indent=1, ensure_ascii=False))


def models_in(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Tasks, as `save` noted them, and their models around one encoder, in evaluation mode."""
    last = AutoModelForSequenceClassification.from_pretrained(folder)
    found, models = described(folder)["tasks"], []
    for task in found[:-1]:
        # Without storage: the encoder is the last task's, the head is read from its file.
        config = AutoConfig.for_model(**{**last.config.to_dict(), **head_config(task["labels"])})
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        share_encoder(last, model)
        _load_head(model, folder / HEAD.format(task["name"]))
        models.append(model.eval())
    return found, [*models, last]


def described(folder: Path) -> dict[str, Any]:
    """What `tasks.json` says; `Refused` where it is missing or damaged."""
    try:
        body = json.loads((folder / TASKS).read_text(encoding="utf-8"))
        if body["schema"] == 1 and all({"name", "labels"} <= {*task} for task in body["tasks"]):
            return dict(body)
    except FileNotFoundError:
        raise Refused(f"no {TASKS}", where=str(folder),
                      remedy="name a run that this holdfast learned") from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise Refused(f"{TASKS} is damaged", where=str(folder), remedy="run its sequence again")


def shared_weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """The encoder's weights by name, as the checkpoint of the task before holds them."""
    named = named_parameters(model)
    before = type(model).from_pretrained(folder, dtype=torch.float32)
    shared = {id(p) for p in model.base_model.parameters()}
    saved = named_parameters(before)
    device = next(model.parameters()).device
    return {n: saved[n].detach().to(device) for n, p in named.items() if id(p) in shared}


def _head(model: Any) -> dict[str, Tensor]:
    """A model's tensors outside of its encoder, by name."""
    inside = f"{model.base_model_prefix}."
    named = model.state_dict()
    return {k: v.detach().cpu().contiguous() for k, v in named.items() if not k.startswith(inside)}


def _load_head(model: Any, file: Path) -> None:
    inside = f"{model.base_model_prefix}."
    try:
        lacking, unknown = model.load_state_dict(load_file(file), strict=False, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Refused(f"cannot be read ({str(error).splitlines()[0]})", where=str(file)) from None
    if unknown or any(not name.startswith(inside) for name in lacking):
        raise Refused("does not fit the model beside it", where=str(file),
                      remedy="run its sequence again")  # fmt: skip
    if left := [n for n, b in model.named_buffers() if b.is_meta]:
        raise Refused(f"a head with a buffer that is not saved ({left[0]})", where=str(file))


# --- what is left to be used ----------------------------------------------------------------------


def finish(home: Path, run: Path) -> Path:
    """`final/`: a task's folder without the state of methods; its files are linked, not copied."""
    final, unfinished = run / FINAL, run / f".{FINAL}-{os.getpid()}"
    listed = _listed(home)
    if final.is_dir() and _listed(final) == listed:
        return final
    for left in run.glob(f".{FINAL}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir()
    link_files(home, unfinished, list(listed))
    commit(unfinished, {name: (size, sha) for name, (size, sha) in listed.items()})
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    return final


def link_files(home: Path, folder: Path, names: Sequence[str]) -> None:
    """Hard links to files of one folder in another; copies where a file system has no links."""
    for name in names:
        try:
            os.link(home / name, folder / name)
        except OSError:
            shutil.copy2(home / name, folder / name)


def _listed(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of a folder's files by its manifest, but for the state of methods."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: known for name, known in files.items() if not name.startswith(STATE)}
    except (OSError, ValueError, KeyError):
        return {}


@dataclass(frozen=True)
class Served:
    """Every task that a run learned, over one encoder.

    Example:
        served = holdfast.load("runs/nov")
        served.predict("october", ["where is my order?"])[0].label
    """

    folder: Path
    tokenizer: Any
    max_length: int
    models: Mapping[str, Any]  # by task; each an ordinary Hugging Face model
    tasks: Mapping[str, Mapping[str, Any]]  # name, labels (None: a regression), metric, pairs

    def predict(
        self,
        task: str,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        batch: int = 64,
    ) -> list[Prediction]:
        """What the model of `task` says of each text (or of each text and its second one)."""
        return list(self.predictions(task, texts, pairs, batch=batch))

    def predictions(
        self, task: str, texts: Sequence[str], pairs: Sequence[str] | None = None, *, batch: int
    ) -> Iterator[Prediction]:
        """As `predict`, a chunk of 16 batches at a time."""
        about = self.tasks[self.named(task)]
        if (pairs is not None) != bool(about["pairs"]):
            raise Refused("needs a second text of each row" if about["pairs"] else
                          "takes one text of each row", where=task)  # fmt: skip
        for at in range(0, len(texts), 16 * batch):
            few = slice(at, at + 16 * batch)
            second = None if pairs is None else list(pairs[few])
            fields = self.tokenizer(
                list(texts[few]), second, truncation=True, max_length=self.max_length
            )
            size = len(fields["input_ids"])
            rows = [{k: v[i] for k, v in fields.items()} for i in range(size)]
            collate = DataCollatorWithPadding(self.tokenizer)
            found: list[Prediction | None] = [None] * size
            for chosen, logits in outputs(self.models[task], rows, collate, batch=batch):
                for i, row in zip(chosen, logits, strict=True):
                    found[i] = _prediction(row, about["labels"])
            yield from (each for each in found if each is not None)

    def named(self, task: str) -> str:
        """`task` itself, or `Refused` with the nearest that there is."""
        if task not in self.tasks:
            raise Refused(f"no task {task!r}", where=str(self.folder),
                          remedy=nearest(task, list(self.tasks)))  # fmt: skip
        return task

    def save(self, task: str, folder: str | Path) -> Path:
        """An ordinary Hugging Face folder of one task, tokenizer included."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refused("is not empty", where=str(folder), remedy="name a new folder")
        self.models[self.named(task)].save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


def writer_for(out: Path) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """What writes rows to a .jsonl or .csv file, whole or not at all."""
    if out.suffix not in (".jsonl", ".csv"):
        raise Refused("neither .jsonl nor .csv", where=str(out), remedy="name such a file")

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO(newline="")
        if out.suffix == ".jsonl":
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif rows:
            table = csv.DictWriter(text, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out, text.getvalue())

    return write


def _prediction(logits: Tensor, labels: Sequence[str] | None) -> Prediction:
    if labels is None:
        return Prediction(float(logits[0]), {})
    shares = logits.double().softmax(0).tolist()
    return Prediction(labels[int(logits.argmax())], dict(zip(labels, shares, strict=True)))


def load(run: str | Path) -> Served:
    """What a finished run learned; `run` is its folder, its `final/`, or that of one of its tasks.

    `Refused` where the files are not those that were written.
    """
    quiet()
    folder = Path(run)
    folder = folder / FINAL if (folder / FINAL).is_dir() else folder
    if not (folder / TASKS).is_file():
        if (folder / RECORD).is_file():
            raise Refused("has no final/: it is not finished", where=str(run),
                          remedy="let its command go on")  # fmt: skip
        raise Refused("is no run", where=str(run), remedy="name a run's folder")
    if wrong := damage(folder):
        raise Refused(wrong, where=str(folder), remedy="run its command again")
    about = described(folder)
    tasks, models = models_in(folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    placed: list[nn.Module] = [m.to(device or "cpu") for m in models]
    names = [task["name"] for task in tasks]
    return Served(
        folder,
        load_tokenizer(str(folder)),
        int(about["max_length"]),
        dict(zip(names, placed, strict=True)),
        dict(zip(names, tasks, strict=True)),
    )
