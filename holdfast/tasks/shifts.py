"""Two tasks out of one, so that forgetting can be measured under a known kind of shift.

=========  ======================================================================================
`length`   short rows, then long rows: cut at the median of a measure (words, unless one is given)
`cluster`  2-means of the encoder's embeddings: the larger cluster, then the smaller
`labels`   all classes in both tasks, in opposite balance: 80:20, then 20:80
`task`     two tasks as they are
=========  ======================================================================================

The rule is learned from the training rows alone and then applied to the rows of every split; no row
is in both tasks. The order of the rows does not matter, only texts and seed do. Under `length` and
`cluster` a text that occurs in two splits falls on the same side in both.

BERTcL (arXiv 2404.01317) names these shifts; its released code files rows under "length" by their
index, which does not correlate with length (.002). `Shifted.facts` says what was achieved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from holdfast.errors import Refused, nearest
from holdfast.tasks.splits import stratified
from holdfast.tasks.table import counted, listed, shown
from holdfast.tasks.task import Row, Task, slug

SHIFTS = ("task", "length", "cluster", "labels")
SPLITS = ("train", "selection", "evaluation")
LEAST = 10  # training and evaluation rows of a half
CROWDED = 0.25  # share of training rows at the threshold, above which a warning says so

Measure = Callable[[Row], float]
Embed = Callable[[Sequence[Row]], Any]  # rows -> array (rows, dimensions)
Halves = tuple[list[Row], list[Row]]


class Shifted(NamedTuple):
    """Two tasks and what sets them apart, as plain data."""

    first: Task
    second: Task
    facts: dict[str, Any]


def words(row: Row) -> int:
    """The number of words in text and pair, separated by white space."""
    return len(row.text.split()) + len((row.pair or "").split())


def shift(
    kind: str,
    tasks: Sequence[Task],
    *,
    seed: int = 0,
    measure: Measure = words,
    embed: Embed | None = None,
    share: float = 0.8,
    learn: Sequence[Row] | None = None,
) -> Shifted:
    """The shift called `kind` of one task; `task` takes two.

    Use one `seed` for a whole study: another one moves rows, even evaluation rows, between the two
    tasks. So do other training rows, unless the rule is learned from the same rows each time:
    `learn`, by default the task's own training rows. See `by_length`, `by_cluster` and `by_labels`
    for `measure`, `embed` and `share`.
    """
    if kind not in SHIFTS:
        raise Refused(f"no shift {shown(kind)}", remedy=nearest(str(kind), SHIFTS))
    wanted = 2 if kind == "task" else 1
    if len(tasks) != wanted:
        raise Refused(f"{len(tasks)} task{'s' * (len(tasks) != 1)} for the shift {kind!r}",
                      remedy=f"it takes {wanted}")  # fmt: skip
    if kind == "task":
        return by_task(*tasks)
    if kind == "length":
        return by_length(tasks[0], seed=seed, measure=measure, learn=learn)
    if kind == "labels":
        return by_labels(tasks[0], seed=seed, share=share, learn=learn)
    if embed is None:
        raise Refused("no encoder to embed rows with", where="shift 'cluster'",
                      remedy="give embed, a function from rows to an array")  # fmt: skip
    return by_cluster(tasks[0], embed, seed=seed, learn=learn)


def by_task(first: Task, second: Task) -> Shifted:
    """Two tasks as they are."""
    if first.name == second.name:
        raise Refused(f"two tasks of one name, {shown(first.name)}",
                      remedy="add ?name=… to one")  # fmt: skip
    return Shifted(first, second, {"shift": "task"})


# --- length -------------------------------------------------------------------------------------


def by_length(
    task: Task, *, seed: int = 0, measure: Measure = words, learn: Sequence[Row] | None = None
) -> Shifted:
    """Short rows and long rows, cut at the median of `measure` over the training rows.

    Rows are ordered by (measure, a hash of seed and texts); the training row in the middle of that
    order is the threshold of every split: every short row measures at most what any long row does,
    and both halves of the training rows are equally large, up to rows of equal texts. Another
    measure, such as tokens: `lambda row: len(tokenizer(row.text, row.pair).input_ids)`.

    `facts`: `threshold`, `ties` (share of training rows that measure exactly that), `correlation`
    (Pearson, of half 0 | 1 with the measure), and for each half `least`, `median`, `most`.
    """
    learn = learn or task.train
    value: dict[Row, float] = {}
    for row in [*learn, *_all(task)]:
        if row not in value:
            value[row] = _measured(row, measure, task.name)
    if len({value[row] for row in learn}) < 2:
        raise Refused(f"every training row measures {value[learn[0]]:g}", where=task.name,
                      remedy="there is no length to cut at: take another shift")  # fmt: skip

    def key(row: Row) -> tuple[float, str]:
        return value[row], _hash(row, seed)

    cut = sorted(map(key, learn))[len(learn) // 2]
    two = {name: _split(rows, lambda row: key(row) >= cut) for name, rows in _splits(task).items()}
    ties = sum(value[row] == cut[0] for row in learn) / len(learn)
    sides = [[value[row] for row in half] for half in two["train"]]
    facts: dict[str, Any] = {
        "shift": "length", "seed": seed, "threshold": cut[0], "ties": ties,
        "correlation": _correlation(*sides),
        **{name: _range(side) for name, side in zip(("short", "long"), sides, strict=True)},
    }  # fmt: skip
    warnings = []
    if ties > CROWDED:
        warnings.append(f"length shift: {100 * ties:.0f} % of the training rows measure "
                        f"{cut[0]:g}, the threshold; the seed places them")  # fmt: skip
    return _pair(task, two, ("short", "long"), facts, warnings)


def _measured(row: Row, measure: Measure, where: str) -> float:
    found = measure(row)
    if isinstance(found, bool | str) or not math.isfinite(found):
        raise Refused(f"measure gives {shown(found)} for {shown(row.text)}", where=where,
                      remedy="it has to give a finite number")  # fmt: skip
    return float(found)


def _correlation(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Pearson's, between side and value; None if a side is empty or nothing varies."""
    values = np.array([*one, *two], dtype=float)
    if not one or not two or values.std() == 0:
        return None
    side = np.repeat([0.0, 1.0], [len(one), len(two)])
    return float(np.corrcoef(side, values)[0, 1])


def _range(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"least": min(values), "median": float(np.median(values)), "most": max(values)}


# --- cluster ------------------------------------------------------------------------------------


def by_cluster(
    task: Task, embed: Embed, *, seed: int = 0, learn: Sequence[Row] | None = None
) -> Shifted:
    """The larger and the smaller of two clusters of the training rows (2-means, ten starts).

    `embed` maps rows to an array (rows, dimensions), such as `experiments.embed.embedder` makes; it
    gets them in an order of its own. Rows of the other splits go to the nearer centroid.

    `facts`: `explained`, the share of the variance of the training embeddings that lies between
    the centroids, 0 … 1 (random halves: about 1 / rows), and the `distance` between them.
    """
    from sklearn.cluster import KMeans

    # In a canonical order, since the starts of 2-means depend on the order of its rows.
    train = sorted(learn or task.train, key=lambda row: _hash(row, seed))
    points = _embedded(embed, train, task.name)
    spread = float(((points - points.mean(0)) ** 2).sum())
    if not spread > 1e-12 * float((points**2).sum()):
        raise Refused("every training row has the same embedding", where=task.name,
                      remedy="is that encoder trained?")  # fmt: skip
    state = int.from_bytes(hashlib.sha256(f"cluster {seed}".encode()).digest()[:4], "big")
    means = KMeans(n_clusters=2, n_init=10, random_state=state).fit(points)
    centres = means.cluster_centers_.astype(np.float64)
    sizes = np.bincount(means.labels_, minlength=2)
    order = sorted((0, 1), key=lambda c: (-sizes[c], centres[c].tolist()))
    centres = centres[order]

    def second(points: np.ndarray) -> np.ndarray:
        """Whether the second centre is nearer: (rows,)."""
        # |x − c₁|² < |x − c₀|²  ⇔  2 x·(c₁ − c₀) > |c₁|² − |c₀|²
        return 2 * points @ (centres[1] - centres[0]) > (centres[1] ** 2 - centres[0] ** 2).sum()

    two: dict[str, Halves] = {}
    for name, rows in _splits(task).items():
        ordered = sorted(rows, key=lambda row: _hash(row, seed))
        found = second(_embedded(embed, ordered, task.name)) if ordered else np.array([])
        sides = {row: bool(side) for row, side in zip(ordered, found, strict=True)}
        two[name] = _split(rows, sides.__getitem__)
    side = second(points)
    within = sum(
        float(((points[side == s] - points[side == s].mean(0)) ** 2).sum()) for s in set(side)
    )
    facts = {
        "shift": "cluster", "seed": seed, "explained": 1 - within / spread,
        "distance": float(np.linalg.norm(centres[0] - centres[1])),
        "dimensions": points.shape[1],
    }  # fmt: skip
    return _pair(task, two, ("cluster1", "cluster2"), facts, [])


def _embedded(embed: Embed, rows: Sequence[Row], where: str) -> np.ndarray:
    """What `embed` makes of the rows, checked: (rows, dimensions) in float64."""
    found = np.asarray(embed(rows), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(rows) or found.shape[1] < 1:
        raise Refused(f"embed gives an array of shape {found.shape} for {counted(len(rows))}",
                      where=where, remedy="it has to give one vector a row")  # fmt: skip
    if not np.isfinite(found).all():
        raise Refused("an embedding is not finite", where=where, remedy="has the encoder diverged?")
    return found


# --- labels -------------------------------------------------------------------------------------


def by_labels(
    task: Task, *, seed: int = 0, share: float = 0.8, learn: Sequence[Row] | None = None
) -> Shifted:
    """Two tasks with all classes, in opposite balance.

    The classes of the training rows, by id, fall into two groups: the first ⌈k/2⌉ and the others.
    The first task has `share` of its rows from the first group, the second from the second; within
    a group the classes keep their proportions. With N rows a task in a split::

        N = min(rows of group 1, rows of group 2),   a = round(share · N)
        task one: a of group 1, N − a of group 2;    task two: N − a of group 1, a of group 2

    Rows of the larger group beyond N, and all but one of rows with equal texts, are left out, with
    a warning. A text in two splits may be in both tasks. `facts`: `shares` of group 1 in either
    task's training rows, `groups`, `left_out` by split.
    """
    where = task.name
    if task.labels is None:
        raise Refused("a regression has no classes to balance", where=where,
                      remedy="take the shift 'length' or 'cluster'")  # fmt: skip
    if isinstance(share, bool) or not isinstance(share, float) or not 0.5 < share < 1:
        raise Refused(f"share {share!r} is not between 0.5 and 1", where="share")
    classes = sorted({int(row.label) for row in learn or task.train})
    front = set(classes[: (len(classes) + 1) // 2])
    two, left_out = {}, {}
    for name, rows in _splits(task).items():
        first, second = _balanced(rows, front, set(classes) - front, share, seed)
        two[name] = [rows[i] for i in sorted(first)], [rows[i] for i in sorted(second)]
        left_out[name] = len(rows) - len(first) - len(second)
    shares = [sum(r.label in front for r in half) / max(len(half), 1) for half in two["train"]]
    facts = {
        "shift": "labels", "seed": seed, "shares": shares, "left_out": left_out,
        "groups": [[task.labels[c] for c in classes if (c in front) == f] for f in (True, False)],
    }  # fmt: skip
    told = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
    warnings = [f"labels shift: {told} rows left out to balance the labels"] if told else []
    return _pair(task, two, ("front", "back"), facts, warnings)


def _balanced(
    rows: Sequence[Row], front: set[int], back: set[int], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the rows of task one and of task two; of rows with equal texts one is used."""

    def draw(i: int) -> tuple[str, str]:  # the second decides among labels of one text
        return _hash(rows[i], seed), _hash(rows[i], f"{seed} {rows[i].label}")

    kept: dict[tuple[str, str | None], int] = {}
    for i in sorted(range(len(rows)), key=draw):
        kept.setdefault((rows[i].text, rows[i].pair), i)
    groups = [[i for i in kept.values() if rows[i].label in group] for group in (front, back)]
    size = min(map(len, groups))
    most = round(share * size)
    first: list[int] = []
    second: list[int] = []
    for group, mine in zip(groups, (most, size - most), strict=True):
        ours, rest = _drawn(rows, group, mine, f"labels one {seed}")
        first += ours
        second += _drawn(rows, rest, size - mine, f"labels two {seed}")[0]
    return first, second


def _drawn(
    rows: Sequence[Row], group: list[int], size: int, seed: str
) -> tuple[list[int], list[int]]:
    """`size` indices of a group, its classes in proportion, and the others."""
    chosen, others = stratified([int(rows[i].label) for i in group], size, seed=seed)
    return [group[j] for j in chosen], [group[j] for j in others]


# --- what all of them share ---------------------------------------------------------------------


def _splits(task: Task) -> dict[str, tuple[Row, ...]]:
    return {name: getattr(task, name) for name in SPLITS}


def _all(task: Task) -> list[Row]:
    return [row for rows in _splits(task).values() for row in rows]


def _hash(row: Row, seed: int | str) -> str:
    """A draw that depends on seed and texts alone: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps([seed, row.text, row.pair]).encode()).hexdigest()


def _split(rows: Sequence[Row], second: Callable[[Row], bool]) -> Halves:
    """The rows of either half, in their order."""
    sides = [second(row) for row in rows]
    both = list(zip(rows, sides, strict=True))
    return [row for row, side in both if not side], [row for row, side in both if side]


def _pair(
    task: Task,
    two: dict[str, Halves],
    names: tuple[str, str],
    facts: dict[str, Any],
    warnings: list[str],
) -> Shifted:
    """Both halves as tasks, after checking that each can be learned and tested."""
    made = []
    kind, seed = facts["shift"], facts["seed"]
    for side, name in enumerate(names):
        rows = {split: tuple(halves[side]) for split, halves in two.items()}
        said = [*task.warnings, *warnings, *_checked(task, rows, f"{kind} shift, {name} half")]
        half = replace(
            task, name=f"{slug(task.name)[:54].rstrip('-')}-{name}",
            train=rows["train"], selection=rows["selection"], evaluation=rows["evaluation"],
            source=f"{task.source} [{kind} shift, {name} half, seed {seed}]", warnings=tuple(said),
        )  # fmt: skip
        made.append(half)
    facts["rows"] = [half.rows for half in made]
    return Shifted(made[0], made[1], facts)


def _checked(task: Task, rows: dict[str, tuple[Row, ...]], half: str) -> list[str]:
    """Warnings about a half; Refused if it is too small or has only one label."""
    kinds = {"train": "training", "selection": "selection", "evaluation": "evaluation"}
    for split, found in rows.items():
        least = LEAST if split != "selection" else min(1, len(task.selection))
        if len(found) < least:
            raise Refused(
                f"{half}: {counted(len(found), kinds[split] + ' ')}, at least {least} are needed",
                where=task.name, remedy="take a larger task or another shift",
            )  # fmt: skip
        if split != "selection" and len({row.label for row in found}) < 2:
            label = found[0].label if task.labels is None else task.labels[int(found[0].label)]
            raise Refused(
                f"{half}: every {kinds[split]} row has the label {shown(label)}", where=task.name,
                remedy="nothing can be learned or told from that; take another shift",
            )  # fmt: skip
    if task.labels is None:
        return []
    here = Counter(int(row.label) for row in rows["train"])
    gone = [task.labels[c] for c in sorted({int(r.label) for r in task.train}) if c not in here]
    return [f"{half}: no training row has the label {listed(gone)}"] if gone else []
