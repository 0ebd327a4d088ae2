"""Kills (-9) at random moments, over sequences, grids and searches, until so many were survived.

    python benchmarks/soak.py --kills 1000 --json docs/results/soak.json

Each round is one command in a folder of its own, carried out by one process, or by two at once of a
grid or a search. Each is killed after a random time, and started again, until one has ended. Then
scores, weights and trials have to be those of the same command undisturbed. The file counts: the
same command goes on there, in the round that was open. Writes the JSON after each kill, and a line
beside it (.md). The exit code is 1 once a round ended otherwise; its folder is kept.

    python benchmarks/soak.py --tasks 200 --json docs/results/soak-memory.json

learns so many tasks one after another instead, and tells what memory holds after each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: processes end equal, bit for bit

from results import save

from holdfast.testing.faults.place import Place
from holdfast.testing.faults.processes import ends

SHORT = ["--epochs=2", "--batch-size=4", "--max-length=16", "--save-steps=2"]
LIMIT = 900.0  # seconds: a round's last process that takes longer hangs
LOADED = ["holdfast.experiments.learner", "holdfast.report", "holdfast.search.run",
          "holdfast.search.trial", "holdfast.testing.faults.processes"]  # fmt: skip


def words(kind: str, home: Path, out: Path) -> list[str]:
    """The command of a round."""
    given = ["--model", f"{home}/bert", "--tasks", f"{home}/one.jsonl", f"{home}/two.jsonl",
             "--out", str(out), *SHORT]  # fmt: skip
    return {
        "sequence": ["sequence", *given, "--recipe", "dps"],
        "grid": ["compare", *given, "--recipes", "plain", "ewc", "--seeds", "0", "1"],
        "search": ["search", *given, "--trials", "7", "--sampler", "random", "--parts", "4",
                   "--flat", "1e-3", "3e-3", "--seeds", "3"],
    }[kind]  # fmt: skip


def runs(kind: str, out: Path) -> dict[str, list[Any]]:
    """Scores and weights of each run of a round, and of a search each trial."""
    homes = [path.parent for path in sorted(out.rglob("record.json"))]
    found = {str(home.relative_to(out)): ends(home) for home in homes}
    if kind == "search":
        body = json.loads((out / "search.json").read_text())
        told = [[t[k] for k in ("number", "params", "state", "value")] for t in body["trials"]]
        found["search"] = [told, body["counts"], body["winner"], body["final"], body["gain"]]
    return found


def carry_out(given: Sequence[str], log: str) -> None:
    """`holdfast` in this process."""
    import torch

    from holdfast.cli import main

    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.exit(main(list(given)))


class Soak:
    """The rounds of a folder, and what came of them so far."""

    def __init__(self, home: Path, file: Path, seed: int) -> None:
        self.home, self.file = home, file
        self.body: dict[str, Any] = {
            "kills": 0, "rounds": {}, "kills_by_kind": {}, "other": [], "seconds": 0.0, "seed": seed
        }  # fmt: skip
        if file.is_file():
            self.body |= {k: v for k, v in json.loads(file.read_text()).items() if k in self.body}
        self.draw = random.Random(f"{self.body['seed']} {self.body['kills']}")
        self.fork = multiprocessing.get_context("forkserver")
        self.fork.set_forkserver_preload(LOADED)
        self.kinds = Counter(self.body["rounds"]), Counter(self.body["kills_by_kind"])
        self.since = time.monotonic()
        self.takes: dict[str, float] = {}
        place = Place(home, home)
        home.mkdir(parents=True, exist_ok=True)
        place.bert  # noqa: B018  made here, once
        for name in ("one", "two"):
            place.rows(f"{name}.jsonl", more=f" {name}")

    def start(self, kind: str, out: Path) -> BaseProcess:
        process = self.fork.Process(
            target=carry_out, args=(words(kind, self.home, out), f"{self.home}/log")
        )
        process.start()
        return process

    def whole(self, kind: str) -> dict[str, list[Any]]:
        """What the command gives undisturbed, carried out once, by one process."""
        out, told = self.home / f"whole-{kind}", self.home / f"whole-{kind}.json"
        if not told.is_file():
            shutil.rmtree(out, ignore_errors=True)
            process, began = self.start(kind, out), time.monotonic()
            process.join(LIMIT)
            if process.exitcode != 0:
                sys.exit(f"{out}: ended with {process.exitcode} undisturbed; see {self.home}/log")
            body = {"seconds": time.monotonic() - began, "runs": runs(kind, out)}
            told.write_text(json.dumps(body))
        body = json.loads(told.read_text())
        self.takes[kind] = body["seconds"]
        return body["runs"]  # type: ignore[no-any-return]

    def until(self, kills: int, seconds: float) -> bool:
        """Rounds until so many kills, or so much time; whether all ended as they should."""
        wanted = {kind: self.whole(kind) for kind in ("sequence", "grid", "search")}
        end = time.monotonic() + seconds
        while self.body["kills"] < kills and time.monotonic() < end and not self.body["other"]:
            open_round = next(self.home.glob("round-*"), None)
            kind = open_round.name.split("-")[1] if open_round else self.draw.choice([*wanted])
            out = open_round or self.home / f"round-{kind}"
            out.mkdir(exist_ok=True)
            if not self.round(kind, out, kills, end):
                break
            found = json.loads(json.dumps(runs(kind, out)))
            if found != wanted[kind]:
                names = {n for n in {*found, *wanted[kind]} if found.get(n) != wanted[kind].get(n)}
                self.body["other"].append(f"{kind}: {', '.join(sorted(names))} ended otherwise")
                out.rename(self.home / f"kept-{kind}-{self.body['kills']}")
            else:
                shutil.rmtree(out)
                self.kinds[0][kind] += 1
            self.note()
        return not self.body["other"]

    def round(self, kind: str, out: Path, kills: int, end: float) -> bool:
        """Killed and started again until it ended; whether it did."""
        crew = 1 if kind == "sequence" else self.draw.choice([1, 2])
        while time.monotonic() < end:
            workers = [self.start(kind, out) for _ in range(crew)]
            codes = {self.killed(worker, kind, kills) for worker in workers}
            if bad := codes - {0, -signal.SIGKILL}:
                self.body["other"].append(f"{kind}: ended with {bad.pop()}")
                out.rename(self.home / f"kept-{kind}-{self.body['kills']}")
                self.note()
                return False
            if 0 in codes:  # who ends has waited for all
                return True
        return False

    def killed(self, worker: BaseProcess, kind: str, kills: int) -> int:
        """The exit code of a process that is killed, unless it ends before."""
        enough = self.body["kills"] >= kills
        worker.join(LIMIT if enough else self.draw.expovariate(1 / self.takes[kind]))
        if worker.exitcode is None:
            worker.kill()
            worker.join(60)
            if enough:
                return 124
        code = worker.exitcode or 0
        if code == -signal.SIGKILL:
            self.body["kills"] += 1
            self.kinds[1][kind] += 1
            self.note()
        return code

    def note(self) -> None:
        now = time.monotonic()
        self.body["seconds"] = round(self.body["seconds"] + now - self.since, 1)
        self.since = now
        self.body["rounds"], self.body["kills_by_kind"] = map(dict, self.kinds)
        rounds, kills = self.kinds
        hours = self.body["seconds"] / 3600
        told = (
            f"{self.body['kills']} kills in {hours:.1f} hours, over {sum(rounds.values())} rounds"
        )
        told += ", each of which ended as one undisturbed: "
        told += ", ".join(f"{k} ({rounds[k]} rounds, {kills[k]} kills)" for k in sorted(kills))
        if self.body["other"]:
            told = "; ".join([*self.body["other"], told])
        save(self.file, self.body, told + ".")


def memory(tasks: int, home: Path, file: Path) -> bool:
    """What memory holds after each of so many tasks; whether it grows by less than a tenth."""
    from holdfast import run_sequence
    from holdfast.experiments.learner import Learner

    place, held, note = Place(home, home), list[int](), Learner.note
    shutil.rmtree(home / "many", ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    paths = [place.rows(f"many/t{i}.jsonl", count=12, more=f" {i}") for i in range(tasks)]

    def noted(self: Learner, index: int, **more: Any) -> None:
        note(self, index, **more)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)

    Learner.note = noted  # type: ignore[method-assign]
    began, early = time.monotonic(), max(1, tasks // 10)
    run_sequence(str(place.bert), paths, "plain", out=home / "many/run", epochs=1.0, batch_size=4,
                 max_length=16, save_steps=0, progress=False)  # fmt: skip
    told = (f"{tasks} tasks one after another: {held[early - 1]} MiB after {early}, "
            f"{held[tasks // 2 - 1]} after {tasks // 2}, {held[-1]} after {tasks}.")  # fmt: skip
    save(file, {"mebibytes": held, "seconds": round(time.monotonic() - began, 1)}, told)
    return held[-1] < 1.1 * held[early - 1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add: Callable[..., Any] = parser.add_argument
    add("--kills", type=int, default=1000, help="in all, those of earlier calls among them (1000)")
    add("--hours", type=float, default=float("inf"), help="stop after so many")
    add("--tasks", type=int, help="measure memory over so many tasks instead")
    add("--quick", action="store_true", help="ten kills")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/soak"), help="where the rounds lie")
    add("--json", type=Path, default=Path("runs/soak/soak.json"))
    chosen = parser.parse_args(arguments)
    home = chosen.out.resolve()
    if chosen.tasks:
        return int(not memory(chosen.tasks, home, chosen.json))
    soak = Soak(home, chosen.json, chosen.seed)
    return int(not soak.until(10 if chosen.quick else chosen.kills, 3600 * chosen.hours))


if __name__ == "__main__":
    sys.exit(main())
