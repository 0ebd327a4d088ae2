"""A fine-tuned model as what changed in its base: one safetensors file that serves both ways.

Weights are compared by their bits, as integers of their width (32 of float32, 16 of bfloat16, …):

    d = base XOR tuned        tuned = base XOR d        base = tuned XOR d

so one d makes either model of the other, exactly, in every dtype, NaN and −0 included. Where few
entries of a tensor moved, the file holds their places (`gaps:NAME`: how far each lies behind the
one before, in the smallest unsigned integers that hold all gaps) and d there (`xor:NAME`); where
that would be larger, all of d (`xor:NAME` alone); of a tensor that did not move, nothing. What only
one of the models has, such as a head, or has in another shape or dtype, is held whole
(`base:NAME`, `tuned:NAME`), and so are files beside the weights that differ (`file:SHA-256`, zlib).

The header names both models with a SHA-256 of their weights: over one line a tensor, in order of
name, of its name, dtype, shape and the SHA-256 of its bytes, however they are spread over files.
Nothing is made of other weights than those, and what is made is read again and has to hash to what
was saved. At work is one tensor at a time, in a few copies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.errors import Refused
from holdfast.files import MODEL, inflated, sync_folder
from holdfast.training.manifest import commit
from holdfast.training.tensors import bytes_of, write_tensors
from holdfast.training.weights import (
    BITS,
    Weights,
    alike,
    belongs,
    beside_in,
    bits,
    contents_of,
    digest,
    open_model,
    open_tensors,
    prefixes,
    print_of,
)

SCHEMA, HEADER = 1, "holdfast.delta"
LARGEST = 1 << 30  # bytes of a file beside the weights

Side = Literal["base", "tuned"]
Rule = Literal["refuse", "sum", "mean", "last"]


class Size(NamedTuple):
    """How much of a model a delta file holds."""

    moved: int  # entries whose bits changed
    entries: int  # of all the tuned model's tensors
    whole: int  # tensors that only one of the models has
    file: int  # bytes of the delta file
    model: int  # bytes of the tuned model's weights


@dataclass(frozen=True)
class Change:
    """What leads from a base to a tuned model, and back."""

    about: dict[Side, dict[str, Any]]  # name, sha256, prefix of names, files (name: SHA-256)
    moved: Collection[str]  # names, in the base, of tensors that may have changed
    difference: Callable[[str, Tensor], Tensor]  # d of one, flat, given its name and spec
    whole: dict[Side, Weights]  # what only one side has
    content: Callable[[str], bytes | None]  # a file's, by its SHA-256, if it is held

    def checked(self, weights: Weights, side: Side, folder: Path) -> Weights:
        """`weights`, or `Refused` where they are not those of that side."""
        if digest(weights) != self.about[side]["sha256"]:
            meant = self.about[side]["name"]
            raise Refused(f"other weights than those of {meant!r}, which the delta is of",
                          where=str(folder), remedy=f"name {meant!r} as it was then")  # fmt: skip
        return weights

    def made(self, source: Weights, to: Side) -> Weights:
        """The weights of side `to`, of those of the other side."""
        of: Side = "base" if to == "tuned" else "tuned"
        old, new = self.about[of]["prefix"], self.about[to]["prefix"]
        kept = (n for n in source.specs if n not in self.whole[of].specs)
        origin = {new + name.removeprefix(old): name for name in kept}

        def read(name: str) -> Tensor:
            if name in self.whole[to].specs:
                return self.whole[to].read(name)
            tensor = source.read(origin[name])
            known = name if to == "base" else origin[name]
            if known not in self.moved:
                return tensor
            made = bits(tensor) ^ self.difference(known, tensor)
            return made.view(tensor.dtype).view_as(tensor)

        specs = {name: source.specs[before] for name, before in origin.items()}
        return Weights({**specs, **self.whole[to].specs}, read)


# --- what can be done -----------------------------------------------------------------------------


def save(base: Path, tuned: Path, file: Path) -> Size:
    """Write to `file` what changed between the models in two folders.

    Names need not agree: where one model calls `bert.x` what the other calls `x`, that prefix is
    found and noted. `Refused` where a folder holds no safetensors, or the models share no tensor.
    """
    one, two = open_model(base), open_model(tuned)
    before, after = prefixes(one.specs, two.specs)
    pairs = {n: m for n in one.specs
             if n.startswith(before) and (m := after + n.removeprefix(before)) in two.specs
             and alike(one.specs[n], two.specs[m])}  # fmt: skip
    beside = {"base": beside_in(base), "tuned": beside_in(tuned)}
    if not pairs:
        raise Refused(f"has no tensor that {base} has", where=str(tuned),
                      remedy="name the model that it was fine-tuned of as BASE")  # fmt: skip
    about: dict[Side, dict[str, Any]] = {
        "base": _about(base, one, before, beside["base"]),
        "tuned": _about(tuned, two, after, beside["tuned"]),
    }
    change = Change(
        about,
        pairs,
        lambda name, _: bits(one.read(name)) ^ bits(two.read(pairs[name])),
        {"base": one.only(one.specs.keys() - pairs.keys()),
         "tuned": two.only(two.specs.keys() - set(pairs.values()))},
        contents_of([(base, beside["base"]), (tuned, beside["tuned"])]),
    )  # fmt: skip
    return _write(file, change, one)


def apply(base: Path, file: Path, out: Path) -> None:
    """Make the tuned model of its base in `out`, a new folder, exact to the bit.

    `out` is there once it is whole: one `model.safetensors`, however many files the tuned model
    was in, and its configuration, tokenizer and other files. `Refused` with another base.
    """
    _make(base, file, out, "tuned")


def revert(tuned: Path, file: Path, out: Path) -> None:
    """Make the base model of the tuned one in `out`, a new folder, exact to the bit."""
    _make(tuned, file, out, "base")


def merge(base: Path, files: Sequence[Path], out: Path, *, on_conflict: Rule = "refuse") -> Size:
    """Write one delta of several of the same base, whose folder is `base`, to a new file.

    An entry that one file moved, or several to the same bits, is moved there. Where files differ,
    on_conflict: `refuse`; `sum`: the base plus the sum of their differences to it, also where they
    agree; `mean`: the mean of the values that it was moved to; `last`: the last file's. Sums are
    taken in float64 and rounded once. Tensors that several hold whole must agree, or the `last` is
    taken; a tensor goes if all drop it; files beside the weights are the last one's.
    """
    if out.exists():  # one of the deltas, where OUT was forgotten
        raise Refused("is there already", where=str(out), remedy="name a new file, the last one")
    one = open_model(base)
    changes = [open_delta(file) for file in files]
    for change in changes:
        change.checked(one, "base", base)
    if len({(c.about["base"]["prefix"], c.about["tuned"]["prefix"]) for c in changes}) > 1:
        raise Refused("their models name the same weights differently", where=str(files[0]),
                      remedy="merge deltas of models of one class")  # fmt: skip
    before, after = (changes[0].about[side]["prefix"] for side in ("base", "tuned"))
    heads: dict[str, Weights] = {}
    for change, file in zip(changes, files, strict=True):
        mine = change.whole["tuned"]
        for name in mine.specs:
            twice = name in heads and on_conflict != "last"
            if twice and print_of(heads[name], name) != print_of(mine, name):
                raise Refused(f"{name} is another than in a file before", where=str(file),
                              remedy="say --on-conflict last to take this one")  # fmt: skip
            heads[name] = mine
    gone = {n for n in one.specs
            if after + n.removeprefix(before) in heads
            or all(n in c.whole["base"].specs for c in changes)}  # fmt: skip
    moved = {n for c in changes for n in c.moved}
    if torn := sorted(moved & gone):
        raise Refused(f"{torn[0]} is changed by one file and replaced by another",
                      where=str(files[0]), remedy="merge models of one shape")  # fmt: skip

    def difference(name: str, spec: Tensor) -> Tensor:
        found = [c.difference(name, spec) for c in changes if name in c.moved]
        return _merged(one.read(name), found, on_conflict, name)

    beside = {name: sha for c in changes for name, sha in c.about["tuned"]["files"].items()}
    plain = _about(base, one, before, beside_in(base))
    tuned = {"name": "+".join(c.about["tuned"]["name"] for c in changes), "prefix": after,
             "sha256": "", "files": beside}  # fmt: skip
    own = contents_of([(base, plain["files"])])
    merged = Change(
        {"base": plain, "tuned": tuned},
        moved,
        difference,
        {"base": one.only(gone),
         "tuned": Weights({n: heads[n].specs[n] for n in heads}, lambda n: heads[n].read(n))},
        lambda sha: next((c for each in (*(c.content for c in changes), own)
                          if (c := each(sha)) is not None), None),
    )  # fmt: skip
    tuned["sha256"] = digest(merged.made(one, "tuned"))
    return _write(out, merged, one)


# --- the file -------------------------------------------------------------------------------------


def _write(file: Path, change: Change, base: Weights) -> Size:
    """Twice over the tensors: what is to be written, and then one at a time."""
    if not file.parent.is_dir() or file.is_dir():
        raise Refused("is a folder" if file.is_dir() else "no such folder",
                      where=str(file if file.is_dir() else file.parent),
                      remedy="name a file in a folder that is there")  # fmt: skip
    if file.exists():
        open_delta(file)  # nothing else is written over, such as a model
    specs, moved = dict[str, Tensor](), 0
    for name in change.moved:
        d = change.difference(name, base.specs[name])
        moved += int(d.count_nonzero())
        specs |= {f"{kind}:{name}": t.to("meta") for kind, t in _encoded(d).items()}
    for side, weights in change.whole.items():
        specs |= {f"{side}:{name}": spec for name, spec in weights.specs.items()}
    one, two = (change.about[side]["files"] for side in ("base", "tuned"))
    packed: dict[str, Tensor] = {}
    for name in {n for n in one.keys() | two.keys() if one.get(n) != two.get(n)}:
        for sha in {side[name] for side in (one, two) if name in side}:
            if (content := change.content(sha)) is None:
                raise Refused(f"its {name} is not there any more", where=str(file))
            pressed = np.frombuffer(zlib.compress(content, 9), dtype=np.uint8).copy()
            packed[f"file:{sha}"] = torch.from_numpy(pressed)

    def read(key: str) -> Tensor:
        kind, _, name = key.partition(":")
        if kind == "file":
            return packed[key]
        if kind in ("base", "tuned"):
            return change.whole[kind].read(name)  # type: ignore[index]
        return _encoded(change.difference(name, base.specs[name]))[kind]

    header = json.dumps({"schema": SCHEMA, **change.about}, sort_keys=True)
    # The tuned model may be deleted for it, and what it is written over was a delta, too.
    size, _ = write_tensors(
        file, specs | packed, read=read, metadata={HEADER: header}, durable=True
    )
    result = change.made(base, "tuned").specs.values()
    whole = sum(len(weights.specs) for weights in change.whole.values())
    return Size(moved, sum(t.numel() for t in result), whole, size, sum(t.nbytes for t in result))


def open_delta(file: Path) -> Change:
    """What a delta file says; `Refused` where it is none, or of a later format."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise Refused("not an ordinary file", where=str(file), remedy="name a delta file")
    held, metadata = open_tensors([file])
    try:
        about = json.loads(metadata[HEADER])
        if about["schema"] != SCHEMA:
            raise Refused(f"format {about['schema']}, this holdfast reads {SCHEMA}",
                          where=str(file), remedy="install a later one")  # fmt: skip
        for side in (about["base"], about["tuned"]):
            texts = [side["name"], side["sha256"], side["prefix"], *side["files"].values()]
            # Names of files become paths.
            if not all(isinstance(text, str) for text in texts) or not all(
                belongs(Path(name)) and Path(name).name == name for name in side["files"]
            ):
                raise TypeError
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise Refused("is no delta file", where=str(file),
                      remedy="`holdfast delta save` writes one") from None  # fmt: skip
    damaged = Refused("is damaged", where=str(file), remedy="save it again")

    def difference(name: str, spec: Tensor) -> Tensor:
        d = held.read(f"xor:{name}")
        kind = BITS[spec.element_size()]
        if f"gaps:{name}" in held.specs:
            if (gaps := held.read(f"gaps:{name}")).is_floating_point():
                raise damaged
            at = torch.from_numpy(gaps.numpy().astype(np.int64).cumsum())
            within = not len(at) or 0 <= int(at.min()) <= int(at.max()) < spec.numel()
            if d.dtype != kind or d.shape != at.shape or not within:
                raise damaged
            d = torch.zeros(spec.numel(), dtype=kind).index_put((at,), d)
        if d.dtype != kind or d.shape != (spec.numel(),):
            raise damaged
        return d

    def content(sha: str) -> bytes | None:
        if (key := f"file:{sha}") not in held.specs:
            return None
        found = inflated(bytes_of(held.read(key)), LARGEST)
        if found is None or hashlib.sha256(found).hexdigest() != sha:
            raise damaged
        return found

    def those(kind: str) -> Weights:
        mine = {k.partition(":")[2]: s for k, s in held.specs.items() if k.startswith(f"{kind}:")}
        return Weights(mine, lambda name: held.read(f"{kind}:{name}"))

    whole: dict[Side, Weights] = {"base": those("base"), "tuned": those("tuned")}
    return Change(about, those("xor").specs.keys(), difference, whole, content)


def _encoded(d: Tensor) -> dict[str, Tensor]:
    """A flat difference as the file holds it: nothing, `gaps` and `xor`, or all of it as `xor`."""
    at = d.numpy().nonzero()[0]
    if not len(at):
        return {}
    gaps = np.diff(at, prepend=0)
    gaps = gaps.astype(np.min_scalar_type(gaps.max()))
    if gaps.nbytes + len(at) * d.element_size() >= d.nbytes:
        return {"xor": d}
    return {"gaps": torch.from_numpy(gaps), "xor": d[torch.from_numpy(at)]}


def _merged(base: Tensor, found: Sequence[Tensor], rule: Rule, name: str) -> Tensor:
    """One difference of several to the same tensor, by the rule of `merge`."""
    last = torch.zeros_like(bits(base))
    for d in found:
        last = torch.where(d != 0, d, last)
    if rule == "last" or len(found) == 1:
        return last
    moves = torch.stack([d != 0 for d in found]).sum(0)
    differ = torch.stack([(d != 0) & (d != last) for d in found]).any(0)
    if (count := int(differ.sum())) and (rule == "refuse" or not base.is_floating_point()):
        remedy = "say --on-conflict sum, mean or last" if base.is_floating_point() else (
            f"entries of {base.dtype} are not added: say --on-conflict last")  # fmt: skip
        raise Refused(f"{count:,} entries are moved by several files, to different values",
                      where=name, remedy=remedy)  # fmt: skip
    at = differ if rule == "mean" else moves > 1
    if rule == "refuse" or not base.is_floating_point() or not at.any():
        return last
    start = base.reshape(-1)[at].double()
    total = torch.zeros_like(start)
    for d in found:
        value = (bits(base) ^ d).view(base.dtype)[at].double()
        total += torch.where(d[at] != 0, value - start, 0.0)
    value = (start + (total / moves[at] if rule == "mean" else total)).to(base.dtype)
    if wrong := int((~value.double().isfinite()).sum()):  # such as a sum beyond float16
        raise Refused(f"{wrong:,} entries are NaN or infinite as a {rule}", where=name,
                      remedy="say --on-conflict last, or leave out a file")  # fmt: skip
    last[at] = bits(base)[at] ^ bits(value)
    return last


def _about(folder: Path, weights: Weights, prefix: str, files: dict[str, str]) -> dict[str, Any]:
    home = folder.resolve()  # of a run's `final`, the run
    name = home.parent.name if home.name in ("final", "model") else home.name
    return {"name": name, "sha256": digest(weights), "prefix": prefix, "files": files}


def _make(source: Path, file: Path, out: Path, to: Side) -> None:
    """A folder of side `to`, of the other side's."""
    change = open_delta(file)
    if out.name in ("", ".."):  # the folder one is in, as of a variable that is not set
        raise Refused("names no folder of its own", where=str(out), remedy="name a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused("is not empty", where=str(out), remedy="name a new folder")
    weights = change.checked(open_model(source), "base" if to == "tuned" else "tuned", source)
    made = change.made(weights, to)
    own = contents_of([(source, beside_in(source))])
    unfinished = out.with_name(f".{out.name}-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        for name, sha in change.about[to]["files"].items():
            content = own(sha) if (held := change.content(sha)) is None else held
            if content is None:
                raise Refused(f"its {name} is not the one that {file.name} was saved beside",
                              where=str(source), remedy="put that one back")  # fmt: skip
            (unfinished / name).write_bytes(content)
        written = write_tensors(
            unfinished / MODEL, made.specs, read=made.read, metadata={"format": "pt"}
        )
        if digest(open_model(unfinished)) != change.about[to]["sha256"]:
            raise Refused("is damaged: it makes other weights than were saved", where=str(file),
                          remedy="save it again")  # fmt: skip
        commit(unfinished, {MODEL: written})
        unfinished.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
