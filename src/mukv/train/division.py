"""Check that the batches of a training plan can be divided between the devices of a mesh."""

from __future__ import annotations

from collections.abc import Mapping

from mukv.core.errors import BadInput
from mukv.train.training import Training


def require_split(training: Training, sizes: Mapping[str, int]) -> None:
    """Raise BadInput if the rows of a piece of the batch, or the tokens of a row, can't be divided
    between the devices of a mesh. sizes: of the mesh, by axis"""
    require_rows(training, sizes)
    require_tokens(training, sizes)


def require_rows(training: Training, sizes: Mapping[str, int]) -> None:
    """Raise BadInput if the rows of a piece of the batch can't be divided between devices."""
    split = sizes["replica"] * sizes["data"]
    axes = "mesh.data" if sizes["replica"] == 1 else "mesh.replica x mesh.data"
    for batch, length in training.sizes:
        rows = batch // training.accumulate
        if rows % split:
            raise BadInput(
                "train.batch",
                batch,
                f"batch / accumulate ({rows}) must be a multiple of {axes} ({split})"
                + (f" at length {length}" if training.stages else ""),
            )


def require_tokens(training: Training, sizes: Mapping[str, int]) -> None:
    """Raise BadInput if the tokens of a row can't be divided between the devices of a mesh."""
    context = sizes["context"]
    for number, (_, length) in enumerate(training.sizes):
        if length % context:
            shorter, longer = length // context * context, -(-length // context) * context
            near = f"{shorter} or {longer}" if shorter else str(longer)
            raise BadInput(
                "train.length" if number == 0 else f"train.stages.{number - 1}.length",
                length,
                f"a multiple of mesh.context ({context}), such as {near}",
            )
