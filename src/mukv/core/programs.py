"""Programs of a function: compiled ahead of their first call, once for each shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np


class Programs:
    """A function under `jax.jit` whose time of compilation can be told from that of a call."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        """options: of `jax.jit`."""
        self.function = jax.jit(function, **options)
        self.programs: dict[Hashable, Any] = {}

    def compiled(self, *arguments: Any) -> Any:
        """The program for arguments of these shapes, types and shardings."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple(map(_signature, leaves))
        if key not in self.programs:
            self.programs[key] = self.function.lower(*arguments).compile()
        return self.programs[key]


def outputs(program: Any) -> Any:
    """What a compiled program gives, as abstract arrays: another can be compiled for them before
    this one has run."""

    def abstract(about: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(about.shape, about.dtype, sharding=sharding)

    return jax.tree.map(abstract, program.out_info, program.output_shardings)


def _signature(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.sharding, getattr(leaf, "weak_type", False)
    return np.shape(leaf), np.result_type(leaf)
