"""Checks of arguments that Python code gives: wrong types are told by the argument's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mukv.core.errors import BadInput
from mukv.core.typing import Int


def whole_numbers(where: str, given: Any) -> Int[np.ndarray, "batch token"]:
    """Int32 rows from [token] or [batch token], as nested sequences or an array.

    Raises BadInput for rows of unequal length, other dimensions, emptiness, numbers that are not
    whole or beyond 32 bits, and anything that is no number.
    """
    allowed = "whole numbers of shape [token] or [batch token]"
    try:
        found = np.asarray(given)
    except (ValueError, TypeError):
        raise BadInput(where, type(given).__name__, f"{allowed}, all rows equally long") from None
    if found.dtype.kind not in "iu":
        raise BadInput(where, f"{type(given).__name__} of {found.dtype}", allowed)
    if found.ndim not in (1, 2) or not found.size:
        raise BadInput(where, f"shape {found.shape}", allowed)
    limits = np.iinfo(np.int32)
    beyond = found[(found < limits.min) | (found > limits.max)]
    if beyond.size:
        raise BadInput(where, int(beyond[0]), "numbers of 32 bits")
    return np.atleast_2d(found).astype(np.int32)


def require_text(where: str, given: Any) -> None:
    """Raise BadInput unless this is a text, and those in mappings and sequences too.

    A lone surrogate, which no UTF-8 can hold, is the half of a character or stands for a byte of a
    command line that is not UTF-8.
    """
    if isinstance(given, Mapping):
        for key, value in given.items():
            require_text(where, key)
            require_text(f"{where}.{key}", value)
    elif isinstance(given, list | tuple):
        for place, value in enumerate(given):
            require_text(f"{where}[{place}]", value)
    elif isinstance(given, str):
        try:
            given.encode()
        except UnicodeEncodeError:
            raise BadInput(where, given, "text without lone surrogates") from None


def token_ids(where: str, given: Any, vocab_size: int) -> Int[np.ndarray, "batch token"]:
    """Return int32 rows of ids from [token] or [batch token].

    Raises BadInput as `whole_numbers` does, and for ids outside of 0 to vocab_size - 1.
    """
    found = whole_numbers(where, given)
    beyond = found[(found < 0) | (found >= vocab_size)]
    if beyond.size:
        raise BadInput(where, int(beyond[0]), f"token ids go from 0 to {vocab_size - 1}")
    return found


def strings(where: str, given: Any) -> list[str]:
    """A text or a sequence of texts as a list. Raises BadInput."""
    require_text(where, given)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise BadInput(where, given, "a text, or a list of texts")
    return list(given)


def require_types(**given: tuple[Any, Any]) -> None:
    """Raise BadInput for an argument of another type. given: value and type by name; a bool is no
    number."""
    for name, (value, kind) in given.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            words = str(getattr(kind, "__name__", kind)).replace("NoneType", "None")
            raise BadInput(name, value, f"{words} is needed")
