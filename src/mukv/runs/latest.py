"""The newest weights of a run directory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput, Failed
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.storage.checkpoint import Checkpoints
from mukv.storage.weights import load_weights, require_weights, step_of
from mukv.train.step import Trainer


def latest_weights(run: Run, folder: RunDirectory) -> Any:
    """Read the exported weights of a run, or those of its latest checkpoint if that is newer.

    Raises BadInput for a run that has none, and for damaged ones.
    """
    exported, exported_step = None, 0
    if folder.weights.exists():
        exported, metadata = load_weights(folder.weights)
        exported_step = step_of(metadata, folder.weights)
    if folder.checkpoints.exists():
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            latest = checkpoints.latest()
            if latest is not None and (exported is None or latest > exported_step):
                single = replace(run.mesh, data=1, tensor=1).build()
                alone = replace(run.train, accumulate=1, teacher=None)
                trainer = Trainer(run.model, alone, single)
                return _restored(checkpoints, latest, trainer.abstract_state()).weights
    if exported is None:
        raise BadInput("MODEL", str(folder.path), "a run with weights; this one has none yet")
    require_weights(run.model.params(), exported, folder.weights)
    return jax.tree.map(jnp.asarray, exported)


def _restored(checkpoints: Checkpoints, latest: int, like: Any) -> Any:
    """The latest state; a newer one, where training deletes this one while it is read."""
    try:
        return checkpoints.restore(latest, like)
    except (BadInput, Failed):
        newer = checkpoints.latest()
        if newer is None or newer <= latest:
            raise
    return _restored(checkpoints, newer, like)
