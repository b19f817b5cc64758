"""How RoPE's frequencies are slowed for contexts beyond those of training.

Each answer is `scale` (frequencies, fastest first, before and after) and may raise the
temperature. `Linear`: position interpolation (Chen et al. 2023). `NTK`: the fastest pair is kept,
the slowest slowed in full (bloc97 2023). `Llama3`: Llama 3.1. `YaRN`: Peng et al. 2023. A factor
that changes with the length (dynamic NTK) is left out: cached keys would not agree with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mukv.core.errors import BadInput


@dataclass(frozen=True)
class Slower:
    """factor: times the context of training. rotation_factor multiplies rotated queries and
    keys, logit_factor all logits."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise BadInput("factor", self.factor, "at least 1")

    @property
    def rotation_factor(self) -> float:
        return 1.0

    @property
    def logit_factor(self) -> float:
        return 1.0

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """Radians per token of each pair, float32 [pair], before and after; operations stand in
        the order of transformers' code, whose roundings are those of published models."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScaling(Slower):
    kind: Literal["linear"] = "linear"

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        return frequency / self.factor


@dataclass(frozen=True)
class NTK(Slower):
    """The base times factor ** (d / (d - 2)): pair m of M slows by factor ** (m / (M - 1))."""

    kind: Literal["ntk"] = "ntk"

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        pairs = len(frequency)
        slower = self.factor ** (-np.arange(pairs) / max(1, pairs - 1))
        return (frequency * slower).astype(np.float32)


@dataclass(frozen=True)
class Llama3(Slower):
    """Wavelengths beyond original_length / low_frequency_factor are stretched by `factor`, those
    below original_length / high_frequency_factor are kept; linear in frequency between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise BadInput(
                "low_frequency_factor",
                self.low_frequency_factor,
                f"between 0 and high_frequency_factor ({self.high_frequency_factor})",
            )
        if self.original_length < 1:
            raise BadInput("original_length", self.original_length, "at least 1 token")

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        turns = self.original_length / (2 * math.pi / frequency)
        blend = (turns - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        kept = np.clip(blend, 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True)
class YaRN(Slower):
    """Pairs that turn more than `fast` times within original_length are kept, those that turn
    less than `slow` times are slowed in full; linear in the pair's number between.

    rounded: whole pairs bound the ramp (Hugging Face, DeepSeek), or not (gpt-oss). temperature:
    c = 0.1 ln(factor) + 1 multiplies what is rotated (Hugging Face, gpt-oss), or c^2 all logits,
    dimensions that are not rotated included (DeepSeek).
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = 8.0
    original_length: int = 4096
    fast: float = 32.0
    slow: float = 1.0
    rounded: bool = True
    temperature: Literal["rotation", "logits", "none"] = "rotation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.original_length < 1:
            raise BadInput("original_length", self.original_length, "at least 1 token")
        if not 0 < self.slow < self.fast:
            raise BadInput("slow", self.slow, f"between 0 and fast ({self.fast})")

    @property
    def rotation_factor(self) -> float:
        return self._warmth() if self.temperature == "rotation" else 1.0

    @property
    def logit_factor(self) -> float:
        return self._warmth() ** 2 if self.temperature == "logits" else 1.0

    def _warmth(self) -> float:
        return 0.1 * math.log(self.factor) + 1

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        pairs = len(frequency)

        def pair_that_turns(times: float) -> float:
            length = self.original_length / (2 * math.pi * times)
            return pairs * math.log(length) / math.log(base)

        low, high = pair_that_turns(self.fast), pair_that_turns(self.slow)
        if self.rounded:
            low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * pairs - 1)
        # Where the bounds cross, published code goes on to divide by what is negative then.
        ramp = (np.arange(pairs, dtype=np.float32) - low) / ((high - low) or 1e-3)
        kept = 1 - np.clip(ramp, 0, 1)
        return frequency / self.factor * (1 - kept) + frequency * kept


AnyScaling = LinearScaling | NTK | Llama3 | YaRN
