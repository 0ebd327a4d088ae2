"""Several ranks and machines: two processes of this one in a group of gloo, and a Ray of one's own.

What the ranks do is in `ranked`. Each try takes some seconds to start them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.methods import L2SP
from holdfast.recipe import Recipe
from holdfast.testing.faults import ranked
from holdfast.testing.faults.place import Place, equal, refuses
from holdfast.testing.faults.suite import Missing, Wrong, tried, untried
from holdfast.training.loop import load_checkpoint
from holdfast.training.manifest import damage, newest_complete

LIMIT = 60.0  # seconds that ranks have to end once one of them is lost


def started(name: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two ranks of one group, at work."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    words = [sys.executable, "-m", "holdfast.testing.faults.ranked", name, str(folder)]
    return [
        subprocess.Popen(words, env={**os.environ, **told, "RANK": str(i), "LOCAL_RANK": str(i)},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip


def on_two(name: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks tells, both having ended as they should."""
    ranks = started(name, folder)
    try:
        for rank in ranks:
            said = rank.communicate(timeout=240)[1]
            assert rank.returncode == 0, f"a rank of {name!r}: {said.strip()[-250:]}"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def lost(name: str, folder: Path) -> None:
    """Rank 1 is lost; rank 0 has to end, and not well, in bounded time."""
    ranks = started(name, folder)
    try:
        end = time.monotonic() + 240
        while not (folder / "died").exists():
            assert time.monotonic() < end and ranks[0].poll() is None, "no rank was lost"
            time.sleep(0.05)
        try:
            ranks[0].communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a rank still waits after {LIMIT:.0f} s") from None
        if ranks[0].returncode == 0:
            raise Wrong("a rank was lost, and the other ended as if it had not")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def alone(place: Place, **more: Any) -> dict[str, Any]:
    """What one process ends with whose batch is that of both ranks."""
    home = place / "alone"
    home.mkdir()
    return ranked.trained(home, size=4, **more)


def agree(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Both ranks hold the same bits, and one process' numbers but for rounding."""
    equal(found[0]["hash"], found[1]["hash"], "weights and state of two ranks")
    equal(found[0]["steps"], one["steps"], "steps")
    for name, values in one["weights"].items():
        ours = torch.tensor(found[0]["weights"][name])
        far = float((ours - torch.tensor(values)).abs().max())
        if not far < 1e-4:
            raise Wrong(f"{name} differs by {far:.1e} from one process'")


@tried("R1", "plain loop", slow=True)
def r1_loop(place: Place) -> None:
    for told in on_two("sums", place.folder):  # gradients 1 and 11: 6 in the mean, squared
        equal(told["sums"], [36.0], "the sum of squared gradients")


@tried("R2", "plain loop", slow=True)
def r2_loop(place: Place) -> None:
    for told in on_two("sums without sync", place.folder):
        equal(told["sums"], [36.0], "the sum of squared gradients")


@tried("R1", "Trainer", slow=True)
def r1(place: Place) -> None:
    agree(on_two("trained", place / "two"), alone(place))


@tried("R2", "Trainer", slow=True)
def r2(place: Place) -> None:
    agree(on_two("in pieces", place / "two"), alone(place))


@tried("R3", "plain loop", slow=True)
def r3(place: Place) -> None:
    for told in on_two("shards", place.folder):
        equal(told, {"0.1": [36, True], "0.5": [20, True], "0.9": [4, True]},
              "entries that are kept, and whether they are the largest of all")  # fmt: skip


@tried("R4", "plain loop")
def r4(place: Place) -> None:
    """DeepSpeed's marks without DeepSpeed: it hides gradients, or all of a parameter."""

    def hidden(model: Any) -> Any:
        kind = type("DeepSpeedZeroOptimizer", (),
                    {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})  # fmt: skip
        made: Any = kind()
        made.optimizer = torch.optim.AdamW(model.parameters())
        return made

    def cut(model: Any) -> Any:
        model[0].weight.ds_id = 3
        return torch.optim.AdamW(model.parameters())

    for make in (hidden, cut):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = make(model)
        refuses(lambda m=model, o=optimizer: ranked.RECIPE.bind(m, o, total_steps=3), "DeepSpeed")  # type: ignore[misc]


untried("R4", "Trainer", "needs DeepSpeed: tests/distributed/test_refusals.py has a stand-in")


def _goes_on(place: Place, newest: str) -> None:
    """From the newest whole checkpoint both ranks end where two undisturbed ones do."""
    found = newest_complete(place / "two/trainer", tell=lambda _: None)
    equal(found and found.name, newest, "the newest whole checkpoint")
    ended, whole = on_two("saving", place / "two"), on_two("saving", place / "whole")
    equal([e["hash"] for e in ended], [w["hash"] for w in whole], "weights and state")
    left = [p for p in (place / "two/trainer").glob("checkpoint-*") if damage(p)]
    equal(left, [], "checkpoints that are torn")


@tried("R5", "Trainer", slow=True)
def r5(place: Place) -> None:
    lost("killed", place / "two")
    _goes_on(place, "checkpoint-2")


@tried("R5", "Trainer", slow=True)
def r5_hangs(place: Place) -> None:
    lost("hanging", place / "two")
    _goes_on(place, "checkpoint-2")


@tried("R6", "Trainer", slow=True)
def r6(place: Place) -> None:
    lost("killed while saving", place / "two")
    assert (place / "two/trainer/checkpoint-4").is_dir(), "it was not saving"
    _goes_on(place, "checkpoint-2")


@tried("R7", "plain loop", slow=True)
def r7_loop(place: Place) -> None:
    on_two("saved", place.folder)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recipe = Recipe(methods=[L2SP()])
    bound = recipe.bind(model, optimizer, total_steps=200)
    refuses(lambda: load_checkpoint(place / "run/checkpoint-1", bound), "on as many ranks")


@tried("R7", "Trainer", slow=True)
def r7(place: Place) -> None:
    on_two("saving", place.folder)
    refuses(lambda: ranked.trained(place.folder, **ranked.STEPS), "ranks: 2 → 1")


@tried("R8", "plain loop", slow=True)
def r8(place: Place) -> None:
    for told in on_two("saved apart", place.folder):
        if told["refused"] is None:
            raise Wrong("each rank wrote its own part, and nobody was told")
        assert "rank 0 does not see loop-1.json" in told["refused"], told["refused"]


@tried("R11", "plain loop", slow=True)
def r11_loop(place: Place) -> None:
    one, two = on_two("nan in a loop", place.folder)
    equal(one, two, "what two ranks hold")
    equal((one["skipped"], one["step"]), (1, 2), "steps skipped and made")
    equal(one["weights"][0], one["weights"][1], "the weight after a step that is left out")
    assert one["weights"][2] != one["weights"][1], "nothing is learned after it"


@tried("R11", "Trainer", slow=True)
def r11(place: Place) -> None:
    one, two = on_two("poisoned", place.folder)
    equal(one["hash"], two["hash"], "weights and state of two ranks")
    equal((one["skipped"], two["skipped"]), (1, 1), "skipped steps")
    numbers = torch.cat([torch.tensor(v).flatten() for v in one["weights"].values()])
    equal(bool(numbers.isfinite().all()), True, "finite weights")


@tried("R9", "command line", slow=True)
def r9(place: Place) -> None:
    """Connections end, and the server with them, under two workers: no trial is lost or doubled."""
    from holdfast.testing.faults import servers, studies

    with servers.postgresql() as server:
        of = studies.study(place, "search", url=server.url, trials=16)
        workers = [studies.started(place, "search", url=server.url, trials=16, slow=0.2)
                   for _ in range(2)]  # fmt: skip
        try:
            for share, harm in ((0.25, server.drop), (0.5, server.restart), (0.75, server.drop)):
                end = time.monotonic() + 120
                while of.counts()["complete"] < share * 16 and time.monotonic() < end:
                    time.sleep(0.1)
                harm()
            for worker in workers:
                said = worker.communicate(timeout=240)[1]
                assert worker.returncode == 0, said[-300:]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        equal(dict(of.counts()), {"complete": 16}, "trials")
        equal([t.number for t in of.trials()], [*range(16)], "their numbers")
        equal(len({tuple(t.params.values()) for t in of.trials()}), 16, "trials that differ")


def killed_once(folder: Path) -> str:
    """Dies by SIGKILL the first time, and goes on from its mark."""
    if not (folder / "mark").exists():
        (folder / "mark").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@tried("R10", "command line", slow=True)
def r10(place: Place) -> None:
    """A process of Ray's is killed in a run: another one goes on with it."""
    from functools import partial

    from holdfast.experiments.engines import Job
    from holdfast.experiments.engines.ray import Ray

    try:
        import ray  # noqa: F401
    except ImportError:
        raise Missing("needs Ray: pip install 'holdfast[ray]'") from None
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    job = Job(place.folder, "a", partial(killed_once, place.folder))
    equal([*Ray(cpus=0.5)([job], where="x")], [(0, "done")], "what came of the run")
    assert (place / "mark").exists(), "nothing was killed"
