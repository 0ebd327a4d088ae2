"""What an engine costs a run, how much faster more workers are, and what kills cost.

    python benchmarks/engines.py --json docs/results/engines.json

A grid of short runs (a model of two layers of 32, random weights, a built-in task) by each engine
of `holdfast compare` with 1, 2 and 4 workers: this machine's processes, a Ray of its own, a Ray of
two nodes on this machine, and Slurm's engine with submitit's local executor, which begins a process
for each run. Of each

    first         seconds until the first run begins
    speed-up      beside one worker without an engine
    beside a run  seconds of a worker that are not of a run, by the number of runs

and once more with two workers while processes at work, a node of Ray's and the command itself are
killed (SIGKILL): how many runs are lost, how many were made twice. What is in the JSON is not
measured again, so that each call may measure some engines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from results import markdown, save
from tqdm.auto import tqdm

from holdfast.experiments.engines import Engine, carry_out
from holdfast.experiments.engines.local import Local
from holdfast.experiments.engines.ray import Ray
from holdfast.experiments.engines.slurm import Slurm
from holdfast.experiments.record import Record
from holdfast.experiments.runs import ended
from holdfast.testing.nodes import Nodes

ENGINES = ("local", "ray", "ray on 2 nodes", "slurm")
WORKERS = (1, 2, 4)
SETTINGS = {"train_size": 160, "evaluation_size": 100, "batch_size": 8, "epochs": 2.0,
            "save_steps": 10, "max_length": 16, "progress": False}  # fmt: skip


def tiny(folder: Path) -> None:
    """A model that learns nothing worth knowing, with MiniLM's tokenizer."""
    from transformers import AutoModel

    from holdfast.tasks.kinds.pretrained import load_config, load_tokenizer, locate

    config = load_config(locate("minilm"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64}  # fmt: skip
    for name, size in sizes.items():
        setattr(config, name, size)
    AutoModel.from_config(config).save_pretrained(folder)
    load_tokenizer(locate("minilm")).save_pretrained(folder)


def made(*, out: Path, label: str, model: str, seed: int) -> None:
    """A run; who makes it and when is noted beside it, and once more when it is made."""
    from holdfast import run_sequence

    fresh = not ended(out)
    if fresh:
        out.mkdir(parents=True, exist_ok=True)
        (out / "at-work").write_text(f"{os.getpid()} {time.time()}")
    run_sequence(model, ["builtin:intents"], "plain", seed=seed, out=out, **SETTINGS)  # type: ignore[arg-type]
    if fresh:
        with (out / "made").open("a") as file:
            file.write("x")


def engine_of(name: str, workers: int, address: str | None) -> Engine:
    if name == "local":
        return Local(workers)
    if name == "slurm":
        return Slurm(cluster="local", jobs=workers, time="60")
    return Ray(address=address, jobs=workers, cpus=0.5)


def grid(place: Path, name: str, workers: int, runs: int, address: str | None) -> None:
    """What the command does: all runs of a grid, by an engine."""
    torch.set_num_threads(1)
    todo = [{"out": place / str(seed), "label": str(seed), "model": str(place.parent / "tiny"),
             "seed": seed} for seed in range(runs)]  # fmt: skip
    carry_out(made, todo, engine_of(name, workers, address), where=place, progress=False)


class Grid:
    """A command at work, from outside."""

    def __init__(self, place: Path, name: str, workers: int, runs: int, nodes: Nodes | None):
        self.place, self.runs, self.nodes = place, runs, nodes
        asked = [str(place), name, str(workers), str(runs), *([nodes.address] if nodes else [])]
        self.words = [sys.executable, __file__, "--grid", *asked]
        place.mkdir(exist_ok=True)

    def begin(self) -> subprocess.Popen[bytes]:
        env = self.nodes.env if self.nodes else dict(os.environ)
        return subprocess.Popen(self.words, env=env | {"OMP_NUM_THREADS": "1"})

    def done(self) -> int:
        return sum(ended(self.place / str(i)) for i in range(self.runs))

    def at_work(self) -> list[int]:
        """The processes of runs that are not over."""
        found = []
        for path in self.place.glob("*/at-work"):
            with suppress(OSError, ValueError):
                if not ended(path.parent):
                    found.append(int(path.read_text().split()[0]))
        return found

    def told(self) -> dict[str, int]:
        each = [len(path.read_text()) for path in self.place.glob("*/made")]
        return {"lost": self.runs - self.done(), "twice": sum(n > 1 for n in each)}


def measured(grid: Grid, workers: int) -> dict[str, Any]:
    """A grid that is left alone."""
    began, wall = time.perf_counter(), time.time()
    if code := grid.begin().wait():
        sys.exit(f"{grid.words[3:]} ended with {code}")
    seconds = time.perf_counter() - began
    first = min(float(p.read_text().split()[1]) for p in grid.place.glob("*/at-work")) - wall
    busy = sum(sum(s or 0 for s in Record.load(grid.place / str(i)).seconds)
               for i in range(grid.runs))  # fmt: skip
    return {"seconds": seconds, "first": first, "busy": busy,
            "beside": (workers * (seconds - first) - busy) / grid.runs, **grid.told()}  # fmt: skip


def killed(grid: Grid, kills: int) -> dict[str, Any]:
    """A grid of which `kills` processes, then a node, then the command are killed."""
    draw, began, process = random.Random(5), time.perf_counter(), grid.begin()
    told = {"workers": 0, "nodes": 0, "commands": 0}
    waves = ["workers"] * kills + ["nodes"] * (grid.nodes is not None) + ["commands"]
    for i, what in enumerate(waves, 1):
        while grid.done() < i * grid.runs // (len(waves) + 1) and process.poll() is None:
            time.sleep(0.1)
        while what == "workers" and told["workers"] < i and process.poll() is None:
            if pids := grid.at_work():
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    told["workers"] += 1
        if what == "nodes" and grid.nodes:
            grid.nodes.kill(grid.nodes.far)
            told["nodes"] += 1
        if what == "commands" and process.poll() is None:
            process.kill()
            process.wait()
            told["commands"] += 1
            process = grid.begin()
    if code := process.wait():
        sys.exit(f"{grid.words[3:]} ended with {code} after {told}")
    return {"seconds": time.perf_counter() - began, "killed": told, **grid.told()}


def table(body: dict[str, Any]) -> str:
    rows, harmed = body["rows"], body["harmed"]
    alone = next((r["seconds"] for r in rows if (r["engine"], r["workers"]) == ("local", 1)), None)
    lines = [[r["engine"], r["workers"], f"{r['seconds']:.0f}", f"{r['first']:.1f}",
              "–" if alone is None else f"{alone / r['seconds']:.2f}", f"{r['beside']:.1f}",
              f"{r['load'][0]:.1f}", f"{r['lost']}, {r['twice']}"] for r in rows]  # fmt: skip
    text = markdown(["engine", "workers", "seconds", "first", "speed-up", "beside a run",
                     "load before", "lost, twice"], lines)  # fmt: skip
    told = [[r["engine"], *r["killed"].values(), f"{r['seconds']:.0f}",
             f"{r['lost']}, {r['twice']}"] for r in harmed]  # fmt: skip
    return text + "\n\n" + markdown(["engine, 2 workers", "processes killed", "nodes", "commands",
                                     "seconds", "lost, twice"], told)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--workers", nargs="+", type=int, default=WORKERS)
    parser.add_argument("--kills", type=int, default=2, help="of processes at work")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no node of Ray's is left behind
    kept = json.loads(chosen.json.read_text()) if chosen.json.is_file() else {}
    body: dict[str, Any] = {k: kept.get(k, []) for k in ("rows", "harmed")}
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder) / "tiny")
        for name in chosen.engines:
            nodes = Nodes(Path(folder)) if name == "ray on 2 nodes" else None
            try:
                for workers in (*chosen.workers, 0):
                    kind = "rows" if workers else "harmed"
                    key = {"engine": name, "workers": workers or 2, "runs": chosen.runs}
                    if any(key.items() <= row.items() for row in body[kind]):
                        continue
                    load, place = os.getloadavg(), Path(folder) / f"{name} {workers}"
                    work = Grid(place, name, workers or 2, chosen.runs, nodes)
                    found = measured(work, workers) if workers else killed(work, chosen.kills)
                    body[kind].append({**key, **found, "load": load})
                    tqdm.write(f"{key} {found}")
                    save(chosen.json, body, about(chosen, body))
            finally:
                if nodes:
                    nodes.end()
    return 0


def about(chosen: argparse.Namespace, body: dict[str, Any]) -> str:
    return f"{chosen.runs} runs, {os.cpu_count()} cores shared with other work\n\n{table(body)}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grid"]:
        _, _, home, engine, width, count, *at = sys.argv
        grid(Path(home), engine, int(width), int(count), at[0] if at else None)
        sys.exit(0)
    sys.exit(main())
