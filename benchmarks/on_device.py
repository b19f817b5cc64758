"""The measurements of benchmarks/gpu.py. Each takes the name of a case and returns one row.

A row has times and, beside them, what the compiled program is expected to do (`compiled.facts`) and
the least seconds that its bytes or its products take at the rates of the device's data sheet. With
`tiny`, shapes are so small that a CPU takes seconds: such rows only show that the code runs.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import compress
import cores
import jax
import jax.numpy as jnp
import kmeans
import numpy as np
import ours
import sweep
from compiled import facts
from rich.console import Console
from rounds import Contender, Refused, Worker, compare, median
from train_step import SIZES, Size

from mukv.cache import Policy
from mukv.cache import kmeans as clustering
from mukv.cache.reads import bytes_read
from mukv.cli import launch
from mukv.core.compute import Compute, settled
from mukv.core.device import data_sheet
from mukv.infer.decode import decoding_weights
from mukv.infer.functions import BLOCK, decode_functions
from mukv.infer.sampling import Sampling
from mukv.runs import config

Row = dict[str, Any]
LARGEST_ERROR = {"bfloat16": 0.02, "float32": 0.005}
"""Relative errors up to which a core agrees with float32. A GPU multiplies float32 numbers with 11
bits unless it is told otherwise."""
LOGIT_ERROR = 0.01
TINY = Size(32, 2, 2, 64, 128, 256)
TRAINING_ROUNDS, DECODING_ROUNDS = 5, 3
MINUSCULE = (
    "model.d_model=32",
    "model.attention={heads: 2, kv_heads: 1, head_dim: 16}",
    "model.mlp.hidden=48",
    "model.vocab_size=128",
    "model.plan=[{repeats: 2}]",
)
"""Overrides of llama-3.2-1b, for a model that decodes in a second."""


@dataclass(frozen=True)
class Part:
    """Cases that one process measures, one after another.

    cases: their names, the most important first
    limit: seconds after which the process is killed
    measure: function of a case's name and of whether it is tiny
    """

    cases: tuple[str, ...]
    limit: float
    measure: Callable[[str, bool], Row]


def rates() -> tuple[float | None, float | None]:
    """Return FLOP/s and bytes/s of the device by its data sheet; None where it is not known."""
    sheet = data_sheet()
    return (None, None) if sheet is None else (sheet.flops, sheet.bandwidth)


def share(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate


# Parity


def parity(case: str, tiny: bool) -> Row:
    """Compare every core with the plain one in float32. case: TYPE/CASE of `cores.CASES`"""
    kind, name = case.split("/")
    length, width = (150, 16) if tiny else (4096, 64)
    found = {
        core_name: cores.measure(name, core, length, kind, 1 if tiny else 5, width)
        for core_name, core in cores.on_this_device().items()
    }
    errors = [row[key] for row in found.values() for key in ("output_error", "gradient_error")]
    passed = all(error <= LARGEST_ERROR[kind] for error in errors)
    return {"length": length, "cores": found, "passed": passed}


def decoded_logits(case: str, tiny: bool) -> Row:
    """Compare the logits of a decode step on the device with those on the host's CPU, in float32.
    case: a policy"""
    model = llama(tiny=True)
    context = 512 if tiny else 4096
    policy, compute = Policy.parse(case), Compute(dtype="float32", operands="float32")

    def logits(device: jax.Device) -> Any:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            own = compute.resolve("cpu" if device.platform == "cpu" else "gpu")
            weights, cache = jax.device_put((host_weights, host_cache), device)
            step = jax.jit(partial(model.step, compute=own))
            return np.asarray(step(weights, cache, jnp.zeros(2, jnp.int32))[0])

    host = jax.devices("cpu")[0]
    with jax.default_device(host):
        own = compute.resolve("cpu")
        weights = decoding_weights(model, compress.random_weights(model), own)
        cache = compress.filled(model, weights, context, policy, own, rows=2)
        host_weights, host_cache = jax.device_get((weights, cache))
    error = cores.error(logits(jax.devices()[0]), logits(host))
    return {"context": context, "logit_error": error, "passed": error <= LOGIT_ERROR}


# Training


def training(size: str, case: str, tiny: bool) -> Row:
    """Measure a training step in bfloat16. case: LENGTH/CONTENDER"""
    length, contender = case.split("/")
    shape = asdict(TINY if tiny else SIZES[size])
    tokens = shape.pop("tokens")
    length = 64 if tiny else int(length)
    job = {"task": "train", **shape, "batch": max(1, tokens // length), "length": length}
    worker = Worker("ours.py") if contender == "mukv" else Worker("peers.py", sys.executable)
    peer = (
        {} if contender == "mukv" else {"peer": "plain", "compile": contender == "torch compiled"}
    )
    request = {"precision": "bfloat16", "warmup": 1, **peer}
    one = Contender(contender, worker, request)
    rounds, least = (1, 0.0) if tiny else (TRAINING_ROUNDS, 0.5)
    try:
        compare([one], job, rounds, least, 60.0, Console(stderr=True, quiet=True))
    finally:
        worker.close()
    if one.why_not:
        raise Refused(one.why_not)
    speed = median(one.per_second(one.told["tokens"]))
    assert speed is not None
    row = {
        "batch": job["batch"],
        "length": length,
        "parameters": one.told["parameters"],
        "seconds": one.told["tokens"] / speed,
        "tokens_per_second": speed,
    }
    model = ours.Job(**job).model()
    flops = ours.flops_per_token(model, length) * one.told["tokens"]
    peak, bandwidth = rates()
    row["mfu"] = share(flops / row["seconds"], peak)
    row["least_seconds"] = share(flops, peak)
    if "program" in one.told:
        row["program"] = one.told["program"]
        row["seconds_of_moved_bytes"] = share(row["program"]["moved_bytes"], bandwidth)
    return row


# Decoding


def llama(tiny: bool) -> Any:
    """Return the model of llama-3.2-1b, without a limit of the context."""
    return config.load("llama-3.2-1b", ["model.context=null", *(MINUSCULE if tiny else ())]).model


def decoding(policy: str, case: str, tiny: bool) -> Row:
    """Measure greedy decoding after a body of random entries. case: CONTEXT/ROWS"""
    context, rows = (512, 2) if tiny else map(int, case.split("/"))
    model, compute = llama(tiny), settled(None)
    weights = decoding_weights(model, compress.random_weights(model), compute)
    chosen = Policy.parse(policy)
    cache = compress.filled(model, weights, context, chosen, compute, rows)
    cache_bytes = cache.nbytes()

    def step(cache: Any, weights: Any) -> Any:
        logits, cache = model.step(weights, cache, jnp.zeros(rows, jnp.int32), compute=compute)
        return logits, cache.split()[1]

    read = bytes_read(step, cache, weights) + sum(x.nbytes for x in jax.tree.leaves(weights))
    frozen, live = cache.split()
    key, one = jax.random.key(0), np.int32(BLOCK)
    token, number = jnp.zeros(rows, jnp.int32), jnp.ones((), jnp.int32)
    block = decode_functions(model, Sampling(), compute).block
    start = time.perf_counter()
    program = block.compiled(weights, frozen, live, token, number, key, one)
    counted = facts(program, time.perf_counter() - start)
    seconds = []
    for turn in range(1 if tiny else DECODING_ROUNDS + 1):
        carry = jax.tree.map(jnp.copy, (live, token, number))
        jax.block_until_ready(carry)
        start = time.perf_counter()
        # Decode as many blocks as fill the tail, and fetch each, as `generate` does.
        for _ in range(compress.TAIL // BLOCK):
            made, *carry = program(weights, frozen, *carry, key, one)
            np.asarray(made)
        if turn or tiny:
            seconds.append((time.perf_counter() - start) / compress.TAIL)
    bandwidth = rates()[1]
    taken = statistics.median(seconds)
    return {
        "context": context,
        "rows": rows,
        "seconds": taken,
        "tokens_per_second": rows / taken,
        "cache_bytes": cache_bytes,
        "read_bytes": read,
        "of_bandwidth": share(read / taken, bandwidth),
        "least_seconds": share(read, bandwidth),
        "seconds_of_moved_bytes": share(counted["moved_bytes"], bandwidth),
        "program": counted,
    }


# Clusters and sweeps


def clusters(case: str, tiny: bool) -> Row:
    """Measure k-means of 4,096 keys of 64 dimensions per set, 64 clusters. case: number of sets"""
    sets, number = (1, 4) if tiny else (int(case), kmeans.CLUSTERS)
    points = jax.device_put(kmeans.keys(sets)[:, : 256 if tiny else None])
    start = time.perf_counter()
    fit = jax.jit(partial(clustering.fit, clusters=number)).lower(points).compile()
    counted = facts(fit, time.perf_counter() - start)
    rounds = 1 if tiny else 5
    row = {"seconds": kmeans.seconds(lambda: jax.block_until_ready(fit(points)), rounds)}
    return row | {"iterations": int(fit(points).iterations), "program": counted}


def sweeping(case: str, tiny: bool) -> Row:
    """Train 16 learning rates in one program and one after another. case: width of the model"""
    launch.prepare()
    sweep.compile_each_time()
    width, points, steps = (32, 2, 2) if tiny else (int(case), 16, 40)
    row = sweep.compare(width, points, steps)
    return {"points": points, "steps": steps, **row}


CONTEXTS = tuple(f"{context}/{rows}" for context in (8192, 32768, 2048, 131072) for rows in (1, 8))
CONTENDERS = ("mukv", "torch", "torch compiled")
TRAININGS = tuple(f"{length}/{name}" for length in (4096, 1024) for name in CONTENDERS)

PARTS: dict[str, Part] = {
    "parity": Part((*(f"bfloat16/{name}" for name in cores.CASES), "float32/packed"), 90, parity),
    "train 300m": Part(TRAININGS, 150, partial(training, "300m")),
    "decode full": Part(CONTEXTS, 150, partial(decoding, "full")),
    "train 1b": Part(TRAININGS, 200, partial(training, "1b")),
    "decode int4": Part(CONTEXTS, 200, partial(decoding, "int4")),
    "decode pages:0.0625": Part(CONTEXTS, 200, partial(decoding, "pages:0.0625")),
    "parity of decoding": Part(("full", "int8", "int4"), 60, decoded_logits),
    "k-means": Part(("8", "64"), 60, clusters),
    "sweep": Part(("64", "256"), 120, sweeping),
    "train 37m": Part(TRAININGS, 120, partial(training, "37m")),
    "decode int8": Part(CONTEXTS, 200, partial(decoding, "int8")),
    "decode snapkv:0.25": Part(CONTEXTS, 200, partial(decoding, "snapkv:0.25")),
}
"""Parts by name, the most important first."""


def measure(part: str, case: str, tiny: bool) -> Row:
    """Measure one case; memory of earlier ones is freed before.

    Raises any error of the case, such as an error of JAX if it does not fit in memory.
    """
    jax.clear_caches()
    gc.collect()
    return PARTS[part].measure(case, tiny)
