"""Find a short plan that has given layers."""

from __future__ import annotations

from collections.abc import Sequence

from mukv.model import Layer, Stage


def planned(layers: Sequence[Layer]) -> tuple[Stage, ...]:
    """Return stages that have these layers.

    Each stage is chosen greedily: the pattern whose repeats cover the most of the remaining layers,
    and of equal ones the shortest.
    """
    stages: list[Stage] = []
    rest = tuple(layers)
    while rest:
        period = max(range(1, len(rest) + 1), key=lambda size: (_covered(rest, size), -size))
        repeats = max(_covered(rest, period) // period, 1)
        stages.append(Stage(rest[:period], repeats))
        rest = rest[period * repeats :]
    return tuple(stages)


def _covered(layers: tuple[Layer, ...], period: int) -> int:
    """Count the layers that repeats of the first `period` layers cover; 0 if there is no second
    repeat.
    """
    repeats = 1
    while layers[repeats * period : (repeats + 1) * period] == layers[:period]:
        repeats += 1
    return repeats * period if repeats > 1 else int(period == len(layers))
