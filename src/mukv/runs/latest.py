"""Read the newest weights of a run directory; adapters are merged with the weights they change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mukv.core.errors import BadInput, Failed
from mukv.core.params import named
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.start import merged_weights, trained_params
from mukv.storage.checkpoint import Checkpoints
from mukv.storage.compact import Converter
from mukv.storage.weights import load_weights, require_weights, step_of, weight_types
from mukv.train.step import Trainer


def latest_weights(run: Run, folder: RunDirectory, mesh: Mesh, kind: str | None = None) -> Any:
    """Read the exported weights of a run, or the weights of its latest checkpoint if it is newer.

    Adapters are merged with the weights that they change.

    mesh: mesh on which adapters are merged
    kind: format of `core.compact` that the weights are converted to, one weight at a time if they
        are read from a file; None to keep their dtype

    Raises BadInput for a run that has no weights, and for damaged weights.
    """
    if kind is None:
        saved = _saved(run, folder)
        return saved if run.train.adapter is None else merged_weights(run, folder, saved, mesh)
    converter = Converter(kind, folder.path)
    declared = run.model.params()
    params = named(declared)

    def convert(name: str, array: Any) -> Any:
        return converter(name, params[name], lambda cut: np.asarray(array[cut]))

    exported_only = folder.weights.exists() and not folder.checkpoints.exists()
    if run.train.adapter is None and exported_only:
        require_weights(declared, weight_types(folder.weights), folder.weights)
        return load_weights(folder.weights, convert)[0]
    whole = latest_weights(run, folder, mesh)
    found = {name: convert(name, leaf) for name, leaf in named(whole).items()}
    structure = jax.tree.structure(whole)
    return structure.unflatten(found.values())


def _saved(run: Run, folder: RunDirectory) -> Any:
    """Read the newest weights that a run trained: the adapters alone if it has adapters."""
    exported, exported_step = None, 0
    if folder.weights.exists():
        exported, metadata = load_weights(folder.weights)
        exported_step = step_of(metadata, folder.weights)
    if folder.checkpoints.exists():
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            latest = checkpoints.latest()
            if latest is not None and (exported is None or latest > exported_step):
                single = replace(run.mesh, data=1, tensor=1).build()
                trainer = Trainer(run.model, replace(run.train, accumulate=1), single)
                return _restored(checkpoints, latest, trainer.abstract_state()).weights
    if exported is None:
        raise BadInput("MODEL", str(folder.path), "a run with weights; this one has none yet")
    require_weights(trained_params(run), exported, folder.weights)
    return jax.tree.map(jnp.asarray, exported)


def _restored(checkpoints: Checkpoints, latest: int, like: Any) -> Any:
    """Restore a checkpoint. If a training process deletes it meanwhile, restore a newer one."""
    try:
        return checkpoints.restore(latest, like)
    except (BadInput, Failed):
        newer = checkpoints.latest()
        if newer is None or newer <= latest:
            raise
    return _restored(checkpoints, newer, like)
