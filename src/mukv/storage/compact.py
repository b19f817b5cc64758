"""Convert weights to few bits while they are read, so that RAM never holds all of them in full.

A tensor is read and converted layer by layer, or, if it is an embedding or a readout, in blocks of
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compact import Compact, CompactLayers, compacted, fits, require_format
from mukv.core.params import LAYER, Param
from mukv.core.typing import Array
from mukv.storage.tensors import Cut, is_finite
from mukv.storage.weights import not_finite

TOKENS = 1 << 14
"""Number of token ids whose rows of an embedding or readout are converted at once."""


class Converter:
    """Converts weights to a format of `core.compact`. Raises BadInput for an unknown format.

    where: name of the file or folder of the weights, for errors
    """

    def __init__(self, kind: str, where: object):
        require_format(kind)
        self.kind, self.where = kind, where

    def __call__(self, name: str, param: Param, read: Callable[[Cut], np.ndarray]) -> Any:
        """Convert one weight, or read it without conversion if it does not fit the format.

        read: function that returns a part of the weight

        Raises BadInput for numbers that are not finite.
        """
        if not fits(name, param):
            return jnp.asarray(self._finite(name, read(())))
        if LAYER not in param.dims:
            return joined([self._converted(name, param, read, cut) for cut in _cuts(param)])
        own = replace(param, dims={n: size for n, size in param.dims.items() if n != LAYER})

        def layer(number: int) -> Compact:
            one = slice(number, number + 1)
            return self._converted(name, own, lambda _: read((one,))[0], ())

        return CompactLayers(tuple(map(layer, range(param.dims[LAYER]))))

    def _converted(
        self, name: str, param: Param, read: Callable[[Cut], np.ndarray], cut: Cut
    ) -> Compact:
        return compacted(param, jnp.asarray(self._finite(name, read(cut))), self.kind)

    def _finite(self, name: str, part: np.ndarray) -> np.ndarray:
        if not is_finite(part):
            raise not_finite(f"{self.where}: {name}")
        return part


def _cuts(param: Param) -> Iterator[Cut]:
    """Yield the parts of a weight that are converted one after the other: blocks of the vocabulary,
    or the whole weight if it has none."""
    if param.role not in ("embedding", "readout"):
        yield ()
        return
    axis = 0 if param.role == "embedding" else len(param.dims) - 1
    before, size = (slice(None),) * axis, param.shape[axis]
    for start in range(0, size, TOKENS):
        yield (*before, slice(start, min(start + TOKENS, size)))


def joined(parts: list[Compact]) -> Compact:
    """Concatenate blocks of outputs."""
    if len(parts) == 1:
        return parts[0]
    arrays = [(part.codes, part.step, part.low) for part in parts]
    codes, step, low = jax.tree.map(lambda *each: jnp.concatenate(each), *arrays)
    return replace(parts[0], codes=codes, step=step, low=low, outputs=(len(codes),))


def stacked(layers: list[Compact | Array]) -> CompactLayers | Array:
    """Combine the weights of the repeats of a layer: compact ones as a `CompactLayers`, arrays
    stacked."""
    kept = [layer for layer in layers if isinstance(layer, Compact)]
    if len(kept) == len(layers):
        return CompactLayers(tuple(kept))
    return jnp.stack([jnp.asarray(layer) for layer in layers])


def nbytes(weights: Any) -> int:
    """Return the bytes of a tree of weights."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
