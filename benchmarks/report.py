"""What a page of many runs costs: seconds to read the records and to draw them, and bytes.

    python benchmarks/report.py --runs 1000 --json docs/results/report.json

The records are made up: recipes at ten rates over five seeds, three tasks, thirty points of
history each, as `holdfast compare` leaves them. They are written to a folder and read from it as
`holdfast report` does; the page is drawn in the same process, which has imported what it needs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from results import markdown, save

from holdfast.experiments.record import Record
from holdfast.report import find_records, write_report

TASKS = ("inference", "intents", "sentiment")
RATES = tuple(round(1e-5 * 1.6**i, 8) for i in range(10))
SEEDS = range(5)
PARTS = ("embeddings", *(f"layer.{i}" for i in range(12)), "head")


def made(recipe: int, rate: int, seed: int) -> Record:
    """A run of three tasks; recipe 0 is plain."""
    draw = random.Random(f"{recipe} {rate} {seed}")
    new, lost = 0.7 + 0.02 * rate, max(0.02 * rate - 0.005 * recipe, 0.0)

    def score(i: int, j: int) -> float | None:
        return None if j > i else new - lost * (i - j) + draw.gauss(0, 0.01)

    scores = [[score(i, j) for j in range(len(TASKS))] for i in range(len(TASKS))]
    history = [{"learning": i, "step": 100 * i + 10 * k, "epoch": k / 10, "loss": 1 / (k + 1),
                "scores": [score(i, j) for j in range(len(TASKS))]}
               for i in range(len(TASKS)) for k in range(10)]  # fmt: skip
    name = f"recipe-{recipe}" if recipe else "plain"
    methods = {"ewc": {"strength": 10.0}, f"m{recipe}": {}} if recipe else {}
    lr = RATES[rate]
    return Record(
        tasks=[
            {"name": t, "kind": "classification", "metric": "accuracy", "labels": ["no", "yes"],
             "rows": {"train": 1000, "selection": 100, "evaluation": 500}, "constant": 0.5,
             "classes": {"train": [500, 500], "selection": [50, 50], "evaluation": [250, 250]},
             "hash": f"{j:064x}", "evaluation_hash": f"{j:064x}", "source": f"builtin:{t}",
             "synthetic": True, "warnings": []}
            for j, t in enumerate(TASKS)
        ],
        scores=scores,
        selection_scores=scores,
        history=history,
        model={"name": "minilm", "parameters": 22_713_216, "layers": 12, "hash": "0" * 64},
        recipe={"name": name, "methods": methods},
        rates={"order": list(PARTS), "multiplier": [1.0] * len(PARTS)},
        movement={t: {"parts": {p: draw.uniform(0.001, 0.1) for p in PARTS}} for t in TASKS},
        settings={"lr": lr, "epochs": 3, "batch_size": 16, "seed": seed,
                  "out": f"runs/c/{name}-{lr:g}/seed-{seed}"},
        seed=seed,
        command=["holdfast", "compare", "--tasks", *TASKS],
        versions={"python": "3.11"},
        holdfast="0.1.0",
        seconds=[60.0] * len(TASKS),
        steps=[100] * len(TASKS),
        skipped_steps=[0] * len(TASKS),
        methods_state={"ewc": {"bytes": 90_000_000}} if recipe else {},
    )  # fmt: skip


def clocks() -> tuple[float, float]:
    """Seconds that passed, and those that this process worked: other work counts in the first."""
    return time.perf_counter(), time.process_time()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path("report.json"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as made_up:
        folder = Path(made_up)
        for k in range(chosen.runs):
            rest, seed = divmod(k, len(SEEDS))
            recipe, rate = divmod(rest, len(RATES))
            made(recipe, rate, seed).save(folder / str(k) / "record.json")
        write_report([made(0, 0, 0)], folder / "first.html")  # imports what draws
        began = clocks()
        records = find_records([folder])
        read = clocks()
        page = write_report(records, folder / "report.html")
        drawn, size = clocks(), page.stat().st_size
    found: dict[str, float] = {"runs": chosen.runs, "bytes": size}
    for i, of in enumerate(("", " (CPU)")):
        found |= {f"read{of}": read[i] - began[i], f"drawn{of}": drawn[i] - read[i]}
    heads = ["runs", "seconds to read", "of the CPU", "to draw", "of the CPU", "page, MB"]
    told = [chosen.runs, *(found[k] for k in ("read", "read (CPU)", "drawn", "drawn (CPU)"))]
    save(chosen.json, found, markdown(heads, [[*told, size / 1e6]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
