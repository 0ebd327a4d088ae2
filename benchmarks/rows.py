"""What rows cost before training: reading a large CSV, and encoding rows, in seconds and memory.

    python benchmarks/rows.py --json docs/results/rows.json

Each figure is of a process of its own: wall seconds, and GB beyond what it held before. `lists` is
how rows were encoded before they were packed: all at once, as lists of Python's numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import markdown, save

WORDS = 126  # and two special tokens: 128 a row


def used() -> float:
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def words(count: int, seed: int) -> list[str]:
    from holdfast.tasks.kinds.pretrained import load_tokenizer, locate

    known = sorted(w for w in load_tokenizer(locate("minilm")).get_vocab() if w.isalpha())
    return random.Random(seed).sample(known, count)


def read(rows: int) -> Callable[[], Any]:
    """A CSV of short texts."""
    from holdfast.tasks import load_task

    file, known, draw = Path(tempfile.mkdtemp()) / "rows.csv", words(2000, 0), random.Random(1)
    with file.open("w") as lines:
        lines.write("text,label\n")
        for i in range(rows):
            lines.write(f"{' '.join(draw.choices(known, k=12))} {i},{'ab'[i % 2]}\n")
    return lambda: load_task(file)


def encoded(rows: int, how: str) -> Callable[[], Any]:
    from holdfast.tasks import Row, Task
    from holdfast.tasks.kinds import packed
    from holdfast.tasks.kinds.classification import KIND
    from holdfast.tasks.kinds.pretrained import load_tokenizer, locate

    known, draw = words(8000, 0), random.Random(1)
    made = tuple(Row(" ".join(draw.choices(known, k=WORDS)), None, i % 2) for i in range(rows))
    task = Task(name="t", labels=("a", "b"), metric="accuracy", train=made, selection=(),
                evaluation=(), source="")  # fmt: skip
    tokenizer = load_tokenizer(locate("minilm"))
    if how == "lists":
        packed.CHUNK, packed.Packed.of = rows, lambda rows, few: few(rows)  # type: ignore
    return lambda: KIND.encode(made, task, tokenizer, max_length=128)


def one(name: str, rows: int) -> None:
    run = read(rows) if name == "read" else encoded(rows, name)
    before, began = used(), time.monotonic()
    kept = run()
    print(json.dumps({"what": name, "rows": rows, "seconds": time.monotonic() - began,
                      "GB": used() - before, "kept": bool(kept)}))  # fmt: skip


def main() -> None:
    """Measure each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rows")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.one[0], int(chosen.one[1]))
        return
    found = []
    for name, rows in (("read", 1_000_000), ("packed", 100_000), ("lists", 100_000)):
        words_ = [
            sys.executable,
            __file__,
            "--one",
            name,
            str(rows // 20 if chosen.quick else rows),
        ]
        done = subprocess.run(words_, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1])
    heads = ["what", "rows", "seconds", "GB"]
    table = markdown(heads, [[f[h] for h in heads] for f in found])
    if chosen.json:
        save(chosen.json, {"rows": found}, table)


if __name__ == "__main__":
    main()
