"""Compile functions before their first call, once per shape of the arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

from mukv.core.tap import capturing
from mukv.core.typing import Array

KEPT = 256
"""Number of programs of one function that are kept; the oldest is forgotten first."""
COMPILERS = 2
"""Number of programs that are compiled at once."""


class Programs:
    """A function under `jax.jit` that keeps one compiled program per signature of its arguments.

    Compiling apart from calling allows the two to be timed separately, and several programs to be
    compiled at once.
    """

    def __init__(self, function: Callable[..., Any], static: int = 0, **options: Any):
        """function: function to compile. static: number of first arguments that are no arrays.
        options: keyword arguments of `jax.jit`."""
        self.static = static
        self.function = jax.jit(function, static_argnums=range(static), **options)
        self.programs: dict[Hashable, Compilation] = {}

    def begin(self, *arguments: Any) -> Compilation:
        """Trace the function for arguments of these shapes, types and shardings, and compile it in
        another thread, if the signature is new. The arrays may be abstract.
        """
        leaves, structure = jax.tree.flatten(arguments[self.static :])
        key = arguments[: self.static], structure, tuple(map(_signature, leaves))
        if key not in self.programs:
            lowered = self.function.lower(*arguments)
            compiled = _threads().submit(lowered.compile)
            self.programs[key] = Compilation(lowered.out_info, _single_device(leaves), compiled)
        return self.programs[key]

    def compiled(self, *arguments: Any) -> Any:
        """Return the program for arguments of these shapes, types and shardings; compile it if it
        is new. It is called without the static arguments.
        """
        return self.begin(*arguments).result()


class Subprogram:
    """A function that is a part of the program that calls it; elsewhere it is a program of its own,
    one per signature of its arguments."""

    def __init__(self, function: Callable[..., Any], static: int = 0, donated: int | None = None):
        """static: number of first arguments that are no arrays. donated: number of the argument
        whose arrays a program of its own may overwrite."""
        self.function, self.static, self.donated = function, static, donated
        self.part = jax.jit(function, static_argnums=range(static))
        self.programs: dict[Hashable, Future[Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        if capturing():
            return self.function(*arguments)  # what is captured can't leave a program
        leaves = jax.tree.leaves(arguments[self.static :])
        if not any(isinstance(leaf, Tracer) for leaf in leaves):
            return self._begun(arguments).result()(*leaves)
        beginning = _BEGINNING.get()
        if beginning is None:
            return self.part(*arguments)
        with _beginning(None):  # what this subprogram calls is a part of it
            beginning.subprograms.append(self._begun(beginning.abstract(arguments)))
            return self.part(*arguments)

    def _begun(self, arguments: tuple[Any, ...]) -> Future[Any]:
        """Begin to compile the program, unless that was done; it takes the leaves of the arguments,
        since JAX describes those of a program by objects that typed classes refuse."""
        static, given = arguments[: self.static], arguments[self.static :]
        leaves, structure = jax.tree.flatten(given)
        mesh = jax.sharding.get_abstract_mesh()
        key = static, mesh, structure, tuple(map(_signature, leaves))
        if key not in self.programs:
            if len(self.programs) >= KEPT:
                self.programs.pop(next(iter(self.programs)))

            def flat(*leaves: Array) -> Any:
                return self.function(*static, *jax.tree.unflatten(structure, leaves))

            lowered = jax.jit(flat, donate_argnums=self._owned(given)).lower(*leaves)
            self.programs[key] = _threads().submit(lowered.compile)
        return self.programs[key]

    def _owned(self, given: tuple[Any, ...]) -> Sequence[int]:
        """Return the numbers of the leaves that may be overwritten."""
        if self.donated is None:
            return ()
        place = self.donated - self.static
        before, own = (len(jax.tree.leaves(part)) for part in (given[:place], given[place]))
        return range(before, before + own)


class Subprograms:
    """A function that applies `Subprogram`s one after another and does nothing else with arrays.

    It has the methods of `Programs`. It compiles faster than one program if a subprogram occurs
    often, such as a layer. On several devices it is one program.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """options: keyword arguments of `jax.jit`, for one program."""
        self.function = function
        self.whole = Programs(function, **options)

    def begin(self, *arguments: Any) -> Compilation | SubprogramsCompilation:
        """Begin to compile the subprograms for arguments of these shapes, types and shardings. The
        arrays may be abstract."""
        place = _single_device(jax.tree.leaves(arguments))
        if place is None:
            return self.whole.begin(*arguments)
        beginning = _Beginning(place, [])
        with _beginning(beginning):
            about = jax.eval_shape(self.function, *arguments)
        return SubprogramsCompilation(
            self.function, beginning.abstract(about), beginning.subprograms
        )

    def compiled(self, *arguments: Any) -> Any:
        """Return the function when all of its subprograms are compiled."""
        return self.begin(*arguments).result()


@dataclass(frozen=True)
class SubprogramsCompilation:
    """Subprograms of a function that are being compiled.

    about: the outputs of the function, as abstract arrays with their shardings
    """

    function: Callable[..., Any]
    about: Any
    subprograms: Sequence[Future[Any]]

    def result(self) -> Callable[..., Any]:
        """Wait for the subprograms and return the function."""
        for each in self.subprograms:
            each.result()
        return lambda *arguments: self.function(*jax.tree.map(jnp.asarray, arguments))

    def outputs(self) -> Any:
        """Return the outputs as abstract arrays with their shardings."""
        return self.about


@dataclass(frozen=True)
class _Beginning:
    """A run of a function on traced arguments in which its subprograms begin to be compiled.

    place: the device of all arrays
    """

    place: SingleDeviceSharding
    subprograms: list[Future[Any]]

    def abstract(self, tree: Any) -> Any:
        """Return the tree with abstract arrays on the device."""

        def abstract(leaf: Any) -> Any:
            if not isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
                return leaf
            weak = getattr(leaf, "weak_type", False)  # random keys have none
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.place, weak_type=weak)

        return jax.tree.map(abstract, tree)


_BEGINNING: ContextVar[_Beginning | None] = ContextVar("_BEGINNING", default=None)


@contextmanager
def _beginning(now: _Beginning | None) -> Iterator[None]:
    before = _BEGINNING.set(now)
    try:
        yield
    finally:
        _BEGINNING.reset(before)


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
