"""Check the counts in configuration objects: integers of at least 1 that fit 32 bits."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mukv.core.errors import BadInput

INT32 = (1 << 31) - 1


def require_counts(part: Any, *names: str, most: int = INT32, unit: str = "") -> None:
    """Raise BadInput unless each of these fields of `part` is None or from 1 to `most`.

    most: upper bound, which catches typing errors; JAX counts in 32 bits. unit: what is counted,
        such as "token", for the error text.
    """
    for name in names:
        value = getattr(part, name)
        if value is not None and value < 1:
            null = [field.default for field in fields(part) if field.name == name] == [None]
            one = f"at least 1 {unit}".rstrip()
            raise BadInput(name, value, f"{one}, or null" if null else one)
        if value is not None and value > most:
            raise BadInput(name, value, f"at most {most:,}")
