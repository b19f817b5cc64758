"""Format names and numbers for display: printable, short, with equal decimals in a column."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST = 40
"""Maximum number of characters of a name in a legend or on an axis."""
DIGITS = 4
"""Significant digits of the largest number of a column."""
MOST_DECIMALS = 6
"""Maximum number of decimals; a column that needs more is written with exponents."""
_DIRECTION_MARKS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Unicode controls that change the writing direction and can make a name look like another."""


def printable(text: object, keep: str = "") -> str:
    """Replace each invisible character by its escape sequence, such as \\x1b or \\n.

    These are control characters, line separators, marks of writing direction, and the lone
    surrogates that Python uses for bytes of a file name that are not UTF-8. keep: characters that
    stay.
    """
    return "".join(
        character if character in keep or _is_visible(character) else _escape(character)
        for character in str(text)
    )


def _is_visible(character: str) -> bool:
    if character in _DIRECTION_MARKS:
        return False
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shortened(text: object, longest: int = LONGEST) -> str:
    """Return a printable text of at most `longest` characters; its middle becomes an ellipsis."""
    whole = str(text)
    if len(whole) > 2 * longest:  # a printable text is at least as long: only the ends are needed
        whole = whole[:longest] + whole[-longest:]
    whole = printable(whole)
    if len(whole) <= longest:
        return whole
    end = (longest - 1) // 2
    return f"{whole[: longest - 1 - end]}\u2026{whole[len(whole) - end :]}"


def distinct(names: Iterable[object], longest: int = LONGEST) -> list[str]:
    """Return `shortened` of each name; equal results are numbered."""
    found: list[str] = []
    seen: dict[str, int] = {}
    for name in names:
        short = shortened(name, longest)
        seen[short] = seen.get(short, 0) + 1
        found.append(short if seen[short] == 1 else f"{short} ({seen[short]})")
    return found


def even(
    values: Sequence[float | int | None], digits: int = DIGITS, missing: str = ""
) -> list[str]:
    """Format the numbers of a column with equal decimals.

    Integers are written without decimals. Otherwise the largest number has `digits` significant
    digits and the smallest at least two. If that takes more than MOST_DECIMALS decimals, or if a
    number reaches 1e15, all are written with exponents.

    values: numbers within the range of a float. missing: text for None and NaN.
    """
    there = [value for value in values if value is not None and not math.isnan(value)]
    sizes = [abs(value) for value in there if value and math.isfinite(value)]
    low, high = (math.floor(math.log10(pick(sizes, default=1))) for pick in (min, max))
    decimals = 0
    if not all(isinstance(value, int) for value in there):
        decimals = max(0, digits - 1 - high, 1 - low if sizes else 0)
    form = f",.{decimals}f" if decimals <= MOST_DECIMALS and high < 15 else f".{digits - 1}e"
    return [
        missing if value is None or math.isnan(value) else format(value, form) for value in values
    ]


def gibibytes(size: float) -> str:
    """Format a number of bytes in GiB, such as "12.5 GiB", or in MiB if it is below 0.1 GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
