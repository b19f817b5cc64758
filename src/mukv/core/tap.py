"""Record named intermediate values for analysis.

`tap("attention.logits", x)` returns x. Inside `capture()` it also records x under its name,
prefixed by the enclosing scopes. Recording happens while JAX traces: capture inside the traced
function and return the collected values from it. Layers must be unrolled, since a value can't leave
a scan this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mukv.core.typing import Array

_collected: ContextVar[dict[str, Array] | None] = ContextVar("collected", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


def tap(name: str, value: Array) -> Array:
    """Return `value`; inside `capture()`, also record it under `name`."""
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
    """Return whether taps are being collected."""
    return _collected.get() is not None


def tapped() -> str | None:
    """Return why all intermediate values must exist; None unless taps are being collected."""
    return "a tap captures them" if capturing() else None


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the taps inside the block with `name` and a dot."""
    token = _prefix.set(f"{_prefix.get()}{name}.")
    try:
        yield
    finally:
        _prefix.reset(token)
