"""A run directory as a model that speaks: what `mukv.load` returns.

A model trained here and one that was imported are the same to everything that reads run
directories.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.checkpoint import Checkpoints
from mukv.config import Run
from mukv.core.errors import BadInput, nearest_name
from mukv.core.params import abstract, named
from mukv.core.typing import Array, Float
from mukv.core.weights import load_weights
from mukv.data.tokenizer import AnyTokenizer, load_tokenizer
from mukv.decode import Generation, Sampling, decoding_weights, generate
from mukv.evaluate import Evaluation, evaluate
from mukv.model.base import LanguageModel
from mukv.runs import RunDirectory
from mukv.train import Trainer


@dataclass(frozen=True)
class Text:
    """One generated continuation."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Model:
    """A model with its weights and tokenizer: what a run directory becomes when loaded."""

    run: Run
    weights: Any
    tokenizer: AnyTokenizer

    @property
    def decoder(self) -> LanguageModel:
        return self.run.model

    @cached_property
    def scaled(self) -> Any:
        """Weights as the forward pass sees them."""
        return self.decoder.scaled(self.weights)

    @cached_property
    def decoding(self) -> Any:
        """Weights as decoding takes them."""
        return decoding_weights(self.decoder, self.weights, self.run.train.compute)

    def logits(self, tokens: Any) -> Float[Array, "batch token vocab"]:
        """Float32 scores of the next token after each of `tokens` (ids, [batch token] or
        [token])."""
        ids = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))

        def forward(weights: Any, ids: Array) -> Array:
            compute = self.run.train.compute
            return self.decoder.logits(
                weights, self.decoder.hidden(weights, ids, compute=compute), compute
            )

        return jax.jit(forward)(self.scaled, ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as the beginning of a document."""
        return [*self.tokenizer.start, *self.tokenizer.encode(text).tolist()]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Collection[int] = (),
        show: Any = None,
    ) -> Generation:
        """Continue token ids; see `mukv.decode.generate`."""
        compute = self.run.train.compute
        return generate(
            self.decoder, self.decoding, prompts, max_tokens, sampling, stop, compute, show
        )

    def generate(
        self, prompt: str, max_tokens: int = 128, sampling: Sampling | None = None
    ) -> Text:
        """Continue a text."""
        made = self.generate_ids([self.encode(prompt)], max_tokens, sampling)
        return Text(self.tokenizer.decode(made.tokens[0]), made.tokens[0])

    def evaluate(self, rows: Sequence[np.ndarray], length: int | None = None) -> Evaluation:
        """Loss on rows of token ids, in windows of `length` (default: as in training)."""
        return evaluate(
            self.decoder,
            self.scaled,
            rows,
            length or self.run.train.length,
            self.tokenizer.token_bytes(self.decoder.vocab_size),
            self.run.train.compute,
        )


def load(source: str | Path) -> Model:
    """A run directory as a model: its exported weights, or its latest checkpoint if newer."""
    folder = RunDirectory(Path(source))
    if not folder.exists:
        parent = folder.path.parent
        siblings = [path.parent.name for path in parent.glob("*/config.yaml")]
        near = nearest_name(folder.path.name, siblings)
        raise BadInput(
            "MODEL",
            str(source),
            "a run directory (with a config.yaml)",
            str(parent / near) if near else None,
        )
    run = folder.load_config()
    return Model(run, _latest_weights(run, folder), load_tokenizer(folder.tokenizer))


def _latest_weights(run: Run, folder: RunDirectory) -> Any:
    exported, metadata = None, {}
    if folder.weights.exists():
        exported, metadata = load_weights(folder.weights)
    if folder.checkpoints.exists():
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            latest = checkpoints.latest()
            if latest is not None and (exported is None or latest > int(metadata.get("step", 0))):
                single = replace(run.mesh, data=1, tensor=1).build()
                trainer = Trainer(run.model, replace(run.train, accumulate=1), single)
                return checkpoints.restore(latest, trainer.abstract_state()).weights
    if exported is None:
        raise BadInput("MODEL", str(folder.path), "a run with weights; this one has none yet")
    _check_weights(run, exported, folder.weights)
    return jax.tree.map(jnp.asarray, exported)


def _check_weights(run: Run, found: Any, path: Path) -> None:
    """Raise BadInput where the weights are not those of the configuration."""
    wanted = {name: leaf.shape for name, leaf in named(abstract(run.model.params())).items()}
    shapes = {name: leaf.shape for name, leaf in named(found).items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise BadInput(
                f"{path}: {name}",
                shapes.get(name, "missing"),
                f"the configuration asks for {wanted.get(name, 'no such weight')}",
            )
