"""The predecessor's defects, one by one: what each costs a concept model of chunks of four bytes.

    python reproductions/concept-model/ablation.py

lag: a concept is heard one chunk after it is complete. no skip: the decoder hears of the encoder
only through concepts. bag of bytes: no encoder, and a sum for a reduction. leak: tokens before the
first concept hear the mean of all concepts of the row, those of the future included; judged
without it, as decoding would be. Writes ablation.json.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv import config, runs
from mukv.core.files import write_atomic
from mukv.core.mesh import MeshShape
from mukv.data.batches import Batches
from mukv.loop import validation_metrics
from mukv.model import Concept
from mukv.model.concept import Residually, Sum
from mukv.train import Trainer

HERE = Path(__file__).parent
SEEDS, WINDOWS = (0, 1), 24
PLAN = (
    *("model.d_model=64", "model.mlp.hidden=192", "model.attention.heads=2"),
    *("model.attention.kv_heads=1", "model.concepts.d_model=64"),
    *("train.steps=150", "train.length=128", "train.learning_rate=0.01"),
)


@dataclass(frozen=True)
class Lag(Residually):
    def mix(self, joint: Any, x: Any, heard: Any) -> Any:
        chunks = heard.chunks
        late = chunks._replace(
            number=jnp.maximum(chunks.number - 1, 0), made=jnp.maximum(chunks.made - 1, 0)
        )
        return super().mix(joint, x, heard._replace(chunks=late))


@dataclass(frozen=True)
class NoSkip(Residually):
    def mix(self, joint: Any, x: Any, heard: Any) -> Any:
        own = {"skip": jnp.zeros_like(joint.own["skip"])}
        return super().mix(joint._replace(own=own), x, heard)


@dataclass(frozen=True)
class Leak(Residually):
    def mix(self, joint: Any, x: Any, heard: Any) -> Any:
        from mukv.core.linear import project

        there = (heard.chunks.end < x.shape[1])[..., None]
        total = jnp.sum(jnp.where(there, heard.thoughts, 0), axis=1, keepdims=True)
        mean = total / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
        early = jnp.where(heard.chunks.made[..., None] == 0, project(mean, joint.give["give"]), 0)
        return super().mix(joint, x, heard) + early


def variants(model: Concept) -> dict[str, tuple[Concept, Concept]]:
    """By name the model that is trained and the one that is judged."""

    def both(other: Concept) -> tuple[Concept, Concept]:
        return other, other

    bag = replace(model, encoder=(), pool=Sum())
    worst: Any = type("Worst", (Leak, Lag, NoSkip), {})
    fair: Any = type("Fair", (Lag, NoSkip), {})
    return {
        "none": both(model),
        "lag": both(replace(model, injection=Lag())),
        "no skip": both(replace(model, injection=NoSkip())),
        "bag of bytes": both(bag),
        "leak": (replace(model, injection=Leak()), model),
        "all": (replace(bag, injection=worst()), replace(bag, injection=fair())),
    }


def bits_per_byte(trained: Concept, judged: Concept, run: Any, seed: int) -> tuple[float, float]:
    """Of held-out text: as trained, and as judged."""
    training = replace(run.train, seed=seed)
    tokens, mesh = runs.open_corpus(run), MeshShape().build()
    common = {"seed": seed, "batch": training.batch, "length": training.length}
    batches = Batches(tokens, split="train", **common)
    trainer = Trainer(trained, training, mesh)
    state = trainer.initial_state()
    for step in range(training.steps):
        state, _ = trainer.step(state, step, trainer.put(batches.at(step)))
    table = jnp.asarray(tokens.token_bytes(trained.vocab_size), jnp.int32)
    found = []
    for each in (trainer, Trainer(judged, training, mesh)):
        total = np.zeros(3)
        for batch in Batches(tokens, split="validation", **common).once(WINDOWS):
            sums = each.validate(state.weights, each.put(batch), table)
            total += np.asarray([float(number) for number in sums])
        found.append(validation_metrics(*total)["validation_bits_per_byte"])
    return found[0], found[1]


def main() -> None:
    run = config.load("tiny-concept-fixed", PLAN)
    assert isinstance(run.model, Concept)
    found = {}
    for name, (trained, judged) in variants(run.model).items():
        pairs = [bits_per_byte(trained, judged, run, seed) for seed in SEEDS]
        as_trained, honest = (statistics.mean(column) for column in zip(*pairs, strict=True))
        by_seed = [pair[1] for pair in pairs]
        found[name] = {"as_trained": as_trained, "bits_per_byte": honest, "by_seed": by_seed}
        print(f"{name:14} {as_trained:.4f} as trained, {honest:.4f} honest", by_seed, flush=True)
        jax.clear_caches()
    write_atomic(HERE / "ablation.json", json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
