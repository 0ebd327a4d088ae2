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

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import LENGTH, ROWS, SIZES, Bench, Run, carry_out, done, options, save, show, task
from results import DATA, need_data
from torch import nn

from holdfast import (
    DPS,
    EWC,
    PEFT,
    Dropout,
    HeadFirst,
    HeadLast,
    KfacEWC,
    LwF,
    Merge,
    Recipe,
    Replay,
)
from holdfast.experiments.learner import unprepare
from holdfast.recipe import PRESETS

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
STEPS = 100  # of a task
FIRST = 2e-4  # the rate of the shared first task
PROBED = 2e-4  # the rate of a probe


def flat(lr: float) -> tuple[Recipe, float]:
    return Recipe(name="plain"), lr


def with_methods(*methods: Any, head_first: bool = True, lr: float = 2e-4) -> tuple[Recipe, float]:
    return Recipe(methods=methods, head_first=HeadFirst() if head_first else None), lr


def last(name: str = "plain", *, lr: float = 2e-4) -> tuple[Recipe, float]:
    """A preset with the head fitted last."""
    return replace(PRESETS[name](), head_last=HeadLast(), name="head last"), lr


def preset(name: str, lr: float = 2e-4) -> tuple[Recipe, float]:
    return PRESETS[name](), lr


def adapted(kind: str, lr: float = 1e-3, **settings: Any) -> tuple[Recipe, float]:
    """One of PEFT's methods, at the larger rate that few weights take."""
    return Recipe(peft=PEFT(kind, **settings)), lr


# Name → recipe and base rate, the most telling first; `joint` trains all tasks at once.
ARMS: dict[str, Callable[[], tuple[Recipe, float]]] = {
    "default": lambda: preset("default"),
    "flat 2e-4": lambda: flat(2e-4),
    "flat 1e-4": lambda: flat(1e-4),
    "joint": lambda: flat(2e-4),
    "flat 2e-4 + head last": last,
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
    "lora": lambda: adapted("lora", r=8, lora_alpha=16, target_modules="all-linear"),
    "osf": lambda: adapted("osf"),
    "mofo": lambda: preset("mofo"),
    "hft": lambda: preset("hft"),
    "recadam": lambda: preset("recadam"),
    "mixout": lambda: preset("mixout"),
    "dynamic_subset": lambda: preset("dynamic_subset", 1e-3),
    "from probe": lambda: flat(PROBED),
    "flat 2e-4, like lengths": lambda: flat(2e-4),
    "flat 2e-4 without dropout": lambda: with_methods(Dropout(), head_first=False),
    # As it was before it ended at the mean of the last steps' weights.
    "default without swa": lambda: with_methods(Dropout(), Merge(), LwF(rows="near", strength=1.5)),
    "default with dropout": lambda: with_methods(Merge(), LwF(rows="near", strength=1.5)),
}
MAIN = list(ARMS)[:4]
# Tried on the tuning pairs only; on request.
TRIED: dict[str, Callable[[], tuple[Recipe, float]]] = {
    "default + head last": lambda: last("default"),
    "default, C .1": lambda: (
        replace(PRESETS["default"](), head_first=HeadFirst(inverse_decay=0.1), name="C .1"),
        2e-4,
    ),
    "kfac_ewc .01": lambda: with_methods(KfacEWC(rows=100)),
    "kfac_ewc .001": lambda: with_methods(KfacEWC(rows=100, strength=1e-3)),
    "kfac_ewc .1": lambda: with_methods(KfacEWC(rows=100, strength=1e-1)),
    "kfac_ewc .003 + merge": lambda: with_methods(KfacEWC(rows=100, strength=3e-3), Merge()),
    "kfac_ewc .01 + merge": lambda: with_methods(KfacEWC(rows=100), Merge()),
    "kfac_ewc .01 + near lwf": lambda: with_methods(KfacEWC(rows=100), LwF(rows="near")),
}
KNOWN = ARMS | TRIED


# --- one run ----------------------------------------------------------------------------------


class Forgetting(Bench):
    """Runs of a sequence; those of one first task begin with one checkpoint of it."""

    def work(self, job: Sequence[Any]) -> Run | None:
        names, seed, arm = job
        if arm is None:
            self.first(names[0], seed)
            return None
        return self.run(names, seed, arm)

    def first(self, name: str, seed: int) -> Path:
        """The checkpoint of a first task, trained plainly once for all arms."""
        folder = self.home / "first" / f"{name}-{seed}"
        if not folder.exists():
            model = self.heads.load_model(self.source, task(name, seed), seed=1000 * seed)
            self.train(name, model, 1000 * seed, Recipe(name="plain"), FIRST,
                       steps=STEPS).train()  # fmt: skip
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
        if arm == "from probe" and len(names) > 1:
            recipe, lr = self._probed(names, seed, lr)
        if len(names) == 1:
            _, found = self.alone(names[0], seed, recipe, lr, steps=STEPS)
        elif arm == "joint":
            found = self._joint(names, seed, lr)
        else:
            like = {"train_sampling_strategy": "group_by_length"} if "like" in arm else {}
            found = self._sequence(names, seed, recipe, lr, like)
        return {"sequence": ">".join(names), "seed": seed, "arm": arm, "lr": lr, **found,
                "commit": self.commit, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip

    def _probed(self, names: list[str], seed: int, lr: float) -> tuple[Recipe, float]:
        """Rates by a probe of the second task, which later ones of a chain take too."""
        from holdfast.search.from_probe import rates_from_probe

        with tempfile.TemporaryDirectory(dir=self.home) as folder:
            begun = shutil.copytree(self.first(names[0], seed), Path(folder) / "first")
            self.tokenizer.save_pretrained(begun)
            rates = rates_from_probe(
                None, [DATA / names[1]], "plain", from_run=begun, old_task=DATA / names[0],
                out=Path(folder) / "rates", seed=seed, lr=lr, batch_size=ROWS, max_length=LENGTH,
                epochs=STEPS * ROWS / SIZES["train_size"], bf16=self.bf16, **SIZES,
            )  # fmt: skip
        return Recipe(rates=rates, name="from probe"), rates.geometric_mean_rate or lr

    def _sequence(
        self, names: list[str], seed: int, recipe: Recipe, lr: float, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        from transformers import AutoModelForSequenceClassification

        begun = self.first(names[0], seed)
        one = AutoModelForSequenceClassification.from_pretrained(begun)
        torch.manual_seed(1000 * seed)
        models, bound = {names[0]: recipe.prepare(one)}, recipe.unbound(seed=seed)
        start = json.loads((begun / "scores.json").read_text())
        # Checkpoints differ in their last bits between machines: compare arms from the same one.
        found: dict[str, Any] = {"first": self.hash(str(begun)),
                                 "fit_seconds": [], "end_seconds": [],
                                 "scores": [start["evaluation"]],
                                 "selection": [start["selection"]]}  # fmt: skip
        bound.remember(names[0], one, self.batches(names[0], seed), shared=one.base_model)
        for i, name in enumerate(names[1:], 1):
            model = self.heads.add_head(one, task(name, seed), seed=1000 * seed + i)
            models[name] = model
            trainer = self.train(name, model, 1000 * seed + i, recipe, lr, steps=STEPS,
                                 bound=bound, arguments=arguments)  # fmt: skip
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


def main() -> int:
    """Run or resume the benchmark."""
    parser = options(__doc__.split("\n")[0], "runs/forgetting")
    parser.add_argument("--pairs", type=int, default=10, help="how many of the reported pairs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sequences", nargs="+", help="tuning, chains, ten, alone, or task>task…")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="main, or names")
    parser.add_argument("--quick", action="store_true", help="2 tuning pairs, main arms, 1 seed")
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

    body = done(chosen.json)
    have = {(r["sequence"], r["seed"], r["arm"]) for r in body["runs"]}
    jobs = [(s.split(">"), seed, arm) for group in (arms[:4], arms[4:]) for seed in seeds
            for s in sequences for arm in group if (s, seed, arm) not in have]  # fmt: skip
    firsts = dict.fromkeys((n[0], seed) for n, seed, arm in jobs if len(n) > 1 and arm != "joint")
    steps = STEPS * (len(firsts) + sum(len(n) - (a != "joint" and len(n) > 1) for n, _, a in jobs))
    print(f"{len(jobs)} runs of {steps:,} training steps to go, about "
          f"{steps * 0.3 / chosen.workers / 3600:.1f} hours", flush=True)  # fmt: skip
    settings = {**SIZES, "rows a step": ROWS, "steps": STEPS, "tokens": LENGTH,
                "rate of the first task": FIRST}  # fmt: skip

    def write(run: Run | None = None) -> None:
        body["runs"] += [run] if run else []
        save(chosen.json, body, _order, settings)

    if jobs and not chosen.draw:
        carry_out(Forgetting, chosen, jobs, keep=write,
                  first=[([name], seed, None) for name, seed in firsts])  # fmt: skip
    write()

    from forgetting_page import draw, tables

    show(chosen.json, body, tables, draw)
    return 0


def _order(run: Run) -> tuple[str, int, int]:
    return run["sequence"], run["seed"], list(KNOWN).index(run["arm"])


if __name__ == "__main__":
    sys.exit(main())
