"""Check arguments that Python code passes. Every BadInput names the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mukv.core.errors import BadInput
from mukv.core.typing import Int


def whole_numbers(where: str, given: Any) -> Int[np.ndarray, "batch token"]:
    """Convert nested sequences or an array of shape [token] or [batch token] to int32 rows.

    where: name of the argument, for errors

    Returns an int32 array [batch token]. Raises BadInput for rows of unequal length, another number
    of axes, an empty input, values that are not integers and values beyond 32 bits.
    """
    allowed = "whole numbers of shape [token] or [batch token]"
    try:
        found = np.asarray(given)
    except (ValueError, TypeError):
        raise BadInput(where, type(given).__name__, f"{allowed}, all rows of one length") from None
    if found.dtype.kind not in "iu":
        raise BadInput(where, f"{type(given).__name__} of {found.dtype}", allowed)
    if found.ndim not in (1, 2) or not found.size:
        raise BadInput(where, f"shape {found.shape}", allowed)
    limits = np.iinfo(np.int32)
    beyond = found[(found < limits.min) | (found > limits.max)]
    if beyond.size:
        raise BadInput(where, int(beyond[0]), "whole numbers of 32 bits")
    return np.atleast_2d(found).astype(np.int32)


def require_text(where: str, given: Any) -> None:
    """Raise BadInput unless UTF-8 can encode every string in `given`.

    Mappings (keys and values), lists and tuples are searched recursively; values of other types are
    accepted. Only a lone surrogate can't be encoded. Python decodes a byte of the command line that
    is not UTF-8 to one.

    where: name of the argument, for errors
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
    """Convert token ids of shape [token] or [batch token] to int32 rows [batch token].

    Raises BadInput as `whole_numbers` does, and for ids outside 0 to vocab_size - 1.
    """
    found = whole_numbers(where, given)
    beyond = found[(found < 0) | (found >= vocab_size)]
    if beyond.size:
        raise BadInput(where, int(beyond[0]), f"token ids go from 0 to {vocab_size - 1}")
    return found


def strings(where: str, given: Any) -> list[str]:
    """Return a string as a list of one string, and a sequence of strings as a list.

    Raises BadInput for other types and for strings that UTF-8 can't encode.
    """
    require_text(where, given)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise BadInput(where, given, "a string, or a list of strings")
    return list(given)


def require_types(**given: tuple[Any, Any]) -> None:
    """Raise BadInput for the first argument that has another type than required.

    given: value and type (or union of types) by argument name; a bool does not count as a number
    """
    for name, (value, kind) in given.items():
        if isinstance(value, bool) or not isinstance(value, kind):
            words = str(getattr(kind, "__name__", kind)).replace("NoneType", "None")
            raise BadInput(name, value, f"{words} is needed")
