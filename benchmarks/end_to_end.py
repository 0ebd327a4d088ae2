"""Seconds of whole trainings: holdfast's defaults beside Trainer's, and what saving costs.

    python benchmarks/end_to_end.py --quick --json docs/results/end-to-end-quick.json

Time: MiniLM on each task for one epoch, (a) as published scripts train it, every row padded to 128
tokens and AdamW unfused, (b) by Trainer's own defaults with rows padded per batch, (c) by
holdfast's. The clock stops while scores are computed; the target is the score of (a) at its end.
Fast (`--fast`): instead, an epoch by Trainer's defaults beside holdfast's with batches of like
length, and with bf16 too, by turns; and a compiled encoder: after how many steps it pays.
Saving: the seconds within each checkpoint, by Trainer and by holdfast, and their difference as a
share of 100 steps; a second Trainer shows the noise. Repetitions are interleaved. Writes the JSON
and, beside it, the tables (.md).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from results import DATA, markdown, need_data, save
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

import holdfast
from holdfast.engine.forwarding import uncompiled
from holdfast.recipe import Recipe
from holdfast.tasks import Task, load_task
from holdfast.tasks.kinds import evaluate
from holdfast.tasks.kinds.classification import KIND
from holdfast.tasks.kinds.pretrained import load_tokenizer, locate, quiet

LOOKS = 8  # how often the score is computed during training
LIKE, FAST = "holdfast, like lengths", "holdfast, like lengths, bf16"
COMPILED = "trainer, compiled"
PADDED, DYNAMIC, OURS = "published (padded to 128, unfused)", "trainer (per batch)", "holdfast"
SAVERS = ("trainer", "trainer again", "holdfast")


def processor_time() -> float:
    """Seconds that processors worked for this process and the ended ones that it started."""
    return sum(os.times()[:4])


class Clock(TrainerCallback):
    """Seconds of training alone, and the score on selection rows at a few points."""

    def __init__(
        self, score: Callable[[Any], float] | None, every: int, now: Callable[[], float]
    ) -> None:
        self.score, self.every, self.now = score, every, now
        self.seconds, self.points = 0.0, list[tuple[int, float, float]]()
        self.saves = list[float]()  # seconds in each checkpoint
        self.steps = list[float]()  # seconds of training at the end of each

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        self.steps.append(self.seconds + self.now() - self.began)
        if self.score is not None and (step % self.every == 0 or step == state.max_steps):
            self.pause()
            self.points.append((step, self.seconds, self.score(model)))
            model.train()
            self.began = self.now()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.pause()

    def pause(self) -> None:
        self.seconds += self.now() - self.began

    def timed(self, save: Callable[..., None]) -> Callable[..., None]:
        """`save`, with its seconds recorded."""

        def measured(*args: Any, **kwargs: Any) -> None:
            began = self.now()
            save(*args, **kwargs)
            self.saves.append(self.now() - began)

        return measured


class Work:
    """One task's rows and what all trainings of it have in common."""

    def __init__(self, path: str, chosen: argparse.Namespace) -> None:
        self.task: Task = load_task(path, train_size=chosen.train_size, selection=chosen.selection)
        self.source, self.chosen = locate(chosen.model), chosen
        self.tokenizer = load_tokenizer(self.source)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.train, self.selection = (
            KIND.encode(rows, self.task, self.tokenizer, max_length=chosen.max_length)
            for rows in (self.task.train, self.task.selection)
        )
        epoch = math.ceil(len(self.train) / chosen.batch_size)
        self.steps = min(epoch, chosen.steps or epoch)

    def score(self, model: Any) -> float:
        """In full precision and uncompiled, however it is trained."""
        autocast = model.__dict__.pop("forward", None)
        try:
            with uncompiled():
                return evaluate(model, self.selection, self.task, self.collate)
        finally:
            if autocast is not None:
                model.forward = autocast

    def run(
        self, kind: str, out: Path, *, seed: int, save: int = 0, steps: int = 0, scored: bool = True
    ) -> Clock:
        """Train once, in the way of `kind`; save: steps between checkpoints, 0 for none."""
        padded = DataCollatorWithPadding(
            self.tokenizer, padding="max_length", max_length=self.chosen.max_length
        )
        ours = kind in (OURS, LIKE, FAST)
        steps = steps or self.steps
        looks = 1 if self.chosen.fast else LOOKS
        now = processor_time if self.chosen.processor_time else time.perf_counter
        clock = Clock(self.score if scored else None, max(1, steps // looks), now)
        more: dict[str, Any] = {"optim": "adamw_torch"} if kind == PADDED else {}
        if kind in (LIKE, FAST):
            more |= {"train_sampling_strategy": "group_by_length", "bf16": kind == FAST}
        args = TrainingArguments(
            output_dir=str(out), max_steps=steps, learning_rate=self.chosen.lr, warmup_steps=0.1,
            per_device_train_batch_size=self.chosen.batch_size, weight_decay=0.01, seed=seed,
            save_strategy="steps" if save else "no", save_steps=save or 500, save_total_limit=2,
            logging_steps=100, report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False, **more,
        )  # fmt: skip
        cls = holdfast.Trainer if ours else transformers.Trainer
        own = {"recipe": Recipe.named(self.chosen.recipe)} if ours else {}
        model = KIND.load_model(self.source, self.task, seed=seed)
        if kind == COMPILED:
            torch.compiler.reset()
            model.base_model.compile(dynamic=True)
        trainer = cls(
            model=model, args=args, callbacks=[clock],
            train_dataset=self.train, data_collator=padded if kind == PADDED else self.collate,
            processing_class=self.tokenizer, **own,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer._save_checkpoint = clock.timed(trainer._save_checkpoint)
        trainer.train()
        shutil.rmtree(out, ignore_errors=True)
        return clock


def _by_turns(
    work: Work, kinds: Sequence[str], repeats: int, out: Path, tell: Callable[[str], None]
) -> dict[str, list[Clock]]:
    found: dict[str, list[Clock]] = {kind: [] for kind in kinds}
    for repeat in range(repeats):
        for kind in _turned(list(found), repeat):
            clock = work.run(kind, out, seed=repeat)
            found[kind].append(clock)
            tell(f"{work.task.name} · {kind} · {clock.seconds:.1f} s, {clock.points[-1][2]:.3f}")
    return found


def speed(work: Work, chosen: argparse.Namespace, out: Path, tell: Callable[[str], None]) -> Any:
    """Every way to train the task, interleaved."""
    found = _by_turns(work, (PADDED, DYNAMIC, OURS), chosen.repeats, out / "speed", tell)
    # The target counts as reached within its noise: one standard error on the selection rows.
    target = statistics.median(c.points[-1][2] for c in found[PADDED])
    noise = math.sqrt(max(target * (1 - target), 0.01) / max(len(work.selection), 1))
    rows = []
    for kind, clocks in found.items():
        pairs = list(zip(clocks, found[PADDED], strict=True))
        reached = [
            next((s for _, s, score in c.points if score >= target - noise), None) for c in clocks
        ]
        rows.append({
            "task": work.task.name, "kind": kind, "steps": work.steps,
            "seconds": [round(c.seconds, 3) for c in clocks],
            "median_seconds": statistics.median(c.seconds for c in clocks),
            "times_faster_than_published": statistics.median(p.seconds / c.seconds
                                                             for c, p in pairs),
            "scores": [c.points[-1][2] for c in clocks], "target": target, "noise": noise,
            "seconds_to_target": reached,
        })  # fmt: skip
    return rows


def fast(work: Work, chosen: argparse.Namespace, out: Path, tell: Callable[[str], None]) -> Any:
    """Trainer's defaults and holdfast's faster settings by turns, then the compiled encoder."""
    found = _by_turns(work, (DYNAMIC, LIKE, FAST), chosen.repeats, out / "fast", tell)
    rows = [
        {
            "task": work.task.name, "kind": kind, "steps": work.steps,
            "seconds": [round(c.seconds, 3) for c in clocks],
            "median_seconds": statistics.median(c.seconds for c in clocks),
            "times_faster": statistics.median(
                p.seconds / c.seconds for c, p in zip(clocks, found[DYNAMIC], strict=True)
            ),
            "scores": [c.points[-1][2] for c in clocks],
            "mean_score": statistics.fmean(c.points[-1][2] for c in clocks),
        }
        for kind, clocks in found.items()
    ]  # fmt: skip
    clock = work.run(COMPILED, out / "fast", seed=0, scored=False)
    tell(f"{work.task.name} · {COMPILED} · {clock.seconds:.1f} s")
    # In the later half of the steps, which are of the same rows, all is compiled.
    half, eager = work.steps // 2, found[DYNAMIC][0]
    before, now = ((c.steps[-1] - c.steps[half - 1]) / (work.steps - half) for c in (eager, clock))
    spent = clock.steps[-1] - work.steps * now  # on compiling
    pays = math.ceil(spent / (before - now)) if now < before else None
    told = {"task": work.task.name, "seconds_a_step": before, "compiled": now,
            "seconds_to_compile": spent, "pays_after_steps": pays}  # fmt: skip
    return rows, told


def saving(work: Work, chosen: argparse.Namespace, out: Path, tell: Callable[[str], None]) -> Any:
    """Seconds of each checkpoint, and the excess over Trainer's as a share of 100 steps."""
    steps, found = chosen.save_runs * chosen.save_steps, {kind: list[Clock]() for kind in SAVERS}
    for repeat in range(chosen.repeats):
        for kind in _turned(list(SAVERS), repeat):
            name = OURS if kind == "holdfast" else DYNAMIC
            clock = work.run(name, out / "saving", seed=0, steps=steps, scored=False,
                             save=chosen.save_steps)  # fmt: skip
            found[kind].append(clock)
            shown = ", ".join(f"{s:.2f}" for s in clock.saves)
            tell(f"{kind} · {clock.seconds:.1f} s, in checkpoints {shown}")
    training = statistics.median(
        (c.seconds - sum(c.saves)) / steps for clocks in found.values() for c in clocks
    )
    base = statistics.median(s for c in found["trainer"] for s in c.saves)
    rows = []
    for kind, clocks in found.items():
        each = [s for c in clocks for s in c.saves]
        median = statistics.median(each)
        rows.append({
            "kind": kind, "save_steps": chosen.save_steps, "checkpoints": len(each),
            "seconds_a_checkpoint": median, "each": each, "seconds_a_step": training,
            "more_than_trainer_at_100_steps": (median - base) / (100 * training + base),
            "seconds": [c.seconds for c in clocks],
        })  # fmt: skip
    return rows


def _turned(values: list[Any], by: int) -> list[Any]:
    """Start with another one each time, so that none is always the first after a pause."""
    by %= len(values)
    return values[by:] + values[:by]


def table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """Some of the fields."""
    return markdown(keys, [[row[k] for k in keys] for row in rows])


def run_fast(works: Sequence[Work], chosen: argparse.Namespace) -> int:
    """Measure `fast` of every task."""
    runs = len(works) * (3 * chosen.repeats + 1)
    steps = (3 * chosen.repeats + 1) * sum(work.steps for work in works)
    print(f"{steps} training steps in {runs} runs", flush=True)
    done, began, load = itertools.count(1), time.monotonic(), os.getloadavg()

    def tell(line: str) -> None:
        print(f"[{next(done)}/{runs}, {time.monotonic() - began:.0f} s] {line}", flush=True)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        for kind in (DYNAMIC, FAST):  # not counted: what is loaded and allocated once
            works[0].run(kind, Path(folder) / "warm", seed=0, steps=min(10, works[0].steps))
        made = [fast(work, chosen, Path(folder), tell) for work in works]
    rows, compiled = [row for each, _ in made for row in each], [told for _, told in made]
    found = {
        "training_steps": steps, "seconds": time.monotonic() - began,
        "load_average": [load, os.getloadavg()],
        "settings": {k: str(v) for k, v in vars(chosen).items()},
        "speed": rows, "compiled": compiled,
    }  # fmt: skip
    keys = ("task", "kind", "steps", "median_seconds", "times_faster", "mean_score")
    save(chosen.json, found, f"{table(rows, keys)}\n\n{table(compiled, list(compiled[0]))}")
    return 0


def main() -> int:
    """Run the benchmark; --quick takes at most 25 minutes on two cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 repetitions, 1280 rows a task")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[str(DATA / "mrpc"), str(DATA / "trec6")])
    parser.add_argument("--model", default="minilm", help="another one to try it out")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--selection", type=int, default=400)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, help="fewer than an epoch, to try it out")
    parser.add_argument("--save-steps", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--save-runs", type=int, help="checkpoints of each training that saves")
    parser.add_argument("--fast", action="store_true", help="only holdfast's faster settings")
    parser.add_argument("--processor-time", action="store_true",
                        help="of --fast on a machine that others use; with one thread")  # fmt: skip
    parser.add_argument("--only-saving", action="store_true", help="not the time of trainings")
    parser.add_argument("--threads", type=int, help="of torch (as many as it takes)")
    chosen = parser.parse_args()
    need_data(*chosen.tasks)
    chosen.repeats = chosen.repeats or (2 if chosen.quick else 5)
    chosen.train_size = chosen.train_size or (1280 if chosen.quick else None)
    chosen.save_runs = chosen.save_runs or (2 if chosen.quick else 5)
    if chosen.processor_time:  # compiling counts where it is waited for
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    quiet()
    works = [Work(path, chosen) for path in chosen.tasks]
    if chosen.fast:
        return run_fast(works, chosen)
    saves = chosen.save_runs * chosen.save_steps
    timed = [] if chosen.only_saving else works
    runs = chosen.repeats * (3 * len(timed) + len(SAVERS))
    steps = chosen.repeats * (3 * sum(w.steps for w in timed) + len(SAVERS) * saves)
    print(f"{steps} training steps in {runs} runs", flush=True)
    done, began = itertools.count(1), time.monotonic()

    def tell(line: str) -> None:
        print(f"[{next(done)}/{runs}, {time.monotonic() - began:.0f} s] {line}", flush=True)

    with tempfile.TemporaryDirectory(dir=".") as folder:
        # A first training, not counted, pays for what is loaded and allocated once.
        works[0].run(DYNAMIC, Path(folder) / "warm", seed=0, steps=min(10, works[0].steps))
        faster = [row for work in timed for row in speed(work, chosen, Path(folder), tell)]
        cost = saving(works[0], chosen, Path(folder), tell)
    found = {
        "training_steps": steps, "seconds": time.monotonic() - began,
        "settings": {k: str(v) for k, v in vars(chosen).items()},
        "speed": faster, "saving": cost,
    }  # fmt: skip
    tables = [
        table(faster, ("task", "kind", "steps", "median_seconds", "times_faster_than_published",
                       "scores", "target", "seconds_to_target")),
        table(cost, ("kind", "checkpoints", "seconds_a_checkpoint",
                     "more_than_trainer_at_100_steps")),
    ]  # fmt: skip
    save(chosen.json, found, "\n\n".join(tables[chosen.only_saving :]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
