"""Names from files and users are shown whole or shortened, with control characters escaped."""

from __future__ import annotations

import pytest

from mukv.core.names import distinct, even, printable, shortened


@pytest.mark.parametrize(
    "name",
    ["[/b]x", "[red]x", "$\\frac{x$", "_x", ":smile:", "a b", "\u00e9\u4e2d\u0639", "a\u200db"],
)
def test_visible_characters_are_not_escaped(name):
    assert printable(name) == name


def test_invisible_characters_are_escaped():
    assert printable("a\x1b[31m\nb\udcff\u202e\u2028\x00") == (
        "a\\x1b[31m\\nb\\udcff\\u202e\\u2028\\x00"
    )
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    printable("".join(map(chr, range(0x110000)))).encode()


def test_long_names_keep_both_ends():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdefghij", 5) == "ab\u2026ij"
    assert len(shortened("x" * 9999)) == 40


def test_names_that_come_out_alike_are_told_apart():
    long = ["x" * 50 + middle + "y" * 50 for middle in "ab"]
    first, second = distinct(long)
    assert first != second
    assert distinct(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 2000], ["1", "2,000"]),
        ([0.5, 0.25, None], ["0.5000", "0.2500", ""]),
        ([1234.5, 1.25], ["1,234.5", "1.2"]),
        ([0.01, 0.0123], ["0.01000", "0.01230"]),
        ([1234.5, 0.25], ["1,234.50", "0.25"]),
        ([1e-9, 1.0], ["1.000e-09", "1.000e+00"]),
        ([float("nan"), float("inf"), 2.0], ["", "inf", "2.000"]),
        ([0, 0.0], ["0.000", "0.000"]),
        ([], []),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(values, shown):
    assert even(values) == shown
