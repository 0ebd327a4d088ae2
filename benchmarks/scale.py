"""How the work grows: with the number of weights, tasks, runs or trials.

    python benchmarks/scale.py --quick --json docs/results/scale-quick.json
    python benchmarks/scale.py --of tasks --json docs/results/scale-tasks.json
    python benchmarks/scale.py --of runs --json docs/results/scale-runs.json
    python benchmarks/scale.py --of trials --storage URL --json docs/results/scale-trials.json

**Weights**, from 10 million to a thousand million.
Synthetic float32 tensors, as one large one and as many small ones: summing squares (DPS), adding a
squared gradient to Fisher information, selecting a subnetwork, marking it, zeroing its gradients,
restoring weights. For each the slope of log time over log size (1 is linear) and GB/s beside a
plain copy, measured in the same run. A size that would need more than --memory is left out and
reported. Writes the JSON and beside it the table (.md) and a picture (.png).

For whole models of up to a thousand million weights at the end of a task see `task_end.py`.

**Tasks**: a sequence of 50 small ones of a tiny model; of each the seconds of the processor without
its tests, those of its tests (of all tasks so far, so they grow), and the process's memory.
**Runs**: a grid of 1,000 that train nothing: what leases, records and looking for what is to do
cost a run. **Trials**: a search of 1,000 that train nothing, each with its reports at rungs: how
many are asked and told a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import markdown, save
from torch import Tensor

from holdfast.ops.blocks import add_squares_
from holdfast.ops.masks import hold_, mark_, zero_
from holdfast.ops.selection import select

SIZES = (10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
COLUMNS = {"one large": 1024, "many small": 256}
SMALL = 256 * 256  # entries of a small tensor
NEEDED = 4 + 4 + 1 + 1  # bytes an entry: two tensors, a mask, and what an operation adds
# Bytes that must be read and written per entry; for a selection one read, however many it does.
TRAFFIC = {"copy": 8, "accumulate": 12, "fisher": 12, "select": 4, "mark": 9, "zero": 12,
           "restore": 12}  # fmt: skip


def make(layout: str, count: int, device: str) -> list[Tensor]:
    """Float32 tensors of `count` entries in all (rounded to whole rows), normally distributed."""
    columns = COLUMNS[layout]
    sizes = [count] if layout == "one large" else [SMALL] * (count // SMALL)
    return [torch.empty(max(n // columns, 1), columns, device=device).normal_() for n in sizes]


def operations(
    grads: list[Tensor], sums: list[Tensor], drop: float
) -> dict[str, Callable[[], None]]:
    """The operations to time, in an order in which each finds what it needs."""
    masks: dict[str, Tensor] = {}

    def choose() -> None:
        masks.clear()
        masks.update(select({str(i): s for i, s in enumerate(sums)}, drop))

    def mark() -> None:
        for i, s in enumerate(sums):
            mark_(s, masks[str(i)])

    def copy() -> None:
        for target, source in zip(sums, grads, strict=True):
            target.copy_(source)

    named = [{str(i): t for i, t in enumerate(tensors)} for tensors in (grads, sums)]
    return {
        "copy": copy,
        "accumulate": lambda: add_squares_(sums, grads),
        "fisher": lambda: torch._foreach_addcmul_(sums, grads, grads, value=1 / 512),
        "select": choose,
        "mark": mark,
        "zero": lambda: zero_(*named),
        "restore": lambda: hold_(*named),
    }


def measure(layout: str, count: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each operation, applied once to all tensors."""
    grads = make(layout, count, chosen.device)
    sums = [torch.empty_like(g) for g in grads]
    entries = sum(g.numel() for g in grads)
    repeats = max(3, min(chosen.repeats, math.ceil(chosen.repeats * 10**8 / entries)))
    seconds = {}
    for name, work in operations(grads, sums, 0.3).items():
        if name == "accumulate":
            for s in sums:
                s.zero_()
        taken = []
        for _ in range(repeats + 1):  # the first warms up
            _wait(chosen.device)
            start = time.perf_counter()
            work()
            _wait(chosen.device)
            taken.append(time.perf_counter() - start)
        seconds[name] = statistics.median(taken[1:])
        print(f"{layout}, {entries:,}: {name} {1e3 * seconds[name]:.1f} ms", flush=True)
    return {"layout": layout, "entries": entries, "tensors": len(grads), "repeats": repeats,
            "seconds": seconds}  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def slope(rows: list[dict[str, Any]], name: str) -> float | None:
    """Of log time over log size, by least squares."""
    if len(rows) < 2:
        return None
    x = [math.log(r["entries"]) for r in rows]
    y = [math.log(r["seconds"][name]) for r in rows]
    return statistics.linear_regression(x, y).slope


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds and GB/s by size, and the slope, for each operation."""
    parts = []
    for layout in COLUMNS:
        mine = [r for r in rows if r["layout"] == layout]
        heads = [f"{r['entries'] / 1e6:.0f} M" for r in mine]
        lines = []
        for name, traffic in TRAFFIC.items():
            cells = [
                f"{1e3 * r['seconds'][name]:.1f}, "
                f"{traffic * r['entries'] / r['seconds'][name] / 1e9:.1f}"
                for r in mine
            ]
            found = slope(mine, name)
            lines.append([name, *cells, "" if found is None else f"{found:.2f}"])
        told = markdown(["operation", *heads, "slope"], lines)
        parts.append(f"**{layout}** (milliseconds, GB/s)\n\n{told}")
    return "\n\n".join(parts)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over size, both on log scales."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(10, 4), layout="constrained")
    for axis, layout in zip(axes, COLUMNS, strict=True):
        mine = [r for r in rows if r["layout"] == layout]
        for name in TRAFFIC:
            axis.loglog([r["entries"] for r in mine], [r["seconds"][name] for r in mine], "o-",
                        label=name, color="grey" if name == "copy" else None)  # fmt: skip
        axis.set(title=layout, xlabel="entries", ylabel="seconds")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def available() -> int:
    """Bytes of free memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


# --- tasks, runs, trials --------------------------------------------------------------------------


def rows_of(number: int) -> list[str]:
    """Forty rows of a task: which of two words stands in a row of five."""
    draw = random.Random(number)
    words = ["red", "blue", "warm", "cold", "river", "city", "film", "book"]
    one, two, *rest = draw.sample(words, len(words))
    rows = [(word, [*draw.sample(rest, 4), word]) for word in (one, two) for _ in range(20)]
    return [json.dumps({"text": " ".join(draw.sample(t, 5)), "label": w}) for w, t in rows]


def tasks(count: int, folder: Path, _: str | None) -> dict[str, list[float]]:
    """Of each task: seconds at work without its tests, those of its tests, this process's GiB."""
    from holdfast import run_sequence
    from holdfast.experiments import learner

    found: dict[str, list[float]] = {"processor": [], "its tests": [], "GiB": []}
    evaluate, learn, spent = learner.evaluate, learner.Learner.learn, [0.0]

    def timed(*args: Any) -> float:
        began = time.process_time()
        try:
            return evaluate(*args)
        finally:
            spent[0] += time.process_time() - began

    def noted(self: Any, index: int) -> None:
        began, spent[0] = time.process_time(), 0.0
        learn(self, index)
        found["processor"].append(time.process_time() - began - spent[0])
        found["its tests"].append(spent[0])
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found["GiB"].append(held / 2**30)

    learner.evaluate, learner.Learner.learn = timed, noted  # type: ignore[method-assign]
    for i in range(count):
        (folder / f"t{i}.jsonl").write_text("\n".join(rows_of(i)))
    names = [folder / f"t{i}.jsonl" for i in range(count)]
    run_sequence(str(folder / "tiny"), names, "plain", out=folder / "out", epochs=2.0,
                 batch_size=4, save_steps=0, max_length=16, progress=False)  # fmt: skip
    return found


def nothing(*, out: Path, label: str) -> None:
    """A run that trains nothing."""
    from holdfast.experiments.record import Record
    from holdfast.experiments.runs import RECORD, open_run

    with open_run(out, {"tasks": []}):
        if not (out / RECORD).exists():
            Record(tasks=[{"name": label, "metric": "accuracy"}]).save(out / RECORD)


def runs(count: int, folder: Path, _: str | None) -> dict[str, list[float]]:
    """Seconds, and those of this process at work, of a grid: made by one process, read, by two."""
    from holdfast.experiments.engines import carry_out
    from holdfast.experiments.engines.local import Local

    found: dict[str, list[float]] = {}
    for name, place, workers in (("one process", "a", 1), ("read again", "a", 1),
                                 ("two processes", "b", 2)):  # fmt: skip
        jobs = [{"out": folder / place / str(i), "label": str(i)} for i in range(count)]
        began, worked = time.perf_counter(), time.process_time()
        carry_out(nothing, jobs, Local(workers), where=folder, progress=False)
        found[name] = [time.perf_counter() - began, time.process_time() - worked]
    return found


def trials(count: int, folder: Path, storage: str | None) -> dict[str, list[float]]:
    """Seconds, and those of this process at work, of each trial: asked, told at rungs, ended."""
    from holdfast.search.objective import Scores
    from holdfast.search.plan import Plan
    from holdfast.search.study import Study

    two = ["builtin:inference", "builtin:intents"]
    plan = Plan.make(str(folder / "tiny"), two, trials=count, sampler="random", train_size=100,
                     evaluation_size=100, max_length=16)  # fmt: skip
    study, draw = Study(folder / "out", plan, storage), random.Random(0)
    found: dict[str, list[float]] = {"seconds": [], "processor": []}
    while True:
        began, worked = time.perf_counter(), time.process_time()
        if (claim := study.claim()) is None:
            return found
        if any(claim.report(k, draw.random()) for k in range(1, 2 * len(plan.rungs) + 1)):
            claim.pruned("as told", 1, 0.0)
        else:
            claim.done(Scores(0.5, 0.5, draw.random(), 1, 0.0), [])
        claim.close()
        found["seconds"].append(time.perf_counter() - began)
        found["processor"].append(time.process_time() - worked)


OTHERS = {"tasks": (tasks, 50), "runs": (runs, 1000), "trials": (trials, 1000)}


def told(of: str, count: int, found: dict[str, list[float]]) -> str:
    """Markdown: means over the first tenth, the middle one and the last; of runs the sums."""
    if of == "runs":
        lines = [[name, *(f"{v:.1f}" for v in values), f"{1000 * values[-1] / count:.1f}"]
                 for name, values in found.items()]  # fmt: skip
        return markdown(["", "seconds", "of this process", "its milliseconds a run"], lines)
    tenth = max(1, count // 10)
    lines = [
        [name, *(f"{statistics.fmean(values[at : at + tenth]):.3f}"
                 for at in (0, (count - tenth) // 2, count - tenth))]
        for name, values in found.items()
    ]  # fmt: skip
    return markdown(["", "first tenth", "in the middle", "last tenth"], lines)


def other(chosen: argparse.Namespace) -> int:
    """Measure one of `OTHERS`."""
    from engines import tiny

    measured, usual = OTHERS[chosen.of]
    count, load = chosen.count or usual, [os.getloadavg()]
    torch.set_num_threads(chosen.threads or 1)
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder) / "tiny")
        found = measured(count, Path(folder), chosen.storage)
    load.append(os.getloadavg())
    facts = f"{count} {chosen.of}, load average {load[0][0]:.1f} before, {load[1][0]:.1f} after"
    if chosen.of == "trials":
        kind = (chosen.storage or "sqlite").partition(":")[0]
        facts += f"; {kind}, {count / sum(found['seconds']):.1f} trials a second"
    body = {"of": chosen.of, "count": count, "load_average": load, "found": found}
    save(chosen.json, body, f"{facts}\n\n{told(chosen.of, count, found)}")
    return 0


def main() -> int:
    """Measure every size that fits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES), help="entries")
    parser.add_argument("--memory", type=float, default=15.0, help="at most so many GiB")
    parser.add_argument("--repeats", type=int, help="of up to 100 M entries (5, 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument("--of", choices=["weights", *OTHERS], default="weights")
    parser.add_argument("--count", type=int, help="of tasks (50), runs or trials (1000)")
    parser.add_argument("--storage", help="of a search's trials (a SQLite file)")
    chosen = parser.parse_args()
    if chosen.of != "weights":
        return other(chosen)
    chosen.repeats = chosen.repeats or (5 if chosen.quick else 15)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    print("0 training steps: synthetic tensors", flush=True)
    load, rows, left_out = [os.getloadavg()], [], []
    for size in (int(s) for s in chosen.sizes):
        limit = chosen.memory * 2**30
        if chosen.device == "cpu":
            limit = min(limit, 0.9 * available())
        if size * NEEDED > limit:
            left_out.append(size)
            print(f"{size:,} entries left out: {size * NEEDED / 2**30:.1f} GiB", flush=True)
            continue
        rows += [measure(layout, size, chosen) for layout in COLUMNS]
    load.append(os.getloadavg())
    if not rows:
        print("no size fits", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "load_average": load,
        "peak_bytes": peak,
        "left_out": left_out,
        "slopes": {
            layout: {n: slope([r for r in rows if r["layout"] == layout], n) for n in TRAFFIC}
            for layout in COLUMNS
        },
        "rows": rows,
    }
    facts = (f"{torch.get_num_threads()} threads, load average {load[0][0]:.1f} before, "
             f"{load[1][0]:.1f} after, peak memory {peak / 2**30:.1f} GiB")  # fmt: skip
    if left_out:
        facts += "; left out for memory: " + ", ".join(f"{s:,}" for s in left_out)
    save(chosen.json, found, f"{facts}\n\n{table(rows)}")
    picture(rows, chosen.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
