"""Configurations cannot be made wrong, and say what was wrong."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from holdfast.config import Checked, Share, count
from holdfast.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Example(Checked):
    shares: ClassVar[tuple[str, ...]] = ("length",)

    size: Annotated[float, Field(gt=0, le=2)]
    length: Share = 0.5
    kind: Literal["a", "b"] | tuple[str, ...] = "a"
    flag: bool | None = None
    rows: Annotated[int, Field(gt=0)] = 3


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("size", [0, -1, 2.1, math.nan, math.inf, True, "1", None]),
        ("length", [0, 0.0, -0.1, 1.0, 2.0, math.nan, True, "0.5", None]),
        ("kind", ["c", 1, ["a"], ("a", 1)]),
        ("flag", [0, 1, "no"]),
        ("rows", [0, 3.0, True, "3", math.inf]),
    ],
)
def test_wrong_values_name_field_and_value(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(Refused, match=f"^{field}: ") as refusal:
            Example(**{"size": 1.0, field: value})
        assert repr(value) in str(refusal.value)


def test_whole_numbers_serve_as_floats_but_counts_stay_counts() -> None:
    made = Example(size=2, length=7)
    assert (made.size, made.length) == (2.0, 7)
    assert isinstance(made.size, float) and isinstance(made.length, int)
    with pytest.raises(FrozenInstanceError):
        made.size = 1.0  # type: ignore[misc]


def test_files_lists_become_tuples_and_back() -> None:
    made = Example.from_dict({"size": 1.0, "kind": ["x", "y"]}, where="f.yaml")
    assert made.kind == ("x", "y")
    assert made.to_dict()["kind"] == ["x", "y"]
    assert Example.from_dict(made.to_dict(), where="") == made


def test_unknown_and_missing_settings_are_refused() -> None:
    with pytest.raises(Refused, match=r"^f\.yaml: unknown key 'lenght'; did you mean 'length'\?"):
        Example.from_dict({"size": 1.0, "lenght": 2}, where="f.yaml")
    with pytest.raises(Refused, match=r"known are .*size"):
        Example.from_dict({"zzz": 1.0}, where="f.yaml")
    with pytest.raises(Refused, match=r"^f\.yaml: missing key 'size'"):
        Example.from_dict({"length": 2}, where="f.yaml")


def test_a_setting_of_a_file_is_refused_under_the_files_name() -> None:
    with pytest.raises(Refused, match=r"^f\.yaml: rows: .*not 0$"):
        Example.from_dict({"size": 1.0, "rows": 0}, where="f.yaml")
    with pytest.raises(Refused, match=r"^rows: "):
        Example.from_dict({"size": 1.0, "rows": 0})


def test_a_text_where_a_list_is_wanted_says_so() -> None:
    with pytest.raises(Refused, match=r"'\*\.weight'; .* in a list too: \['\*\.weight'\]$"):
        Example(size=1.0, kind="*.weight")  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"not 'many'$"):
        Example(size=1.0, rows="many")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "total", "expected"),
    [
        (0.05, 468, 23),
        (0.05, 375, 18),
        (0.5, 9, 4),
        (0.01, 10, 1),
        (40, 10, 40),
        (7, 50, 7),
        (0.29, 100, 29),
        (0.07, 100, 7),
        (0.57, 100, 57),
        (1e-05, 200_000, 2),
    ],
)
def test_a_share_is_rounded_down_but_not_to_nothing(
    amount: float, total: int, expected: int
) -> None:
    assert count(amount, total) == expected


def test_a_share_may_be_nothing_where_nothing_will_do() -> None:
    assert count(0.0, 9, least=0) == count(0.01, 9, least=0) == count(0, 50, least=0) == 0


@pytest.mark.parametrize("amount", [1.0, 1.5, -0.1, -1, math.nan, True, "0.1"])
def test_what_is_neither_share_nor_count_is_refused(amount: Any) -> None:
    with pytest.raises(Refused, match=r"selection .* neither a share"):
        count(amount, 50, what="selection")


@given(st.floats() | st.integers() | st.text() | st.booleans() | st.none())
def test_any_value_is_taken_or_refused(value: Any) -> None:
    try:
        made = Example(size=1.0, length=value)
    except Refused:
        return
    assert isinstance(made.length, int | float) and not isinstance(made.length, bool)
    assert 0 < made.length < 1 if isinstance(made.length, float) else made.length >= 1
