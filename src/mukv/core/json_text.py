"""Values as JSON that every reader takes: no NaN and no infinity, which JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8: a path of other bytes can't."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def to_json(value: Any, indent: int | None = None) -> str:
    """The text of a value made of mappings, lists, tuples, numbers and text.

    Numbers that are not finite become null, numpy's numbers and arrays what they hold, and
    anything else, such as a path, its text.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # an array or a number of numpy's or JAX's
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _key(key: Any) -> Any:
    return key if key is None or isinstance(key, bool | int | str) else str(key)
