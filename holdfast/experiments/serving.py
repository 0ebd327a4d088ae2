"""One encoder and the head of every task learned so far: what a run leaves to be used.

A folder that `save` wrote is an ordinary Hugging Face model of its last task. Beside it lie the
heads of the earlier ones (`head-<task>.safetensors`, without the encoder) and `tasks.json`, which
names every task with its labels. A run has one for each task, and `final/` for those who use it.
Where tasks share one head, the model serves all of them, and its labels stand with every task.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.errors import NotFinite, Refused, nearest
from holdfast.experiments.runs import FINAL, RECORD
from holdfast.files import no_archive, write_text_atomic
from holdfast.network.parts import named_parameters
from holdfast.tasks import Prediction, Task, program, slug
from holdfast.tasks.kinds import Kind, kind_named, kind_of
from holdfast.tasks.kinds.heads import OneHead, answering, with_classes
from holdfast.tasks.kinds.levi import LeviConfig
from holdfast.tasks.kinds.pretrained import device, first_line, quiet
from holdfast.tasks.spec import template_in
from holdfast.tasks.task import Row
from holdfast.training.manifest import commit, damage, listed

TASKS, HEAD = "tasks.json", "head-{}.safetensors"
STATE = "holdfast"  # files of this name hold the state of methods, which only learning needs


def save(
    folder: Path,
    tasks: Sequence[Task],
    models: Sequence[Any],
    processor: Any,
    max_length: int,
    *,
    kind: Kind | None = None,
) -> None:
    """Write the models of tasks that share one encoder; `commit` or the caller declares it whole.

    max_length: at how many tokens a row is cut. kind: that of the tasks, as `headed` makes it.
    """
    models[-1].save_pretrained(folder)
    processor.save_pretrained(folder)
    kind = kind or kind_of(tasks)
    one = kind if isinstance(kind, OneHead) else None
    for task, model in zip(tasks[:-1] if kind.HEADS else (), models, strict=False):
        kind.save_head(model, folder / HEAD.format(task.name))
    told = [{"name": t.name, "labels": one.labels[tasks[-1].name] if one else t.labels,
             "metric": t.metric, "pairs": t.pairs, "kind": t.kind,
             **({"template": made} if (made := template_in(t.source)) else {})} for t in tasks
            ]  # fmt: skip
    body = {"schema": 1, "max_length": max_length, **({"one_head": True} if one else {}),
            "tasks": told}  # fmt: skip
    write_text_atomic(folder / TASKS, json.dumps(body, indent=1, ensure_ascii=False))


def models_in(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Tasks, as `save` noted them, and their models around one encoder, in evaluation mode."""
    about = described(folder)
    found = about["tasks"]
    kind = kind_named(found[-1]["kind"])
    last, size = kind.open_saved(str(folder), found[-1]), len(found[-1]["labels"] or "-")
    if kind.HEADS and last.config.num_labels != size:
        raise Refused(f"a head of {last.config.num_labels} outputs for {size} labels",
                      where=str(folder), remedy="run its sequence again")  # fmt: skip
    if about.get("one_head"):
        return found, [last] * len(found)
    before = [kind.with_head(last, t, folder / HEAD.format(t["name"])) for t in found[:-1]]
    return found, [*before, last]


def described(folder: Path) -> dict[str, Any]:
    """What `tasks.json` says; `Refused` where it is missing or damaged."""
    try:
        body = json.loads((folder / TASKS).read_text(encoding="utf-8"))
        tasks = [(t["name"], t["labels"], t["kind"], bool(t["pairs"])) for t in body["tasks"]]
        # Names are parts of paths.
        good = body["schema"] == 1 and tasks and all(slug(name) == name for name, *_ in tasks)
        long = isinstance(size := body["max_length"], int) and size > 0
        if good and long and all(_distinct(labels) for _, labels, *_ in tasks):
            return dict(body)
    except FileNotFoundError:
        raise Refused(f"no {TASKS}", where=str(folder),
                      remedy="name a run that this holdfast learned") from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Refused(f"{TASKS} is damaged", where=str(folder), remedy="run its sequence again")


def _distinct(labels: Any) -> bool:
    """Whether these are labels: different texts in a list, or none of what has none."""
    if labels is None:
        return True
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    return texts and len(set(labels)) == len(labels)


def shared_weights(folder: Path, model: Any, module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of what tasks share, `module`, by name, as the checkpoint before holds them."""
    named = named_parameters(model)
    about = described(folder)["tasks"][-1]
    before = kind_named(about["kind"]).open_saved(str(folder), about)
    shared = {id(p) for p in module.parameters()}
    saved = named_parameters(before)
    device = next(model.parameters()).device
    return {n: saved[n].detach().to(device) for n, p in named.items() if id(p) in shared}


# --- what is left to be used ----------------------------------------------------------------------


def finish(home: Path, run: Path) -> Path:
    """`final/`: a task's folder without the state of methods; its files are linked, not copied."""
    final, unfinished = run / FINAL, run / f".{FINAL}-{os.getpid()}"
    files = _listed(home)
    if final.is_dir() and _listed(final) == files:
        return final
    for left in run.glob(f".{FINAL}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir()
    link_files(home, unfinished, files)
    commit(unfinished, files)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    return final


def link_files(home: Path, folder: Path, names: Iterable[str]) -> None:
    """Hard links to files of one folder in another; copies where a file system has no links."""
    for name in names:
        _link(home / name, folder / name)


def _link(one: Path, two: Path) -> None:
    try:
        os.link(one, two)
    except OSError:
        shutil.copy2(one, two)


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """The files of a folder, but for the state of methods."""
    return {name: known for name, known in listed(folder).items() if not name.startswith(STATE)}


@dataclass(frozen=True)
class Served:
    """Every task that a run learned, over one encoder.

    Example:
        served = holdfast.load("runs/nov")
        served.predict("october", ["where is my order?"])[0].label
    """

    folder: Path
    processor: Any  # its tokenizer, or what else makes inputs of rows
    max_length: int
    models: Mapping[str, Any]  # by task; each an ordinary Hugging Face model
    tasks: Mapping[str, Mapping[str, Any]]  # name, labels (None: a regression), metric, pairs
    one_head: bool = False  # one model for all tasks, whose labels are those of all of them

    def predict(
        self,
        task: str,
        texts: Sequence[Any] | Mapping[str, Any],
        pairs: Sequence[str] | None = None,
        *,
        batch: int = 64,
    ) -> list[Prediction]:
        """What the model of `task` says of each text (or of each text and its second one).

        Of a task of conversations each text is a list of messages. A network of one's own takes
        rows as its file gives them: arrays (rows, …) by name, or a list of mappings.
        """
        return list(self.predictions(task, texts, pairs, batch=batch))

    def predictions(
        self,
        task: str,
        texts: Sequence[Any] | Mapping[str, Any],
        pairs: Sequence[str] | None = None,
        *,
        batch: int,
    ) -> Iterator[Prediction]:
        """As `predict`, a chunk of 16 batches at a time."""
        about = self.tasks[self.named(task)]
        if isinstance(texts, str) or isinstance(pairs, str):
            raise Refused("takes a list of texts, not one text", where=task)
        if (pairs is not None) != bool(about["pairs"]):
            raise Refused("needs a second text of each row" if about["pairs"] else
                          "takes one text of each row", where=task)  # fmt: skip
        kind = kind_named(about["kind"])
        if about["kind"] == "module" and len(texts):
            rows = program.items(texts, task)
            texts = [row.values for row in rows]  # type: ignore[attr-defined]
        elif isinstance(texts, Mapping):
            raise Refused("takes a list of texts, not a mapping", where=task)
        for at in range(0, len(texts), 16 * batch):
            few = slice(at, at + 16 * batch)
            second = None if pairs is None else list(pairs[few])
            with answering(kind, self.models[task]) as asked:
                try:
                    found = asked.predict(self.models[task], about, list(texts[few]), second,
                                          self.processor, max_length=self.max_length,
                                          batch=batch)  # fmt: skip
                except NotFinite as error:
                    raise error.within(task) from None
            yield from found

    def add_classes(self, rows: Mapping[str, Sequence[Any]]) -> Served:
        """This with further classes, of a run with a head of prototypes; nothing is trained.

        rows: label -> texts of that class; of tasks about two texts, pairs of texts. The encoder is
        shared with what this is, all prototypes that there were are the same bit for bit, and the
        files of the run stay as they are: `save` writes the model that was made. Raises `Refused`
        for another head, a class that there is, one without rows.
        """
        name = list(self.tasks)[-1]  # its labels are those of all tasks
        about = self.tasks[name]
        if about["kind"] != "classification":
            raise Refused(f"is a {about['kind']}: classes are added to tasks of text", where=name)
        size = 2 if about["pairs"] else 1
        if not isinstance(rows, Mapping) or not rows:
            raise Refused("needs labels, each with its texts", where="add_classes",
                          remedy='{"refund": ["where is my money?"]}')  # fmt: skip
        made: dict[str, list[Row]] = {}
        for label, few in rows.items():
            each = [(one,) if isinstance(one, str) else tuple(one) for one in few]
            if isinstance(few, str) or any(len(texts) != size for texts in each):
                raise Refused(f"takes a list of {'texts' if size == 1 else 'pairs of texts'}",
                              where=label)  # fmt: skip
            made[label] = [Row(t[0], t[1] if size == 2 else None, None) for t in each]
        model, labels = with_classes(self.models[name], about, made, self.processor,
                                     max_length=self.max_length)  # fmt: skip
        tasks = {key: {**task, "labels": labels} for key, task in self.tasks.items()}
        return replace(self, models=dict.fromkeys(self.models, model), tasks=tasks)

    def named(self, task: str) -> str:
        """`task` itself, or `Refused` with the nearest that there is."""
        if task not in self.tasks:
            raise Refused(f"no task {task!r}", where=str(self.folder),
                          remedy=nearest(task, list(self.tasks)))  # fmt: skip
        return task

    def save(self, task: str, folder: str | Path, *, onnx: bool = False) -> Path:
        """An ordinary Hugging Face folder of one task, tokenizer included.

        onnx: also in ONNX, by Optimum, in its folder `onnx`.
        """
        folder, model = Path(folder), self.models[self.named(task)]
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refused("is not empty", where=str(folder), remedy="name a new folder")
        if isinstance(getattr(model, "config", None), LeviConfig):
            raise Refused("an ensemble (--head levi) is no model of Transformers' own: without "
                          "holdfast nothing loads it", where=task,
                          remedy="serve it with holdfast.load")  # fmt: skip
        export = _exporter() if onnx else None
        try:
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        except BaseException:
            # Such as a full disk: a part would pass for a model, and is in the way.
            for left in [*folder.iterdir()] if folder.is_dir() else ():
                left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
            raise
        if export is not None:
            again = kind_named(self.tasks[task]["kind"]).open_saved(str(folder))  # on the CPU
            try:
                export(again, folder / "onnx")
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise Refused(f"Optimum cannot export it ({first_line(error)})", where=task,
                              remedy=f"{folder} is whole but for onnx/") from None  # fmt: skip
            self.processor.save_pretrained(folder / "onnx")
        return folder


def _exporter() -> Any:
    """Optimum's export of a model in memory."""
    try:
        from optimum.exporters.onnx import onnx_export_from_model
    except ImportError:
        raise Refused("needs Optimum", where="--onnx",
                      remedy="pip install 'optimum[onnxruntime]'") from None  # fmt: skip
    return onnx_export_from_model


def load(run: str | Path) -> Served:
    """What a finished run learned; `run` is its folder, its `final/`, or that of one of its tasks.

    `Refused` where the files are not those that were written.
    """
    quiet()
    folder = Path(run)
    no_archive(folder)
    folder = folder / FINAL if (folder / FINAL).is_dir() else folder
    if not (folder / TASKS).is_file():
        if (folder / RECORD).is_file():
            raise Refused("has no final/ yet", where=str(run),
                          remedy="run its command to the end")  # fmt: skip
        raise Refused("is no run", where=str(run), remedy="name a run's folder")
    if wrong := damage(folder):
        raise Refused(wrong, where=str(folder), remedy="run its command again")
    about = described(folder)
    tasks, models = models_in(folder)
    placed: list[nn.Module] = [m.to(device()) for m in models]
    names = [task["name"] for task in tasks]
    return Served(
        folder,
        kind_named(tasks[-1]["kind"]).load_processor(str(folder)),
        int(about["max_length"]),
        dict(zip(names, placed, strict=True)),
        dict(zip(names, tasks, strict=True)),
        bool(about.get("one_head")),
    )
