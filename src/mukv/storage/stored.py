"""Read arrays that Orbax saved, one after another, each onto its devices.

Orbax reads all arrays at once in an event loop, which it closes at the first error; every read that
ends later prints a traceback. With one read at a time, a damaged file gives one exception.
`require_path` refuses paths that Orbax or TensorStore can't use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from mukv.core.errors import BadInput
from mukv.storage.json_text import is_text

PATH_BYTES = 3800
"""Longest path of a folder in bytes. Linux allows 4096, and names in the folder take up to 200."""


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read arrays by dotted name, each with the wanted shape, dtype and sharding.

    folder: folder that Orbax wrote with `StandardSave`

    Raises ValueError for an array of another shape or dtype, and, with TensorStore's message, for
    an array that is missing or can't be decoded.
    """
    for entry in folder.rglob("*"):
        if not entry.is_file() and not entry.is_dir():  # reading a pipe would never end
            raise ValueError(f"{entry.name} is neither a file nor a folder")
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
    return {name: _read(folder, name, leaf, context) for name, leaf in wanted.items()}


def _read(folder: Path, name: str, leaf: jax.ShapeDtypeStruct, context: ts.Context) -> jax.Array:
    database = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder}/"},
        "path": f"{name}/",
        "cache_pool": "cache_pool#ocdbt",
    }
    array = ts.open({"driver": "zarr", "kvstore": database}, read=True, context=context).result()
    if array.shape != leaf.shape or array.dtype.numpy_dtype != leaf.dtype:
        raise ValueError(f"{name} is {array.dtype.name}{list(array.shape)}")
    parts: dict[str, np.ndarray] = {}

    def part(place: Any) -> np.ndarray:
        """Read a slice once for all devices that hold it."""
        if str(place) not in parts:
            parts[str(place)] = array[place].read().result()
        return parts[str(place)]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def require_path(folder: Path) -> None:
    """Raise BadInput for a path that Orbax or TensorStore can't use.

    Orbax passes the path to `glob`, which reads brackets, * and ? as patterns. TensorStore reads a
    backslash as a slash and accepts only UTF-8.
    """
    text = str(folder)
    if not is_text(text):
        raise BadInput("--out", text, "a path in UTF-8, which checkpoints need")
    special = sorted({letter for letter in text if letter in "[]*?\\"})
    if special:
        named = " ".join(map(ascii, special))
        raise BadInput("--out", text, f"a path without {named}: checkpoints can't be kept there")
    room = PATH_BYTES - len(os.fsencode(text))
    if room < 0:
        raise BadInput("--out", f"{text[:80]}...", f"a path of at most {PATH_BYTES} bytes")
