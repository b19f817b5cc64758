"""Scalings of RoPE's frequencies for contexts longer than those of training.

Each class has `scale`, which maps frequencies (highest first) to lower ones, and may scale the
logits. `LinearScaling`: position interpolation (Chen et al. 2023). `NTK`: the highest frequency is
kept, the lowest is divided by the factor (bloc97 2023). `Llama3`: Llama 3.1. `YaRN`: Peng et al.
2023. A factor that depends on the current length (dynamic NTK) is left out: keys already in the
cache would have been rotated with other frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from mukv.core.errors import BadInput
from mukv.core.table import Component, PartTable


@dataclass(frozen=True)
class Slower(Component):
    """Base class of the scalings.

    factor: length of the new context divided by that of training
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise BadInput("factor", self.factor, "at least 1")

    @property
    def rotation_factor(self) -> float:
        """Factor that multiplies rotated queries and keys."""
        return 1.0

    @property
    def logit_factor(self) -> float:
        """Factor that multiplies all logits."""
        return 1.0

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """Map the radians per token of each pair to lower ones; float32 [pair], highest first.

        Operations are in the order of transformers' code, so that roundings equal those of
        published models.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScaling(Slower):
    """Divide all frequencies by `factor`."""

    kind: Literal["linear"] = "linear"

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        return frequency / self.factor


@dataclass(frozen=True)
class NTK(Slower):
    """Multiply the base by factor ** (d / (d - 2)): pair m of M is divided by factor ** (m / (M -
    1)).
    """

    kind: Literal["ntk"] = "ntk"

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        pairs = len(frequency)
        slower = self.factor ** (-np.arange(pairs) / max(1, pairs - 1))
        return (frequency * slower).astype(np.float32)


@dataclass(frozen=True)
class Llama3(Slower):
    """Divide low frequencies by `factor`, keep high ones, interpolate linearly in frequency
    between.

    low_frequency_factor: wavelengths above original_length / low_frequency_factor are divided by
        `factor`
    high_frequency_factor: wavelengths below original_length / high_frequency_factor are kept
    original_length: context of training (tokens)
    """

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
    """Divide low frequencies by `factor`, keep high ones, interpolate linearly in the pair's index.

    original_length: context of training (tokens)
    fast: pairs with more than this many full turns within original_length are kept
    slow: pairs with fewer than this many full turns are divided by `factor`
    rounded: whether the bounds of the ramp are rounded to whole pairs (Hugging Face, DeepSeek) or
        not (gpt-oss)
    temperature: with c = 0.1 ln(factor) + 1, "rotation" multiplies rotated queries and keys by c
        (Hugging Face, gpt-oss), "logits" multiplies all logits, unrotated dimensions included, by
        c^2 (DeepSeek)
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
        if not 0 < self.slow <= self.fast:
            raise BadInput("slow", self.slow, f"greater than 0 and at most fast ({self.fast})")

    @property
    def rotation_factor(self) -> float:
        return self._temperature() if self.temperature == "rotation" else 1.0

    @property
    def logit_factor(self) -> float:
        return self._temperature() ** 2 if self.temperature == "logits" else 1.0

    def _temperature(self) -> float:
        return 0.1 * math.log(self.factor) + 1

    def scale(self, frequency: np.ndarray, base: float) -> np.ndarray:
        pairs = len(frequency)

        def pair_with_turns(turns: float) -> float:
            length = self.original_length / (2 * math.pi * turns)
            return pairs * math.log(length) / math.log(base)

        low, high = pair_with_turns(self.fast), pair_with_turns(self.slow)
        if self.rounded:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        # Where the bounds cross, the published code divides by a negative number; this is the same.
        ramp = (np.arange(pairs, dtype=np.float32) - low) / ((high - low) or 1e-3)
        kept = 1 - np.clip(ramp, 0, 1)
        return frequency / self.factor * (1 - kept) + frequency * kept


SCALINGS = PartTable(
    "RoPE scaling", Slower, {"linear": LinearScaling, "ntk": NTK, "llama3": Llama3, "yarn": YaRN}
)
AnyScaling = Annotated[Slower, SCALINGS]
