from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Refused
from holdfast.tasks.labels import Spelling, by_id, by_name, names_of, number, spelled


def names(*labels: object, fractions: bool = False) -> tuple[str, ...]:
    return names_of(spellings(*labels), "a.csv", fractions=fractions)


def spellings(*labels: object, rows: int = 2) -> dict[str, Spelling]:
    """Each label stands in `rows` rows, for the first time in the lines from 2 on."""
    return {
        spelled(label, f"a.csv, line {line}"): Spelling(f"line {line}", rows)
        for line, label in enumerate(labels, start=2)
    }


@pytest.mark.parametrize(
    "labels, order",
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, 2], ("2", "9", "10")),
        (["b", "10", "9"], ("10", "9", "b")),
        (["True", "False"], ("False", "True")),
        ([True, False], ("False", "True")),
        (["10.0", "9.0"], ("9.0", "10.0")),
        (["99999999999999999999", "100000000000000000000"],) * 2,
        (["1", "-100", "0"], ("0", "1")),
        (["1", "-100.0", " -100", -100.0, "0"], ("0", "1")),
        (["NA", "None", "null", "nan"], ("NA", "None", "nan", "null")),
    ],
)
def test_the_map_is_in_numeric_order_or_by_letter(labels, order) -> None:
    assert names(*labels) == tuple(order)


@pytest.mark.parametrize(
    "one, other",
    [
        *[("1", "01"), ("1", "True"), ("0", "false"), ("1", "1.0"), ("True", "true"), (1, 1.0)],
        *[("yes", "yes "), ("1", " 1"), ("1", "+1"), ("1000", "1e3"), ("1", "١")],
    ],
)
def test_two_spellings_of_one_label_are_refused_with_both_lines(one, other) -> None:
    with pytest.raises(Refused) as caught:
        names("x", one, other)
    line = str(caught.value)
    assert repr(str(one)) in line and repr(str(other)) in line
    assert "line 3" in line and "line 4" in line


def test_numbers_with_fractions_ask_what_is_meant() -> None:
    with pytest.raises(Refused, match="say type=regression"):
        names("0.5", "1", "2")
    assert names("0.5", "1", "2", fractions=True) == ("0.5", "1", "2")
    assert names("0.5", "1", "x") == ("0.5", "1", "x")


def test_too_many_classes_ask_what_is_meant() -> None:
    with pytest.raises(Refused, match="1,001 different labels in 2,002 rows"):
        names(*range(1001))
    with pytest.raises(Refused, match="3 different labels in 3 rows"):
        names_of(spellings("a", "b", "c", rows=1), "a.csv")


@pytest.mark.parametrize("label", [None, "", "  ", float("nan")])
def test_a_missing_label_is_refused(label: object) -> None:
    for read in (by_id(("a", "b")), by_name(("a", "b")), number):
        with pytest.raises(Refused, match=r"a\.csv, line 3: no label"):
            read(label, "a.csv, line 3")
    with pytest.raises(Refused, match=r"a\.csv, line 3: no label"):
        names("a", label)


@pytest.mark.parametrize("label", [[], {}, b"x", "x" * 300, 10**300])
def test_what_is_no_label_is_refused(label: object) -> None:
    with pytest.raises(Refused, match="line 3: label"):
        names("a", label)


@given(labels=st.lists(st.text(max_size=5) | st.integers() | st.floats() | st.booleans()))
def test_the_map_reads_back_its_own_labels(labels: list[object]) -> None:
    try:
        found = names(*labels, fractions=True)
    except Refused:
        return
    read = by_name(found)
    ids = {read(label, "here") for label in labels} - {None}
    assert ids == set(range(len(found)))


@pytest.mark.parametrize("cell", ["1_0", "4_4", "１２", "٣", "inf", "nan", "x", True])
def test_a_number_is_written_in_plain_digits(cell: object) -> None:
    """Python reads 1_0 as ten: a typing error that no score would show."""
    with pytest.raises(Refused, match="is not a finite number"):
        number(cell, "a.csv, line 2")
    assert number(" 1.5e1 ", "") == 15 and number("-3", "") == -3 and number(0.5, "") == 0.5
