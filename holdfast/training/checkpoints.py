"""The state of a `Bound` beside a checkpoint: safetensors for tensors, JSON for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from holdfast.bound import Bound
from holdfast.errors import Refused
from holdfast.files import write_text_atomic

TENSORS, META = "holdfast.safetensors", "holdfast.json"


def save_state(bound: Bound, folder: str | Path, *, plan: Mapping[str, Any] | None = None) -> None:
    """Write the state into a folder; the JSON comes last and marks it complete.

    plan: the settings of the training, which `differences` compares on resume.
    """
    state = bound.state_dict()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Two names may share memory (an anchor that has not moved): safetensors wants them apart.
    tensors = {k: t.detach().cpu().clone().contiguous() for k, t in state["tensors"].items()}
    save_file(tensors, folder / TENSORS)
    meta = {**state["meta"], "plan": dict(plan or {})}
    write_text_atomic(folder / META, json.dumps(meta, indent=1))


def load_state(bound: Bound, folder: str | Path) -> None:
    """Take up the state in a folder; `Refused` where there is none or it does not fit."""
    bound.load_state_dict(read_state(Path(folder)))


def differences(folder: str | Path, plan: Mapping[str, Any]) -> list[str]:
    """In which settings a checkpoint's training differs from `plan`, in words."""
    before = _read_meta(Path(folder)).get("plan", {})
    now = json.loads(json.dumps(dict(plan)))
    return [f"{k} was {before[k]}, is {now.get(k)}" for k in before if before[k] != now.get(k)]


def read_state(folder: Path) -> dict[str, Any]:
    """The saved state as `Bound.load_state_dict` takes it."""
    return {"meta": _read_meta(folder), "tensors": load_file(folder / TENSORS)}


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / META).is_file() or not (folder / TENSORS).is_file():
        raise Refused(
            f"{META} or {TENSORS} is missing",
            where=str(folder),
            remedy="resume from a checkpoint that was saved with a recipe",
        )
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta


def newest_complete(folder: str | Path) -> Path | None:
    """The latest checkpoint in a Trainer's output folder that was saved to its end."""
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    complete = [p for p in found if _complete(p)]
    return complete[-1] if complete else None


def _complete(checkpoint: Path) -> bool:
    """Whether Trainer wrote its last file, and none before it has gone since.

    Without one of these Trainer would go on all the same, with other weights (faults P2).
    """
    needed = (TENSORS, META, "optimizer.pt", "scheduler.pt", "rng_state.pth")
    if not all((checkpoint / f).is_file() for f in needed) or not any(checkpoint.glob("*model*")):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # killed while it was written
        return False
    return True
