"""Few rows: every method beside plain fine-tuning at the best of five rates, over many seeds.

    python benchmarks/low_resource.py --seeds 10 --json docs/results/low-resource.json

Six tasks with 300 rows (100 steps of 16) and 1,000 (190 steps), and, as in the DPS paper, SNLI and
MNLI with 500 and 1,000 rows, tested on SICK, HANS and RTE too (`--tasks domain`). Every arm has a
short list of rates; the one with the best mean score on selection rows, over the seeds, is reported
on evaluation rows, a task and size at a time. The JSON also records progress: the same command runs
what it does not hold yet, seed by seed. Beside it: tables (.md) and a picture (.svg).

A run has failed where its score is no better than that of one answer for all rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import LENGTH, ROWS, SIZES, Bench, Run, carry_out, done, options, save, show, task
from results import need_data
from torch import nn

from holdfast import PEFT, Recipe
from holdfast.experiments.elsewhere import answer_ids, score_elsewhere
from holdfast.experiments.sequence import describe
from holdfast.methods import METHODS
from holdfast.tasks.protocol import Protocol

GLUE = ("mrpc", "rte", "cola", "stsb", "trec6", "sst2")
STEPS = {300: 100, 500: 100, 1000: 190}  # by training rows: about 5 and 3 epochs
DOMAIN = ("snli", "mnli")  # trained on one, tested on others
TESTS = Protocol.named("out-of-domain").tests
ELSEWHERE = {"sick": TESTS["sick"], "hans_regenerated": TESTS["hans"], "rte": TESTS["rte"]}
FLAT = (1e-4, 2e-4, 5e-5, 4e-4, 2e-5)
FEW = (1e-4, 2e-4)  # of methods that train most weights
SMALL = (1e-3, 2e-3)  # of methods that train few: a rate of their own


@dataclass(frozen=True)
class Arm:
    """A recipe and the rates it is tried at."""

    recipe: Callable[[], Recipe]
    rates: Sequence[float] = FEW
    dropout: bool = True


def _method(name: str, **settings: Any) -> Callable[[], Recipe]:
    return lambda: Recipe(methods=[METHODS[name](**settings)])


def _peft(kind: str, **settings: Any) -> Callable[[], Recipe]:
    return lambda: Recipe(peft=PEFT(kind, **settings))


# The most telling first.
ARMS: dict[str, Arm] = {
    "plain": Arm(Recipe, FLAT),
    "plain, no dropout": Arm(Recipe, FLAT, dropout=False),
    "head first": Arm(lambda: Recipe.named("head_first")),
    "dps": Arm(_method("dps")),
    "dps mix": Arm(_method("dps", mix=True)),
    "l2sp": Arm(_method("l2sp")),
    "mixout": Arm(_method("mixout")),
    "r3f": Arm(_method("r3f")),
    "bitfit": Arm(_method("bitfit"), SMALL),
    "sift": Arm(_method("sift", share=0.05), SMALL),
    "sift, random mask": Arm(_method("sift", share=0.05, score="random"), SMALL),
    "child_tuning D": Arm(_method("child_tuning")),
    "child_tuning F": Arm(_method("child_tuning", score="random")),
    "recadam": Arm(_method("recadam")),
    "reinit": Arm(_method("reinit")),
    "lora": Arm(_peft("lora", r=8, lora_alpha=16, target_modules="all-linear"), SMALL),
    "ia3": Arm(_peft("ia3"), SMALL),
    "mofo": Arm(_method("mofo")),
    "lisa": Arm(_method("lisa")),
    "hft": Arm(_method("hft")),
    "dynamic_subset": Arm(_method("dynamic_subset", share=0.05), SMALL),
    "lnsr": Arm(_method("lnsr")),
    "smart": Arm(_method("smart")),
    "sam": Arm(_method("sam")),
    "extrapolation": Arm(_method("extrapolation")),
    "head first, no dropout": Arm(lambda: Recipe.named("head_first"), dropout=False),
}


class LowResource(Bench):
    """Runs of one task."""

    def work(self, job: Sequence[Any]) -> Run:
        name, seed, arm, lr = job
        began, made = time.monotonic(), ARMS[arm]
        folder, rows = name.split("@")
        model, found = self.alone(name, seed, made.recipe(), lr, steps=STEPS[int(rows)],
                                  change=None if made.dropout else undropped)  # fmt: skip
        seconds = round(time.monotonic() - began, 1)
        if folder in DOMAIN:
            found["elsewhere"] = {o: self.elsewhere(model, name, o, seed) for o in ELSEWHERE}
        return {"task": name, "seed": seed, "arm": arm, "lr": lr, "score": found["scores"][0][0],
                "selection": found["selection"][0][0],
                "constant": describe(task(name, seed))["constant"],
                **{k: found[k] for k in found.keys() & {"elsewhere"}},
                "commit": self.commit, "seconds": seconds}  # fmt: skip

    def elsewhere(self, model: nn.Module, name: str, other: str, seed: int) -> float:
        """Accuracy on the evaluation rows of another task of entailment."""
        tested = task(other, seed)
        ids = answer_ids(task(name, seed), tested, ELSEWHERE[other])
        with self._precision():
            rows = self.rows(other, seed, "evaluation")
            return score_elsewhere(model, rows, tested, ids, self.collate)


def undropped(model: nn.Module) -> None:
    """Switch dropout off for good."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def main() -> int:
    """Run or resume the benchmark."""
    parser = options(__doc__.split("\n")[0], "runs/low-resource")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 1000], choices=[300, 1000])
    parser.add_argument("--tasks", nargs="+", default=[*GLUE, "domain"], help="domain, or names")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--quick", action="store_true", help="300 rows, 2 tasks, 3 arms, 1 seed")
    chosen = parser.parse_args()
    need_data()
    if chosen.quick:
        chosen.sizes, chosen.tasks, chosen.seeds = [300], ["trec6", "rte"], 1
        chosen.arms = ["plain", "head first", "dps"]
    names = [f"{t}@{n}" for n in chosen.sizes for t in chosen.tasks if t != "domain"]
    if "domain" in chosen.tasks:
        names += [f"{t}@{n}" for n in (500, 1000) for t in DOMAIN]
    body = done(chosen.json)
    have = {(r["task"], r["seed"], r["arm"], r["lr"]) for r in body["runs"]}
    jobs = [(n, seed, arm, lr) for seed in range(chosen.seeds) for arm in chosen.arms for n in names
            for lr in ARMS[arm].rates if (n, seed, arm, lr) not in have]  # fmt: skip
    steps = sum(STEPS[int(job[0].split("@")[1])] for job in jobs)
    print(f"{len(jobs)} runs of {steps:,} training steps to go, about "
          f"{steps * 0.3 / chosen.workers / 3600:.1f} hours", flush=True)  # fmt: skip
    settings = {**SIZES, "train_size": "by task", "rows a step": ROWS, "steps": STEPS,
                "tokens": LENGTH}  # fmt: skip

    def write(run: Run | None = None) -> None:
        body["runs"] += [run] if run else []
        save(chosen.json, body, _order, settings)

    if jobs and not chosen.draw:
        carry_out(LowResource, chosen, jobs, keep=write)
    write()

    from low_resource_page import draw, tables

    show(chosen.json, body, tables, draw)
    return 0


def _order(run: Run) -> tuple[str, int, int, float]:
    return run["task"], run["seed"], list(ARMS).index(run["arm"]), run["lr"]


if __name__ == "__main__":
    sys.exit(main())
