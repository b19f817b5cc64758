"""The layers of a model as the shortest plan that says the same."""

from __future__ import annotations

from collections.abc import Sequence

from mukv.model import Layer, Stage


def planned(layers: Sequence[Layer]) -> tuple[Stage, ...]:
    """Stages whose repeats cover as much as they can, the shortest pattern of equals first."""
    stages: list[Stage] = []
    rest = tuple(layers)
    while rest:
        period = max(range(1, len(rest) + 1), key=lambda size: (_covered(rest, size), -size))
        repeats = max(_covered(rest, period) // period, 1)
        stages.append(Stage(rest[:period], repeats))
        rest = rest[period * repeats :]
    return tuple(stages)


def _covered(layers: tuple[Layer, ...], period: int) -> int:
    """Layers that repeats of the first `period` cover; none where there is no second one."""
    repeats = 1
    while layers[repeats * period : (repeats + 1) * period] == layers[:period]:
        repeats += 1
    return repeats * period if repeats > 1 else int(period == len(layers))
