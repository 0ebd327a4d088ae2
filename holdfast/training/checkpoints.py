"""The state of a `Bound` beside a checkpoint: safetensors for tensors, JSON for the rest.

State that changes from step to step goes into one file. Each larger slot of a method's state
(anchors, Fisher information, replayed rows, Mix's start weights) has a file of its own; while the
slot is unchanged, the next checkpoint gets a hard link to that file: stored once, and every folder
is still complete wherever it is moved.
"""

from __future__ import annotations

import json
import os
import re
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.engine.peft import adapter_weights
from holdfast.engine.state import check_fit, check_schema, describe, saved_by
from holdfast.errors import Refused, printable
from holdfast.files import write_text_atomic
from holdfast.ops import distributed
from holdfast.training.manifest import listed
from holdfast.training.tensors import write_tensors

TENSORS, META = "holdfast.safetensors", "holdfast.json"
ADAPTERS = "holdfast_adapters.safetensors"  # beside weights that they are folded into
BEFORE = "holdfast_lora.safetensors"  # its name when there was only LoRA
KEPT = "holdfast-{:02d}.safetensors"  # one slot each; its keys say which
OURS = re.compile(r"holdfast(-\d+)?\.safetensors")
WAITS = 30  # tenths of a second for another rank's file to be seen
KEPT_FROM = 1 << 16  # bytes from which a slot gets a file of its own

Files = dict[str, tuple[int, str]]  # name -> size and SHA-256


@dataclass(frozen=True)
class _Kept:
    """A slot as last written or read: while nothing here has changed, its file is up to date."""

    tensors: dict[str, tuple[weakref.ref[Tensor], int, int]]  # name -> tensor, version, sum of bits
    path: Path
    size: int
    sha: str
    mark: tuple[int, int]  # inode and time: the file is still the one that was written

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], path: Path, size: int, sha: str) -> _Kept:
        now = {k: (weakref.ref(t), _version(t), _sum(t)) for k, t in tensors.items()}
        return cls(now, path, size, sha, _mark(path))

    def holds(self, slot: Mapping[str, Tensor]) -> bool:
        if self.tensors.keys() != slot.keys():
            return False
        for name, tensor in slot.items():
            before, version, _ = self.tensors[name]
            if before() is not tensor or version != _version(tensor) or version < 0:
                return False
        # Writing through `.data` does not bump the version, so the content is compared as well.
        return all(self.tensors[name][2] == _sum(tensor) for name, tensor in slot.items())


# Which slots of a `Bound` lie in which files; a cache, not part of its state.
_KEPT: weakref.WeakKeyDictionary[Bound, dict[str, _Kept]] = weakref.WeakKeyDictionary()


def save_state(
    bound: Bound,
    folder: str | Path,
    *,
    more: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Files:
    """Write the state into a folder; the JSON comes last and marks it complete.

    more: what else to keep in the JSON, for `kept`. state: the result of `bound.state_dict()`, if
    every rank has already called it. Returns size and SHA-256 of the tensor files, so that `commit`
    need not read them again.
    """
    state = bound.state_dict() if state is None else state
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)  # of a checkpoint being overwritten
    slots, rest = _slots(state["tensors"])
    before, kept = _KEPT.get(bound, {}), {}
    files: Files = {TENSORS: write_tensors(folder / TENSORS, rest)}
    for number, (slot, tensors) in enumerate(sorted(slots.items())):
        path, old = folder / KEPT.format(number), before.get(slot)
        if old is None or not old.holds(tensors) or not _link(old, path):
            old = _Kept.of(tensors, path, *write_tensors(path, tensors))
        kept[slot] = replace(old, path=path)
        files[path.name] = (old.size, old.sha)
    _KEPT[bound] = kept
    for stale in folder.glob("holdfast-*.safetensors"):  # of a checkpoint being overwritten
        if stale.name not in files:
            stale.unlink()
    meta = {**state["meta"], "files": sorted(files), **(more or {})}
    write_text_atomic(folder / META, json.dumps(meta, indent=1, default=str))
    return files


def _slots(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The larger slots by ``method/kind/slot``, and all other tensors."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        slots.setdefault("/".join(key.split("/", 3)[:3]), {})[key] = tensor
    large = {
        slot: held
        for slot, held in slots.items()
        if "/" in slot and sum(t.numel() * t.element_size() for t in held.values()) >= KEPT_FROM
    }
    return large, {
        key: t for slot, held in slots.items() if slot not in large for key, t in held.items()
    }


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bits as whole numbers, modulo 2^64: one pass over memory, no copy."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype is torch.bool:
        return int(flat.sum())
    return int(flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).sum())


def _version(tensor: Tensor) -> int:
    """How often the tensor was written in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _mark(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns


def _link(old: _Kept, path: Path) -> bool:
    """Hard-link a slot's file to `path`; False if it is gone or changed, or cannot be linked."""
    try:
        if old.path.lstat().st_size != old.size or _mark(old.path) != old.mark:
            return False
        if old.path == path:
            return True
        path.unlink(missing_ok=True)
        os.link(old.path, path)
    except OSError:
        return False
    return True


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """`Refused` where a state is of another form than ours: its checksums anybody can make."""
    try:
        yield
    except (Refused, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        said = printable(f"{type(error).__name__}: {error}")[:200]
        raise Refused(f"its state is not of the form that holdfast writes ({said})",
                      where=str(folder), remedy="load the one before it, into a model and an "
                      "optimizer made anew") from error  # fmt: skip


def load_state(bound: Bound, folder: str | Path, *, exact: bool = True) -> None:
    """Load the state in a folder; `Refused` if there is none or it does not fit.

    exact: see `Bound.load_state_dict`.
    """
    folder = Path(folder)
    with reading(folder):
        meta, files = _read(folder)
        try:
            bound.load_state_dict({"meta": meta, "tensors": _together(files)}, exact=exact)
        except Refused as error:
            raise error.within(str(folder)) from None
    # The next checkpoint may link to the files that were read here.
    names, recorded = {frozenset(held): name for name, held in files.items()}, listed(folder)
    slots, _ = _slots(bound.state_dict()["tensors"])
    _KEPT[bound] = {
        slot: _Kept.of(tensors, folder / name, *recorded[name])
        for slot, tensors in slots.items()
        if (name := names.get(frozenset(tensors))) in recorded
    }


def require_shared(folder: Path, names: Sequence[str], device: torch.device) -> None:
    """`Refused`, on every rank, where rank 0 does not see the files that all ranks have written.

    Such a checkpoint could not be loaded: each rank would find its own files only.
    """
    if distributed.world() == 1:
        return
    missing = list[int]()
    for _ in range(WAITS if distributed.rank() == 0 else 0):
        missing = [i for i, name in enumerate(names) if not (folder / name).is_file()]
        if not missing:
            break
        os.listdir(folder)  # a network file system may know of a new file only after a while
        time.sleep(0.1)
    told = [int(i in missing) for i in range(len(names))]
    gone = [n for n, one in zip(names, distributed.gather(told, device)[0], strict=True) if one]
    if gone:
        raise Refused(f"rank 0 does not see {', '.join(gone)}", where=str(folder),
                      remedy="save to a folder that all ranks share")  # fmt: skip


def save_adapters(model: nn.Module, folder: str | Path, *, base: bool = False) -> Files:
    """Write a model's adapters as they are, if it has any, with `base` also what is below them."""
    held = adapter_weights(model, base=base)
    if not held:
        return {}
    return {ADAPTERS: write_tensors(Path(folder) / ADAPTERS, held)}


def load_adapters(model: nn.Module, folder: str | Path, *, base: bool = False) -> None:
    """Put into a prepared model what `save_adapters` wrote of one like it."""
    held, older = adapter_weights(model, base=base), Path(folder) / BEFORE
    try:
        saved = load_file(older if older.is_file() else Path(folder) / ADAPTERS)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{ADAPTERS} cannot be read ({error})", where=str(folder),
                      remedy="go on with the recipe it was saved with") from None  # fmt: skip
    check_fit(describe(saved), describe(held))
    for name, tensor in held.items():
        tensor.copy_(saved[name])


def saved_with(folder: str | Path, methods: Sequence[Method]) -> bool:
    """Whether the state in a folder can be loaded by these methods."""
    return saved_by(_read_meta(Path(folder)), methods)


def kept(folder: str | Path, key: str) -> Any:
    """A value in the JSON of a state: its `plan`, or what `save_state` was given `more`."""
    return _read_meta(Path(folder)).get(key)


def read_state(folder: Path) -> dict[str, Any]:
    """The saved state as `Bound.load_state_dict` takes it."""
    meta, files = _read(folder)
    return {"meta": meta, "tensors": _together(files)}


def _together(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for held in files.values() for key, tensor in held.items()}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The JSON of a state, and the tensors of each of its files."""
    meta = _read_meta(folder)
    files: dict[str, dict[str, Tensor]] = {}
    for name in meta.get("files", [TENSORS]):
        if not isinstance(name, str) or not OURS.fullmatch(name):
            raise Refused(f"{META} names {name!r}, no file of a state", where=str(folder))
        try:
            files[name] = load_file(folder / name)
        except FileNotFoundError:
            raise Refused(f"{name} is missing", where=str(folder), remedy=AGAIN) from None
        except (SafetensorError, OSError) as error:
            raise Refused(f"{name} cannot be read ({error})", where=str(folder)) from None
    return meta, files


AGAIN = "resume from a checkpoint that was saved with a recipe"


def _read_meta(folder: Path) -> dict[str, Any]:
    if not (folder / META).is_file() or not (folder / TENSORS).is_file():
        raise Refused(f"{META} or {TENSORS} is missing", where=str(folder), remedy=AGAIN)
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    check_schema(meta, META, str(folder))
    return meta
