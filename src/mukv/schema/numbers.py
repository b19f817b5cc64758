"""Find numbers in configuration objects by dotted path, and replace them by traced numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from mukv.schema.schema import join

T = TypeVar("T")


def leaves(mapping: Any, where: str = "") -> dict[str, Any]:
    """Return the values in nested mappings and lists, by dotted path."""
    if not isinstance(mapping, dict | list):
        return {where: mapping}
    pairs = mapping.items() if isinstance(mapping, dict) else enumerate(mapping)
    values: dict[str, Any] = {}
    for key, value in pairs:
        values |= leaves(value, join(where, str(key)))
    return values


def substituted(part: T, numbers: Mapping[str, Any]) -> T:
    """Copy a dataclass with other numbers at dotted paths of its fields.

    The numbers are not checked, because traced numbers can't be compared; the checks were made when
    the original object was built.
    """
    if not numbers:
        return part
    inside: dict[str, dict[str, Any]] = {}
    for path, number in numbers.items():
        name, _, rest = path.partition(".")
        inside.setdefault(name, {})[rest] = number
    copy = object.__new__(type(part))
    for field in fields(part):  # pyright: ignore[reportArgumentType]
        value = getattr(part, field.name)
        if field.name in inside:
            value = inside[field.name].get("", None)
            if value is None:
                value = substituted(getattr(part, field.name), inside[field.name])
        object.__setattr__(copy, field.name, value)
    return copy
