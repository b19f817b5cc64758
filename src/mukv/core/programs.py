"""Compile functions before their first call, once per shape of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np


class Programs:
    """A function under `jax.jit` that keeps one compiled program per signature of its arguments.

    Compiling apart from calling allows the two to be timed separately.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """function: function to compile. options: keyword arguments of `jax.jit`."""
        self.function = jax.jit(function, **options)
        self.programs: dict[Hashable, Any] = {}

    def compiled(self, *arguments: Any) -> Any:
        """Return the program for arguments of these shapes, types and shardings; compile it if it
        is new.
        """
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple(map(_signature, leaves))
        if key not in self.programs:
            self.programs[key] = self.function.lower(*arguments).compile()
        return self.programs[key]


def outputs(program: Any) -> Any:
    """Return the outputs of a compiled program as abstract arrays with their shardings.

    With these a second program can be compiled before the first one has run.
    """

    def abstract(about: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(about.shape, about.dtype, sharding=sharding)

    return jax.tree.map(abstract, program.out_info, program.output_shardings)


def _signature(leaf: Any) -> Hashable:
    """Return what the compiled program depends on in one argument."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.sharding, getattr(leaf, "weak_type", False)
    return np.shape(leaf), np.result_type(leaf)
