"""Run training steps on random tokens, without a run directory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mukv.core.compute import Compute
from mukv.core.mesh import MeshShape
from mukv.data.batches import Batch
from mukv.model import LanguageModel
from mukv.train.state import Metrics, State
from mukv.train.step import Trainer
from mukv.train.training import Training
from tests.laws import matrix

EXACT = Compute("float32", "float32", unroll=True)


def trainer(
    model: LanguageModel,
    data: int = 1,
    tensor: int = 1,
    replica: int = 1,
    context: int = 1,
    **changes: Any,
) -> Trainer:
    """Make a trainer on a mesh of simulated devices."""
    settings = {"steps": 8, "batch": 8, "length": matrix.LENGTH, "compute": EXACT, **changes}
    return Trainer(model, Training(**settings), MeshShape(data, tensor, replica, context).build())


def batch(step: int, rows: int = 8) -> Batch:
    """Make a batch with two documents per row and some tokens of weight zero."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, matrix.VOCAB, (rows, matrix.LENGTH + 1)).astype(np.int32)
    cut = matrix.LENGTH // 3
    place = np.arange(matrix.LENGTH)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weight=(random.random((rows, matrix.LENGTH)) > 0.1).astype(np.float32),
        position=np.tile(np.where(place < cut, place, place - cut), (rows, 1)).astype(np.int32),
        segment=np.tile(1 + (place >= cut), (rows, 1)).astype(np.int32),
    )


def steps(train: Trainer, state: State, first: int, last: int) -> tuple[State, list[Metrics]]:
    """Apply the updates number `first` to `last`; return the state and metrics."""
    seen = []
    with jax.set_mesh(train.mesh):
        for step in range(first, last):
            state, metrics = train.step(state, step, train.put(batch(step)))
            seen.append(jax.device_get(metrics))
    return state, seen


def run(train: Trainer, last: int) -> tuple[State, list[Metrics]]:
    """Train from the initial state."""
    return steps(train, train.initial_state(), 0, last)
