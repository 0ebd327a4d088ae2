"""Which part of a network each parameter is in: embeddings, layer k of n, or head.

Works on any `nn.Module`, by its structure and never by the name of its class (`stacks.py` finds
the repeated blocks):

- A block is "layer.k". What is registered before the blocks is "embeddings", what is registered
  after them is "head", unless its name says otherwise (`rel_embeddings`, `classifier`).
- Two stacks, one of them named a decoder: "encoder.layer.k" and "decoder.layer.k" on one scale of
  depth; what follows the encoder's blocks (its final norm) joins its last layer.
- Other stacks stand side by side (the towers of CLIP), each on a scale from 0 to 1:
  "text_model.layer.k", "vision_model.layer.k".
- No repeated blocks: the modules that own parameters, in order of registration, a norm joining
  what it follows. The first is "embeddings", the last "head", the others are layers; a single
  module is "head".

A tied weight counts once, under the name that is registered first: GPT-2's output matrix is in
"embeddings".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from holdfast.errors import Refused, nearest
from holdfast.network.stacks import (
    Stack,
    find_stacks,
    inside,
    is_head,
    is_norm,
    is_serial,
    prefixes,
)

EMBEDDINGS, HEAD = "embeddings", "head"

# Path components that wrappers insert. torch.compile, activation checkpointing, FSDP1 and Fabric
# use unmistakable names; PEFT moves a layer that it adapts below one of the last two.
_COMPONENTS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_COMPONENTS |= {"_forward_module", "base_layer", "original_module"}


def canonical(name: str) -> str:
    """A parameter's name without what wrappers added, so that it is the same key everywhere.

    Removed: compile, checkpoint, FSDP1 and Fabric components anywhere, leading `module.` (DDP),
    leading `base_model.model.` (PEFT), and PEFT's `base_layer` and `original_module`, which hold
    the weights the layer had before. Adapter names stay: two adapters are two parameters.

    >>> canonical("module._orig_mod.base_model.model.bert.query.base_layer.weight")
    'bert.query.weight'
    >>> canonical("base_model.model.bert.query.lora_A.default.weight")
    'bert.query.lora_A.default.weight'
    """
    name = ".".join(piece for piece in name.split(".") if piece not in _COMPONENTS)
    shorter = name.removeprefix("module.").removeprefix("base_model.model.")
    return name if shorter == name else canonical(shorter)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{canonical name: parameter} in order of registration; a tied one once, under its first name.

    Refused if two different parameters would share a name, or one has no shape yet.
    """
    found: dict[str, nn.Parameter] = {}
    for raw, parameter in model.named_parameters():
        name = canonical(raw)
        if isinstance(parameter, UninitializedParameter):
            raise Refused("has no shape yet", where=raw, remedy="run one batch first")
        if name in found:
            raise Refused(
                f"two parameters are both called {name!r} once wrappers are removed",
                where=raw,
                remedy="rename one of the modules",
            )
        found[name] = parameter
    return found


@dataclass(frozen=True, repr=False)
class Parts:
    """Which part each parameter is in, and where each part lies between input and output."""

    names: dict[str, str]
    """{canonical parameter name: part}, in order of registration."""
    order: tuple[str, ...]
    """Parts that own a parameter, from input to output; `depth` never falls along it."""
    depth: dict[str, float]
    """{part: relative depth}: embeddings 0, layer i of n (i + ½)/n, head 1."""
    sizes: dict[str, int] = field(default_factory=dict)
    """{part: number of weights}, tied ones once."""

    def members(self, part: str) -> tuple[str, ...]:
        """The canonical names of the parameters in one part."""
        if part not in self.depth:
            raise Refused(f"no part {part!r}", remedy=nearest(part, self.order))
        return tuple(name for name, of in self.names.items() if of == part)

    def __repr__(self) -> str:
        rows = [f"{'part':<24}{'depth':>6}{'weights':>16}"]
        rows += [f"{p:<24}{self.depth[p]:>6.3f}{self.sizes.get(p, 0):>16,}" for p in self.order]
        return "\n".join(rows)


def parts(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Parts:
    """Put every parameter of `model` in exactly one part, by the rules at the top of this file.

    `overrides` is {glob on canonical names: part}, tried in order, the first match wins. A glob
    that matches nothing, or a part that the model does not have, is Refused.
    """
    parameters = named_parameters(model)
    raw = [name for name, _ in model.named_parameters()]
    stacks = find_stacks(model)
    for stack in stacks:
        stack.label = canonical(stack.label)
    found = _around(model, raw, stacks) if stacks else _in_a_row(model, raw)
    names = {canonical(name): part for name, part in found.items()}
    depth = {EMBEDDINGS: 0.0, **_depths(stacks, names.values()), HEAD: 1.0}
    for name, part in _overridden(names, overrides or {}, tuple(depth)).items():
        names[name] = part
    sizes = dict.fromkeys(sorted(depth, key=depth.__getitem__), 0)
    for name, part in names.items():
        sizes[part] += parameters[name].numel()
    order = tuple(part for part in sizes if part in set(names.values()))
    return Parts(names, order, {p: depth[p] for p in order}, {p: sizes[p] for p in order})


# --- placing the rest --------------------------------------------------------------------------


def _around(model: nn.Module, raw: list[str], stacks: list[Stack]) -> dict[str, str]:
    """{raw name: part}: blocks by path, everything else by where it is registered."""
    blocks = {
        path: (stack, stack.part(i))
        for stack in stacks
        for i, block in enumerate(stack.blocks)
        for path in block
    }
    owned = {name: blocks[p] for name in raw for p in prefixes(name) if p in blocks}
    at: dict[str, list[int]] = {stack.path: [] for stack in stacks}  # where a stack is registered
    for t, name in enumerate(raw):
        if name in owned:
            at[owned[name][0].path].append(t)
    stacks = [s for s in stacks if at[s.path]]
    final = stacks[-1:] if is_serial(stacks) else stacks
    modules = dict(model.named_modules())
    ancestors = {path for s in stacks for path in prefixes(s.path)}
    placed: dict[str, str] = {}
    before: nn.Module | None = None  # the module registered before `owner`
    owner: nn.Module | None = None
    for t, name in enumerate(raw):
        module = modules[name.rpartition(".")[0]]
        before, owner = (before if module is owner else owner), module
        words = [p.rpartition(".")[2] for p in prefixes(name) if p not in ancestors]
        tower = next((s for s in stacks if inside(name, s.tower)), None)
        passed = [s for s in ([tower] if tower else stacks) if at[s.path][0] < t]
        if name in owned:
            placed[name] = owned[name][1]
        elif is_head(words):
            placed[name] = tower.part(-1) if tower and tower not in final else HEAD
        elif not passed or _is_embedding(words, owner, before):
            placed[name] = EMBEDDINGS
        else:
            latest = max(passed, key=lambda s: at[s.path][-1])
            own = at[latest.path]
            done = own[-1] < t and (latest in final if tower else len(passed) == len(stacks))
            placed[name] = HEAD if done else owned[raw[max(i for i in own if i < t)]][1]
    return placed


def _is_embedding(words: list[str], owner: nn.Module, before: nn.Module | None) -> bool:
    """Whether something registered after a stack is used before it.

    Relative position tables, BART's `layernorm_embedding`, and a norm right after such a table
    (DeBERTa). A linear layer called "embed_out" is an output.
    """
    table = isinstance(owner, nn.Embedding)
    named = any("embed" in word.lower() for word in words) and not isinstance(owner, nn.Linear)
    return table or named or (is_norm(owner) and isinstance(before, nn.Embedding))


def _in_a_row(model: nn.Module, raw: list[str]) -> dict[str, str]:
    """{raw name: part} for a network without stacks: modules in order of registration."""
    modules = dict(model.named_modules())
    units: dict[str, list[str]] = {}
    for name in raw:
        path = name.rpartition(".")[0]
        if path not in units and units and is_norm(modules[path]):
            path = next(reversed(units))
        units.setdefault(path, []).append(name)
    last = len(units) - 1
    placed: dict[str, str] = {}
    for i, names in enumerate(units.values()):
        part = HEAD if i == last else f"layer.{i - 1}" if i else EMBEDDINGS
        placed.update(dict.fromkeys(names, part))
    return placed


def _depths(stacks: list[Stack], found: Iterable[str]) -> dict[str, float]:
    """{layer: relative depth}: (i + ½)/n along each stack, or along all of them if serial."""
    if not stacks:
        rows = [part for part in dict.fromkeys(found) if part not in (EMBEDDINGS, HEAD)]
        return {part: (i + 0.5) / len(rows) for i, part in enumerate(rows)}
    depth: dict[str, float] = {}
    total, start = sum(len(s.blocks) for s in stacks), 0
    for stack in stacks:
        n = total if is_serial(stacks) else len(stack.blocks)
        depth.update({stack.part(i): (start + i + 0.5) / n for i in range(len(stack.blocks))})
        start += len(stack.blocks) if is_serial(stacks) else 0
    return depth


def _overridden(
    names: Mapping[str, str], overrides: Mapping[str, str], known: tuple[str, ...]
) -> dict[str, str]:
    """The parameters whose part the overrides decide, the first match winning."""
    moved: dict[str, str] = {}
    for glob, part in overrides.items():
        if part not in known:
            where = f"override {glob!r}"
            raise Refused(f"no part {part!r}", where=where, remedy=nearest(part, known))
        matches = [name for name in names if fnmatchcase(name, glob)]
        if not matches:
            near = get_close_matches(glob, list(names), n=3, cutoff=0.3) or list(names)[:3]
            raise Refused(f"no parameter matches {glob!r}", remedy=f"nearest are {', '.join(near)}")
        for name in matches:
            moved.setdefault(name, part)
    return moved
