"""Run mukv's side of the speed comparisons, as a worker with the same protocol as peers.py.

`python ours.py` reads one JSON request per line of stdin and writes one JSON answer per line of
stdout. It runs the code of `mukv train` and `mukv generate`. The number of simulated devices and
the allocator are fixed when a process starts: `rounds.py` starts one worker for each number of
devices, with mukv's own environment. Weights and tokens are random: only speed is measured.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from compiled import facts

from mukv.attention import Grouped
from mukv.cli import launch
from mukv.core import params
from mukv.core.compute import Compute
from mukv.core.device import peak_flops
from mukv.core.mesh import MeshShape
from mukv.data.batches import Batch
from mukv.infer.decode import decoding_weights, generate
from mukv.model import Decoder, Stage
from mukv.model.block import Gated
from mukv.model.counting import entry_bytes, flops_per_token
from mukv.position.rope import RoPE
from mukv.runs import loaded
from mukv.runs.located import locate
from mukv.train.step import Trainer
from mukv.train.training import Training


@dataclass(frozen=True)
class Job:
    """One measurement; the keys of a `setup` request mean the same as in peers.py.

    precision: dtype of matrix products with weights, and of activations except on a CPU
    folder: pretrained model that decodes; None for the sizes below
    devices: number of devices that a training batch is split over
    """

    task: str = "train"
    precision: str = "float32"
    d_model: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int | None = None
    hidden: int = 1024
    vocab_size: int = 256
    batch: int = 16
    length: int = 256
    new_tokens: int = 32
    devices: int = 1
    rematerialise: bool = False
    warmup: int = 2
    tied: bool = False
    folder: str | None = None

    @property
    def vocab(self) -> int:
        return self.model().vocab_size if self.folder else self.vocab_size

    def model(self) -> Decoder:
        if self.folder:
            found = locate(self.folder).run.model
            assert isinstance(found, Decoder)
            return found
        attention = Grouped(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.d_model // self.heads,
            position=RoPE(),
        )
        return Decoder(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            attention=attention,
            mlp=Gated(hidden=self.hidden),
            plan=(Stage(repeats=self.layers),),
            readout="tied" if self.tied else "linear",
        )

    def read_bytes(self) -> int:
        """Return the bytes that a decode step must read: weights of matrix products, and the cache
        of all rows.
        """
        model, compute = self.model(), self.compute()
        multiply = (param.size for param in params.named(model.params()).values() if param.fan_in)
        (stack,) = model.stacks
        entries = (entry_bytes(stack, layer, compute.type) for layer in model.layers)
        cached = sum(sum(entry.values()) for entry in entries)
        weights = sum(multiply) * jax.numpy.dtype(compute.operands).itemsize
        return weights + self.batch * self.length * cached

    def compute(self) -> Compute:
        on_cpu = jax.default_backend() == "cpu"
        bfloat16 = self.precision == "bfloat16"
        return Compute(
            dtype="bfloat16" if bfloat16 and not on_cpu else "float32",
            operands="bfloat16" if bfloat16 else "float32",
            rematerialise=self.rematerialise,
        )

    def tokens(self, rows: int, length: int) -> np.ndarray:
        return np.random.default_rng(0).integers(self.vocab, size=(rows, length), dtype="i4")


Round = Callable[[], dict[str, float]]


def training(job: Job) -> tuple[Round, dict[str, Any]]:
    """Set up training. A round is one step, including the transfer of its loss to the host. Also
    returns the counts of the compiled step (`compiled.facts`).
    """
    mesh = MeshShape(data=job.devices).build()
    trainer = Trainer(
        job.model(), Training(batch=job.batch, length=job.length, compute=job.compute()), mesh
    )
    ids = job.tokens(job.batch, job.length + 1)
    position = np.broadcast_to(np.arange(job.length, dtype="i4"), (job.batch, job.length))
    ones = np.ones((job.batch, job.length))
    batch = trainer.put(
        Batch(ids[:, :-1], ids[:, 1:], position, ones.astype("i4"), ones.astype("f4"))
    )
    start = time.perf_counter()
    program = trainer.compile(batch)
    counted = facts(program, time.perf_counter() - start)
    state, number = trainer.initial_state(), 0

    def step() -> dict[str, float]:
        nonlocal state, number
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            state, metrics = trainer.step(state, number, batch)
            loss = float(metrics.loss)
        seconds = time.perf_counter() - start
        number += 1
        if not np.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} in step {number}")
        return {"seconds": seconds}

    return step, counted


def decoding(job: Job) -> tuple[Round, dict[str, Any]]:
    """Set up decoding. A round prefills `length` tokens per row and decodes `new_tokens` more,
    greedily. There are no counts of its program.
    """
    model = job.model()
    weights = loaded.load(job.folder).weights if job.folder else model.init()
    ready = decoding_weights(model, weights, job.compute())
    del weights
    prompts = job.tokens(job.batch, job.length).tolist()

    def decode() -> dict[str, float]:
        # The prefill yields the first new token.
        made = generate(model, ready, prompts, job.new_tokens + 1, compute=job.compute())
        return {
            "seconds": job.batch * job.new_tokens / made.tokens_per_second,
            "prefill_seconds": made.prefill_seconds,
        }

    return decode, {}


def bandwidth(size: int = 1 << 28, rounds: int = 7) -> float:
    """Measure the bytes per second of reading 1 GiB, by a matrix-vector product or a sum, whichever
    is faster.
    """
    matrix = jax.numpy.ones((size >> 12, 1 << 12), jax.numpy.float32)
    vector = jax.numpy.ones(1 << 12, jax.numpy.float32)
    ways = (
        jax.jit(lambda matrix, vector: matrix @ vector),
        jax.jit(lambda matrix, _: matrix.sum()),
    )
    best = 0.0
    for way in ways:
        jax.block_until_ready(way(matrix, vector))
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(way(matrix, vector))
            best = max(best, matrix.nbytes / (time.perf_counter() - start))
    return best


class Worker:
    """Hold one job at a time, and answer requests about it."""

    def __init__(self) -> None:
        self.step: Round | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request.

            {"op": "setup", **Job fields} -> {"parameters", "tokens", "jax", "device",
                "flops_per_token", "peak_flops", "warmup_seconds", "program"}: builds, compiles,
                warms up.
            {"op": "round"} -> {"seconds"}, and "prefill_seconds" in decoding.
            {"op": "device"} -> {"platform", "bandwidth"}: cpu, gpu or tpu; measured peak of bytes
                read per second.

        Any failure gives {"error": "one line"}, and the worker continues. It ends with its input.
        """
        request = dict(request)
        op = request.pop("op", None)
        if op == "setup":
            return self.setup(Job(**request))
        if op == "round":
            if self.step is None:
                raise ValueError("round: nothing is set up; send a setup first")
            return self.step()
        if op == "device":
            return {"platform": jax.default_backend(), "bandwidth": bandwidth()}
        raise ValueError(f"op: {op!r}; allowed: setup, round, device")

    def setup(self, job: Job) -> dict[str, Any]:
        self.step = None
        gc.collect()
        launch.prepare(job.devices)
        start = time.perf_counter()
        step, counted = training(job) if job.task == "train" else decoding(job)
        for _ in range(job.warmup):
            step()
        self.step = step
        model = job.model()
        return {
            "parameters": params.count(model.params()),
            "tokens": job.batch * (job.length if job.task == "train" else job.new_tokens),
            "jax": jax.__version__,
            "device": f"{jax.default_backend()}, {jax.devices()[0].device_kind}",
            "flops_per_token": flops_per_token(model, job.length),
            "peak_flops": peak_flops(job.devices),
            "read_bytes": job.read_bytes(),
            "warmup_seconds": time.perf_counter() - start,
            "program": counted,
        }


def main() -> None:
    """Answer requests until the input ends; only answers go to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    worker = Worker()
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
