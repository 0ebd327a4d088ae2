"""What a method adds to a training step: whole step, optimizer phase, memory.

    python benchmarks/step_overhead.py --quick --json docs/results/step-overhead-quick.json

Each method steps beside plain fused AdamW in one process, in pairs of random order on the same
batch, each on its own copy of the model; "plain again" is a second plain copy: the noise. Both
sides clip: plain by `clip_grad_norm_`, ours by the recipe, or with `--loop-clips` as plain does, so
that the engine measures once more what the loop has measured. Clipping counts as optimizer phase,
like everything between backward and the end of `optimizer.step()`. Cycles of DPS that are longer
than the run are measured by kinds of step (accumulate, select, mask, turn back), weighted as they
occur in a cycle; so are the steps in which K-FAC EWC pulls. EWC's importance comes from 512 rows of
--rows: its cost depends on the words they use. The Gram matrices of GPM, K-FAC EWC and Merge are of
the same rows. Two models are held at a time, and what they leave in cycles is collected between the
pairs. `--quick` takes the arms that the engine's own targets are of; `--arms all` every method.
Writes the JSON, and beside it the table (.md) and a picture (.png). `--costs` writes what
`holdfast methods` shows: the ratio of each method's whole step to plain's at the longest length.

    python benchmarks/step_overhead.py --lengths 128 --json docs/results/step-overhead.json \\
        --costs holdfast/methods/costs.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import DATA, need_data, save, summary
from step_overhead_page import NAMED, costs, picture, table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from holdfast.engine.method import Method
from holdfast.methods import DPS, EWC, GPM, L2SP, METHODS, KfacEWC, LwF, Merge, Replay
from holdfast.recipe import Recipe
from holdfast.tasks import load_task
from holdfast.tasks.kinds.classification import KIND
from holdfast.tasks.kinds.pretrained import load_tokenizer, locate, quiet

ARMS: dict[str, Method | None] = {
    "plain again": None,
    "engine alone": None,
    "dps-dense-50": DPS(stage=50),
    "dps-dense-5": DPS(stage=5),
    "dps-mix-50": DPS(stage=50, mix=True),
    "dps-mix-5": DPS(stage=5, mix=True),
    "retention-50": DPS(stage=50, score="retention"),
    "retention-5": DPS(stage=5, score="retention"),
    "ewc": EWC(),
    "l2sp": L2SP(),
    "replay-off": Replay(),
    "kfac-1": KfacEWC(every=1),
    "kfac-10": KfacEWC(every=10),
    "gpm": GPM(),
    "gpm-gradient": GPM(project="gradient"),
    "lwf": LwF(),
    "merge": Merge(),
}
QUICK = ["plain again", "engine alone", "dps-dense-50", "dps-dense-5", "dps-mix-50", "dps-mix-5",
         "retention-50", "retention-5", "ewc", "l2sp", "replay-off", "merge"]  # fmt: skip
ARMS |= {name: kind() for name, kind in METHODS.items() if name not in (*ARMS, *NAMED)}
SIZES = {
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}  # fmt: skip


class Arm:
    """A model, its fused AdamW, and a recipe at work on it (None: plain); `rows` of its task.

    second: whether a task was learned before.
    """

    def __init__(
        self, chosen: argparse.Namespace, recipe: Recipe | None, *rows: Any, second: bool = False
    ) -> None:
        self.chosen, self.rows, self.second = chosen, rows, second
        self.model = make_model(chosen) if recipe is None else recipe.prepare(make_model(chosen))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(chosen.device, enabled=chosen.dtype == "fp16")
        self.bound = recipe.unbound() if recipe else None
        if self.bound is not None:
            self._begin()

    def _begin(self) -> None:
        """Bind; methods that act from the second task on get state as if one task were finished."""

        def begin(task: str) -> None:
            self.bound.begin_task(task, self.optimizer, 10**6, model=self.model, data=self.rows)

        begin("one")
        for method in self.bound.methods:
            slots = self.bound.states[method.name].weights
            if self.second:
                self.bound.end_task(partial(read_rows, self.chosen))
                begin("two")
            elif isinstance(method, DPS) and method.score == "retention":
                names = self.bound.states["dps"].numbers["covered"]
                slots["fisher"] = {n: torch.rand_like(self.bound.weights[n]) for n in names}
                begin("one")

    def step(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """Seconds of a training step, and of its part after the backward pass."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.chosen.dtype)
        casting = torch.autocast(self.chosen.device, half) if half else contextlib.nullcontext()
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with casting:
            out = self.model(**batch)
            loss = out.loss
            if self.bound is not None and self.bound.has_penalty:
                loss = loss + self.bound.penalty(batch, out)
        self.scaler.scale(loss).backward()
        self._wait()
        middle = time.perf_counter()
        if self.chosen.clip and (self.bound is None or self.chosen.loop_clips):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.chosen.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._wait()
        end = time.perf_counter()
        return end - start, end - middle

    def _wait(self) -> None:
        if self.chosen.device == "cuda":
            torch.cuda.synchronize()

    def saved_bytes(self, batch: dict[str, Tensor]) -> int:
        """What one forward pass keeps for the backward pass, parameters aside."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found: dict[int, int] = {}

        def see(t: Tensor) -> None:  # an output that is kept would keep its graph, and that it
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()

        with torch.autograd.graph.saved_tensors_hooks(see, lambda nothing: nothing):
            out = self.model(**batch)
        del out
        for view in self.bound.views.values() if self.bound else ():
            view.scratch.clear()
        return sum(found.values())


def make_model(chosen: argparse.Namespace) -> nn.Module:
    """A classifier of two classes in training mode."""
    import transformers

    kind = transformers.AutoModelForSequenceClassification
    if chosen.model in SIZES:
        config = transformers.BertConfig(**SIZES[chosen.model])
        model = kind.from_config(config)
    else:
        model = kind.from_pretrained(locate(chosen.model), dtype=torch.float32)
    return model.to(chosen.device).train()


def make_batch(chosen: argparse.Namespace, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens without padding, labels of two kinds."""
    ids = torch.randint(1000, vocabulary, (chosen.batch, length), device=chosen.device)
    labels = ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def read_rows(chosen: argparse.Namespace) -> list[dict[str, Tensor]]:
    """512 real rows in batches as the model takes them."""
    task = load_task(chosen.rows, train_size=512)
    tokenizer = load_tokenizer(locate("minilm" if chosen.model in SIZES else chosen.model))
    found = KIND.encode(task.train, task, tokenizer, max_length=128)
    rows = [{**row, "labels": 0} for row in found]  # the Fisher information draws its own labels
    collate = DataCollatorWithPadding(tokenizer)
    batches = (collate(rows[i : i + 32]) for i in range(0, len(rows), 32))
    return [{k: v.to(chosen.device) for k, v in batch.items()} for batch in batches]


# --- which steps are taken ------------------------------------------------------------------------


def kind_of(method: Method | None, step: int) -> str:
    """What a step of DPS or K-FAC does; other methods do the same in every step."""
    if isinstance(method, KfacEWC):
        return "pull" if (step + 1) % method.every == 0 else "pass"
    if not isinstance(method, DPS):
        return "step"
    odd, last = step // method.stage % 2 == 1, (step + 1) % method.stage == 0
    if method.score == "retention":
        return "select" if last else "mask"
    return ("turn back" if last else "mask") if odd else ("select" if last else "accumulate")


def cycle(method: Method | None) -> dict[str, float]:
    """How often each kind of step occurs, as shares of all steps."""
    if isinstance(method, KfacEWC):
        length = method.every
    elif isinstance(method, DPS):
        length = 2 * method.stage
    else:
        return {"step": 1.0}
    kinds = [kind_of(method, s) for s in range(length)]
    return {k: kinds.count(k) / length for k in dict.fromkeys(kinds)}


WARM = 6  # pairs that are not counted


def schedule(method: Method | None, pairs: int) -> list[int | None]:
    """Which step of its schedule each pair takes, the first `WARM` included; None: all are alike.

    Whole cycles where they fit, else rounds that jump to the end of each stage.
    """
    if isinstance(method, KfacEWC):
        return list(range(WARM + pairs))
    if not isinstance(method, DPS):
        return [None] * (WARM + pairs)
    k = method.stage
    steps: list[int | None] = [0, 1, k - 1, k, k + 1, 2 * k - 1]  # warms up, and selects once
    if 2 * k <= pairs:
        return steps + list(range(2 * k, 2 * k * (1 + pairs // (2 * k))))
    inside = min(max((pairs // 3 - 2) // 2, 1), k - 1)
    for start in range(2 * k, 8 * k, k):
        steps += [*range(start, start + inside), start + k - 1]
    return steps


# --- measuring ------------------------------------------------------------------------------------

Pair = dict[str, Any]  # kind, plain and ours: (whole, optimizer phase) in seconds


def measure(
    chosen: argparse.Namespace, plain: Arm, label: str, batch: dict[str, Tensor], bar: Any
) -> tuple[list[Pair], dict[str, float]]:
    """Pairs of steps of an arm beside plain, and the bytes per covered weight that it adds."""
    method = ARMS[label]
    methods = [method] if method else []
    limit = None if chosen.loop_clips else chosen.clip or None
    recipe = Recipe(methods=methods, max_grad_norm=limit)
    second = method is not None and method.needs_old_task and label != "replay-off"
    ours = Arm(chosen, None if label == "plain again" else recipe, batch, second=second)
    pairs, held, order = list[Pair](), 0, random.Random(label)
    gc.collect()
    gc.freeze()  # what lives through all pairs is not looked at again
    gc.disable()
    for i, step in enumerate(schedule(method, chosen.pairs)):
        if ours.bound is not None and step is not None:
            ours.bound.step = step
        both = [("plain", plain), ("ours", ours)]
        order.shuffle(both)
        pair: Pair = {"kind": kind_of(method, step or 0)}
        for side, arm in both:
            pair[side] = arm.step(batch)
        if i >= WARM:
            pairs.append(pair)
        if ours.bound is not None:
            held = max(held, sum(s.bytes() for s in ours.bound.states.values()))
        gc.collect()
        bar.update(2)
    gc.enable()
    gc.unfreeze()
    added = added_bytes(ours, plain, batch, held)
    if ours.bound is not None:
        ours.bound.unbind()  # while it mixes weights, it is held
    return pairs, added


def added_bytes(ours: Arm, plain: Arm, batch: dict[str, Tensor], held: int) -> dict[str, float]:
    """Bytes of state, and kept between forward and backward pass, per covered weight."""
    bound = ours.bound
    if bound is None or not bound.methods:
        return {"state": 0.0, "forward": 0.0}
    names = bound.states[bound.methods[0].name].numbers.get("covered", list(bound.shared))
    covered = sum(bound.weights[n].numel() for n in names)
    forward = ours.saved_bytes(batch) - plain.saved_bytes(batch)
    return {"state": held / covered, "forward": forward / covered}


def ratios(pairs: list[Pair], which: int) -> dict[str, list[float]]:
    """Ours / plain of each pair, by kind of step; which: 0 whole step, 1 optimizer phase."""
    found: dict[str, list[float]] = {}
    for p in pairs:
        found.setdefault(p["kind"], []).append(p["ours"][which] / p["plain"][which])
    return found


def medians(taken: list[tuple[float, float]]) -> list[float]:
    """Milliseconds of the whole step and of the optimizer phase."""
    return [round(1e3 * statistics.median(column), 3) for column in zip(*taken, strict=True)]


def row(label: str, length: int, pairs: list[Pair], added: dict[str, float]) -> dict[str, Any]:
    """All figures of an arm at a length."""
    shares = cycle(ARMS[label])
    found: dict[str, Any] = {"arm": label, "length": length, "pairs": len(pairs)}
    for which, name in enumerate(("whole", "optimizer")):
        found[name] = summary(ratios(pairs, which), shares, which)
    kinds = sorted({p["kind"] for p in pairs})
    found["milliseconds"] = {
        side: {kind: medians([p[side] for p in pairs if p["kind"] == kind]) for kind in kinds}
        for side in ("plain", "ours")
    }
    if "select" in kinds:
        ours = found["milliseconds"]["ours"]
        before = ours.get("accumulate", ours["mask"])[1]
        each = ours["select"][1] - before
        found["selection"] = {"each_ms": each, "per_step_ms": each * shares["select"]}
    found["bytes_per_weight"] = added
    found["raw"] = [[p["kind"], *p["plain"], *p["ours"]] for p in pairs]
    return found


def tell(row: dict[str, Any], bar: Any) -> None:
    """A line for an arm that is done, with the most memory that the process has held."""
    whole, phase = (f"{row[part]['median']:.3f}" for part in ("whole", "optimizer"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bar.write(f"{row['arm']}, {row['length']} tokens: whole step {whole}, optimizer phase {phase}; "
              f"peak {peak:.1f} GiB")  # fmt: skip


def main() -> int:
    """Measure every arm at every length."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="24 pairs an arm and length, few arms")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--costs", type=Path, help="write what `holdfast methods` shows there too")
    parser.add_argument("--model", default="minilm", help=f"{', '.join(SIZES)}, a folder, minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--arms", nargs="+", choices=["all", *ARMS], help="what to measure (all)")
    parser.add_argument("--pairs", type=int, help="pairs of steps an arm and length (24, 200)")
    parser.add_argument("--clip", type=float, default=1.0, help="0: neither side clips")
    parser.add_argument("--loop-clips", action="store_true", help="both sides by clip_grad_norm_")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--rows", default=str(DATA / "trec6"), help="the old task of EWC (TREC)")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    chosen = parser.parse_args()
    need_data(chosen.rows)
    torch.set_num_threads(chosen.threads or torch.get_num_threads())
    chosen.pairs = chosen.pairs or (24 if chosen.quick else 200)
    chosen.arms = chosen.arms or (QUICK if chosen.quick else ["all"])
    chosen.arms = list(ARMS) if "all" in chosen.arms else chosen.arms
    schedules = [schedule(ARMS[arm], chosen.pairs) for arm in chosen.arms]
    steps = 2 * len(chosen.lengths) * sum(map(len, schedules))
    print(f"{steps} training steps", flush=True)
    quiet()
    torch.manual_seed(0)
    load, rows = [os.getloadavg()], []
    with tqdm(total=steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        for length in chosen.lengths:
            plain = Arm(chosen, None)
            batch = make_batch(chosen, length, plain.model.config.vocab_size)
            for label in chosen.arms:
                bar.set_description(f"{label}, {length} tokens", refresh=False)
                rows.append(row(label, length, *measure(chosen, plain, label, batch, bar)))
                gc.collect()  # the arm's model, before the next one's is made
                tell(rows[-1], bar)
            del plain
    load.append(os.getloadavg())
    told = (f"{torch.get_num_threads()} threads, load average {load[0][0]:.1f} before, "
            f"{load[1][0]:.1f} after\n\n{table(rows)}")  # fmt: skip
    found = {
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "load_average": load,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(chosen).items()},
        "rows": rows,
    }
    body = save(chosen.json, found, told)
    if chosen.costs:
        chosen.costs.write_text(json.dumps(costs(body), indent=1) + "\n")
    picture(rows, chosen.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
