"""Count the bytes that a program reads of an argument, from its jaxpr.

A gather or slice counts the elements that it takes, any other operation its whole operand. An array
counts at most its size. Masking therefore saves no reads, as on a real machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

SAME = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "slice"} | {
    *("convert_element_type", "copy", "stop_gradient")
}
"""Operations that only change the form of their operand; uses of the result count as reads of the
operand."""
TAKEN = {"gather", "dynamic_slice"}


def bytes_read(program: Callable[..., Any], tracked: Any, *others: Any) -> int:
    """Return the bytes that a program reads of its first argument.

    tracked: the first argument, a tree of arrays
    others: the other arguments; all arguments may be abstract
    """
    jaxpr = jax.make_jaxpr(program)(tracked, *others).jaxpr
    leaves = jax.tree.leaves(tracked)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    widths = [leaf.dtype.itemsize for leaf in leaves]
    read = [0] * len(leaves)

    def add(source: int, numbers: int) -> None:
        read[source] += numbers * widths[source]

    sources = dict(zip(jaxpr.invars, range(len(leaves)), strict=False))
    # An argument that is returned unchanged was not read.
    _walk(jaxpr, sources, [True] * len(jaxpr.outvars), 1, add)
    return int(sum(map(min, read, sizes)))


def _walk(
    jaxpr: Any,
    sources: Mapping[Any, int],
    wanted: list[bool],
    times: int,
    add: Callable[[int, int], None],
) -> list[int | None]:
    """Count the reads of a jaxpr that runs `times` times.

    sources: index of the tracked array that a variable is a form of
    wanted: which results are used
    add: called with the index of a tracked array and the number of elements read

    Returns, for each result, the index of the tracked array that it is a form of, or None.
    """
    sources = dict(sources)
    alive = _alive(jaxpr, wanted)
    for equation in jaxpr.eqns:
        if not any(out in alive for out in equation.outvars):
            continue
        operands = [None if _literal(v) else sources.get(v) for v in equation.invars]
        if all(operand is None for operand in operands):
            continue
        name, out = equation.primitive.name, equation.outvars
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if name in SAME:
            sources[out[0]] = operands[0]  # pyright: ignore[reportArgumentType]
        elif name in TAKEN:
            if operands[0] is not None:
                add(operands[0], times * _size(out[0]))
            _whole(equation.invars[1:], operands[1:], times, add)
        elif name == "scan":
            constants = equation.params["num_consts"]
            body = inner.jaxpr
            known = dict(zip(body.invars[:constants], operands[:constants], strict=True))
            known = {v: s for v, s in known.items() if s is not None}
            _walk(body, known, [True] * len(body.outvars), times * equation.params["length"], add)
            _whole(equation.invars[constants:], operands[constants:], times, add)
        elif inner is not None and name != "while":
            body = getattr(inner, "jaxpr", inner)
            known = {v: s for v, s in zip(body.invars, operands, strict=True) if s is not None}
            results = _walk(body, known, [v in alive for v in out], times, add)
            sources |= {v: s for v, s in zip(out, results, strict=True) if s is not None}
        else:
            _whole(equation.invars, operands, times, add)
    return [None if _literal(v) else sources.get(v) for v in jaxpr.outvars]


def _alive(jaxpr: Any, wanted: list[bool]) -> set[Any]:
    """Return the values that the wanted results depend on."""
    alive = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not _literal(v)}
    for equation in reversed(jaxpr.eqns):
        if any(out in alive for out in equation.outvars):
            alive |= {v for v in equation.invars if not _literal(v)}
    return alive


def _whole(
    values: Any, sources: list[int | None], times: int, add: Callable[[int, int], None]
) -> None:
    for value, source in zip(values, sources, strict=True):
        if source is not None:
            add(source, times * _size(value))


def _literal(value: Any) -> bool:
    return hasattr(value, "val")


def _size(value: Any) -> int:
    return math.prod(value.aval.shape)
