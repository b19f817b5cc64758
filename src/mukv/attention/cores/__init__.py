"""Attention cores, the fastest first, and the function that chooses one.

To add a core, write a file with a class and add a line to CORES.
"""

from __future__ import annotations

from typing import NamedTuple

from mukv.attention.cores.base import Core, Demand, Part, Scores
from mukv.attention.cores.chunked import Chunked
from mukv.attention.cores.flash import Flash
from mukv.attention.cores.plain import Plain, mixed, weighed
from mukv.core.compute import Compute

CORES: dict[str, type[Core]] = {"flash": Flash, "fused": Chunked, "plain": Plain}
"""Cores by the name that `mukv describe` prints, in order of preference."""


class CoreChoice(NamedTuple):
    """The chosen core.

    name: its key in CORES
    core: the core, with the settings applied
    refused: why each faster core was not chosen, by name
    """

    name: str
    core: Core
    refused: dict[str, str]


def choose(demand: Demand, compute: Compute) -> CoreChoice:
    """Return the first core of CORES for the platform that supports these demands."""
    refused: dict[str, str] = {}
    for name, core in CORES.items():
        if core.platforms is not None and compute.platform not in core.platforms:
            continue
        reason = core.supports(demand, compute)
        if reason is None:
            return CoreChoice(name, core.made(compute), refused)
        refused[name] = reason
    raise AssertionError(f"the plain core must support every demand: {refused}")


__all__ = [
    "CORES",
    "Chunked",
    "Core",
    "CoreChoice",
    "Demand",
    "Flash",
    "Part",
    "Plain",
    "Scores",
    "choose",
    "mixed",
    "weighed",
]
