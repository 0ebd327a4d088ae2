"""Where a network repeats itself: its stacks of blocks, found by structure alone.

A *stack* is the outermost list of repeated blocks (ModuleList, Sequential or ModuleDict whose
members own sub-modules) that holds most parameters. Outermost, so that the experts inside a layer
are not layers; but stages of unequal shape (ResNet, Swin, ConvNeXt) are opened, so that their
blocks are the layers and a downsampling joins its nearest block. Several lists under one parent
(`layer1 … layer4`, `downs` and `ups`) are one stack, and lists of equal length beside a list of
norms (`convs`, `norms`) are slices of the same layers. Without any such list, the layers of
recurrent modules are the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import nn

# A second stack below this share of the largest counts as part of its surroundings.
MINOR = 0.1


@dataclass(eq=False)
class Stack:
    """Repeated blocks in order; a block is the module paths or parameter names that it owns."""

    path: str  # of the list, or of the first of several
    blocks: list[list[str]]
    size: int  # number of weights
    kind: object = None
    role: str = ""  # "encoder" or "decoder" where the path says so
    tower: str = ""  # the highest module around this stack and no other
    label: str = ""  # what tells it from the other stacks, "" if it is alone

    def part(self, i: int) -> str:
        """The name of layer i; -1 is the last."""
        i %= len(self.blocks)
        return f"{self.label}.layer.{i}" if self.label else f"layer.{i}"


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks that make up the network, in order of registration, decoders last."""
    lists = _block_lists(model) or _recurrent(model)
    # A list inside a head is not a stack, unless all lists are (a wrapper names it "classifier").
    lists = [one for one in lists if not is_head(one.path.split("."))] or lists
    if not lists:
        return []
    shared = _shared_components([one.path for one in lists])
    groups: dict[tuple[str | None, str], list[Stack]] = {}
    for one in lists:
        words = ".".join(one.path.split(".")[shared:]).lower()
        one.role = next((role for role in ("decoder", "encoder") if role in words), "")
        parent = one.path.rpartition(".")[0] if one.path else None
        groups.setdefault((parent, one.role), []).append(one)
    stacks = [_one_of(model, group) for group in groups.values()]
    largest = max(stacks, key=lambda s: (len(s.blocks) > 1, s.size))
    stacks = [s for s in stacks if s is largest or _is_peer(s, largest)]
    if len(stacks) > 1:
        _label(stacks)
    return sorted(stacks, key=lambda s: s.role == "decoder")


def blocks(model: nn.Module) -> dict[nn.Module, str]:
    """The blocks that are modules, in the order of `find_stacks`, with the roles of their stacks.

    Of a block that owns several modules the first stands for it; layers of a recurrent module are
    none.
    """
    modules = dict(model.named_modules())
    found = ((next((modules[p] for p in block if p in modules), None), stack.role)
             for stack in find_stacks(model) for block in stack.blocks)  # fmt: skip
    return {module: role for module, role in found if module is not None}


def _block_lists(model: nn.Module) -> list[Stack]:
    """Every list of repeated blocks that is not inside another list's block."""
    found: list[Stack] = []
    closed: set[str] = set()
    for path, module in model.named_modules():
        if not closed.isdisjoint(prefixes(path)):
            continue
        if blocks := _repeated(module):
            closed.update(_join(path, name) for name in blocks)
            size = _size(blocks.values())
            kinds = frozenset(_kind(block) for block in blocks.values())
            found.append(Stack(path, _expand(path, blocks), size, kinds))
    return found


def _recurrent(model: nn.Module) -> list[Stack]:
    """Recurrent modules as stacks: parameters in `_l0` are layer 0, in both directions."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            blocks: list[list[str]] = [[] for _ in range(module.num_layers)]
            for name, _ in module.named_parameters():
                if match := re.search(r"_l(\d+)(_reverse)?$", name):
                    blocks[int(match[1])].append(_join(path, name))
            found.append(Stack(path, blocks, _size([module]), nn.RNNBase))
    return found


def _repeated(module: nn.Module, *, lone: bool = False) -> dict[str, nn.Module]:
    """The members of a container from its first repeated block to its last, {} if it has none.

    Blocks own sub-modules. A ModuleList of blocks only (or, if `lone`, any container of them)
    counts whole, mixed kinds or one block too; else two of a kind with most of the weights.
    """
    if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return {}
    members = _owners(module)
    blocks = {name: child for name, child in members.items() if _owners(child)}
    if (lone or isinstance(module, nn.ModuleList)) and len(blocks) == len(members):
        return blocks
    kinds: dict[object, list[str]] = {}
    for name, child in blocks.items():
        kinds.setdefault(_kind(child), []).append(name)
    runs = [run for run in kinds.values() if len(run) > 1]
    if not runs:
        return {}
    run = max(runs, key=lambda run: _size(members[name] for name in run))
    names = list(members)
    span = {n: members[n] for n in names[names.index(run[0]) : names.index(run[-1]) + 1]}
    most = 2 * _size(members[name] for name in run) >= _size(span.values())
    return span if most else {}


def _expand(path: str, members: dict[str, nn.Module]) -> list[list[str]]:
    """Blocks as lists of what they own, with stages opened.

    Layers of one stack have the same shapes, stages do not: so experts inside equal layers stay
    closed, and the blocks of unequal stages (or of bare lists in a list) become the layers.
    """
    kinds: dict[object, list[nn.Module]] = {}
    for member in members.values():
        kinds.setdefault(_kind(member), []).append(member)
    main = max(kinds.values(), key=_size)
    unequal = len({_shape(block) for block in main}) > 1
    bare = all(type(block) is nn.ModuleList for block in main)
    open_stages = len(main) > 1 and (unequal or bare) and all(_stage(block)[1] for block in main)
    layers: list[list[str]] = []
    for name, member in members.items():
        own = _join(path, name)
        where, inner = _stage(member) if open_stages else ("", {})
        if not _owners(member) and layers:  # a lone norm or projection joins what it follows
            layers[-1].append(own)
            continue
        first = len(layers)
        layers += [[_join(own, where, block)] for block in inner] or [[own]]
        seen = False
        for parameter, _ in member.named_parameters():
            full = _join(own, parameter)
            if any(inside(full, layer[0]) for layer in layers[first:]):
                seen = True
            else:  # a stage's other weights join its first block, or its last
                layers[-1 if seen else first].append(full)
    return layers


def _stage(module: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """(path of the list, its blocks) of a module that is mostly one list of one kind of block."""
    inner = {"": module, **_owners(module)}
    found = {path: _repeated(child, lone=True) for path, child in inner.items()}
    path, blocks = max(found.items(), key=lambda item: _size(item[1].values()))
    alike = len({_kind(block) for block in blocks.values()}) == 1
    return path, blocks if alike and 2 * _size(blocks.values()) > _size([module]) else {}


def _one_of(model: nn.Module, lists: list[Stack]) -> Stack:
    """Sibling lists as one stack: slices of the same layers, or one list after another."""
    largest = max(lists, key=lambda one: one.size)
    lists = [one for one in lists if one.kind == largest.kind or one.size >= MINOR * largest.size]
    path, size = lists[0].path, sum(one.size for one in lists)
    parent = path.rpartition(".")[0]
    siblings = {_join(parent, n): m for n, m in _owners(model.get_submodule(parent)).items()}
    n = len(largest.blocks)
    norms = [
        [[_join(name, child)] for child in _owners(module)]
        for name, module in siblings.items()
        if isinstance(module, nn.ModuleList) and len(module) == n > 1 and all(map(is_norm, module))
    ]
    if norms:
        slices = [one.blocks for one in lists if len(one.blocks) == n] + norms
        whole = [list(chain.from_iterable(same)) for same in zip(*slices, strict=True)]
        return Stack(largest.path, whole, size, role=largest.role)
    if len(lists) == 1:
        return lists[0]
    blocks_of = {one.path: one.blocks for one in lists}
    names = list(siblings)
    blocks: list[list[str]] = []
    for name in names[names.index(path) : names.index(lists[-1].path) + 1]:
        # A compound module between two lists, such as a U-Net's middle, is a layer of its own.
        blocks += blocks_of.get(name, [[name]] if _owners(siblings[name]) else [])
    return Stack(path, blocks, size, role=lists[0].role)


def _is_peer(stack: Stack, largest: Stack) -> bool:
    """Whether a second stack stands in its own right, and is not part of a stem or a head."""
    if inside(stack.path, largest.path) or inside(largest.path, stack.path):
        return False
    if {stack.role, largest.role} == {"encoder", "decoder"}:
        return True
    return len(stack.blocks) > 1 and stack.size >= MINOR * largest.size


def _label(stacks: list[Stack]) -> None:
    """Give each stack its tower, and the shortest label that tells it from the others."""
    for stack in stacks:
        others = [other.path for other in stacks if other is not stack]
        alone = [p for p in prefixes(stack.path) if not any(inside(o, p) for o in others)]
        stack.tower = alone[0]
    roles = [stack.role for stack in stacks]
    ends = [stack.tower.rpartition(".")[2] for stack in stacks]
    for stack, end in zip(stacks, ends, strict=True):
        if is_serial(stacks) and stack.role and roles.count(stack.role) == 1:
            stack.label = stack.role
        else:
            stack.label = end if ends.count(end) == 1 else stack.tower


def is_serial(stacks: list[Stack]) -> bool:
    """Whether data flows through the stacks in turn: if some of them, not all, are decoders."""
    return 0 < sum(stack.role == "decoder" for stack in stacks) < len(stacks)


def is_norm(module: nn.Module) -> bool:
    """Whether the module's class, or one it derives from, has norm in its name."""
    return any("norm" in kind.__name__.lower() for kind in type(module).__mro__)


def is_head(words: list[str]) -> bool:
    """Whether a name marks an output module, wherever it was registered."""
    return any(re.search(r"(^|_)heads?$|classifier|logit|^final_", word.lower()) for word in words)


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    """The children that own parameters, directly or below."""
    children = module.named_children()
    return {name: child for name, child in children if next(child.parameters(), None) is not None}


def _kind(module: nn.Module) -> object:
    """The kind of a module: its class, or for a bare container its members' kinds."""
    if type(module) in (nn.Sequential, nn.ModuleList):
        return frozenset(_kind(child) for child in _owners(module).values())
    return type(module).__qualname__


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _shape(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _join(*pieces: str) -> str:
    return ".".join(piece for piece in pieces if piece)


def inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(path + ".")


def prefixes(path: str) -> list[str]:
    """["", "a", "a.b"] of "a.b"."""
    pieces = path.split(".") if path else []
    return [".".join(pieces[:i]) for i in range(len(pieces) + 1)]


def _shared_components(paths: list[str]) -> int:
    """How many leading components all paths share, not counting the last of each."""
    columns = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    same = [len(set(column)) == 1 for column in columns]
    return [*same, False].index(False)
