"""Numbers and names as text: one line each, whatever an untrusted name contains."""

from __future__ import annotations

import math
import re
import unicodedata

from holdfast.experiments.metrics import Cell
from holdfast.experiments.statistics import Spread

DASH = "–"
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")


def clean(text: object, *, width: int | None = None) -> str:
    """A name on one line: no terminal codes, control characters or bidi overrides (S9)."""
    line = BIDI.sub("", _ANSI.sub("", str(text)))
    line = "".join(
        (" " if char in "\n\r\t\v\f\x85\u2028\u2029" else "")
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        else char
        for char in line
    )
    line = " ".join(line.split()) or "(no name)"
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def short(text: object) -> str:
    """A name that fits a sentence or a table's head; pages give the whole one beside it."""
    return clean(text, width=48)


def number(value: Cell, *, sign: bool = False, digits: int = 3) -> str:
    """A score as text; a dash where nothing was measured."""
    if value is None or not math.isfinite(value):
        return DASH
    value = round(value, digits) + 0.0  # no -0.000
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "\u2212")


def spread_text(spread: Spread, *, sign: bool = False, digits: int = 3) -> str:
    """`0.741 ± 0.012`, without the spread below two runs."""
    text = number(spread.mean, sign=sign, digits=digits)
    return text if spread.sd is None else f"{text}\u00a0±\u00a0{number(spread.sd, digits=digits)}"


def points(value: Cell) -> str:
    """A difference of scores in points: `−21.1 points`."""
    return DASH if value is None else f"{number(100 * value, sign=True, digits=1)} points"


def amount(value: Cell) -> str:
    """A count with its thousands set apart: `12 345`."""
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


def size(value: Cell) -> str:
    """Bytes: `86.6 MB`."""
    if value is None:
        return DASH
    power = min(int(math.log10(max(value, 1)) // 3), 3)
    return f"{value / 1000**power:.3g}\u00a0{('B', 'kB', 'MB', 'GB')[power]}"
