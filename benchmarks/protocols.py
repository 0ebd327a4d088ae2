"""A published protocol as it can be run here, with a head for each task and with one for all.

    python benchmarks/protocols.py --seeds 5 --json docs/results/protocols.json

The standard orders 1 to 3 with the tasks in ../shared/data, by the harness itself: `Protocol.plan`
and `run_sequence`. All arms of an order and seed go on from one run of its first task, trained once
at a flat rate. The JSON also records progress: the same command runs what it does not hold yet,
seed by seed, the most telling arms first, and may be stopped at any time. Beside it: tables (.md),
with what differs from what was published, and a picture (.svg) for each scenario.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import forgetting_page
from bench import Bench, Run, carry_out, done, options, save, show
from forgetting import ARMS as KNOWN
from forgetting import FIRST
from results import DATA, markdown, need_data

from holdfast import Recipe, run_sequence
from holdfast.errors import Busy
from holdfast.experiments.record import Record
from holdfast.tasks.protocol import Plan, Protocol
from holdfast.tasks.spec import parse

ORDERS = ("standard-1", "standard-2", "standard-3")
HEADS = ("task", "shared")  # task- and class-incremental
# Of benchmarks/forgetting.py, where rates and strengths were tuned; the most telling first.
ARMS = ("default", "flat 2e-4", "flat 1e-4", "flat 4e-4", "flat 5e-5", "flat 2e-5", "replay 5%",
        "ewc 1e4", "merge", "lwf")  # fmt: skip
PER_CLASS = 100  # a tenth of the published rows, and twice their passes
SETTINGS: dict[str, Any] = {"epochs": 2.0, "batch_size": 16, "max_length": 64,
                            "evaluation_size": 300, "selection": 200}  # fmt: skip


@cache
def plan(order: str) -> Plan:
    """The order with the rows that there are; its record says what differs."""
    found = Protocol.named(order)
    line = f"per_class {PER_CLASS} was asked for; the protocol has per_class {found.per_class}"
    found = found.model_copy(update={"per_class": PER_CLASS, "differs": [*found.differs, line]})
    return found.plan(order, SETTINGS, data=DATA)


def tasks(order: str) -> list[str]:
    """The specs of its tasks."""
    (found,) = plan(order).sequences.values()
    return found


class Protocols(Bench):
    """Runs of one order; those of one first task go on from one run of it."""

    def work(self, job: Sequence[Any]) -> Run | None:
        order, head, seed, arm = job
        first = self.first(order, seed)
        if arm is None:
            return None
        began = time.monotonic()
        out = self.home / f"{order}-{head}-{seed}-{arm.replace(' ', '-')}"
        made = self.learn(None, tasks(order)[1:], *KNOWN[arm](), seed, out, head, from_run=first)
        shutil.rmtree(out)
        return {"sequence": ">".join(made.names), "order": order, "head": head, "seed": seed,
                "arm": arm, "scores": [row[: i + 1] for i, row in enumerate(made.scores)],
                "commit": self.commit, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip

    def first(self, order: str, seed: int) -> Path:
        """A finished run of an order's first task."""
        spec = tasks(order)[0]
        out = self.home / "first" / f"{Path(parse(spec).place).name}-{seed}"
        while True:
            try:
                self.learn(self.source, [spec], Recipe(name="plain"), FIRST, seed, out, "task")
                return out
            except Busy:  # another process is at it
                time.sleep(1)

    def learn(self, model: str | None, specs: list[str], recipe: Recipe, lr: float, seed: int,
              out: Path, head: str, **more: Any) -> Record:  # fmt: skip
        return run_sequence(
            model, specs, recipe, seed=seed, out=out, progress=False, bf16=self.bf16,
            bf16_eval=self.bf16, save_steps=0, **{**SETTINGS, "head": head, "lr": lr}, **more,
        )  # fmt: skip


def tables(runs: Sequence[Run]) -> str:
    """Each scenario by itself; then what an arm takes, what was published, and what differs."""
    parts = []
    for head in HEADS:
        if some := [run for run in runs if run["head"] == head]:
            parts.append(f"# --head {head}\n\n{forgetting_page.tables(some)}")
    rows = [
        [arm, f"{statistics.fmean(some):.0f}"]
        for arm in ARMS
        if (some := [run["seconds"] for run in runs if run["arm"] == arm])
    ]
    parts.append(f"# Seconds a run, without its first task\n\n{markdown(['arm', 'mean'], rows)}")
    told = [plan(o).of(name) for o in ORDERS for name in plan(o).sequences]
    cited = [
        [t["name"], method, f"{value:.1f}", c["model"], c["source"]]
        for t in told
        for c in t["cited"]
        for method, value in c["averages"].items()
    ]
    lines = dict.fromkeys(line for t in told for key in ("differs", "caveats") for line in t[key])
    parts.append(
        "# Published, and why it may not compare\n\n"
        + markdown(["order", "method", "average at the end, %", "model", "source"], cited)
        + "\n\n"
        + "\n".join(f"* {line}" for line in lines)
    )
    return "\n\n".join(parts)


def draw(runs: Sequence[Run], path: Path) -> None:
    """A picture for each scenario, whose scores do not compare."""
    for head in HEADS:
        some = [run for run in runs if run["head"] == head]
        forgetting_page.draw(some, path.with_name(f"{path.stem}-{head}.svg"))


def main() -> int:
    """Run or resume the benchmark."""
    parser = options(__doc__.split("\n")[0], "runs/protocols")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orders", nargs="+", default=ORDERS, choices=ORDERS)
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, metavar="ARM")
    parser.add_argument("--quick", action="store_true", help="an order, 3 arms, 1 seed")
    chosen = parser.parse_args()
    need_data()
    if chosen.quick:
        chosen.orders, chosen.arms, chosen.seeds = ORDERS[:1], ARMS[:3], 1
    body = done(chosen.json)
    have = {(r["order"], r["head"], r["seed"], r["arm"]) for r in body["runs"]}
    jobs = [(order, head, seed, arm) for some in (chosen.arms[:4], chosen.arms[4:])
            for seed in range(chosen.seeds) for order in chosen.orders for head in chosen.heads
            for arm in some if (order, head, seed, arm) not in have]  # fmt: skip
    # Orders that begin with one task share its run.
    begun = {(tasks(o)[0], seed): (o, None, seed, None) for o, _, seed, _ in jobs}
    print(f"{len(jobs)} runs to go, of 3 tasks each, and {len(begun)} of first tasks", flush=True)

    def write(run: Run | None = None) -> None:
        body["runs"] += [run] if run else []
        save(chosen.json, body, _order, {**SETTINGS, "per_class": PER_CLASS, "first": FIRST})

    if jobs and not chosen.draw:
        carry_out(Protocols, chosen, jobs, keep=write, first=list(begun.values()))
    write()
    show(chosen.json, body, tables, draw)
    return 0


def _order(run: Run) -> tuple[str, str, int, int]:
    return run["order"], run["head"], run["seed"], ARMS.index(run["arm"])


if __name__ == "__main__":
    sys.exit(main())
