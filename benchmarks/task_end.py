"""What merging costs beside training: the end of a task and the pass before it, in seconds and GiB.

    python benchmarks/task_end.py --quick --json task-end.json
    python benchmarks/task_end.py --models bert-large --lengths 32 --json task-end.json

A model learns a second task by --recipe (`default`, or lwf_merge, merge …), on the CPU.
Rows are random tokens without padding; weights are random except MiniLM's. Measured are

    a step        plain training of --batch rows, nothing of ours in it
    before        one pass over the task's rows: their features, the old head's answers, the fit of
                  the head. Larger models read fewer rows; seconds are given for 1,000
    the end       of a task: for Merge's 100 rows the forward passes, Gram products and solves
                  (including products with the change of weights); LwF's pass over its rows, in
                  which it measures how near they are; and the rest, mostly copying

the last two also in steps, and as a share of a task of 3 epochs of 1,000 rows. Memory is the peak
above the model's own weights: methods' state and temporaries. The optimizer holds none here, and
the start weights are read from a file, tensor by tensor, as they would be from a checkpoint.
"layer" compares the structures of one wide layer's Gram matrix.

What is in the JSON is not measured again, so that each call may measure one model and length.
Beside it the tables (.md). Linux only, because of the memory peaks.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sklearn.linear_model  # noqa: F401  what fits the head: importing it is no part of a task
import torch
from results import markdown, save
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import holdfast.engine.bound
from holdfast.engine.head_first import Head
from holdfast.methods import LwF, Merge
from holdfast.network.layers import Layer
from holdfast.ops.moments import Blocks, LowRank
from holdfast.recipe import PRESETS
from holdfast.tasks.kinds.pretrained import locate, quiet

ROWS, EPOCHS = 1000, 3  # of the task that shares are of
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model, and how much of it is measured."""

    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "bert"
    optimizer: str = "AdamW"
    before: int = ROWS  # rows that are read before a task
    steps: int = 10
    repeats: int = 3  # of a task


SHAPES = {
    "minilm": Shape(kind="", steps=20),
    "bert-base": Shape(before=400),
    "bert-large": Shape(
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096},
        before=200, steps=4, repeats=1,
    ),
    # As Llama 3.2 of 1 B, 1.24 B weights; AdamW's moments would take 9.2 GiB more.
    "llama-1b": Shape(
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128_256,
         "pad_token_id": 0},
        "llama", "SGD", before=32, steps=2, repeats=1,
    ),
}  # fmt: skip


def make_model(shape: Shape) -> Any:
    """A classifier of two classes in training mode."""
    import transformers

    kind = transformers.AutoModelForSequenceClassification
    if shape.kind:
        config = transformers.AutoConfig.for_model(shape.kind, **shape.config)
        return kind.from_config(config, dtype=torch.float32).train()
    return kind.from_pretrained(locate("minilm"), dtype=torch.float32).train()


def make_rows(model: Any, rows: int, length: int, batch: int) -> list[dict[str, Tensor]]:
    """Random tokens without padding, labels of two kinds."""
    ids = torch.randint(1000, model.config.vocab_size, (rows, length))
    return [{"input_ids": b, "attention_mask": torch.ones_like(b), "labels": b[:, 0] % 2}
            for b in ids.split(batch)]  # fmt: skip


class Stored(Mapping[str, Tensor]):
    """Weights in a file, each read on access."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        self.path, self.names = path, list(weights)
        save_file({n: w.detach().contiguous() for n, w in weights.items()}, path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# --- clocks ---------------------------------------------------------------------------------------


def status(name: str) -> int:
    """Bytes of this process by the kernel's account: VmRSS held now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(s.split()[1]) for s in lines if s.startswith(f"{name}:"))


def tidy() -> int:
    """Free unused memory and reset the peak; returns the bytes that are held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


CLOCKS = {
    "measure": [(holdfast.engine.passes, "measure")],
    "products": [(kind, name) for kind in (Blocks, LowRank) for name in ("see_", "close_")]
    + [(Layer, "inputs")],
    "solves": [(Blocks, "shrunk"), (LowRank, "shrunk")],
    "near": [(LwF, "end_task")],
    "fit": [(Head, "fit")],
}


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent within the block in the functions of `CLOCKS`."""
    found = dict.fromkeys(CLOCKS, 0.0)
    with contextlib.ExitStack() as stack:
        for part, places in CLOCKS.items():
            for owner, name in places:
                work = getattr(owner, name)

                @functools.wraps(work)
                def clocked(*args: Any, part: str = part, work: Any = work, **how: Any) -> Any:
                    start = time.perf_counter()
                    try:
                        return work(*args, **how)
                    finally:
                        found[part] += time.perf_counter() - start

                setattr(owner, name, clocked)
                stack.callback(setattr, owner, name, work)
        yield found


# --- a whole model --------------------------------------------------------------------------------


def measure_model(name: str, length: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """A plain step, the pass before a second task and its end."""
    shape, began = SHAPES[name], os.getloadavg()
    torch.manual_seed(0)
    model = make_model(shape)
    weights = sum(p.numel() for p in model.parameters())
    steps = plain_steps(model, shape, length, chosen)
    print(f"{name}, {length} tokens: a step {statistics.median(steps):.3f} s", flush=True)
    bound = PRESETS[chosen.recipe]().unbound()
    before, end = [], []
    with tempfile.TemporaryDirectory() as folder:
        base = tidy()
        bound.remember("task0", model, make_rows(model, chosen.batch, length, chosen.batch))
        start = Stored(Path(folder) / "start.safetensors", bound.shared)
        for turn in range(1, 1 + (chosen.repeats or shape.repeats)):
            # A copy of the head on the same encoder; of the finished tasks only the first counts.
            encoder, task = model.base_model, f"task{turn}"
            model = copy.deepcopy(model, {id(encoder): encoder})
            bound.finished = bound.finished[:1]
            rows = make_rows(model, shape.before, length, chosen.batch)
            still = torch.optim.SGD(model.parameters(), lr=0.0)
            tidy()
            with clocks() as spent:
                total = timed(lambda: bound.begin_task(
                    task, still, max(1, EPOCHS * shape.before // chosen.batch),  # noqa: B023
                    model=model, data=rows, start=lambda: start))  # noqa: B023  # fmt: skip
            before.append({"total": total, "fit": spent["fit"], "fitted": bound.fitted,
                           "peak_bytes": status("VmHWM") - base})  # fmt: skip
            with torch.no_grad():
                for w in bound.shared.values():
                    w.mul_(1.001)
            rows = make_rows(model, ROWS, length, chosen.batch)
            bound.unbind()
            tidy()
            with clocks() as spent:
                total = timed(lambda: bound.end_task(rows))  # noqa: B023
            end.append({"total": total, "forwards": spent["measure"] - spent["products"],
                        "products": spent["products"], "solves": spent["solves"],
                        "near": spent["near"],
                        "rest": total - spent["measure"] - spent["solves"] - spent["near"],
                        "peak_bytes": status("VmHWM") - base})  # fmt: skip
            print(f"{name}, {length} tokens: before {before[-1]['total']:.2f} s, "
                  f"end {end[-1]['total']:.2f} s", flush=True)  # fmt: skip
    return {"model": name, "length": length, "recipe": chosen.recipe,
            "threads": torch.get_num_threads(), "weights": weights,
            "load_average": [began, os.getloadavg()],
            "optimizer": shape.optimizer, "batch": chosen.batch, "step_seconds": steps,
            "before_rows": shape.before, "before": before, "end": end,
            "state_bytes": {n: s.bytes() for n, s in bound.states.items()}}  # fmt: skip


def plain_steps(model: Any, shape: Shape, length: int, chosen: argparse.Namespace) -> list[float]:
    """Seconds of each plain training step except the first."""
    rate = {"lr": 1e-6, "fused": True}
    optimizer = getattr(torch.optim, shape.optimizer)(model.parameters(), **rate)

    def step() -> None:
        (batch,) = make_rows(model, chosen.batch, length, chosen.batch)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    taken = [timed(step) for _ in range(1 + (chosen.steps or shape.steps))]
    optimizer.zero_grad()
    return taken[1:]


# --- one wide layer -------------------------------------------------------------------------------


def measure_layer(width: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """State, seconds and peak of each structure, for `width` inputs and 1,024 outputs."""
    torch.manual_seed(0)
    d, how, found = width + 1, Merge(), []
    device = torch.device("cpu")
    x = nn.functional.pad(torch.randn(how.rows * 32, width), (0, 1), value=1.0)
    change = torch.randn(1024, d)
    makes: dict[str, Callable[[], Any]] = {
        "full": lambda: Blocks.empty(d, None, device),
        "block": lambda: Blocks.empty(d, how.width, device),
        "low_rank": lambda: LowRank.empty(d, how.rank, device),
    }
    for structure, make in makes.items():
        base, pair, seconds = tidy(), [make(), make()], []
        for moment in pair:
            seconds.append(timed(lambda: (moment.see_(x), moment.close_())))  # noqa: B023
            moment.scale_(1 / how.rows)
        solve = timed(lambda: pair[0].shrunk(change, pair[1], 1.0, how.ridge))  # noqa: B023
        found.append({"structure": structure, "products": statistics.median(seconds),
                      "solve": solve, "peak_bytes": status("VmHWM") - base,
                      "state_bytes": sum(t.nbytes for t in moment.tensors().values())})  # fmt: skip
        print(f"layer of {width} inputs, {structure}: {found[-1]}", flush=True)
    return {"width": width, "positions": len(x), "threads": torch.get_num_threads(),
            "structures": found}  # fmt: skip


# --- telling --------------------------------------------------------------------------------------


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Medians over repeats; `before` for 1,000 rows. In seconds, in steps, in shares of a task."""
    step = statistics.median(row["step_seconds"])
    steps = EPOCHS * math.ceil(ROWS / row["batch"])
    scale, fitted = ROWS / row["before_rows"], row["before"][0]["fitted"]["steps"]
    reading = scale * statistics.median(t["total"] - t["fit"] for t in row["before"])
    fit = statistics.median(t["fit"] for t in row["before"])
    fit *= math.ceil(0.1 * steps) / fitted if fitted else scale
    before, whole = reading + fit, steps * step
    end = {k: statistics.median(t[k] for t in row["end"]) for k in row["end"][0]}
    return {
        "step": step, "before": before, "fit": fit, "before_steps": before / step,
        "before_share": before / whole, **end, "end_steps": end["total"] / step,
        "end_share": end["total"] / whole,
        "before_peak": max(t["peak_bytes"] for t in row["before"]) / GIB,
        "end_peak": max(t["peak_bytes"] for t in row["end"]) / GIB,
        "weights": 4 * row["weights"] / GIB,
    }  # fmt: skip


def tables(body: dict[str, Any]) -> str:
    """Markdown."""
    ends, before, layers = [], [], []
    for row in body["models"]:
        r, state = ratios(row), sum(row["state_bytes"].values())
        name = [row["model"], f"{row['weights'] / 1e6:,.0f} M", row["length"], row["recipe"],
                row["threads"]]  # fmt: skip
        times = [r[k] for k in ("step", "forwards", "products", "solves", "near", "rest", "total")]
        ends.append([*name, *times, f"{r['end_steps']:.1f}", f"{100 * r['end_share']:.2f} %",
                     f"{r['weights']:.2f}", f"{state / GIB:.2f}",
                     f"{state / row['weights']:.2f}", f"{r['end_peak']:.2f}"])  # fmt: skip
        before.append([*name, row["before_rows"], r["before"], f"{r['fit']:.3f}",
                       row["before"][0]["fitted"]["fit"], f"{r['before_steps']:.1f}",
                       f"{100 * r['before_share']:.2f} %", f"{r['before_peak']:.2f}"])  # fmt: skip
    for layer in body["layers"]:
        for s in layer["structures"]:
            layers.append([layer["width"], layer["threads"], s["structure"],
                           f"{s['state_bytes'] / 2**20:.1f}", s["products"], s["solve"],
                           f"{s['peak_bytes'] / 2**20:.0f}"])  # fmt: skip
    model = ["model", "weights", "tokens", "recipe", "threads"]
    told = [
        "**The end of a task** (seconds; share of 3 epochs of 1,000 rows; GiB: of the weights, of "
        "the methods' state, at most above the weights)",
        markdown([*model, "a step", "forward passes", "Gram products", "solves", "near rows",
                  "rest", "total", "in steps", "share", "weights, GiB", "state, GiB",
                  "state, bytes/weight", "peak, GiB"], ends),
        "**Before a task** (seconds for 1,000 rows)",
        markdown([*model, "rows read", "total", "of it the fit", "fit", "in steps", "share",
                  "peak, GiB"], before),
        "**One wide layer** of 1,024 outputs",
        markdown(["inputs", "threads", "structure", "state, MiB", "products of a task, s",
                  "solve, s", "peak, MiB"], layers),
    ]  # fmt: skip
    return "\n\n".join(told)


def main() -> int:
    """Measure what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="MiniLM once, and a small layer")
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, "layer"],
                        default=[*SHAPES, "layer"])  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 48])
    parser.add_argument("--width", type=int, default=11_008, help="inputs of the layer")
    parser.add_argument("--recipe", choices=[n for n in PRESETS if "merge" in n or n == "default"],
                        default="default")  # fmt: skip
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="plain steps that are timed")
    parser.add_argument("--repeats", type=int, help="tasks that are measured")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.models, chosen.lengths, chosen.width = ["minilm", "layer"], [32], 2048
        chosen.steps, chosen.repeats = chosen.steps or 6, chosen.repeats or 1
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    quiet()
    body = json.loads(chosen.json.read_text()) if chosen.json.exists() else {}
    found = {key: body.get(key, []) for key in ("models", "layers")}
    threads = torch.get_num_threads()
    done = {(r["model"], r["length"], r["threads"]) for r in found["models"]
            if r["recipe"] == chosen.recipe}  # fmt: skip
    done |= {("layer", r["width"], r["threads"]) for r in found["layers"]}
    sizes = {name: [chosen.width] if name == "layer" else chosen.lengths for name in chosen.models}
    jobs = [(n, s) for n in chosen.models for s in sizes[n] if (n, s, threads) not in done]
    steps = sum(chosen.steps or SHAPES[n].steps for n, _ in jobs if n != "layer")
    print(f"{len(jobs)} measurements to go, {steps} training steps", flush=True)
    for name, size in jobs:
        if name == "layer":
            found["layers"].append(measure_layer(size, chosen))
        else:
            found["models"].append(measure_model(name, size, chosen))
        save(chosen.json, found, tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
