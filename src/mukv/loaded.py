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

from mukv.cache import FULL, Calibrated, Policy
from mukv.cache.centres import FOLDER, load_centres
from mukv.cache.clusters import Clusters
from mukv.checkpoint import Checkpoints
from mukv.config import Run
from mukv.core.errors import BadInput, Failed, nearest_name
from mukv.core.mesh import MeshShape, weight_shardings
from mukv.core.typing import Array, Float
from mukv.core.weights import load_weights, require_weights
from mukv.data.tokenizer import AnyTokenizer, find_tokenizer, load_tokenizer
from mukv.decode import Generation, Sampling, decoding_weights, generate
from mukv.evaluate import Evaluation, evaluate
from mukv.hub import checkpoint
from mukv.hub.chat import chat_text
from mukv.hub.settings import read_json
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
    ends: tuple[int, ...] = ()
    """Ids after which a text is over, where the model came with any."""
    folder: Path | None = None
    """Where it was loaded from."""

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

    def logits(
        self, tokens: Any, position: Any = None, segment: Any = None
    ) -> Float[Array, "batch token vocab"]:
        """Float32 scores of the next token after each of `tokens` (ids, [batch token] or
        [token]).

        position: place in the document (default: in the row). segment: number of the document;
        tokens see only their own, so that padding is a document of its own.
        """
        ids, position, segment = (
            None if given is None else jnp.atleast_2d(jnp.asarray(given, jnp.int32))
            for given in (tokens, position, segment)
        )
        compute = self.run.train.compute

        def forward(weights: Any, ids: Array, *places: Array | None) -> Array:
            hidden = self.decoder.hidden(weights, ids, *places, compute=compute)
            return self.decoder.logits(weights, hidden, compute)

        return jax.jit(forward)(self.scaled, ids, position, segment)

    def encode(self, text: str) -> list[int]:
        """Ids of a text as the beginning of a document."""
        return [*self.tokenizer.start, *self.tokenizer.encode(text).tolist()]

    def encode_chat(self, message: str) -> list[int]:
        """Ids of a user's message as the model's chat template puts it. Raises BadInput."""
        if self.folder is None:
            raise BadInput("--chat", message[:40], "a model that was loaded from a folder")
        text = chat_text(self.folder, [{"role": "user", "content": message}])
        return self.tokenizer.encode_marked(text)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
        show: Any = None,
        policy: Policy = FULL,
    ) -> Generation:
        """Continue token ids; see `mukv.decode.generate`. stop: default: the model's `ends`."""
        compute = self.run.train.compute
        stop = self.ends if stop is None else stop
        cache = self.calibrated(policy)
        return generate(
            self.decoder, self.decoding, prompts, max_tokens, sampling, stop, compute, show, *cache
        )

    @property
    def by_head(self) -> bool:
        """Whether every layer without a window keeps entries of each head, so that centres fit."""
        layers = [layer for stack in self.decoder.stacks for layer in stack.layers]
        kept = [layer.attention for layer in layers if layer.window is None]
        return all(attention.stores == attention.key_heads for attention in kept)

    def calibrated(self, policy: Policy) -> tuple[Policy, Calibrated]:
        """A policy with what was calibrated for it, if anything was: the centres of `clusters`,
        where keys have heads of their own to be clustered by.

        Raises BadInput for a calibration of another model.
        """
        if not isinstance(policy.select, Clusters) or self.folder is None or not self.by_head:
            return policy, {}
        if not (self.folder / FOLDER).exists():
            return policy, {}
        centres = load_centres(self.folder, self.weights)
        if not centres.rotated:
            allowed = "centres of rotated keys, which a step can compare its query with"
            raise BadInput(str(self.folder / FOLDER), "centres of unrotated keys", allowed)
        select = replace(policy.select, calibrated=centres.kind)
        return replace(policy, select=select), centres.arrays()

    def generate(
        self, prompt: str, max_tokens: int = 128, sampling: Sampling | None = None
    ) -> Text:
        """Continue a text."""
        made = self.generate_ids([self.encode(prompt)], max_tokens, sampling)
        return Text(self.tokenizer.decode(made.tokens[0]), made.tokens[0])

    def evaluate(
        self, rows: Sequence[np.ndarray], length: int | None = None, stride: int | None = None
    ) -> Evaluation:
        """Loss on rows of token ids, in windows of `length` (default: as in training)."""
        return evaluate(
            self.decoder,
            self.scaled,
            rows,
            length or self.run.train.length,
            self.tokenizer.token_bytes(self.decoder.vocab_size),
            self.run.train.compute,
            stride,
        )


def load(source: str | Path, mesh: MeshShape | None = None) -> Model:
    """A run directory as a model: its exported weights, or its latest checkpoint if newer. Or a
    Hugging Face folder or hub id, whose weights stream to their places.

    mesh: that the weights are split over; one device if None. Raises BadInput.
    """
    mesh = mesh or MeshShape()
    folder = RunDirectory(Path(source))
    if not folder.exists:
        found = checkpoint.find(source)
        if found is not None:
            run = replace(checkpoint.imported_run(found), mesh=mesh)
            ends = checkpoint.end_ids(found.special)
            weights = found.place(mesh.build())
            return Model(run, weights, found.tokenizer, ends, found.folder)
        parent = folder.path.parent
        siblings = [path.parent.name for path in parent.glob("*/config.yaml")]
        near = nearest_name(folder.path.name, siblings)
        raise BadInput(
            "MODEL",
            str(source),
            "a run directory (with a config.yaml), a Hugging Face folder (with a config.json) or "
            "a hub id",
            str(parent / near) if near else None,
        )
    run = folder.load_config()
    weights = _latest_weights(run, folder)
    if mesh.size > 1:
        weights = jax.device_put(weights, weight_shardings(run.model.params(), mesh.build()))
    if not folder.generation.exists():
        return Model(run, weights, load_tokenizer(folder.tokenizer), folder=folder.path)
    ends = checkpoint.end_ids(read_json(folder.generation))
    return Model(run, weights, find_tokenizer(folder.tokenizer), ends, folder.path)


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
                return _restored(checkpoints, latest, trainer.abstract_state()).weights
    if exported is None:
        raise BadInput("MODEL", str(folder.path), "a run with weights; this one has none yet")
    require_weights(run.model.params(), exported, folder.weights)
    return jax.tree.map(jnp.asarray, exported)


def _restored(checkpoints: Checkpoints, latest: int, like: Any) -> Any:
    """The latest state; a newer one, where training deletes this one while it is read."""
    try:
        return checkpoints.restore(latest, like)
    except (BadInput, Failed):
        newer = checkpoints.latest()
        if newer is None or newer <= latest:
            raise
    return _restored(checkpoints, newer, like)
