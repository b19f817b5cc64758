"""NoPE: no position encoding; the causal mask alone tells order (Kazemnejad et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mukv.position.base import Position


@dataclass(frozen=True)
class NoPE(Position):
    kind: Literal["nope"] = "nope"
