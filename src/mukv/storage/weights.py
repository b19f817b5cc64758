"""Save and load weights, a nested dict of arrays, as one safetensors file. The name of a tensor is
the keys joined by dots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from mukv.core.errors import BadInput
from mukv.core.params import abstract, named
from mukv.storage import checksum
from mukv.storage.tensors import WRITTEN, Spec, is_finite, write_tensors

FILE = "weights.safetensors"
TYPES = {code: dtype for dtype, code in WRITTEN.items()}
"""Dtypes by their names in a safetensors file."""


def save_weights(folder: Path, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
    """Write a nested dict of arrays (any sharding, dtypes of 8 to 64 bits) to a file in a folder.

    Returns the file's path. All processes must call this function; process 0 writes. The file has a
    checksum, and replaces an existing file only when it is complete. Raises BadInput for a key with
    a dot and for a folder that can't be written, Failed for a full disk.
    """
    arrays = {name: _on_host(array) for name, array in _flatten(tree)}
    path = folder / FILE
    if jax.process_index() == 0:
        specs = {
            name: Spec(array.shape, array.dtype, partial(iter, (array,)))
            for name, array in arrays.items()
        }
        write_tensors(path, specs, metadata)
    return path


def load_weights(
    folder: Path, convert: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the nested dict of NumPy arrays that `save_weights` wrote, and its metadata.

    convert: function of the name and the array of a weight that returns the value to put in its
        place; it is called before the next weight is read

    Raises BadInput if the file is missing, damaged or not written by mukv.
    """
    path = folder / FILE
    tree: dict[str, Any] = {}
    checksum.require_whole(path)
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                *parents, last = name.split(".")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                array = file.get_tensor(name)
                node[last] = array if convert is None else convert(name, array)
    except (IndexError, AttributeError):  # an array where a dict is needed
        given = "a name that begins with the name of another weight"
        raise BadInput(str(path), given, "weights that mukv wrote") from None
    except (SafetensorError, OSError, TypeError) as error:
        given = f"a file that can't be read ({str(error).splitlines()[0]})"
        raise BadInput(str(path), given, "it is cut short, or not written by mukv") from None
    metadata.pop(checksum.KEY, None)
    return tree, metadata


def weight_types(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Read shape and dtype of each weight that `save_weights` wrote, by dotted name.

    Raises BadInput if the file is missing, damaged or not written by mukv.
    """
    path = folder / FILE
    if not path.is_file():
        raise BadInput(str(path), "no such file", "a file with saved weights")
    try:
        with safe_open(path, "numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: jax.ShapeDtypeStruct(part.get_shape(), TYPES[part.get_dtype()])
                for name, part in found.items()
            }
    except (SafetensorError, OSError, KeyError) as error:
        given = f"a file that can't be read ({str(error).splitlines()[0]})"
        raise BadInput(str(path), given, "it is cut short, or not written by mukv") from None


def step_of(metadata: Mapping[str, str], path: Path) -> int:
    """Read the step from the metadata of a run's weights. Raises BadInput if it is not a number."""
    step = metadata.get("step", "0")
    if not (step.isascii() and step.isdecimal() and len(step) < 16):
        raise BadInput(f"{path}: step", step[:40], "the number of the step, as mukv writes it")
    return int(step)


def require_finite(weights: Any, where: object) -> None:
    """Raise BadInput if any weight is not finite."""
    for name, leaf in named(weights).items():
        shards = getattr(leaf, "addressable_shards", None)
        parts = [leaf] if shards is None else [s.data for s in shards if s.replica_id == 0]
        if not all(is_finite(np.asarray(part)) for part in parts):
            raise not_finite(f"{where}: {name}")


def not_finite(where: str) -> BadInput:
    """Make the error for weights that are not finite."""
    given = "numbers that are infinite or not a number"
    others = "eval, generate, export and import take others with --allow-nonfinite"
    return BadInput(where, given, f"finite weights; {others}")


def require_weights(declared: Any, given: Any, path: Path) -> None:
    """Raise BadInput if names or shapes of weights differ from what a model declares, or if they
    are not floating-point numbers.

    declared: tree of `Param`
    given: tree of arrays
    path: file of the weights, for messages
    """
    wanted = {name: leaf.shape for name, leaf in named(abstract(declared)).items()}
    shapes = {name: leaf.shape for name, leaf in named(given).items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise BadInput(
                f"{path}: {name}",
                shapes.get(name, "missing"),
                f"the configuration asks for {wanted.get(name, 'no such weight')}",
            )
    for name, leaf in named(given).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            allowed = "weights are floating point numbers"
            raise BadInput(f"{path}: {name}", str(leaf.dtype), allowed)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if "." in key:
            raise BadInput(f"{prefix}{key}", key, "the name of a weight has no dot")
        inner = isinstance(value, Mapping)
        flat += _flatten(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return flat


def _on_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, order="C")
