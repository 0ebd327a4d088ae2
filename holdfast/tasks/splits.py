"""Choosing rows by seed, every class in proportion.

Rows are ranked by `random.Random.random()`, the one draw that Python promises never to
change, so that a seed means the same rows in every version of every library.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any


def stratified(
    labels: Sequence[Any],
    size: int,
    *,
    seed: str,
    leave: int = 0,
    alike: Sequence[Hashable] | None = None,
) -> tuple[list[int], list[int]]:
    """`size` indices in proportion to the classes, and the others, each in row order.

    Each class gets its share rounded down or up, and at least one row if `size` allows it and
    `leave` of its rows remain. Float labels are classed by deciles, without regard to `leave`.
    Rows with equal `alike` form a bundle that stays together, so that a class may get fewer rows
    than its share; it gets more only if it has two or more bundles and none is small enough.
    Float labels whose bundles are too long for a decile are one class, and so are texts. A row of
    several labels counts for its rarest.
    """
    bundles: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(range(len(labels)) if alike is None else alike):
        bundles[key].append(index)
    values = _classes(labels)
    classes = [int(value) for value in values]
    if any(isinstance(value, float) for value in values):
        longest = max(map(len, bundles.values()))
        leave, classes = 0, _quantiles(values, 10 if longest == 1 or 10 * longest <= size else 1)
    often = Counter(classes)
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for bundle in bundles.values():  # counts for its rarest class, as it may hold all of its rows
        of = {classes[i] for i in bundle}
        groups[min(of, key=lambda c: (often[c], c))].append(bundle)
    counts = {group: sum(map(len, groups[group])) for group in sorted(groups)}
    draw = random.Random(seed)
    rank = [draw.random() for _ in labels]
    chosen: set[int] = set()
    for group, count in _shares(counts, size, leave).items():
        ranked = sorted(groups[group], key=lambda bundle: rank[bundle[0]])
        chosen.update(_filled(ranked, count))
    return sorted(chosen), [index for index in range(len(labels)) if index not in chosen]


def of_each(labels: Sequence[Hashable], most: int, *, seed: str) -> list[int]:
    """At most `most` indices of each class, in row order."""
    draw = random.Random(seed)
    rank = [draw.random() for _ in labels]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(range(len(labels)), key=rank.__getitem__):
        groups[labels[index]].append(index)
    return sorted(index for group in groups.values() for index in group[:most])


def _classes(labels: Sequence[Any]) -> list[int | float]:
    """A class or a number for each label; texts are one class, several ids the rarest of them."""
    if {*map(type, labels)}.isdisjoint((str, tuple)):
        return list(labels)
    often = Counter(i for label in labels if isinstance(label, tuple) for i in set(label))
    return [
        0 if isinstance(label, str)
        else min(label, key=lambda i: (often[i], i), default=-1) if isinstance(label, tuple)
        else label
        for label in labels
    ]  # fmt: skip


def _filled(bundles: list[list[int]], size: int) -> list[int]:
    """The bundles that fit into `size`, in their order; if none of several does, the smallest."""
    found: list[int] = []
    for bundle in bundles:
        if len(found) + len(bundle) <= size:
            found += bundle
    return found or (min(bundles, key=len) if size and len(bundles) > 1 else [])


def _quantiles(labels: Sequence[int | float], parts: int) -> list[int]:
    """Which of `parts` equal quantiles each label falls into."""
    order = sorted(range(len(labels)), key=labels.__getitem__)
    found = [0] * len(labels)
    for place, index in enumerate(order):
        found[index] = parts * place // len(labels)
    return found


def _shares(counts: dict[int, int], size: int, leave: int) -> dict[int, int]:
    """`size` divided among the classes by largest remainder."""
    total = sum(counts.values())
    most = {group: max(0, count - leave) for group, count in counts.items()}
    size = min(size, sum(most.values()))
    exact = {group: size * count / total for group, count in counts.items()}
    least = 1 if size >= len(counts) else 0
    shares = {group: min(most[group], max(least, int(exact[group]))) for group in counts}
    # Where the minimum of one row took too many, larger classes give them back.
    while sum(shares.values()) > size:
        spare = [group for group in counts if shares[group] > least]
        shares[max(spare, key=lambda group: (shares[group] - exact[group], shares[group]))] -= 1
    while sum(shares.values()) < size:
        open_ = [group for group in counts if shares[group] < most[group]]
        shares[max(open_, key=lambda group: (exact[group] - shares[group], -group))] += 1
    return shares
