"""Check that the batches of a training plan can be divided between the devices of a mesh."""

from __future__ import annotations

from jax.sharding import Mesh

from mukv.core.errors import BadInput
from mukv.core.mesh import ROWS, size_of
from mukv.train.training import Training


def require_split(training: Training, mesh: Mesh) -> None:
    """Raise BadInput if the rows of a piece of the batch, or the tokens of a row, can't be divided
    between the devices of a mesh."""
    split, context = size_of(mesh, *ROWS), size_of(mesh, "context")
    axes = "mesh.data" if size_of(mesh, "replica") == 1 else "mesh.replica x mesh.data"
    for number, (batch, length) in enumerate(training.sizes):
        rows = batch // training.accumulate
        if rows % split:
            raise BadInput(
                "train.batch",
                batch,
                f"batch / accumulate ({rows}) must be a multiple of {axes} ({split})"
                + (f" at length {length}" if training.stages else ""),
            )
        if length % context:
            shorter, longer = length // context * context, -(-length // context) * context
            near = f"{shorter} or {longer}" if shorter else str(longer)
            raise BadInput(
                "train.length" if number == 0 else f"train.stages.{number - 1}.length",
                length,
                f"a multiple of mesh.context ({context}), such as {near}",
            )
