"""What is learned and what is lost: every remedy beside flat learning rates, on pairs and chains.

    python benchmarks/forgetting.py --pairs 10 --seeds 5 --json docs/results/forgetting.json

Real tasks of at most 48 tokens, 800 training rows, 100 steps of 16 a task. All arms of a sequence
and seed start from one checkpoint of the first task, trained once at a flat rate. The JSON also
records progress: the same command runs what it does not hold yet, seed by seed, the most telling
arms first, and may be stopped at any time. Beside it: tables (.md) and a picture (.svg).

Rates and strengths were tuned on the TUNING pairs, by scores on selection rows; the other pairs are
reported, on evaluation rows. `--sequences tuning` runs the former.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from results import DATA, need_data
from torch import nn
from tqdm.auto import tqdm

from holdfast import DPS, EWC, HeadFirst, KfacEWC, LwF, Merge, Recipe, Replay
from holdfast.experiments.learner import unprepare
from holdfast.experiments.processes import end_with_parent
from holdfast.experiments.record import commit, versions
from holdfast.recipe import PRESETS
from holdfast.tasks import Task, load_task

# Chosen before any run: far and near domains, single sentences and pairs, 2 to 14 classes, one
# regression. Those in TUNING serve only for tuning.
TUNING = ["trec6>sst2", "trec6>snli", "snli>sick", "sst2>amazon5", "sick>stsb"]
PAIRS = [
    "sst2>trec6", "sick>snli", "amazon5>sst2", "snli>mnli", "ag_news>dbpedia14", "trec6>stsb",
    "qqp>mrpc", "cola>sst2", "dbpedia14>qqp", "mnli>ag_news",
]  # fmt: skip
CHAINS = ["trec6>snli>sst2>dbpedia14", "sst2>amazon5>cola>sick"]
TEN = ["trec6>sst2>snli>ag_news>stsb>cola>qqp>dbpedia14>sick>amazon5"]
# Single tasks, with 500 training rows.
ALONE = [
    f"{t}@500" for t in ("trec6", "sst2", "snli", "mrpc", "cola", "stsb", "dbpedia14", "amazon5")
]
SIZES = {"train_size": 800, "selection": 200, "evaluation_size": 500}
ROWS, STEPS, LENGTH = 16, 100, 48  # rows a step, steps a task, tokens a row
FIRST = 2e-4  # the rate of the shared first task


def flat(lr: float) -> tuple[Recipe, float]:
    return Recipe(name="plain"), lr


def with_methods(*methods: Any, head_first: bool = True, lr: float = 2e-4) -> tuple[Recipe, float]:
    return Recipe(methods=methods, head_first=HeadFirst() if head_first else None), lr


def preset(name: str, lr: float = 2e-4) -> tuple[Recipe, float]:
    return PRESETS[name](), lr


# Name → recipe and base rate, the most telling first; `joint` trains all tasks at once.
ARMS: dict[str, Callable[[], tuple[Recipe, float]]] = {
    "default": lambda: preset("default"),
    "flat 2e-4": lambda: flat(2e-4),
    "flat 1e-4": lambda: flat(1e-4),
    "joint": lambda: flat(2e-4),
    "flat 4e-4": lambda: flat(4e-4),
    "flat 5e-5": lambda: flat(5e-5),
    "head first + lwf": lambda: with_methods(LwF()),
    "head first + merge": lambda: with_methods(Merge()),
    "head first": lambda: with_methods(),
    "head first + lwf + merge": lambda: with_methods(LwF(), Merge()),
    "head first + lwf + merge, 4e-4": lambda: with_methods(LwF(), Merge(), lr=4e-4),
    "merge": lambda: with_methods(Merge(), head_first=False),
    "lwf": lambda: with_methods(LwF(), head_first=False),
    "flat 2e-5": lambda: flat(2e-5),
    "replay 5%": lambda: with_methods(Replay(), head_first=False),
    "ewc 1e3": lambda: with_methods(EWC(strength=1e3), head_first=False),
    "ewc 1e4": lambda: with_methods(EWC(strength=1e4), head_first=False),
    "ewc 1e5": lambda: with_methods(EWC(strength=1e5), head_first=False),
    "retention": lambda: with_methods(DPS(score="retention", drop=0.9), head_first=False),
    "bertcl": lambda: preset("bertcl"),
    "kl_anchor": lambda: preset("kl_anchor"),
    "gpm": lambda: preset("gpm"),
    "wise": lambda: preset("wise"),
    "kfac_ewc": lambda: preset("kfac_ewc"),
}
MAIN = list(ARMS)[:4]
# Tried on the tuning pairs only; on request.
TRIED: dict[str, Callable[[], tuple[Recipe, float]]] = {
    "kfac_ewc .01": lambda: with_methods(KfacEWC(rows=100)),
    "kfac_ewc .001": lambda: with_methods(KfacEWC(rows=100, strength=1e-3)),
    "kfac_ewc .1": lambda: with_methods(KfacEWC(rows=100, strength=1e-1)),
    "kfac_ewc .003 + merge": lambda: with_methods(KfacEWC(rows=100, strength=3e-3), Merge()),
    "kfac_ewc .01 + merge": lambda: with_methods(KfacEWC(rows=100), Merge()),
    "kfac_ewc .01 + near lwf": lambda: with_methods(KfacEWC(rows=100), LwF(rows="near")),
}
KNOWN = ARMS | TRIED


# --- one run ----------------------------------------------------------------------------------


@cache
def task(name: str, seed: int) -> Task:
    """The task of a name, or of NAME@ROWS with so many training rows."""
    folder, _, rows = name.partition("@")
    sizes = SIZES | ({"train_size": int(rows)} if rows else {})
    return load_task(DATA / folder, seed=seed, **sizes)


class Bench:
    """What the runs of one process share: the tokenizer, encoded rows, the first tasks."""

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

    def train(self, name: str, model: Any, seed: int, recipe: Recipe, lr: float, **how: Any) -> Any:
        from transformers import PrinterCallback, TrainingArguments

        from holdfast import Trainer

        arguments = TrainingArguments(
            output_dir=str(self.home / "unused"), max_steps=STEPS, per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=32, learning_rate=lr, weight_decay=0.01, warmup_steps=0.1,
            bf16=self.bf16, optim="adamw_torch_fused", seed=seed, data_seed=seed, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=self.rows(name, seed, "train"),
            data_collator=self.collate, processing_class=self.tokenizer, recipe=recipe, task=name,
            shared=model.base_model, **how,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    def first(self, name: str, seed: int) -> Path:
        """The checkpoint of a first task, trained plainly once for all arms."""
        folder = self.home / "first" / f"{name}-{seed}"
        if not folder.exists():
            model = self.heads.load_model(self.source, task(name, seed), seed=1000 * seed)
            self.train(name, model, 1000 * seed, Recipe(name="plain"), FIRST).train()
            unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
            unprepare(model)
            model.save_pretrained(unfinished)
            scores = {s: self.scores({name: model}, seed, s) for s in ("evaluation", "selection")}
            (unfinished / "scores.json").write_text(json.dumps(scores))
            with contextlib.suppress(OSError):  # another process was first
                unfinished.rename(folder)
        return folder

    def run(self, names: list[str], seed: int, arm: str) -> dict[str, Any]:
        """All tasks after the first with one arm: scores after each, on both kinds of rows."""
        began = time.monotonic()
        recipe, lr = KNOWN[arm]()
        if len(names) == 1:
            found = self._alone(names[0], seed, recipe, lr)
        elif arm == "joint":
            found = self._joint(names, seed, lr)
        else:
            found = self._sequence(names, seed, recipe, lr)
        return {"sequence": ">".join(names), "seed": seed, "arm": arm, "lr": lr, **found,
                "commit": self.commit, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip

    def _sequence(self, names: list[str], seed: int, recipe: Recipe, lr: float) -> dict[str, Any]:
        from transformers import AutoModelForSequenceClassification

        begun = self.first(names[0], seed)
        one = AutoModelForSequenceClassification.from_pretrained(begun)
        models, bound = {names[0]: one}, recipe.unbound(seed=seed)
        start = json.loads((begun / "scores.json").read_text())
        # Checkpoints differ in their last bits between machines: compare arms from the same one.
        found: dict[str, Any] = {"first": self.hash(str(begun)),
                                 "fit_seconds": [], "end_seconds": [],
                                 "scores": [start["evaluation"]],
                                 "selection": [start["selection"]]}  # fmt: skip
        bound.remember(names[0], one, self._batches(names[0], seed), shared=one.base_model)
        for i, name in enumerate(names[1:], 1):
            model = self.heads.add_head(one, task(name, seed), seed=1000 * seed + i)
            models[name] = model
            trainer = self.train(name, model, 1000 * seed + i, recipe, lr, bound=bound)
            for old in models.values():
                trainer.accelerator.prepare_model(old, evaluation_mode=True)
            trainer.train()
            for each in models.values():
                unprepare(each)
            at = time.monotonic()
            trainer.end_task()
            found["end_seconds"].append(round(time.monotonic() - at, 2))
            found["fit_seconds"].append((bound.fitted or {}).get("seconds", 0.0))
            found["scores"].append(self.scores(models, seed, "evaluation"))
            if ">".join(names) in TUNING:
                found["selection"].append(self.scores(models, seed, "selection"))
        return found

    def _alone(self, name: str, seed: int, recipe: Recipe, lr: float) -> dict[str, Any]:
        """A single task, from the pre-trained weights."""
        model = self.heads.load_model(self.source, task(name, seed), seed=1000 * seed)
        self.train(name, model, 1000 * seed, recipe, lr).train()
        unprepare(model)
        splits = {s: [self.scores({name: model}, seed, s)] for s in ("evaluation", "selection")}
        return {"scores": splits["evaluation"], "selection": splits["selection"]}

    def _batches(self, name: str, seed: int) -> Callable[[], Iterator[Any]]:
        rows = self.rows(name, seed, "train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()

        def batches() -> Iterator[Any]:
            for start in range(0, len(order), 32):
                yield self.collate([rows[i] for i in order[start : start + 32]])

        return batches

    def _joint(self, names: list[str], seed: int, lr: float) -> dict[str, Any]:
        """All tasks' rows trained together, in as many steps as all tasks take one by one."""
        from transformers import get_linear_schedule_with_warmup

        one = self.heads.load_model(self.source, task(names[0], seed), seed=1000 * seed)
        models: dict[str, Any] = {names[0]: one}
        for i, name in enumerate(names[1:], 1):
            models[name] = self.heads.add_head(one, task(name, seed), seed=1000 * seed + i)
        own = nn.ModuleList(models.values())
        groups = Recipe().param_groups(own, lr=lr, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups, fused=True)
        total = STEPS * len(names)
        schedule = get_linear_schedule_with_warmup(optimizer, total // 10, total)
        own.train()
        torch.manual_seed(1000 * seed)
        for name, picked in mixed(names, total, seed):
            batch = self.collate([self.rows(name, seed, "train")[i] for i in picked])
            with self._precision():
                loss = models[name](**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return {"scores": [self.scores(models, seed, "evaluation")], "selection": []}


def mixed(names: list[str], total: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Batches of one task each, tasks and rows in random order: (task, rows)."""
    draw = torch.Generator().manual_seed(seed)
    turns = torch.randperm(total, generator=draw) % len(names)
    left: dict[str, list[int]] = {name: [] for name in names}
    for turn in turns.tolist():
        name = names[turn]
        if len(left[name]) < ROWS:
            left[name] = torch.randperm(SIZES["train_size"], generator=draw).tolist()
        yield name, [left[name].pop() for _ in range(ROWS)]


# --- all runs -----------------------------------------------------------------------------------

BENCH: Bench | None = None


def begin(model: str, home: Path, bf16: bool) -> None:
    global BENCH
    threading.Thread(target=end_with_parent, daemon=True).start()
    BENCH = Bench(model, home, bf16)


def work(names: list[str], seed: int, arm: str | None) -> dict[str, Any] | None:
    assert BENCH is not None
    if arm is None:
        BENCH.first(names[0], seed)
        return None
    return BENCH.run(names, seed, arm)


def main() -> int:
    """Run or resume the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10, help="how many of the reported pairs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sequences", nargs="+", help="tuning, chains, ten, alone, or task>task…")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="main, or names")
    parser.add_argument("--quick", action="store_true", help="2 tuning pairs, main arms, 1 seed")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/forgetting"))
    parser.add_argument(
        "--draw", action="store_true", help="only tables and picture of what is done"
    )
    chosen = parser.parse_args()
    need_data()
    known = {"tuning": TUNING, "chains": CHAINS, "ten": TEN, "alone": ALONE}
    asked = chosen.sequences or [*PAIRS[: chosen.pairs], "chains"]
    arms = MAIN if chosen.arms == ["main"] else chosen.arms
    seeds = list(range(chosen.seeds))
    if chosen.quick:
        asked, arms, seeds = TUNING[:2], MAIN, [0]
    sequences = [s for word in asked for s in known.get(word, [word])]
    if wrong := [a for a in arms if a not in KNOWN]:
        parser.error(f"no arm {wrong[0]!r}; there are {', '.join(KNOWN)}")

    body = json.loads(chosen.json.read_text()) if chosen.json.exists() else {"runs": []}
    done = {(r["sequence"], r["seed"], r["arm"]) for r in body["runs"]}
    jobs = [(s.split(">"), seed, arm) for group in (arms[:4], arms[4:]) for seed in seeds
            for s in sequences for arm in group if (s, seed, arm) not in done]  # fmt: skip
    firsts = dict.fromkeys((n[0], seed) for n, seed, arm in jobs if len(n) > 1 and arm != "joint")
    steps = STEPS * (len(firsts) + sum(len(n) - (a != "joint" and len(n) > 1) for n, _, a in jobs))
    print(f"{len(jobs)} runs of {steps:,} training steps to go, about "
          f"{steps * 0.3 / chosen.workers / 3600:.1f} hours", flush=True)  # fmt: skip
    if jobs and not chosen.draw:
        with ProcessPoolExecutor(
            chosen.workers, get_context("spawn"), initializer=begin,
            initargs=(chosen.model, chosen.runs, not chosen.no_bf16),
        ) as pool:  # fmt: skip
            before = [pool.submit(work, [name], seed, None) for name, seed in firsts]
            after = [pool.submit(work, *job) for job in jobs]
            for future in before:
                future.result()
            for future in tqdm(as_completed(after), total=len(after), unit="run"):
                body["runs"].append(future.result())
                save(chosen.json, body)
    save(chosen.json, body)

    from forgetting_page import draw, tables

    told = tables(body["runs"])
    chosen.json.with_suffix(".md").write_text(f"`{body['command']}`\n\n{told}\n")
    draw(body["runs"], chosen.json.with_suffix(".svg"))
    print(told)
    return 0


def save(path: Path, body: dict[str, Any]) -> None:
    """Write what is done so far: one line a run."""
    words = shlex.join(word for word in sys.argv if word != "--draw")
    body |= {"command": f"python {words}", "versions": versions(),
             "settings": {**SIZES, "rows a step": ROWS, "steps": STEPS, "tokens": LENGTH,
                          "rate of the first task": FIRST}}  # fmt: skip
    runs = sorted(
        body["runs"], key=lambda r: (r["sequence"], r["seed"], list(KNOWN).index(r["arm"]))
    )
    lines = ",\n".join(json.dumps(r) for r in runs)
    rest = json.dumps({k: v for k, v in body.items() if k != "runs"})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f'{rest[:-1]},\n"runs": [\n{lines}\n]}}\n')
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
