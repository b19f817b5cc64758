"""Attention cores, the fastest first, and the function that chooses one.

To add a core, write a file with a class and add a line to CORES.
"""

from __future__ import annotations

from typing import NamedTuple

from mukv.attention.cores.base import UNKNOWN, Core, Demand, Part, Scores
from mukv.attention.cores.chunked import Chunked
from mukv.attention.cores.context import context_of, over_context
from mukv.attention.cores.flash import Flash
from mukv.attention.cores.flash_decode import FlashDecode, unread
from mukv.attention.cores.plain import Plain, mixed, weighed
from mukv.attention.cores.splash import Splash
from mukv.core.compute import Compute
from mukv.core.errors import BadInput

CORES: dict[str, type[Core]] = {
    "flash": Flash,
    "splash": Splash,
    "flash_decode": FlashDecode,
    "fused": Chunked,
    "plain": Plain,
}
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
    """Return the first core of CORES for the platform that supports these demands.

    A core that `compute.core` names is taken where queries read the entries of their own tokens,
    as in training, unless all logits are needed for something else. Raises BadInput, with the
    reason and the cores that can serve, if it can't.
    """
    reasons = {name: _reason(core, demand, compute) for name, core in CORES.items()}
    serving = [name for name, reason in reasons.items() if reason is None]
    named = compute.core
    if named is not None and demand.aligned and demand.queries > 1 and demand.shows is None:
        if reasons[named] is not None:
            allowed = f"{', '.join(serving)} can serve here; {named} can't: {reasons[named]}"
            raise BadInput("train.compute.core", named, allowed)
        return CoreChoice(named, CORES[named].made(compute), {})
    refused: dict[str, str] = {}
    for name, core in CORES.items():
        reason = reasons[name]
        if reason is None:
            return CoreChoice(name, core.made(compute), refused)
        if _platform(core, compute) and core.steps in (None, demand.step):
            refused[name] = reason
    raise AssertionError(f"the plain core must support every demand: {refused}")


def _platform(core: type[Core], compute: Compute) -> bool:
    """Return whether a core is for the platform."""
    return core.platforms is None or compute.platform in core.platforms


def _reason(core: type[Core], demand: Demand, compute: Compute) -> str | None:
    """Return why a core can't be used; None if it can."""
    if not _platform(core, compute):
        return f"it is a kernel for {', '.join(core.platforms or ())}, not for {compute.platform}"
    return core.supports(demand, compute)


__all__ = [
    "CORES",
    "UNKNOWN",
    "Chunked",
    "Core",
    "CoreChoice",
    "Demand",
    "Flash",
    "FlashDecode",
    "Part",
    "Plain",
    "Scores",
    "Splash",
    "choose",
    "context_of",
    "mixed",
    "over_context",
    "unread",
    "weighed",
]
