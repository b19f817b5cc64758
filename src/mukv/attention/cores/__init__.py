"""Attention cores, the fastest first, and the one place that chooses. To add one: a file with a
class, a line here."""

from __future__ import annotations

from typing import NamedTuple

from mukv.attention.cores.base import Core, Demand, Part, Scores
from mukv.attention.cores.chunked import Chunked
from mukv.attention.cores.plain import Plain, weighed
from mukv.core.compute import Compute

CORES: dict[str, type[Core]] = {"fused": Chunked, "plain": Plain}
"""By the name that `mukv describe` prints."""


class CoreChoice(NamedTuple):
    """The core that is taken. refused: by name, why each faster one is not."""

    name: str
    core: Core
    refused: dict[str, str]


def choose(demand: Demand, compute: Compute) -> CoreChoice:
    """The first core of the table that supports what is asked."""
    refused: dict[str, str] = {}
    for name, core in CORES.items():
        reason = core.supports(demand, compute)
        if reason is None:
            return CoreChoice(name, core.made(compute), refused)
        refused[name] = reason
    raise AssertionError(f"the plain core supports everything, but: {refused}")


__all__ = [
    "CORES",
    "Chunked",
    "Core",
    "CoreChoice",
    "Demand",
    "Part",
    "Plain",
    "Scores",
    "choose",
    "weighed",
]
