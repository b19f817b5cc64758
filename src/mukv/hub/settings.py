"""Read a config.json key by key; errors name the key.

A missing key has the family's default. As in transformers 5, null is a value and not a missing key.
Values that no model can have (no heads, an infinite number) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mukv.core.errors import BadInput, nearest_name
from mukv.storage.json_text import read_json as read_json

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_python_tanh": "gelu",
    "quick_gelu": "quick_gelu",
}
"""Our name of an activation by its name in Hugging Face's format. Of several names with the same
meaning, the first is written."""
LARGEST = 2**31 - 1
"""Largest whole number that is accepted; no array axis is longer."""
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-30, 1e30
"""Bounds of accepted numbers; products of numbers beyond them leave the range of float32."""


@dataclass(frozen=True)
class Given:
    """A mapping of a config.json.

    where: name of the mapping, for errors
    defaults: values of missing keys
    """

    mapping: Mapping[str, Any]
    where: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def whole(
        self, key: str, default: Any = ..., low: int = 1, high: int = LARGEST, null: bool = False
    ) -> Any:
        """Return a whole number from `low` to `high`.

        default: value of a missing key for which the family has no default; `...` makes the key
            required
        null: whether None is allowed

        The arguments mean the same in the other methods.
        """
        value = self._value(key, default, "a whole number")
        if value is None and null:
            return None
        if type(value) is not int:
            raise self._wrong(key, value, _needed(value, "a whole number"))
        if not low <= value <= high:
            raise self._wrong(key, value, f"{low:,} to {high:,}")
        return value

    def number(self, key: str, default: Any = ..., low: float = 0.0, null: bool = False) -> Any:
        """Return a number greater than `low` that float32 can represent, as a float."""
        value = self._value(key, default, "a number")
        if value is None and null:
            return None
        if type(value) is not int and type(value) is not float:
            raise self._wrong(key, value, _needed(value, "a number"))
        if not max(low, SMALLEST_NUMBER) <= value <= LARGEST_NUMBER or value == low:
            allowed = f"greater than {low:g}, from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g}"
            raise self._wrong(key, value, allowed)
        return float(value)

    def flag(self, key: str, default: Any = ...) -> bool:
        """Return a boolean."""
        value = self._value(key, default, "true or false")
        if type(value) is not bool:
            raise self._wrong(key, value, _needed(value, "true or false"))
        return value

    def items(self, key: str) -> list[Any] | None:
        """Return a list; None if it is missing or null."""
        value = self._value(key, None, "a list")
        if value is not None and type(value) is not list:
            raise self._wrong(key, value, "needs a list")
        return value

    def inside(self, key: str) -> Given:
        """Return the mapping at a key, empty if there is none."""
        value = self._value(key, None, "a mapping")
        if value is not None and type(value) is not dict:
            raise self._wrong(key, value, "needs a mapping")
        return Given(value or {}, f"{self.where}: {key}")

    def require(self, key: str, *allowed: Any) -> None:
        """Raise BadInput unless the key is missing, null or one of the allowed values."""
        value = self.mapping.get(key)
        if value is not None and value not in allowed:
            words = ", ".join(map(str, allowed)) or "null"
            raise self._wrong(key, value, f"not supported; allowed: {words}")

    def one_of(self, key: str, table: Mapping[str, Any], default: Any = ...) -> Any:
        """Return the value in a table for the text at a key."""
        word = self._value(key, default, "text")
        if not isinstance(word, str):
            raise self._wrong(key, word, f"needs text; allowed: {', '.join(table)}")
        if word not in table:
            allowed = f"not supported; allowed: {', '.join(table)}"
            raise BadInput(f"{self.where}: {key}", word, allowed, nearest_name(word[:99], table))
        return table[word]

    def _value(self, key: str, default: Any, what: str) -> Any:
        if key in self.mapping:
            return self.mapping[key]
        value = self.defaults.get(key, default)
        if value is ...:
            raise self._wrong(key, None, f"required: {what}")
        return value

    def _wrong(self, key: str, value: Any, allowed: str) -> BadInput:
        return BadInput(f"{self.where}: {key}", value, allowed)


def _needed(value: Any, what: str) -> str:
    return f"required: {what}" if value is None else f"needs {what}"


def same_number(one: float, other: float) -> bool:
    """Whether two numbers differ only by rounding."""
    return math.isclose(one, other, rel_tol=1e-9)
