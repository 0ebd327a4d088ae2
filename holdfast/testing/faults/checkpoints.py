"""Checkpoints: torn, cut, flipped, of another release; where a run goes on from them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from holdfast.methods import DPS
from holdfast.recipe import Recipe
from holdfast.testing.faults.place import Loop, Place, StopAt, equal, refuses, same, weights
from holdfast.testing.faults.suite import Wrong, swapped, tried
from holdfast.training.loop import load_checkpoint, save_checkpoint
from holdfast.training.manifest import commit, damage, newest_complete, rotate

RECIPE = Recipe(methods=[DPS(stage=2)])


def stopped_trainer(place: Place, *, step: int, **more: Any) -> Path:
    """The checkpoint of a Trainer that was stopped at a step of eight."""
    trainer = place.trainer(recipe=RECIPE, **more)
    trainer.add_callback(StopAt(step))
    trainer.train()
    return place / "trainer" / f"checkpoint-{step}"


def looped(place: Place, *steps: int) -> Path:
    """The folder of a loop's checkpoints at these steps."""
    loop, at = Loop(DPS(stage=2)), 0
    for step in steps:
        save_checkpoint(place / f"run/checkpoint-{step}", loop.steps(at, step).bound, position={})
        at = step
    return place / "run"


def goes_on(folder: Path, *, to: int = 6) -> None:
    """From the newest whole checkpoint a loop ends where it ends undisturbed."""
    found, loop, at = newest_complete(folder), Loop(DPS(stage=2)), 0
    if found is not None:
        load_checkpoint(found, loop.bound)
        at = loop.bound.step
    whole = Loop(DPS(stage=2)).steps(0, to)
    same(loop.steps(at, to).everything(), whole.everything(), f"resumed at {at}")


class Killed(BaseException):
    """Stands for a kill: no handler is to catch it."""


@contextmanager
def dying(count: int, error: Callable[[], BaseException]) -> Iterator[list[int]]:
    """The count-th write, sync or rename from here on raises, and all that follow."""
    calls: list[int] = []

    def wrapped(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) >= count:
                raise error()
            return call(*args, **kwargs)

        return counted

    with swapped(os, "fsync", wrapped(os.fsync)), swapped(os, "replace", wrapped(os.replace)):
        yield calls


@tried("P1", "plain loop")
def p1(place: Place) -> None:
    for count in range(1, 99):
        folder = looped(place, 2)
        bound = Loop(DPS(stage=2)).steps(0, 4).bound
        with dying(count, Killed) as calls, suppress(Killed):
            save_checkpoint(folder / "checkpoint-4", bound, position={})
        found = newest_complete(folder)
        assert found is not None, "no checkpoint is left"
        goes_on(folder)
        shutil.rmtree(folder)
        if len(calls) < count:
            equal(found.name, "checkpoint-4", "the newest checkpoint")
            return
    raise AssertionError("it never came to its end")


def _harmed(place: Place, harm: Callable[[Path], object], names: list[str]) -> None:
    """A Trainer whose newest checkpoint was harmed goes on from the one before it."""
    whole = place.trainer(recipe=RECIPE)
    whole.train()
    stopped_trainer(place, step=5, save_strategy="steps", save_steps=3)
    folder = place / "trainer"
    for name in names:
        kept = (folder / "checkpoint-5" / name).read_bytes()
        harm(folder / "checkpoint-5" / name)
        if newest_complete(folder) != folder / "checkpoint-3":
            raise Wrong(f"{name} is harmed, and the checkpoint counts as whole")
        (folder / "checkpoint-5" / name).write_bytes(kept)
    harm(folder / "checkpoint-5" / names[0])
    again = place.trainer(recipe=RECIPE)
    again.train(resume_from_checkpoint=True)
    same(weights(again.model), weights(whole.model), "weights")


PARTS = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors",
         "trainer_state.json", "holdfast.json", "holdfast.safetensors"]  # fmt: skip


@tried("P2", "Trainer")
def p2_trainer(place: Place) -> None:
    _harmed(place, Path.unlink, PARTS)


@tried("P2", "plain loop")
def p2(place: Place) -> None:
    folder = looped(place, 2, 4)
    for path in sorted((folder / "checkpoint-4").iterdir()):
        kept = path.read_bytes()
        path.unlink()
        refuses(lambda: load_checkpoint(folder / "checkpoint-4", Loop(DPS(stage=2)).bound))
        goes_on(folder)
        path.write_bytes(kept)


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)


@tried("P3", "plain loop")
def p3(place: Place) -> None:
    folder, draw = looped(place, 2, 4), random.Random(0)
    for path in sorted((folder / "checkpoint-4").iterdir()):
        kept = path.read_bytes()
        for _ in range(20):
            flip(path, draw.randrange(len(kept)), draw.randrange(8))
            if not damage(folder / "checkpoint-4"):
                raise Wrong(f"a flipped bit in {path.name} is not seen")
            path.write_bytes(kept)
        flip(path, len(kept) // 2)
        goes_on(folder)
        path.write_bytes(kept)


@tried("P3", "Trainer")
def p3_trainer(place: Place) -> None:
    _harmed(place, lambda path: flip(path, path.stat().st_size // 2), PARTS)


@tried("P4", "plain loop")
def p4(place: Place) -> None:
    folder = looped(place, 2, 4)
    for path in sorted((folder / "checkpoint-4").iterdir()):
        kept = path.read_bytes()
        for length in [*range(0, len(kept), 1 + len(kept) // 40), len(kept) - 1]:
            path.write_bytes(kept[:length])
            if not damage(folder / "checkpoint-4"):
                raise Wrong(f"{path.name} of {length} bytes counts as whole")
        goes_on(folder)
        path.write_bytes(kept)


@tried("P4", "Trainer")
def p4_trainer(place: Place) -> None:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    _harmed(place, cut, PARTS)


@tried("P16", "plain loop")
def p16(place: Place) -> None:
    at = looped(place, 2) / "checkpoint-2"
    for name in ("loop.json", "holdfast.json"):
        text = (at / name).read_text()
        for schema in (99, 0, None):
            (at / name).write_text(json.dumps(json.loads(text) | {"schema": schema}))
            commit(at)
            loop = Loop(DPS(stage=2))
            before = loop.everything()
            refuses(lambda b=loop.bound: load_checkpoint(at, b), "schema")  # type: ignore[misc]
            same(loop.everything(), before)
        (at / name).write_text(text)


@tried("P17", "plain loop")
def p17(place: Place) -> None:
    for method in (DPS(stage=3, drop=0.5), DPS(stage=3, drop=0.5, mix=True)):
        whole = Loop(method).steps(0, 7).everything()
        for step in range(7):
            at = place / f"checkpoint-{step}"
            save_checkpoint(at, Loop(method).steps(0, step).bound, position={})
            loop = Loop(method, seed=5)
            load_checkpoint(at, loop.bound)
            same(loop.steps(step, 7).everything(), whole, f"{method.name} resumed at {step}")


@tried("P17", "Trainer")
def p17_trainer(place: Place) -> None:
    more: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = place.trainer(recipe=RECIPE, **more)
    whole.train()
    at = stopped_trainer(place, step=3, **more)
    again = place.trainer(recipe=RECIPE, **more)
    again.train(resume_from_checkpoint=str(at))
    same(weights(again.model), weights(whole.model), "weights")


@tried("P18", "plain loop")
def p18(place: Place) -> None:
    folder = looped(place, 1, 2, 3, 4)
    (folder / "checkpoint-9").mkdir()  # never written to its end
    rotate(folder / "checkpoint-4", 2, best=str(folder / "checkpoint-1"))
    left = {p.name for p in folder.iterdir()}
    equal(left, {"checkpoint-1", "checkpoint-4"}, "checkpoints that are kept")
    save_checkpoint(folder / "checkpoint-5", Loop(DPS(stage=2)).steps(0, 5).bound, position={},
                    keep=1)  # fmt: skip
    equal({p.name for p in folder.iterdir()}, {"checkpoint-5"}, "checkpoints that are kept")
    goes_on(folder)
