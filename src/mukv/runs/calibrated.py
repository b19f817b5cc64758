"""Complete cache policies with what is calibrated for a model and saved beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mukv.cache import Calibrated, Policy
from mukv.cache.centres import FORM, load_centres
from mukv.cache.clusters import Clusters
from mukv.cache.kvzap import NEEDED
from mukv.cache.predictors import load_predictors
from mukv.core.errors import BadInput


def with_calibration(
    policy: Policy, folder: Path | None, weights: Mapping[str, Any], converted: bool, by_head: bool
) -> tuple[Policy, Calibrated]:
    """Return a policy that is completed with calibrated data, and the calibrated arrays by layer.

    folder: of the model; None if it was not loaded from one
    weights: as they are saved
    converted: whether the weights were converted when they were loaded; what is calibrated belongs
        to the saved weights
    by_head: whether layers store keys for each key head, which cluster centres need

    Raises BadInput for what was calibrated on other weights, for centres of keys without their
    rotation, and for a policy that needs predictors of scores that are not there.
    """
    found: Calibrated = {}
    if policy.keep.calibrated:
        if folder is None or converted:
            raise BadInput("policy", policy.name, f"{NEEDED}, with its weights as they are saved")
        found = load_predictors(folder, weights).layers
    if not isinstance(policy.select, Clusters) or folder is None or not by_head:
        return policy, found
    if converted or not (folder / FORM.folder).exists():
        return policy, found
    centres = load_centres(folder, weights)
    if not centres.rotated:
        allowed = "centres of rotated keys, which a step can compare its query with"
        raise BadInput(str(folder / FORM.folder), "centres of unrotated keys", allowed)
    select = replace(policy.select, calibrated=centres.kind)
    both = {index: {**found.get(index, {}), **own} for index, own in centres.arrays().items()}
    return replace(policy, select=select), both
