"""JSON files that others wrote: one object, of bounded size, each key once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput
from mukv.core.files import require_regular_file

MOST_BYTES = 32 << 20
"""The index of a model with 100,000 tensors has 10 MB; a parsed file takes 30 times its size."""


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object. Raises BadInput for anything else, a key that stands there
    twice included."""
    size = require_regular_file(path).stat().st_size
    if size > MOST_BYTES:
        raise BadInput(str(path), f"{size:,} bytes", f"JSON of at most {MOST_BYTES:,} bytes")
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_each_key_once)
    except _Twice as twice:
        raise BadInput(f"{path}: {twice}", "two values", "a key stands once") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(str(path), f"a file that can't be read ({error})", "JSON") from None
    if not isinstance(found, dict):
        raise BadInput(str(path), type(found).__name__, "a JSON object")
    return found


class _Twice(Exception):
    """The message is the key."""


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found
