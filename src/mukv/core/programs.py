"""Compile functions before their first call, once per shape of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

COMPILERS = 2
"""Number of programs that are compiled at once."""


class Programs:
    """A function under `jax.jit` that keeps one compiled program per signature of its arguments.

    Compiling apart from calling allows the two to be timed separately, and several programs to be
    compiled at once.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """function: function to compile. options: keyword arguments of `jax.jit`."""
        self.function = jax.jit(function, **options)
        self.programs: dict[Hashable, Compilation] = {}

    def begin(self, *arguments: Any) -> Compilation:
        """Trace the function for arguments of these shapes, types and shardings, and compile it in
        another thread, if the signature is new.
        """
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, tuple(map(_signature, leaves))
        if key not in self.programs:
            lowered = self.function.lower(*arguments)
            compiled = _threads().submit(lowered.compile)
            self.programs[key] = Compilation(lowered.out_info, _single_device(leaves), compiled)
        return self.programs[key]

    def compiled(self, *arguments: Any) -> Any:
        """Return the program for arguments of these shapes, types and shardings; compile it if it
        is new.
        """
        return self.begin(*arguments).result()


@dataclass(frozen=True)
class Compilation:
    """A program that is being compiled.

    about: shapes and dtypes of the outputs
    place: the device of all arguments, or None for several devices
    compiled: the program, later
    """

    about: Any
    place: SingleDeviceSharding | None
    compiled: Future[Any]

    def result(self) -> Any:
        """Wait for the program and return it."""
        return self.compiled.result()

    def outputs(self) -> Any:
        """Return the outputs as abstract arrays with their shardings, with which a second program
        can be traced before this one has run. On several devices, wait until they are known.
        """
        if self.place is None:
            shardings = self.result().output_shardings
        else:
            shardings = jax.tree.map(lambda _: self.place, self.about)

        def abstract(about: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(about.shape, about.dtype, sharding=sharding)

        return jax.tree.map(abstract, self.about, shardings)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COMPILERS, "compile")


def _single_device(leaves: Sequence[Any]) -> SingleDeviceSharding | None:
    """Return the only device of the arrays among the leaves, or None if there are several."""
    devices = {
        device
        for leaf in leaves
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and leaf.sharding is not None
        for device in leaf.sharding.device_set
    }
    return SingleDeviceSharding(devices.pop()) if len(devices) == 1 else None


def _signature(leaf: Any) -> Hashable:
    """Return what the compiled program depends on in one argument. All shardings over one device
    are equal."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        place: Hashable = leaf.sharding
        if leaf.sharding is not None and len(leaf.sharding.device_set) == 1:
            place = frozenset(leaf.sharding.device_set), leaf.sharding.memory_kind
        return leaf.shape, leaf.dtype, place, getattr(leaf, "weak_type", False)
    return np.shape(leaf), np.result_type(leaf)
