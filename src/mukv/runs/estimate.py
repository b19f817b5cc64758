"""Estimate bytes of device memory, FLOPs and time of a training step on a mesh of other devices.

The estimates are computed from the declared weights and from the shapes that a traced forward pass
saves for the backward pass; nothing is compiled or allocated. Times are lower bounds at the rates
of the data sheets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from mukv.attention import Attention
from mukv.core import params
from mukv.core.compute import Compute
from mukv.core.device import Device
from mukv.core.mesh import STORED, MeshShape, axes_of, size_of, specification, weight_shardings
from mukv.core.params import LAYER, Param
from mukv.model.base import LanguageModel
from mukv.model.counting import cache_bytes, flops_per_token, product_flops, saved_bytes
from mukv.model.shard import shard
from mukv.runs.collectives import collective_bytes, link_seconds
from mukv.runs.config import Run
from mukv.runs.start import resolved_params, trained_params
from mukv.runs.teacher import find_teacher
from mukv.train import distillation
from mukv.train.division import require_tokens
from mukv.train.footprint import LEFT
from mukv.train.state import state_shardings

POLICIES = (False, "products", True, "offload")
"""Values of `train.compute.rematerialise`."""


@dataclass(frozen=True)
class Estimate:
    """A training step of one configuration on one kind of device.

    A batch that can't be split over `mesh.replica` and `mesh.data` is enlarged to the next one that
    can.

    run: the configuration
    device: the kind of device
    teacher: the model that `train.teacher` names
    traced: cached results of `kept`, by size of the axis `tensor` and policy
    """

    run: Run
    device: Device
    teacher: LanguageModel | None = None
    traced: dict[tuple[int, Any], int] = field(default_factory=dict)

    @cached_property
    def mesh(self) -> AbstractMesh:
        """The mesh of the configuration, without devices."""
        return self.run.mesh.abstract

    @cached_property
    def compute(self) -> Compute:
        """Settings of the forward pass on the device's platform."""
        compute = replace(self.run.train.compute, platform=None)
        return compute.resolve(self.device.platform)

    @property
    def rows(self) -> int:
        """Rows that a device reads at once."""
        training = self.run.train
        return -(-training.batch // training.accumulate // self.split)

    @property
    def split(self) -> int:
        """Number of parts that the rows of a batch are split into."""
        return self.run.mesh.replica * self.run.mesh.data

    @property
    def batch(self) -> int:
        """Rows of a step over all devices."""
        return self.rows * self.run.train.accumulate * self.split

    @property
    def length(self) -> int:
        """Tokens of a row that a device computes."""
        return -(-self.run.train.length // self.run.mesh.context)

    @cached_property
    def local(self) -> LanguageModel:
        """The model as one device of the axis `tensor` computes it."""
        return shard(self.run.model, self.run.mesh.tensor)

    # Memory

    @cached_property
    def state(self) -> dict[str, int]:
        """Bytes per device of the trained weights, the optimizer state, the gradient, the frozen
        weights if adapters are trained, and the teacher's weights."""
        training, declared = self.run.train.effective, trained_params(self.run)
        optimizer = training.optimizer.transform(declared, resolved_params(self.run))
        placed = state_shardings(declared, optimizer, self.mesh)
        shapes = params.abstract(declared)
        weights = _held(shapes, placed.weights)
        frozen = 0
        if training.adapter is not None:
            whole = self.run.model.params()
            frozen = _held(params.abstract(whole), weight_shardings(whole, self.mesh))
        return {
            "weights": weights,
            "optimizer": _held(jax.eval_shape(optimizer.init, shapes), placed.optimizer),
            "gradient": weights,
            "frozen": frozen,
            "teacher": self.taught,
        }

    @cached_property
    def taught(self) -> int:
        """Bytes per device of the teacher's weights; 0 without a teacher."""
        if self.teacher is None:
            return 0
        weights = distillation.abstract_weights(self.teacher, self.compute, self.mesh)
        return _held(weights, jax.tree.map(lambda leaf: leaf.sharding, weights))

    def kept(self, policy: Any) -> int:
        """Return the bytes of a device's tokens of one row that the forward pass saves for the
        backward pass under a rematerialisation policy, without weights."""
        key = self.run.mesh.tensor, policy
        if key not in self.traced:
            compute = replace(self.compute, rematerialise=policy)
            saved = saved_bytes(self.local, self.run.train.length, compute)
            self.traced[key] = saved - (self.gathered if policy is False else 0)
        mesh, context, kept = self.run.mesh, self.run.mesh.context, self.traced[key]
        if self.stream_is_split and policy != "offload":
            kept -= self.stream * (mesh.tensor - 1) // mesh.tensor
        # What is gathered over `context` is saved as a whole if nothing is recomputed.
        others = sum(self.keys) * (context - 1) // context if policy is False else 0
        return -(-kept // context) + others

    @property
    def stream(self) -> int:
        """Bytes of the residual stream before each layer, of all tokens of a row."""
        model = self.run.model
        widths = sum(
            len(stack.layers) * stack.d_model / rate.entry
            for stack, rate in zip(model.stacks, model.rates, strict=True)
        )
        return int(self.run.train.length * widths) * self.compute.type.itemsize

    @property
    def stream_is_split(self) -> bool:
        """Whether `tensor` splits the tokens of the residual stream between blocks."""
        return self.device.platform != "cpu" and self.length % self.run.mesh.tensor == 0

    @cached_property
    def keys(self) -> list[int]:
        """Bytes of the keys and values of all tokens of a row, by layer, as attention reads them.
        Those of layers without softmax count as 0."""
        size, length = self.operand.itemsize, self.run.train.length
        return [
            size * length * each.key_heads * (each.query_dim + each.value_dim)
            if isinstance(each := layer.attention, Attention)
            else 0
            for layer in self.local.layers
        ]

    @cached_property
    def gathered(self) -> int:
        """Bytes of the gathered weights of all layers in the type of operands, which are stored if
        nothing is recomputed; 0 if operands are float32."""
        if self.operand.itemsize == 4:
            return 0
        declared = params.named(self.run.model.params()).values()
        rounded = (param for param in declared if LAYER in param.dims and param.fan_in)
        return self.operand.itemsize * sum(
            self.whole(param) for param in rounded if param.role != "router"
        )

    @cached_property
    def working(self) -> int:
        """Bytes of temporary arrays: the loss of one chunk or one layer's backward pass, whichever
        takes more."""
        layers = len(self.run.model.layers)
        # Values that are not results of products are computed within the kernels that read them.
        # The gathered weights, and their float32 gradient before it is scattered, are added.
        layer = self.rows * self.kept("products") // layers + 3 * self.gathered // layers
        if self.run.mesh.context > 1:
            # Keys and values of all tokens, and their gradients before these are scattered.
            layer += 2 * self.rows * max(self.keys)
        return max(self.loss, layer)

    @cached_property
    def loss(self) -> int:
        """Bytes of the gathered readout and its gradient, and of the logits of a chunk and their
        gradient."""
        model = self.run.model
        readout = params.named(model.params())[model.readout_name]
        whole = self.whole(readout)
        chunk = min(self.compute.loss_tokens(self.rows, model.vocab_size), self.length)
        logits = 4 * self.rows * chunk * model.vocab_size // self.parts(readout, "tensor")
        rounded = self.operand.itemsize < 4
        copies = self.operand.itemsize * rounded + 4 * (rounded or size_of(self.mesh, *STORED) > 1)
        return whole * (4 + copies) + 2 * logits

    def bytes(self, policy: Any) -> dict[str, int]:
        """Return the bytes of each part of a step under a rematerialisation policy."""
        stored = self.rows * self.kept(policy) + (self.gathered if policy is False else 0)
        return self.state | {"activations": stored, "working": self.working}

    def fits(self, parts: dict[str, int]) -> bool:
        """Whether the sum of the parts fits in the device's memory."""
        return sum(parts.values()) <= LEFT * self.device.memory

    @property
    def cache(self) -> int:
        """Bytes of the KV cache of one device's rows, at the length of the configuration."""
        length = self.run.train.length
        return cache_bytes(self.local, self.rows, length, 0, self.compute.type)

    # Work

    @property
    def tokens(self) -> int:
        """Tokens of a step that a device computes, with those that share its index of all axes
        but `tensor`."""
        return self.rows * self.run.train.accumulate * self.length

    @cached_property
    def flops(self) -> float:
        """FLOPs of a step per device, without recomputation."""
        adapters = None if self.run.train.adapter is None else trained_params(self.run)
        each = flops_per_token(self.run.model, self.run.train.length, adapters)
        return each * self.tokens / self.run.mesh.tensor

    @cached_property
    def recomputed(self) -> float:
        """FLOPs per device that rematerialisation adds to a step."""
        if not self.compute.rematerialise:
            return 0.0
        model = self.run.model
        forward = flops_per_token(model, self.run.train.length) / 3
        if self.compute.rematerialise == "products":
            stored = product_flops(model, model.params())
        else:
            stored = 2 * params.named(model.params())[model.readout_name].size
        return (forward - stored) * self.tokens / self.run.mesh.tensor

    @cached_property
    def collectives(self) -> dict[str, int]:
        """Bytes per device of a step's collectives, by mesh axis; see `collective_bytes`."""
        return collective_bytes(self)

    @property
    def operand(self) -> jnp.dtype:
        """Type of the operands of products."""
        return jnp.dtype(self.compute.operands or "float32")

    def parts(self, param: Param, *axes: str) -> int:
        """Return the number of parts into which mesh axes split a weight."""
        used = [axis for part in specification(param.dims, self.mesh) for axis in axes_of(part)]
        return size_of(self.mesh, *(axis for axis in axes if axis in used))

    def whole(self, param: Param) -> int:
        """Return the number of elements of a weight that is gathered for its use."""
        return param.size // self.parts(param, "tensor")

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Lower bounds of a step's seconds for each resource, at the rates of the data sheet."""
        return {
            "compute": (self.flops + self.recomputed) / self.device.flops,
            "memory": self.traffic / self.device.bandwidth,
            **link_seconds(self),
        }

    @cached_property
    def traffic(self) -> int:
        """Lower bound of the bytes that a step reads from and writes to the device's memory.

        Each value that the backward pass needs is written and read once, and once more if it is
        recomputed. So are the logits and their gradient, the state and the gathered weights.
        """
        stored, pieces = self.rows * self.kept(False) + self.gathered, self.run.train.accumulate
        times = 2 * pieces * (2 if self.compute.rematerialise else 1)
        model = self.run.model
        readout = params.named(model.params())[model.readout_name]
        logits = 4 * self.tokens * model.vocab_size // self.parts(readout, "tensor")
        state = self.state
        return (
            times * stored
            + 4 * logits
            + 2 * sum(state[part] for part in ("weights", "optimizer", "gradient"))
        )

    @property
    def limit(self) -> str:
        """Name of the resource with the largest bound in `seconds`."""
        return max(self.seconds, key=self.seconds.__getitem__)

    def utilisation(self, overlap: bool) -> float:
        """Return an upper bound of the model FLOPs utilisation.

        overlap: whether collectives run at the same time as computation; if not, the times are
            added
        """
        spent = dict(self.seconds)
        own = max(spent.pop("compute"), spent.pop("memory"))
        links = spent.values()
        total = max(own, *links) if overlap else own + sum(links)
        return self.flops / self.device.flops / total

    def nearest(self) -> MeshShape | None:
        """Return the mesh with the fewest devices on which a step fits; of several, the mesh whose
        axes `context` and `data` change least. None if no mesh of up to 65,536 devices fits."""
        mesh, training = self.run.mesh, replace(self.run.train, batch=self.batch)
        contexts = [mesh.context << more for more in range(4)]
        found = []
        for tensor, context in product(sorted({1, 2, 4, 8, mesh.tensor}), contexts):
            if tensor > self.device.island or training.length % context:
                continue
            for doubling in range(17):
                shape = replace(mesh, data=1 << doubling, tensor=tensor, context=context)
                moved = replace(self, run=replace(self.run, mesh=shape, train=training))
                if shape.size < mesh.size or shape.size > 1 << 16:
                    continue
                if moved.fits(moved.bytes(moved.compute.rematerialise)):
                    change = abs(math.log2(shape.data / mesh.data))
                    found.append((shape.size, context, change, shape))
                    break
        return min(found, key=lambda one: one[:3])[3] if found else None


def _held(shapes: Any, placed: Any) -> int:
    """Return the bytes of a tree of arrays that are placed on one device."""

    def one(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, shapes, placed)))


def estimate(run: Run, device: Device, name: str) -> dict[str, Any]:
    """Return the facts that `mukv describe --device` adds, as plain data for `--json`.

    With `train.stages`, they are of the last stage, whose rows are the longest.

    name: name of the device

    Raises BadInput for rows whose tokens `mesh.context` can't divide.
    """
    require_tokens(run.train, run.mesh.sizes)
    batch, length = run.train.sizes[-1]
    run = replace(run, train=replace(run.train, batch=batch, length=length, stages=()))
    teacher = find_teacher(run)
    found = Estimate(run, device, teacher and teacher.network)
    policies = {str(policy).lower(): found.bytes(policy) for policy in POLICIES}
    parts = policies[str(found.compute.rematerialise).lower()]
    nearest = None if found.fits(parts) else found.nearest()
    return {
        "device": name,
        "memory": device.memory,
        "mesh": run.mesh.sizes,
        "batch": found.batch,
        "length": run.train.length,
        "bytes_per_device": {**parts, "total": sum(parts.values())},
        "fits": found.fits(parts),
        "rematerialise": {
            key: {
                "activations": each["activations"],
                "total": sum(each.values()),
                "fits": found.fits(each),
            }
            for key, each in policies.items()
        },
        "nearest_mesh": nearest and nearest.sizes,
        "cache_bytes_per_device": found.cache,
        "flops_per_device": found.flops,
        "recomputed_flops_per_device": found.recomputed,
        "collective_bytes": found.collectives,
        "seconds": found.seconds,
        "limited_by": found.limit,
        "mfu_bound": found.utilisation(overlap=True),
        "mfu_bound_without_overlap": found.utilisation(overlap=False),
    }
