"""`load_task`: from a spec to a `Task` whose every row is checked."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.config import count
from holdfast.errors import Refused, nearest
from holdfast.tasks import files, folder, generated, pictures, splits, tagged
from holdfast.tasks.labels import SEPARATOR
from holdfast.tasks.rows import Source, check_metric, source_of
from holdfast.tasks.spec import Options, Spec, parse
from holdfast.tasks.table import Columns, counted, listed, shown
from holdfast.tasks.task import GENERATED, TAGGED, Row, Task, slug

CARVED = 0.2  # of the training rows, where no evaluation rows are given
PIECE = 2000  # characters of running text in a row


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles: a million new rows hold none, and it takes its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def load_task(
    spec: str | Path,
    *,
    seed: int = 0,
    train_size: int | None = None,
    selection: float | int = 0.1,
    columns: Columns | None = None,
    evaluation_size: int | None = None,
) -> Task:
    """Load, check and split a task.

    `spec` is a folder, a CSV, TSV, JSONL or Parquet file, running text (.txt), a Hub id or
    `builtin:NAME`, with options after a `?`:
    `reviews.csv?text=body&label=stars&evaluation=held_out.csv`.

    The seed chooses the selection rows and, with `train_size`, the training rows. The
    evaluation rows are the same for every seed, even if they are carved from the training
    rows (a fifth, if none are given) or cut to `evaluation_size`. Rows whose texts are equal but
    for case and spacing are never separated by choosing evaluation or selection rows.
    """
    asked = parse(str(spec))
    if columns is not None:
        asked = _with_columns(asked, columns)
    name, names, metric, pool, evaluation, warnings, kind = _LOADERS[asked.kind](asked)
    name = slug(asked.options.name or name)
    names = _called(asked.options.labels, names, name)
    if metric == TAGGED[0] and not tagged.chunked(names or ()):
        raise Refused(f"{metric} is for tags O, B-x and I-x, not {listed(names or ())}", where=name,
                      remedy="call them so in labels=, or say metric=accuracy")  # fmt: skip
    _check_classes(pool, names, name, warnings, kind)
    texts = [row.plain for row in pool]
    if names is not None and (torn := _contradicted([*pool, *(evaluation or ())])):
        warnings.append(f"{counted(torn)} with a text that other rows label otherwise")
    if evaluation is None:
        size = max(1, round(CARVED * len(pool)))
        chosen, rest = _apart(pool, texts, size, seed="evaluation")
        evaluation, pool = [pool[i] for i in chosen], [pool[i] for i in rest]
        texts = [texts[i] for i in rest]
        warnings.append(f"{len(evaluation)} evaluation rows carved from the training rows")
        if not evaluation:
            raise Refused(f"{counted(len(pool))} of too few texts to keep any for evaluation",
                          where=name)  # fmt: skip
    elif repeated := _repeated(evaluation, texts):
        warnings.append(f"{counted(repeated, 'evaluation ')} also in the training rows")
    if evaluation_size is not None:
        if evaluation_size < 1:
            raise Refused(f"evaluation_size {evaluation_size} leaves nothing", where=name)
        evaluation = _chosen(evaluation, evaluation_size, seed="evaluation size")
    if len({row.label for row in evaluation}) < 2 and len(_present(evaluation)) < 2:
        warnings.append("every evaluation row has the same label")

    size = count(selection, len(pool), what="selection", least=0)
    if isinstance(selection, float) and selection > 0:  # a share keeps one row per class, if it can
        classes = len(_present(pool)) if names is not None else 1
        size = max(size, min(classes, len(pool) // 2))
    if size >= len(pool):
        raise Refused(f"selection {selection} leaves no row to train on", where=name)
    chosen, rest = _apart(pool, texts, size, seed=f"selection {seed}")
    selected, train = [pool[i] for i in chosen], [pool[i] for i in rest]
    if asked.options.per_class is not None:
        train = _of_each(train, int(asked.options.per_class), seed, names, name, warnings)
    if train_size is not None:
        train = _subset(train, train_size, seed, names, name, warnings)
    return Task(
        name=name,
        labels=names,
        metric=metric,
        train=tuple(train),
        selection=tuple(selected),
        evaluation=tuple(evaluation),
        source=f"hub:{spec}"
        if asked.kind == "hub" and not str(spec).startswith("hub:")
        else str(spec),
        synthetic=asked.kind == "builtin",
        warnings=tuple(warnings),
        kind=kind,
    )


def _with_columns(asked: Spec, columns: Columns) -> Spec:
    if asked.kind in ("builtin", "text"):
        raise Refused(f"a {asked.kind} task has no columns to name", where=asked.place)
    given = {"text": columns.text, "pair": columns.pair, "label": columns.label,
             "answer": columns.answer, "prompt": columns.prompt}  # fmt: skip
    for role, column in given.items():
        other = getattr(asked.options, role)
        if column is not None and other not in (None, column):
            raise Refused(f"{role} is {shown(column)} and {shown(other)}", where=asked.place)
    new = {role: column for role, column in given.items() if column is not None}
    return replace(asked, options=replace(asked.options, **new))


def _called(
    wanted: str | None, names: tuple[str, ...] | None, where: str
) -> tuple[str, ...] | None:
    """The names of the labels, or what they are to be called."""
    if wanted is None:
        return names
    said = tuple(wanted.split(SEPARATOR))
    if names is None or len(said) != len(names) or len({*map(str.strip, said), ""}) <= len(said):
        raise Refused(f"labels {shown(wanted)}: it has {listed(names) if names else 'none'}",
                      where=where, remedy="a name for each, in that order: no|yes")  # fmt: skip
    return said


def _of_each(
    train: list[Row],
    most: int,
    seed: int,
    names: tuple[str, ...] | None,
    where: str,
    warnings: list[str],
) -> list[Row]:
    """At most so many rows of each class."""
    labels = [row.label for row in train]
    if names is None or isinstance(labels[0], tuple):
        raise Refused("per_class: its rows have no single class", where=where)
    few = sum(count < most for count in Counter(labels).values())
    if few:
        warnings.append(f"fewer than {most} training rows of {few} of {len(names)} classes")
    return [train[i] for i in splits.of_each(labels, most, seed=f"train {seed}")]


def _subset(
    train: list[Row],
    size: int,
    seed: int,
    names: tuple[str, ...] | None,
    where: str,
    warnings: list[str],
) -> list[Row]:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise Refused(f"train_size {size!r} is no count of rows", where=where)
    present = len(_present(train)) if names is not None else 1
    if size < present:
        raise Refused(f"train_size {size} is below the {present} classes", where=where)
    if size >= len(train):
        warnings.append(f"train_size {size} takes all {len(train)} training rows")
    return _chosen(train, size, seed=f"train {seed}")


def _chosen(rows: list[Row], size: int, *, seed: str) -> list[Row]:
    return [rows[i] for i in splits.stratified([row.label for row in rows], size, seed=seed)[0]]


def _apart(
    rows: list[Row], texts: list[tuple[str, str]], size: int, *, seed: str
) -> tuple[list[int], list[int]]:
    """Places of about `size` rows, and of the others; the two have no text in common."""
    return splits.stratified([r.label for r in rows], size, seed=seed, leave=1, alike=texts)


def _repeated(rows: list[Row], training: list[tuple[str, str]]) -> int:
    """How many of `rows` have texts that also occur in `training`, ignoring case and spacing."""
    known = set(training)
    return sum(row.plain in known for row in rows)


def _contradicted(rows: list[Row]) -> int:
    """How many rows have a text, ignoring case and spacing, that stands with other labels too."""
    found: dict[tuple[str, str], set[Any]] = {}
    for row in rows:
        found.setdefault(row.plain, set()).add(row.label)
    return sum(len(found[row.plain]) > 1 for row in rows)


def _check_classes(
    pool: list[Row], names: tuple[str, ...] | None, where: str, warnings: list[str], kind: str
) -> None:
    present = _present(pool)
    if len(present) < 2 and len({row.label for row in pool}) < 2:
        ids = pool[0].label
        only = ids if names is None or isinstance(ids, tuple) else names[int(ids)]
        raise Refused(
            f"every training row has the label {shown(only)}",
            where=where,
            remedy="nothing can be learned from that",
        )
    if names is not None:
        absent = [name for index, name in enumerate(names) if index not in present]
        if absent and kind != "tokens":  # a type whose every entity is one word has no I
            warnings.append(f"no training row has the label {listed(absent)}")


def _present(rows: Sequence[Row]) -> set[Any]:
    """The labels that occur, each of several too."""
    found = {row.label for row in rows}
    several = {each for label in found if isinstance(label, tuple) for each in label}
    return several or found


def _folder(asked: Spec) -> Source:
    path, options = Path(asked.place), asked.options
    if not (path / "meta.json").exists() and pictures.has_pictures(path):
        return _pictures(path, options)
    if not (path / "meta.json").exists() and any(pictures.pictures_in(path)):
        raise Refused("pictures that lie in no folder of a class", where=asked.place,
                      remedy="put those of each class into a folder of its name")  # fmt: skip
    meta = folder.meta(path)
    told = meta.kind or ("regression" if meta.labels is None else "classification")
    type = "generation" if options.prompt else options.type or told
    if type not in (told, "generation"):
        raise Refused(f"is a {told}", where=asked.place, remedy=f"leave out type={type}")
    metric = meta.metric if type == told else None  # of labels it is another than of text
    train = files.read(folder.split(path, "train"), options.columns.wanted, collect=True)
    held = folder.find(path, options.evaluation or "validation")
    if held is None and options.evaluation is not None:
        held = folder.split(path, options.evaluation)
    return source_of(
        meta.name,
        train,
        None if held is None else files.read(held, options.columns.wanted, collect=True),
        replace(options, type=type, metric=options.metric or metric),
        names=meta.labels,
        regression=meta.labels is None,
    )


def _pictures(path: Path, options: Options) -> Source:
    given = [k for k, v in vars(options).items() if v is not None and k not in ("name", "metric")]
    if given:
        raise Refused(f"a folder of pictures has no option {given[0]}", where=str(path))
    names, train, held, warnings = pictures.read(path)
    metric = check_metric(options.metric or "accuracy", names, path.name)
    return Source(path.resolve().name, names, metric, train, held, warnings, "images")


def _file(asked: Spec) -> Source:
    path, options = files.must_exist(Path(asked.place)), asked.options
    train = files.read(path, options.columns.wanted, **options.written, collect=True)
    evaluation = None
    if options.evaluation is not None:
        held = files.must_exist(folder.inside(path.parent, options.evaluation))
        evaluation = files.read(held, options.columns.wanted, **options.written, collect=True)
    name = path.name.split(".")[0] or path.name
    return source_of(name, train, evaluation, options, regression=options.type == "regression")


def _text(asked: Spec) -> Source:
    path = Path(asked.place)
    found = pieces(files.text(path))
    if len(found) < 2:
        raise Refused(f"too short to part: up to {PIECE:,} characters are one row",
                      where=files.label(path), remedy="name a longer text")  # fmt: skip
    rows = [Row("", None, piece) for piece in found]
    name = path.name.split(".")[0] or path.name
    return Source(name, None, GENERATED[0], rows, None, [], "generation")


def pieces(text: str, size: int = PIECE) -> list[str]:
    """`text` in pieces of up to `size` characters that end with a paragraph, a line or a word.

    Put together they are the text, but for pieces of white space alone, which are left out.
    """
    found, at = [], 0
    while at < len(text):
        end = at + size
        marks = ("\n\n", "\n", " ") if end < len(text) else ()
        ends = (text.rfind(mark, at + size // 2, end) + len(mark) for mark in marks)
        end = next((e for e in ends if e > at + size // 2), end)
        found.append(text[at:end])
        at = end
    return [piece for piece in found if piece.strip()]


def _hub(asked: Spec) -> Source:
    from holdfast.tasks import hub

    options = asked.options
    train, evaluation, names, floats = hub.read(asked.place, options, options.columns.wanted)
    regression = options.type == "regression" or (floats and options.type is None)
    return source_of(asked.place, train, evaluation, options, names=names, regression=regression)


def _builtin(asked: Spec) -> Source:
    if asked.place not in generated.BUILTIN:
        raise Refused(
            f"no builtin task {shown(asked.place)}",
            remedy=nearest(asked.place, generated.BUILTIN),
        )
    made = generated.make(asked.place)
    return Source(asked.place, made.labels, "accuracy", list(made.train), list(made.evaluation), [])


def _module(asked: Spec) -> Source:
    from holdfast.tasks import program

    program.trust([asked.place])
    name, metric, train, held = program.read(asked.place)
    return Source(name, None, metric, train, held, [], "module")


_LOADERS: dict[str, Callable[[Spec], Source]] = {
    "folder": _folder,
    "file": _file,
    "text": _text,
    "hub": _hub,
    "builtin": _builtin,
    "module": _module,
}
