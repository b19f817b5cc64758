"""Measure the cost of each defect of the predecessor, in a concept model with chunks of four bytes.

    python reproductions/concept-model/ablation.py

lag: a concept is used one chunk late. no skip: the decoder starts from embedded tokens and gets the
    encoder's output only through concepts. cross: cross attention to concepts. bag of bytes: no
    encoder, sum pooling. leak: tokens before the first concept use the mean of all concepts of the
    row, future ones included; evaluated without it, as in decoding. all: lag, no skip, bag of bytes
    and leak. Writes ablation.json and ablation.png; defects in the file are not trained again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Compute, settled
from mukv.core.linear import project
from mukv.core.mesh import MeshShape
from mukv.data.batches import Batches
from mukv.model import Concept, LanguageModel
from mukv.model.base import ForwardResult
from mukv.model.concept import Cross, Fixed, ResidualInjection, Sum
from mukv.runs import config
from mukv.runs.resolve import open_corpus
from mukv.show.figures import saved_figure
from mukv.storage.files import write_atomic
from mukv.train.step import Trainer
from mukv.train.validation import validation_metrics

HERE = Path(__file__).parent
SEEDS, WINDOWS = (0, 1), 32
PLAN = (
    *("model.d_model=64", "model.mlp.hidden=192"),
    "model.attention={heads: 4, kv_heads: 2, head_dim: 16}",
    *("train.steps=200", "train.batch=8", "train.length=256"),
    *("train.learning_rate=0.02", "train.optimizer={kind: muon}"),
    "train.schedule={kind: cosine, warmup: 20, final: 0.1}",
)
SOUND = ("model.injection={kind: residual}", "model.decoder=[{pattern: [{window: 32}]}]")
"""Settings of the concept models without defects."""


@dataclass(frozen=True)
class Lag(ResidualInjection):
    def inject(self, joint: Any, x: Any, inputs: Any) -> Any:
        chunks = inputs.chunks
        late = chunks._replace(
            number=jnp.maximum(chunks.number - 1, 0), made=jnp.maximum(chunks.made - 1, 0)
        )
        return super().inject(joint, x, inputs._replace(chunks=late))


@dataclass(frozen=True)
class NoSkip(ResidualInjection):
    """The decoder's input is the embedded tokens. raw: these embeddings."""

    raw: Any = None

    def inject(self, joint: Any, x: Any, inputs: Any) -> Any:
        return super().inject(joint, self.raw, inputs)


@dataclass(frozen=True)
class Unskipped(Concept):
    """A model whose decoder starts from embedded tokens instead of the encoder's output."""

    def read(
        self,
        weights: Any,
        tokens: Any,
        position: Any = None,
        segment: Any = None,
        compute: Compute | None = None,
    ) -> ForwardResult:
        compute = settled(compute)
        raw = self.embed(weights, tokens, compute)
        given = replace(self, injection=replace(cast("NoSkip", self.injection), raw=raw))
        return Concept.read(given, weights, tokens, position, segment, compute)


@dataclass(frozen=True)
class Leak(ResidualInjection):
    def inject(self, joint: Any, x: Any, inputs: Any) -> Any:
        there = (inputs.chunks.end < x.shape[1])[..., None]
        total = jnp.sum(jnp.where(there, inputs.outputs, 0), axis=1, keepdims=True)
        mean = total / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
        early = jnp.where(inputs.chunks.made[..., None] == 0, project(mean, joint.give["give"]), 0)
        return super().inject(joint, x, inputs) + early


@dataclass(frozen=True)
class Fair(Lag, NoSkip):
    """A concept model with all defects except the leak."""


@dataclass(frozen=True)
class Worst(Leak, Fair):
    """A concept model with all defects except cross attention and attention between documents."""


def variants(plain: LanguageModel, model: Concept) -> dict[str, tuple[Any, Any]]:
    """Return by name the trained model and the evaluated one. plain: a decoder with as
    many layers.
    """

    def both(other: LanguageModel) -> tuple[Any, Any]:
        return other, other

    def unskipped(other: Concept, injection: Any) -> Concept:
        fields = {field.name: getattr(other, field.name) for field in dataclasses.fields(Concept)}
        return Unskipped(**fields | {"injection": injection})

    bag = replace(model, encoder=(), pool=Sum())
    ones = replace(model, chunker=Fixed(size=1))
    return {
        "plain decoder": both(plain),
        "chunks of one": both(ones),
        "chunks of one, lag": both(replace(ones, injection=Lag())),
        "sound": both(model),
        "lag": both(replace(model, injection=Lag())),
        "no skip": both(unskipped(model, NoSkip())),
        "cross": both(replace(model, injection=Cross())),
        "bag of bytes": both(bag),
        "leak": (replace(model, injection=Leak()), model),
        "all": (unskipped(bag, Worst()), unskipped(bag, Fair())),
    }


def bits_per_byte(trained: Any, judged: Any, run: Any, seed: int) -> tuple[float, float]:
    """Compute bits per byte of held-out text, as trained and as evaluated."""
    training = replace(run.train, seed=seed)
    tokens, mesh = open_corpus(run), MeshShape().build()
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
        found.append(float(validation_metrics(total)["validation_bits_per_byte"]))
    return found[0], found[1]


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a bar for each defect, grey for models without one, with the seeds as points."""
    with saved_figure(path, (8, 3.6), "Chunks of four bytes: what each defect costs") as figure:
        axes = figure.subplots()
        for place, (name, row) in enumerate(found.items()):
            worse = row["bits_per_byte"] - found["sound"]["bits_per_byte"]
            sound = name in ("plain decoder", "chunks of one", "sound")
            axes.barh(place, row["bits_per_byte"], color="0.6" if sound else "C0")
            axes.plot(row["by_seed"], [place] * len(row["by_seed"]), "k.", ms=5)
            if name != "sound":
                axes.annotate(f" {worse:+.3f}", (max(row["by_seed"]), place), va="center")
            if row["as_trained"] != row["bits_per_byte"]:
                axes.plot(row["as_trained"], place, "rx", label="what training saw")
        labels = ["lag, no skip, bag, leak" if name == "all" else name for name in found]
        axes.set_yticks(range(len(found)), labels)
        axes.invert_yaxis()
        every = [bits for row in found.values() for bits in (*row["by_seed"], row["as_trained"])]
        axes.set_xlim(min(every) - 0.1, max(every) + 0.1)
        axes.set(xlabel="bits per byte of held-out text (points: seeds)")
        axes.grid(axis="x", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            handles = (part[:1] for part in axes.get_legend_handles_labels())
            figure.legend(*handles, loc="outside lower right")


def main() -> None:
    run, path = config.load("tiny-concept-fixed", [*PLAN, *SOUND]), HERE / "ablation.json"
    plain = config.load("tiny", PLAN).model
    assert isinstance(run.model, Concept)
    model = replace(run.model, concepts=replace(run.model.concepts, d_model=None))
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, (trained, judged) in variants(plain, model).items():
        if name in found:
            continue
        pairs = [bits_per_byte(trained, judged, run, seed) for seed in SEEDS]
        as_trained, honest = (statistics.mean(column) for column in zip(*pairs, strict=True))
        by_seed = [pair[1] for pair in pairs]
        found[name] = {"as_trained": as_trained, "bits_per_byte": honest, "by_seed": by_seed}
        write_atomic(path, json.dumps(found, indent=2) + "\n")
        print(f"{name:14} {as_trained:.4f} as trained, {honest:.4f} honest", by_seed, flush=True)
        jax.clear_caches()
    draw(found, HERE / "ablation.png")


if __name__ == "__main__":
    main()
