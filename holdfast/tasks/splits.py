"""Choosing rows by seed, every class in proportion.

Rows are ranked by `random.Random.random()`, the one draw that Python promises never to
change, so that a seed means the same rows in every version of every library.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence


def stratified(
    labels: Sequence[int | float], size: int, *, seed: str, leave: int = 0
) -> tuple[list[int], list[int]]:
    """`size` indices in proportion to the classes, and the others, each in row order.

    Each class gets its share rounded down or up, at least one row where `size` allows it and
    where `leave` of its rows remain. Float labels are classed by tenths of their order, which
    keep nothing back.
    """
    if any(isinstance(label, float) for label in labels):
        leave = 0
    groups: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(_classes(labels)):
        groups[group].append(index)
    counts = {group: len(groups[group]) for group in sorted(groups)}
    draw = random.Random(seed)
    rank = [draw.random() for _ in labels]
    chosen: set[int] = set()
    for group, count in _shares(counts, size, leave).items():
        chosen.update(sorted(groups[group], key=rank.__getitem__)[:count])
    return sorted(chosen), [index for index in range(len(labels)) if index not in chosen]


def _classes(labels: Sequence[int | float]) -> list[int]:
    if not any(isinstance(label, float) for label in labels):
        return [int(label) for label in labels]
    order = sorted(range(len(labels)), key=labels.__getitem__)
    tenths = [0] * len(labels)
    for place, index in enumerate(order):
        tenths[index] = 10 * place // len(labels)
    return tenths


def _shares(counts: dict[int, int], size: int, leave: int) -> dict[int, int]:
    """`size` over the classes by largest remainder."""
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
