"""Weights as one safetensors file: a nested dict of arrays, its names joined by dots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mukv.core.errors import BadInput, Failed
from mukv.core.files import replacing
from mukv.core.params import abstract, named

FILE = "weights.safetensors"


def save_weights(folder: Path, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
    """Write a nested dict of arrays (any sharding, any type down to 8 bits) into a folder.

    Returns the file's path. All processes must call it, the first one writes. The file is whole
    or not there; one of the same name is replaced. Raises BadInput for a name with a dot, or a
    folder that can't be written, Failed for a full disk.
    """
    arrays = {name: _on_host(array) for name, array in _flatten(tree)}
    path = folder / FILE
    if jax.process_index():
        return path
    with replacing(path) as made:
        try:
            save_file(arrays, made, dict(metadata))
        except SafetensorError as error:
            raise Failed(f"{path}: {error}; nothing was left half-written") from error
    return path


def load_weights(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested dict of numpy arrays that `save_weights` wrote, and its metadata.

    Raises BadInput if the file is missing, cut short or something else.
    """
    path = folder / FILE
    tree: dict[str, Any] = {}
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                *parents, last = name.split(".")
                node = tree
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = file.get_tensor(name)
    except FileNotFoundError:
        raise BadInput(str(path), "no such file", "a folder with saved weights") from None
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        given = f"a file that can't be read ({str(error).splitlines()[0]})"
        raise BadInput(str(path), given, "it is cut short, or not written by mukv") from None
    return tree, metadata


def require_weights(declared: Any, found: Any, path: Path) -> None:
    """Raise BadInput where weights are not those that a model declares."""
    wanted = {name: leaf.shape for name, leaf in named(abstract(declared)).items()}
    shapes = {name: leaf.shape for name, leaf in named(found).items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise BadInput(
                f"{path}: {name}",
                shapes.get(name, "missing"),
                f"the configuration asks for {wanted.get(name, 'no such weight')}",
            )


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
