"""From a cell of a file to a label: ids, names or numbers, one rule each.

Every rule is a function `(cell, where) -> label`, None for a row to leave out.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from holdfast.config import LARGEST
from holdfast.errors import Refused
from holdfast.files import strictly
from holdfast.tasks.table import counted, listed, shown

MAX_CLASSES = 1000
MAX_NAME = 200  # characters
IGNORED = -100  # what the losses of PyTorch leave out
VARIANTS = {chr(code) for code in range(0xFE00, 0xFE10)}  # of an emoji: drawn as text, or not

Read = Callable[[Any, str], Any]


def by_id(names: tuple[str, ...]) -> Read:
    """Labels that are positions in `names`."""

    def read(cell: Any, where: str) -> int | None:
        if _missing(cell):
            raise Refused("no label", where=where)
        if isinstance(cell, int | float) and cell == IGNORED:  # a column with gaps holds floats
            return None
        if isinstance(cell, bool) or not isinstance(cell, int):
            raise Refused(
                f"label {shown(cell)} is a {type(cell).__name__}, not an id",
                where=where,
                remedy=f"write 0 to {len(names) - 1}",
            )
        if not 0 <= cell < len(names):
            raise Refused(
                f"label {shown(cell)} is outside 0 to {len(names) - 1}",
                where=where,
                remedy=f"the labels are {listed(names)}",
            )
        return cell

    return read


def by_name(names: tuple[str, ...]) -> Read:
    """Labels that are spelled as in `names`."""
    ids = {name: index for index, name in enumerate(names)}

    def read(cell: Any, where: str) -> int | None:
        name = spelled(cell, where)
        if name in ids:
            return ids[name]
        if ignored(name):
            return None
        raise Refused(
            f"label {shown(name)} is not among those of the training rows",
            where=where,
            remedy=f"they are {listed(names)}",
        )

    return read


_WRITTEN = re.compile(r"""\s*\[\s*(['"].*['"]|[^|]*,[^|]*|)\s*\]\s*""", re.DOTALL)
SEPARATOR = "|"  # between the labels of one row, where a cell is text


def several(read: Read) -> Read:
    """Labels of a row that may have any number of them: ids in ascending order."""

    def ids(cell: Any, where: str) -> tuple[int, ...] | None:
        every = each_of(read)(cell, where)
        if None in every:  # a label that is not known is not one that the row has not
            return None
        found = sorted(every)
        if len(set(found)) < len(found):
            raise Refused(f"a label twice: {shown(cell)}", where=where)
        return tuple(found)

    return ids


def each_of(read: Read) -> Read:
    """What `read` makes of each label in a cell: a tuple."""
    return lambda cell, where: tuple(read(each, where) for each in _parted(cell, where))


def _parted(cell: Any, where: str) -> Sequence[Any]:
    """The labels in a cell: a list of them, or text with | between them; none if it is empty."""
    if isinstance(cell, str):
        if _WRITTEN.fullmatch(cell):  # as pandas writes a list into a CSV: it is no name
            raise Refused(f"a list that was written as text: {shown(cell)}", where=where,
                          remedy="write joy|anger, or lists in a JSONL file")  # fmt: skip
        return [part.strip() for part in cell.split(SEPARATOR)] if cell.strip() else []
    if cell is None:
        return []
    if not isinstance(cell, list | tuple):
        raise Refused(f"labels are a list, not {shown(cell)}", where=where,
                      remedy='as ["joy", "anger"], or joy|anger')  # fmt: skip
    return cell


def number(cell: Any, where: str) -> float:
    """Labels of a regression: finite numbers."""
    if _missing(cell):
        raise Refused("no label", where=where)
    try:
        plain = strictly(float, cell) if isinstance(cell, str) else float(cell)
        value = math.nan if isinstance(cell, bool) else plain
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise Refused(f"label {shown(cell)} is not a finite number", where=where)
    if abs(value) > LARGEST:
        raise Refused(f"label {shown(cell)} is beyond {LARGEST:g}: its square overflows",
                      where=where, remedy="divide all labels by one number")  # fmt: skip
    return value


def text(cell: Any, where: str) -> str:
    """Answers of a generation, as they stand."""
    if _missing(cell):
        raise Refused("no answer", where=where)
    if not isinstance(cell, str | int | float):
        raise Refused(f"answer {shown(cell)} is a {type(cell).__name__}", where=where)
    return str(cell)


def word(names: tuple[str, ...] | None) -> Read:
    """Labels as answers: the text itself, or of an id its name."""
    ids = None if names is None else by_id(names)

    def read(cell: Any, where: str) -> str | None:
        if ids is None or names is None:
            name = spelled(cell, where)
            return None if ignored(name) else name
        place = ids(cell, where)
        return None if place is None else names[int(place)]

    return read


def spelled(cell: Any, where: str) -> str:
    """The label as text, exactly as it stands; a missing one is refused."""
    if _missing(cell):
        raise Refused("no label", where=where)
    if not isinstance(cell, str | int | float):
        raise Refused(f"label {shown(cell)} is a {type(cell).__name__}", where=where)
    if isinstance(cell, int) and abs(cell) >= 10**MAX_NAME:
        raise Refused("label is a huge number", where=where)
    if len(name := str(cell)) > MAX_NAME:
        raise Refused(f"label {shown(name)} is longer than {MAX_NAME} characters", where=where)
    return name


def _missing(cell: Any) -> bool:
    """Null, blank, or a real NaN. The texts "NA", "None", "null" and "nan" are labels."""
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


class Spelling(NamedTuple):
    first: str  # where it stands first, as "line 4"
    rows: int


def names_of(
    spellings: Mapping[str, Spelling], name: str, *, fractions: bool = False
) -> tuple[str, ...]:
    """The label map of the training rows: in numerical order if all are numbers, else alphabetical.

    Two spellings of one label (`1`, `01`, `True`; an extra space) are refused. So are numbers
    with fractions, unless `fractions`, and implausibly many classes: both suggest a regression.
    """
    alike: dict[Decimal | str, list[str]] = {}  # but for case
    meant: dict[Decimal | str, str] = {}  # meaning -> spelling
    rows = 0
    for spelling, found in spellings.items():
        meaning = _meaning(spelling)
        if meaning == IGNORED:  # pandas writes -100.0 into a column with gaps
            continue
        rows += found.rows
        meant.setdefault(meaning, spelling)
        key = meaning.casefold() if isinstance(meaning, str) else meaning
        alike.setdefault(key, []).append(spelling)
    if twice := [each for each in alike.values() if len({*map(_meaning, each)}) < len(each)]:
        mendable = all(len({s.strip().casefold() for s in each}) == 1 for each in twice)
        raise Refused(
            "labels in several spellings: " + told([s for e in twice for s in e], spellings),
            where=name,
            remedy="write it one way" + ", or say --strip: it mends blanks and case" * mendable,
        )
    seen = sorted(meant.values())
    numbers = {spelling: value for value, spelling in meant.items() if isinstance(value, Decimal)}
    numeric = len(numbers) == len(seen) > 0
    if (
        numeric
        and not fractions
        and any(value != value.to_integral_value() for value in numbers.values())
    ):
        raise Refused(
            f"the labels are numbers with fractions ({listed(seen[:3])} …)",
            where=name,
            remedy="say type=regression, or type=classification if each is a class",
        )
    if len(seen) > MAX_CLASSES or (len(seen) == rows > 1):
        raise Refused(
            f"{len(seen):,} different labels in {rows:,} rows",
            where=name,
            remedy="say type=regression if they are numbers; is the label column right?",
        )
    return tuple(sorted(seen, key=numbers.__getitem__ if numeric else None))


def told(some: Sequence[str], spellings: Mapping[str, Spelling], limit: int = 20) -> str:
    """Some spellings, each with where it is first and its number of rows."""
    each = [f"{shown(s)} ({spellings[s].first}, {counted(spellings[s].rows)})" for s in some]
    return ", ".join(each[:limit]) + (f" and {len(each) - limit} more" if each[limit:] else "")


def look_alike(names: Sequence[str], *, loosely: bool = False) -> list[str]:
    """Labels that read the same: é as one or two characters, a space of zero width, ﬁ and fi.

    loosely: in any case, and whatever blanks are around them.
    """

    def seen(name: str) -> str:
        name = name.strip().casefold() if loosely else name
        plain = unicodedata.normalize("NFKC", name)
        return "".join(c for c in plain if unicodedata.category(c) != "Cf" and c not in VARIANTS)

    counts = Counter(map(seen, names))
    return [name for name in names if counts[seen(name)] > 1]


def usual(spellings: Mapping[str, Spelling]) -> Callable[[str], str]:
    """What `strip=yes` makes of a label: no blanks around it, and of spellings that differ only
    by case the most frequent one, of equally frequent ones the first in order.
    """
    rows: Counter[str] = Counter()
    for spelling, found in spellings.items():
        rows[spelling.strip()] += found.rows
    known: dict[str, str] = {}
    for name in sorted(rows, key=lambda name: (-rows[name], name)):
        known.setdefault(name.casefold(), name)

    def mend(spelling: str) -> str:
        name = spelling.strip()
        return known.get(name.casefold(), name)

    return mend


def ignored(spelling: str) -> bool:
    """Whether a label says that its row is to be left out."""
    return _meaning(spelling) == IGNORED


def _meaning(spelling: str) -> Decimal | str:
    word = spelling.strip()
    if word.lower() in ("true", "false"):
        return Decimal(word.lower() == "true")
    if not re.fullmatch(r"[+-]?[\d.]+(?:[eE][+-]?\d{1,3})?", word):
        return word
    try:
        return Decimal(word)
    except InvalidOperation:
        return word
