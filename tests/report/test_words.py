"""Names cleaned, numbers written."""

from __future__ import annotations

from holdfast.report.words import clean, number


def test_clean() -> None:
    assert clean("a\x1b[31mred\x1b[0m b") == "ared b"
    assert clean("\x1b]0;title\x07x\nline\ttab\r") == "x line tab"
    assert clean("safe\u202egnp.exe\u0000\u0085") == "safegnp.exe"
    assert clean("") == clean("\x07") == "(no name)"
    assert clean("abcdef", width=4) == "abc…"
    assert clean("\U0001f469\u200d\U0001f4bb") == "\U0001f469\u200d\U0001f4bb"


def test_number() -> None:
    assert number(None) == number(float("nan")) == "–"
    assert number(0.0) == number(-0.0001) == "0.000"
    assert number(-0.25, sign=True) == "−0.250" and number(0.25, sign=True) == "+0.250"
