"""What benchmarks of many short runs share: real tasks, one model a process, and runs that go on.

A run is a row of a JSON file, which is progress and result in one: the same command runs what the
file does not hold yet, and may be stopped at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from results import DATA
from tqdm.auto import tqdm

from holdfast import Recipe
from holdfast.experiments.learner import unprepare
from holdfast.experiments.processes import end_with_parent
from holdfast.experiments.record import commit, versions
from holdfast.tasks import Task, load_task

SIZES = {"train_size": 800, "selection": 200, "evaluation_size": 500}
ROWS, LENGTH = 16, 48  # rows a step, tokens a row
Run = dict[str, Any]


@cache
def task(name: str, seed: int) -> Task:
    """The task of a name, or of NAME@ROWS with so many training rows."""
    folder, _, rows = name.partition("@")
    sizes = SIZES | ({"train_size": int(rows)} if rows else {})
    return load_task(DATA / folder, seed=seed, **sizes)


class Bench:
    """What the runs of one process share: the tokenizer, encoded rows."""

    def __init__(self, model: str, home: Path, bf16: bool) -> None:
        from transformers import DataCollatorWithPadding

        from holdfast.tasks.kinds import classification, evaluate, pretrained

        torch.set_num_threads(1)
        pretrained.quiet()
        self.heads, self.home, self.bf16 = classification.KIND, home, bf16
        self.evaluate, self.hash = evaluate, pretrained.source_hash
        self.source = pretrained.locate(model)
        self.tokenizer = pretrained.load_tokenizer(self.source)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.commit = commit(Path(__file__).parent)
        self._rows: dict[tuple[str, int, str], Any] = {}

    def work(self, job: Sequence[Any]) -> Run | None:
        """Carry out one job; what it returns is kept."""
        raise NotImplementedError

    def rows(self, name: str, seed: int, split: str) -> Any:
        key = name, seed, split
        if key not in self._rows:
            found = task(name, seed)
            self._rows[key] = self.heads.encode(
                getattr(found, split), found, self.tokenizer, max_length=LENGTH
            )
        return self._rows[key]

    def scores(self, models: dict[str, Any], seed: int, split: str) -> list[float]:
        with self._precision():
            return [
                self.evaluate(m, self.rows(n, seed, split), task(n, seed), self.collate)
                for n, m in models.items()
            ]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def train(self, name: str, model: Any, seed: int, recipe: Recipe, lr: float,
              *, steps: int, arguments: Run | None = None, **how: Any) -> Any:  # fmt: skip
        """A Trainer of a task, of `steps` steps at a base rate of `lr`; `arguments` are its own."""
        from transformers import PrinterCallback, TrainingArguments

        from holdfast import Trainer

        told = TrainingArguments(
            output_dir=str(self.home / "unused"), max_steps=steps, per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=32, learning_rate=lr, weight_decay=0.01, warmup_steps=0.1,
            bf16=self.bf16, optim="adamw_torch_fused", seed=seed, data_seed=seed, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            **(arguments or {}),
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=told, train_dataset=self.rows(name, seed, "train"),
            data_collator=self.collate, processing_class=self.tokenizer, recipe=recipe, task=name,
            shared=model.base_model, **how,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    def alone(
        self,
        name: str,
        seed: int,
        recipe: Recipe,
        lr: float,
        *,
        steps: int,
        change: Callable[[Any], None] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """A single task, from the pre-trained weights: the model and its scores.

        change: what is done to the fresh model first.
        """
        torch.manual_seed(1000 * seed)
        model = self.heads.load_model(self.source, task(name, seed), seed=1000 * seed)
        if change is not None:
            change(model)
        trainer = self.train(name, model, 1000 * seed, recipe, lr, steps=steps)
        trainer.train()
        unprepare(model)
        if recipe.head_last:
            trainer.end_task()
        of = {s: self.scores({name: model}, seed, s) for s in ("evaluation", "selection")}
        return model, {"scores": [of["evaluation"]], "selection": [of["selection"]]}

    def batches(self, name: str, seed: int) -> Callable[[], Iterator[Any]]:
        rows = self.rows(name, seed, "train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()

        def batches() -> Iterator[Any]:
            for start in range(0, len(order), 32):
                yield self.collate([rows[i] for i in order[start : start + 32]])

        return batches


# --- all runs -----------------------------------------------------------------------------------

_BENCH: Bench | None = None


def options(about: str, runs: str) -> argparse.ArgumentParser:
    """The options that all such benchmarks have."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument(
        "--draw", action="store_true", help="only tables and picture of what is done"
    )
    return parser


def _begin(kind: type[Bench], model: str, home: Path, bf16: bool) -> None:
    global _BENCH
    threading.Thread(target=end_with_parent, daemon=True).start()
    _BENCH = kind(model, home, bf16)


def _work(job: Sequence[Any]) -> Run | None:
    assert _BENCH is not None
    return _BENCH.work(job)


def carry_out(
    kind: type[Bench],
    chosen: argparse.Namespace,
    jobs: Sequence[Sequence[Any]],
    *,
    keep: Callable[[Run], None],
    first: Sequence[Sequence[Any]] = (),
) -> None:
    """Run `first`, then `jobs`, on one process a core; `keep` is told of each that is done."""
    with ProcessPoolExecutor(
        chosen.workers, get_context("spawn"), initializer=_begin,
        initargs=(kind, chosen.model, chosen.runs, not chosen.no_bf16),
    ) as pool:  # fmt: skip
        before = [pool.submit(_work, job) for job in first]
        after = [pool.submit(_work, job) for job in jobs]
        for future in before:
            future.result()
        for future in tqdm(as_completed(after), total=len(after), unit="run"):
            found = future.result()
            assert found is not None
            keep(found)


def done(path: Path) -> dict[str, Any]:
    """What a file holds already."""
    body: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    return body


def save(path: Path, body: dict[str, Any], order: Callable[[Run], Any], settings: Any) -> None:
    """Write what is done so far: one line a run."""
    if "--draw" not in sys.argv:  # which runs nothing: the command and versions are of the runs
        body |= {"command": f"python {shlex.join(sys.argv)}", "versions": versions(),
                 "settings": settings}  # fmt: skip
    lines = ",\n".join(json.dumps(r) for r in sorted(body["runs"], key=order))
    rest = json.dumps({k: v for k, v in body.items() if k != "runs"})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f'{rest[:-1]},\n"runs": [\n{lines}\n]}}\n')
    unfinished.replace(path)


def show(
    path: Path, body: dict[str, Any], tables: Callable[..., str], draw: Callable[..., None]
) -> None:
    """Write the tables (.md) and the picture (.svg) beside the JSON, and print the tables."""
    told = tables(body["runs"])
    path.with_suffix(".md").write_text(f"`{body['command']}`\n\n{told}\n")
    draw(body["runs"], path.with_suffix(".svg"))
    print(told)
