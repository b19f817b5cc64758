"""Constrain how arrays are split over the current mesh, inside of a program.

Every function does nothing without a mesh. Where XLA's partitioner can't split a computation well,
it runs on each shard (`jax.shard_map`): reordering of tokens, kernels, and attention of queries
that `context` splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from mukv.core.compute import Platform
from mukv.core.low_rank import LowRank
from mukv.core.mesh import ROWS, STORED, axes_of, size_of, specification
from mukv.core.params import Param, map_params
from mukv.core.typing import Array

Axes = tuple[str, ...]
"""Logical names of the leading axes of an array."""


def partitioned_mesh() -> AbstractMesh | None:
    """Return the current mesh if XLA's partitioner splits arrays over it, otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual else mesh


def context_size() -> int:
    """Return the number of devices that split the tokens of a row: 1 without a mesh, and where
    each of them computes its own tokens already."""
    mesh = partitioned_mesh()
    return 1 if mesh is None or "context" in mesh.manual_axes else size_of(mesh, "context")


def constrain(array: Array, *names: str | None) -> Array:
    """Constrain the sharding of an activation on the current mesh.

    names: logical name of each axis, a key of AXES; None for an axis that is not split
    """
    mesh = partitioned_mesh()
    if mesh is None:
        return array
    dims = {name or f"axis{i}": array.shape[i] for i, name in enumerate(names)}
    # In activations, `data` splits only the batch, never the width of the residual stream. Inside
    # `by_data_shard` the batch is split already.
    apart = mesh.manual_axes if "batch" in dims else ("data", *mesh.manual_axes)
    return jax.lax.with_sharding_constraint(array, specification(dims, mesh, exclude=apart))


def constrain_stream(stream: Array, platform: Platform | None) -> Array:
    """Constrain the sharding of the residual stream between blocks, [batch token embed].

    Off a CPU `tensor` splits its tokens too (sequence parallelism; Korthikanti et al. 2022,
    2205.05198, section 4.2.2): a block gathers them, and the sum over `tensor` at its end is a
    reduce-scatter, as many bytes as the all-reduce without. What lies between blocks takes a part
    of the memory, and norms a part of the time.
    """
    return constrain(stream, "batch", _token(platform), None)


def enter_block(normed: Array, platform: Platform | None) -> Array:
    """Gather the tokens of the residual stream that a block reads; scatter its gradient."""
    return _changed(normed, "token", _token(platform))


def leave_block(branch: Array, platform: Platform | None) -> Array:
    """Scatter the tokens of what a block adds to the residual stream; gather its gradient."""
    return _changed(branch, _token(platform), "token")


def _token(platform: Platform | None) -> str:
    """Return the logical name of the tokens of the residual stream."""
    return "token" if platform in ("cpu", None) else "stream_token"


def _changed(x: Array, token: str, gradient_token: str) -> Array:
    """Constrain an array [batch token embed] and its gradient, by names of their tokens."""
    mesh = partitioned_mesh()
    if mesh is None:
        return x
    batch, length, _ = x.shape
    placed, gradient_placed = (
        specification({"batch": batch, name: length}, mesh, exclude=mesh.manual_axes)
        for name in (token, gradient_token)
    )
    if placed != gradient_placed:
        # XLA would gather the float32 values that a norm rounds.
        x = jax.lax.optimization_barrier(x)
    return _gathered(x, placed, gradient_placed)


def by_data_shard(
    function: Callable[..., Any],
    weights: Any,
    *rows: Array,
    tokens: Literal["whole", "apart", "summed"] = "whole",
) -> Any:
    """Compute `function(weights, *rows)` separately on each shard of the batch.

    For functions that reorder tokens across rows; XLA's partitioner would reorder them across all
    devices.

    rows: arrays [batch token ...]
    tokens: "whole" if the function needs whole rows, and its results have rows along the first
        axis; "apart" if it computes each token by itself, and its results have rows and tokens
        along the first two axes; "summed" if its results are sums over the tokens of each row
    """
    mesh = partitioned_mesh()
    if mesh is None:
        return function(weights, *rows)
    batch, length, *_ = rows[0].shape
    axes = {"batch": batch} if tokens == "whole" else {"batch": batch, "token": length}
    split = specification(axes, mesh, exclude=mesh.manual_axes)
    over = tuple(axis for part in split for axis in axes_of(part))
    if not over:
        return function(weights, *rows)
    inner = tuple(axis for axis in over if axis not in ROWS)

    def own(weights: Any, *rows: Array) -> Any:
        # Each shard computes its own gradient of the weights; they are summed once, at the end.
        result = function(jax.lax.pcast(weights, over, to="varying"), *rows)
        return jax.lax.psum(result, inner) if tokens == "summed" and inner else result

    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(split for _ in rows)),
        out_specs=PartitionSpec(split[0]) if tokens == "summed" else split,
        axis_names={*over},
    )(weights, *rows)


def by_shard(
    function: Callable[..., Any], names: Sequence[Axes], out: Sequence[Axes]
) -> Callable[..., Any]:
    """Make a function that runs `function` on each shard, for computations that XLA can't split.

    names: logical names of the leading axes of each argument, keys of AXES; other names for axes
        that are not split
    out: those of each result, of which there is a tuple
    """
    mesh = partitioned_mesh()
    if mesh is None:
        return function

    def split(*arrays: Array) -> Any:
        sizes = {
            name: n
            for axes, x in zip(names, arrays, strict=True)
            for name, n in zip(axes, x.shape, strict=False)
        }

        def placed(axes: Axes) -> PartitionSpec:
            dims = {name: sizes[name] for name in axes}
            return specification(dims, mesh, exclude=mesh.manual_axes)

        # Kernels do not say over which axes their results vary.
        shards = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=tuple(map(placed, names)),
            out_specs=tuple(map(placed, out)),
            axis_names={*mesh.axis_names} - {*mesh.manual_axes},
            check_vma=False,
        )
        return shards(*arrays)

    return split


def gather(weights: Any, declared: Any) -> Any:
    """All-gather the weights that `data` and `context` split (FSDP), right before their use.

    The split over `tensor` is kept. The gradient is constrained to the split of the stored weight,
    so that the partitioner sums it by a reduce-scatter: half the traffic of an all-reduce, and no
    device holds the whole gradient. declared: tree of `Param` with the keys of `weights`.
    """
    mesh = partitioned_mesh()
    if mesh is None:
        return weights

    def collect(param: Param, array: Any) -> Any:
        if isinstance(array, LowRank):
            return array.mapped(collect, param)
        whole = specification(param.dims, mesh, exclude=STORED)
        return _gathered(array, whole, specification(param.dims, mesh))

    return map_params(collect, declared, weights)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(array: Array, whole: PartitionSpec, stored: PartitionSpec) -> Array:
    """Constrain an array to the split `whole`, and its gradient to the split `stored`."""
    return jax.lax.with_sharding_constraint(array, whole)


_gathered.defvjp(
    lambda array, whole, stored: (_gathered(array, whole, stored), None),
    lambda whole, stored, _, slope: (jax.lax.with_sharding_constraint(slope, stored),),
)
