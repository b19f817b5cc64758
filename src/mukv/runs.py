"""One folder joins everything: what training writes and everything after reads.

config.yaml (complete, reloadable), metrics.jsonl, checkpoints/, tokenizer.json, weights/ and
provenance.json. `train` makes or continues one, `load` turns one into a model that speaks.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mukv
from mukv import config
from mukv.checkpoint import Checkpoints
from mukv.config import Run
from mukv.core import schema
from mukv.core.errors import BadInput, nearest_name
from mukv.core.files import write_atomic
from mukv.core.params import abstract, named
from mukv.core.presets import apply_overrides
from mukv.core.typing import Array, Float
from mukv.core.weights import load_weights, save_weights
from mukv.core.yaml_text import read_yaml
from mukv.data.batches import Batches
from mukv.data.build import default_corpus
from mukv.data.tokenizer import AnyTokenizer, load_tokenizer
from mukv.data.tokens import TokenFile, open_tokens
from mukv.decode import Generation, Sampling, decoding_weights, generate
from mukv.evaluate import Evaluation, evaluate
from mukv.launch import cache_folder
from mukv.loop import Loop, Outcome
from mukv.model.decoder import Decoder
from mukv.train import Trainer


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    def load_config(self) -> Run:
        return schema.build(Run, read_yaml(self.config))


def resolve(source: str, overrides: Sequence[str], out: Path | None) -> tuple[Run, RunDirectory]:
    """The configuration and folder that `train CONFIG` means.

    CONFIG is a preset, a YAML file, or a run directory to continue. Without `out` the folder's
    name follows from the configuration, so that the same command continues its own run.
    """
    given = RunDirectory(Path(source))
    if given.exists:
        mapping = apply_overrides(Run, read_yaml(given.config), overrides)
        return schema.build(Run, mapping), RunDirectory(out) if out else given
    run = config.load(source, overrides)
    if out is None:
        digest = hashlib.sha256(schema.to_yaml(run).encode()).hexdigest()[:8]
        out = Path("runs") / f"{Path(source).stem}-{digest}"
    return run, RunDirectory(out)


def open_corpus(run: Run) -> TokenFile:
    """The token file that a run trains on, checked against its vocabulary."""
    tokens = (
        default_corpus(cache_folder())
        if run.data.path is None
        else open_tokens(Path(run.data.path))
    )
    if tokens.vocab_size > run.model.vocab_size:
        raise BadInput(
            "model.vocab_size",
            run.model.vocab_size,
            f"at least the {tokens.vocab_size} of the tokenizer of {tokens.path}",
        )
    return tokens


def train(run: Run, folder: RunDirectory, title: str = "training") -> Outcome:
    """Train in `folder`, or continue what is there. Raises BadInput before compiling anything.

    A folder may be continued with other steps, evaluation, logging or mesh; with another model,
    data, seed or optimizer it is another run and is refused.
    """
    tokens = open_corpus(run)
    run = replace(run, data=replace(run.data, path=str(tokens.path.resolve())))
    _check_same(run, folder)
    mesh = run.mesh.build()
    trainer = Trainer(run.model, run.train, mesh)
    training = run.train
    common = {"seed": training.seed, "batch": training.batch, "length": training.length}
    packing = run.data.packing
    batches = Batches(tokens, split="train", packing=packing, **common)
    validation = Batches(tokens, split="validation", packing=packing, **common)
    if jax.process_index() == 0:
        write_atomic(folder.config, schema.to_yaml(run))
        tokens.tokenizer.save(folder.tokenizer)
        write_atomic(folder.path / "provenance.json", json.dumps(_provenance(tokens), indent=2))
    with Checkpoints(folder.checkpoints, training.keep_last, training.keep_best) as checkpoints:
        loop = Loop(
            trainer=trainer,
            batches=batches,
            validation=validation,
            token_bytes=tokens.token_bytes(run.model.vocab_size),
            checkpoints=checkpoints,
            folder=folder.path,
            title=title,
        )
        outcome = loop.run()
    save_weights(folder.weights, outcome.state.weights, {"step": str(outcome.step)})
    return outcome


def _check_same(run: Run, folder: RunDirectory) -> None:
    """Raise BadInput where a folder holds another run."""
    if not folder.exists:
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise BadInput(str(folder.path), "a path in use", "a run directory or a new path")
        return
    before, now = folder.load_config(), run
    free = ("steps", "evaluate_every", "log_every", "checkpoint_every", "validation_batches")
    free += ("keep_last", "keep_best", "profile", "trackers", "compute", "schedule")
    pairs = {
        "model": (before.model, now.model),
        "data": (before.data, now.data),
        **{
            f"train.{name}": (getattr(before.train, name), value)
            for name, value in vars(now.train).items()
            if name not in free
        },
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise BadInput(
                name, new, f"the run in {folder.path} has {old!r}; give another folder with --out"
            )


def _provenance(tokens: TokenFile) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "mukv": mukv.__version__,
        "commit": _commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "data_fingerprint": tokens.fingerprint,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The commit of the source, where it is a checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


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
    def decoder(self) -> Decoder:
        return self.run.model

    @cached_property
    def scaled(self) -> Any:
        """Weights as the forward pass sees them."""
        return self.decoder.scaling.scale(self.decoder.params(), self.weights)

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
        siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
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


def summary(outcome: Outcome, folder: RunDirectory) -> dict[str, Any]:
    """What `train --json` prints; the field names are public."""
    shown = ("step", "loss", "validation_loss", "validation_bits_per_byte", "tokens_per_second")
    facts = {name: getattr(outcome, name) for name in shown}
    return {"run": str(folder.path), **facts, "finished": outcome.finished}


__all__ = ["Model", "RunDirectory", "load", "resolve", "summary", "train"]
