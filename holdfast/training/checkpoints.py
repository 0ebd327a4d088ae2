"""The state of a `Bound` beside a checkpoint, and the manifest that makes a checkpoint count.

State is safetensors for tensors and JSON for the rest. A checkpoint is whole when its manifest,
which is written last and durably, names size and SHA-256 of every file that lies there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from holdfast.bound import Bound
from holdfast.errors import Refused
from holdfast.files import sync_folder, write_text_atomic

LOG = logging.getLogger("holdfast")
TENSORS, META, MANIFEST = "holdfast.safetensors", "holdfast.json", "manifest.json"


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


# --- whole or not ---------------------------------------------------------------------------------


def commit(folder: str | Path) -> None:
    """Declare a folder whole as it lies there: its files, then its manifest, outlive a crash."""
    folder = Path(folder)
    inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST]
    files = {}
    for path in inside:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    for home in {folder, *(path.parent for path in inside)}:
        sync_folder(home)
    write_text_atomic(folder / MANIFEST, _manifest(files))
    sync_folder(folder.parent)


def _manifest(files: Mapping[str, Any]) -> str:
    """The text of a manifest, which vouches for itself too."""
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"schema": 1, "sha256": digest, "files": files}, indent=1)


def damage(folder: str | Path) -> str | None:
    """What is wrong with a folder that `commit` should have declared whole; None if nothing is."""
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, sha) in files.items():
        try:
            with (folder / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{name} has {found} bytes of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != sha:
                    return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest_complete(folder: str | Path, tell: Callable[[str], None] = LOG.warning) -> Path | None:
    """The latest whole checkpoint in a Trainer's output folder.

    tell: is given a line on each later one that is passed over. Trainer itself would go on from
    it, with other weights (faults P2, P3), or stop (P4).
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        tell(f"{checkpoint.name} is passed over: {wrong}")
    return None


def rotate(newest: Path, limit: int | None, *, best: str | None = None) -> None:
    """Keep `limit` checkpoints, among them the newest, which is whole, and the best.

    Those committed first go first, and before them those that never were.
    """

    def committed(checkpoint: Path) -> float:
        manifest = checkpoint / MANIFEST
        return manifest.stat().st_mtime if manifest.exists() else 0.0

    if limit is not None and limit > 0:
        found = _checkpoints(newest.parent)
        spare = [p for p in found if p != newest and (best is None or p != Path(best))]
        for old in sorted(spare, key=committed)[: max(len(found) - limit, 0)]:
            shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by their step."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))
