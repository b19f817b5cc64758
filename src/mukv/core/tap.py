"""Name an intermediate value so that analysis can see it.

`tap("attention.logits", x)` returns x. Under `capture()` it also notes x by its full name, scopes
included. The note is made while JAX traces, so capture inside the traced function and return the
collected values from it; layers must be unrolled, since a value cannot leave a scan this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mukv.core.typing import Array

_collected: ContextVar[dict[str, Array] | None] = ContextVar("collected", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


def tap(name: str, value: Array) -> Array:
    """Show `value` to whoever captures."""
    collected = _collected.get()
    if collected is not None:
        collected[_prefix.get() + name] = value
    return value


@contextmanager
def capture() -> Iterator[dict[str, Array]]:
    """Collect all taps inside the block, by full name in order of computation."""
    collected: dict[str, Array] = {}
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def capturing() -> bool:
    return _collected.get() is not None


def tapped() -> str | None:
    """Why all intermediate values must exist; None where nobody captures them."""
    return "a tap captures them" if capturing() else None


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the taps inside the block."""
    token = _prefix.set(f"{_prefix.get()}{name}.")
    try:
        yield
    finally:
        _prefix.reset(token)
