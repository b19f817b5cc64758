"""The worker of finetune.py: training steps that begin with a pretrained model.

`python tuner.py` reads one JSON request per line of stdin and writes one JSON answer per line of
stdout, with the protocol of ours.py.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mukv.cli import launch
from mukv.core.compute import Compute
from mukv.core.mesh import MeshShape
from mukv.core.params import count
from mukv.data.batches import Batches
from mukv.data.tokens import open_tokens
from mukv.runs.located import locate
from mukv.runs.start import find_base
from mukv.train.adapter import Adapter
from mukv.train.footprint import state_bytes, step_bytes
from mukv.train.step import Trainer
from mukv.train.training import Training

GIB = 1 << 30


@dataclass(frozen=True)
class Job:
    """One measurement.

    model: a run directory, a Hugging Face folder or a GGUF file
    tokens: a token file
    rank: of the adapters; None trains all weights
    unroll: layers one by one rather than scanned; None leaves it to the platform
    """

    model: str
    tokens: str
    rank: int | None = None
    batch: int = 2
    length: int = 128
    unroll: bool | None = None
    learning_rate: float = 1e-4


class Tuner:
    """Holds one model in training."""

    def setup(self, job: Job) -> dict[str, Any]:
        """Read the weights, compile the step and do the first one."""
        launch.prepare()
        model, mesh = locate(job.model).run.model, MeshShape().build()
        adapter = None if job.rank is None else Adapter(rank=job.rank)
        training = Training(
            batch=job.batch,
            length=job.length,
            learning_rate=job.learning_rate,
            adapter=adapter,
            compute=Compute(unroll=job.unroll),
        )
        self.trainer = trainer = Trainer(model, training, mesh)
        start, declared = find_base(job.model), model.params()
        compiled = step_bytes(trainer)
        if adapter is None:
            self.state = trainer.state_of(start.weights(declared, mesh))
        else:
            trainer.freeze(start.weights(declared, mesh))
            self.state = trainer.initial_state()
        batches = Batches(open_tokens(Path(job.tokens)), 0, job.batch, job.length)
        self.batches, self.number, self.losses = batches, 0, []
        self.round()
        return {
            "tokens": job.batch * job.length,
            "jax": jax.__version__,
            "device": f"{jax.default_backend()}, {jax.devices()[0].device_kind}",
            "trained": count(trainer.declared),
            "kept": state_bytes(trainer),
            "compiled_bytes": compiled,
        }

    def round(self) -> dict[str, float]:
        """Do one step, its batch included."""
        start = time.perf_counter()
        batch = self.trainer.put(self.batches.at(self.number))
        with jax.set_mesh(self.trainer.mesh):
            self.state, metrics = self.trainer.step(self.state, self.number, batch)
            loss = float(metrics.loss)
        seconds = time.perf_counter() - start
        self.number += 1
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"seconds": seconds, "loss": loss, "peak": peak / GIB}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request.pop("op", None)
        if op == "setup":
            return self.setup(Job(**request))
        if op == "round":
            return self.round()
        raise ValueError(f"op: {op!r}; allowed: setup, round")


def main() -> None:
    """Answer requests until the input ends; only answers go to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    tuner = Tuner()
    for line in sys.stdin:
        try:
            reply = tuner.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
