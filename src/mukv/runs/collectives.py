"""Estimate the bytes that a training step moves between devices, and the time that this takes.

A collective counts the bytes of its input or output, whichever is larger, and an all-reduce once.
Times are lower bounds at the rates of the data sheets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mukv.attention import Attention
from mukv.core import params
from mukv.core.mesh import STORED
from mukv.core.params import LAYER
from mukv.runs.start import trained_params

Step = Any
"""An `Estimate`, whose module imports this one."""


def collective_bytes(step: Step) -> dict[str, int]:
    """Return the bytes per device of a step's collectives, by mesh axis.

    data: gathers of weights, and sums of their gradients, over `data` and `context` together
    tensor: sums of activations, and gathers of the residual stream
    replica: sums of the gradients that a device holds
    context: gathers of keys and values, sums of their gradients, and exchanges of queries and of
        what they read
    """
    return {
        "data": sum(_weights(step)),
        "tensor": sum(_sums(step)),
        "replica": _copies(step),
        "context": sum(_keys(step)),
    }


def link_seconds(step: Step) -> dict[str, float]:
    """Return lower bounds of the seconds that the collectives of each axis take."""
    mesh, moved, link = step.run.mesh, step.collectives, step.device.link

    def ring(size: int, stride: int, moved: int, times: int = 1) -> float:
        return times * (size - 1) / size * moved / link(size, stride)

    stored, tensor = mesh.data * mesh.context, mesh.tensor
    return {
        "data_links": ring(stored, tensor, moved["data"]),
        "tensor_links": ring(tensor, 1, moved["tensor"], times=1 if step.stream_is_split else 2),
        "replica_links": ring(mesh.replica, stored * tensor, moved["replica"], times=2),
        "context_links": ring(mesh.context, tensor, moved["context"]),
    }


def _weights(step: Step) -> Iterator[int]:
    """Yield the bytes of gathers and sums over the axes that store weights.

    Weights are gathered in the type of operands once for the forward pass, and again for the
    backward pass if layers are recomputed; gradients are summed in float32.
    """
    pieces, model = step.run.train.accumulate, step.run.model
    passes = 2 if step.compute.rematerialise else 1
    for name, param in params.named(model.params()).items():
        if step.parts(param, *STORED) == 1:
            continue
        if name == model.readout_name:
            yield 4 * step.whole(param) * pieces
        elif LAYER in param.dims:
            size = step.operand.itemsize if param.fan_in else 4
            yield size * step.whole(param) * passes * pieces
    if step.run.mesh.data * step.run.mesh.context > 1:
        # Only the rows of a device's own tokens of the embedding's gradient are sent.
        looked_up = {"embedding", "layer_inputs.table"} - {model.readout_name}
        for name, param in params.named(trained_params(step.run)).items():
            if name not in looked_up:
                yield 4 * step.whole(param) * pieces


def _copies(step: Step) -> int:
    """Return the bytes of the sums of gradients over `replica`."""
    if step.run.mesh.replica == 1:
        return 0
    return step.state["gradient"] * step.run.train.accumulate


def _keys(step: Step) -> Iterator[int]:
    """Yield the bytes of the collectives over `context`, by layer.

    Keys and values are gathered for each pass, and their gradients scattered; queries are sent to
    another device before attention, and what they read is sent back.
    """
    mesh, model = step.run.mesh, step.local
    if mesh.context == 1:
        return
    times = 2 + bool(step.compute.rematerialise)
    rows, size = step.rows * step.run.train.accumulate, step.operand.itemsize
    for layer, keys in zip(model.layers, step.keys, strict=True):
        yield times * rows * keys
        if isinstance(each := layer.attention, Attention):
            width = each.heads * (each.query_dim + each.value_dim)
            yield times * size * step.tokens * width


def _sums(step: Step) -> Iterator[int]:
    """Yield the bytes of the collectives over `tensor`.

    If the residual stream is split, each branch gathers its input and scatters its output, forward
    and backward; otherwise it has one all-reduce forward and one backward.
    """
    model, split_stream = step.run.model, step.stream_is_split
    if step.run.mesh.tensor == 1:
        return
    for name, param in params.named(model.params()).items():
        width = step.tokens * param.dims.get("embed", model.d_model)
        split = step.parts(param, "tensor") > 1
        if name == model.readout_name:
            yield width * split * (2 * step.compute.type.itemsize if split_stream else 4)
        elif param.ends_branch and param.fan_in and split:
            # Recomputing a layer repeats the sum after attention, and gathers of inputs.
            again = step.compute.rematerialise in (True, "offload")
            inner = again and ".read." in name
            each = 4 + again + inner if split_stream else 2 + inner
            times = param.dims.get(LAYER, 1) * each
            yield (
                step.compute.type.itemsize
                * times
                * width
                // model.tokens_per_use(name.split(".")[0])
            )
