"""Make and check the manifest of a saved state: name, shape, dtype and checksum of every leaf, and
a checksum of the manifest itself.

Checksums are computed on the devices from the arrays, not from the bytes of files. They don't
depend on the sharding and take one pass over the state.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.core.typing import Array, Int


class Damaged(Exception):
    """A checkpoint differs from the state that was saved; the message names the part."""


def describe(state: Any, metric: float | None) -> dict[str, Any]:
    """Return the manifest of a pytree of arrays, as an object for JSON."""
    return _sealed(
        {
            "metric": metric,
            "leaves": {name: _signature(leaf) for name, leaf in named(state).items()},
            "checksums": _checksums(state),
        }
    )


def read(path: Path) -> dict[str, Any]:
    """Read a manifest from a file. Raises Damaged if it can't be read or has changed."""
    if path.exists() and not path.is_file():  # reading a pipe would never end
        raise Damaged("its manifest is not a file")
    try:
        sealed = json.loads(path.read_bytes())
        manifest = {key: value for key, value in sealed.items() if key != "seal"}
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(f"its manifest can't be read ({reason(error)})") from error
    if sealed != _sealed(manifest):
        raise Damaged("its manifest has changed since it was saved")
    return manifest


def require_same_tree(manifest: dict[str, Any], like: Any, path: Path) -> None:
    """Raise BadInput with the first leaf whose name, shape or dtype differs between the manifest
    and `like`.
    """
    wanted = {name: _signature(leaf) for name, leaf in named(like).items()}
    saved = manifest["leaves"]
    for name in [*wanted, *saved]:
        want, have = wanted.get(name, "nothing of this name"), saved.get(name, "nothing")
        if want != have:
            allowed = f"the model has {want}: it is another model's checkpoint"
            raise BadInput(f"{path}: {name}", have, allowed)


def require_same_numbers(manifest: dict[str, Any], state: Any) -> None:
    """Raise Damaged if a leaf has another checksum than when it was saved."""
    for name, checksum in _checksums(state).items():
        if checksum != manifest["checksums"][name]:
            raise Damaged(f"{name} has changed since it was saved")


def reason(error: BaseException) -> str:
    """Return the first line of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(manifest, sort_keys=True)
    return {**manifest, "seal": zlib.crc32(text.encode())}


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _checksums(state: Any) -> dict[str, int]:
    # One after another, because simulated devices deadlock with two programs in flight (train.py).
    return {name: int(np.asarray(checksum(leaf))) for name, leaf in named(state).items()}


@jax.jit
def checksum(array: Array) -> Int[Array, ""]:
    """Sum all elements' bits modulo 2**32, each times an odd number that depends on its index.

    The sum is independent of the sharding and changes with any single flipped bit and with
    exchanged elements. uint32 scalar.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag])
    if array.dtype.itemsize == 8:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    elif jnp.issubdtype(array.dtype, jnp.floating):
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    else:
        bits = array.astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
