"""Compile the programs of a generation while the weights of the model are read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mukv.cache import Policy
from mukv.cache.clusters import Clusters
from mukv.core.compute import Compute, settled
from mukv.infer.decode import Sizes, check, decoding_weights
from mukv.infer.functions import begin, decode_functions
from mukv.infer.prompts import readings
from mukv.infer.sampling import Sampling
from mukv.model.base import LanguageModel


def compile_ahead(
    model: LanguageModel,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    policy: Policy,
    compute: Compute | None = None,
    prefill_chunk: int | None = None,
) -> float:
    """Begin to compile what `generate` needs for these arguments; return the seconds that it took.

    weights: as they are saved, abstract, on one device

    `generate` finds the programs, since they are kept by model and shapes. Nothing is compiled for
    a policy whose arrays depend on the weights. Raises BadInput as `generate` does.
    """
    check(model, prompts, max_tokens)
    keep = policy.keep
    if keep.replays or keep.calibrated or isinstance(policy.select, Clusters):
        return 0.0
    start = time.perf_counter()
    compute, key = settled(compute), jax.random.key(sampling.seed)
    sizes = Sizes.plan(len(prompts), max(map(len, prompts)), max_tokens)
    functions = decode_functions(model, replace(sampling, seed=0), compute)
    reads = readings(functions.prefill, functions.extend, prompts, None, prefill_chunk)
    room = sizes.batch, sizes.body, sizes.tail
    cache = model.empty_cache(*room, compute.type, policy, None, sizes.after)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda weights: decoding_weights(model, weights, compute), weights)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
    )
    token = jnp.zeros(sizes.batch, jnp.int32)
    begin(functions, placed, reads, cache, token, key, max_tokens - 1, sizes.tail)
    return time.perf_counter() - start
