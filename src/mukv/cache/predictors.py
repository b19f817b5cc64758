"""Predictors of KVzip+ scores, calibrated once per model for the policy `kvzap`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mukv.cache.calibration import CalibrationForm
from mukv.cache.kvzap import BIAS, WEIGHT
from mukv.core.errors import BadInput
from mukv.core.typing import Array

FORM = CalibrationForm("predictors", "mukv-predictors", "predictors of scores", "scores")


@dataclass(frozen=True)
class Predictors:
    """Calibration that `mukv analyze MODEL --calibrate scores` saves beside a model.

    fingerprint: SHA-256 of the model's weights
    layers: arrays of each writing layer by its index: `score_weight` [feature kv_heads] and
        `score_bias` [kv_heads], float32; see `mukv.cache.kvzap.features`
    facts: record of how they were made; no code reads it
    """

    fingerprint: str
    layers: Mapping[int, Mapping[str, Array]]
    facts: Mapping[str, Any]

    def save(self, folder: Path) -> Path:
        """Save the predictors in a model's folder, as `predictors/`; return its path."""
        return FORM.save(folder, self.layers, self.fingerprint, {"facts": dict(self.facts)})


def load_predictors(folder: Path, weights: Mapping[str, Any]) -> Predictors:
    """Load the predictors that are saved in a model's folder.

    weights: the model's weights, as stored

    Raises BadInput if there are none, or they are damaged or were made for other weights.
    """
    layers, about, own = FORM.load(folder, weights)
    for index, arrays in layers.items():
        if set(arrays) != {WEIGHT, BIAS}:
            given = ", ".join(sorted(arrays)) or "nothing"
            raise BadInput(f"{folder / FORM.folder}: layer {index}", given, f"{WEIGHT}, {BIAS}")
    return Predictors(own, layers, about.get("facts", {}))
