"""Read and write JSON. NaN and infinities, which not every reader accepts, are written as null."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput
from mukv.storage.files import require_regular_file

MOST_BYTES = 32 << 20
"""Largest file that is read, in bytes. The index of a model with 100,000 tensors has 10 MB; a
parsed file takes 30 times its size in RAM.
"""


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8; paths with other bytes can't."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_json(value: Any, indent: int | None = None) -> str:
    """Encode a value made of mappings, lists, tuples, numbers and text.

    Numbers that are not finite become null, NumPy's numbers and arrays become plain numbers and
    lists, and any other value, such as a path, becomes its text.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # an array or a number of NumPy or JAX
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _key(key: Any) -> Any:
    return key if key is None or isinstance(key, bool | int | str) else str(key)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object. Raises BadInput for other content, and for a key that
    occurs twice.
    """
    size = require_regular_file(path).stat().st_size
    if size > MOST_BYTES:
        raise BadInput(str(path), f"{size:,} bytes", f"JSON of at most {MOST_BYTES:,} bytes")
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_each_key_once)
    except _DuplicateKey as duplicate:
        raise BadInput(f"{path}: {duplicate}", "two values", "each key may occur once") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(str(path), f"a file that can't be read ({error})", "JSON") from None
    if not isinstance(value, dict):
        raise BadInput(str(path), type(value).__name__, "a JSON object")
    return value


class _DuplicateKey(Exception):
    """Raised for a key that occurs twice; the message is the key."""


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        raise _DuplicateKey(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return merged
