"""The teacher that a run learns from: found and checked before anything is compiled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.core.typing import Array
from mukv.data.tokenizer import AnyTokenizer, find_tokenizer
from mukv.model import LanguageModel
from mukv.runs import loaded, provenance
from mukv.runs.config import Run
from mukv.runs.located import Located, locate
from mukv.train.step import Trainer

KEY = "teacher_checksum"
"""Of the provenance."""


@dataclass(frozen=True)
class RunTeacher:
    """A teacher whose weights are not read yet."""

    found: Located

    @property
    def network(self) -> LanguageModel:
        return self.found.run.model

    def teach(self, trainer: Trainer, run: Run, folder: Path) -> str:
        """Give a trainer the weights; return their checksum. Raises BadInput where a run began with
        other ones.
        """
        weights = loaded.load(self.found, run.mesh).weights
        checksum = checksum_of(weights)
        before = provenance.noted(folder, KEY)
        if before not in (None, checksum):
            raise BadInput(
                "train.teacher",
                str(run.train.teacher),
                f"the run in {folder} began with a teacher of checksum {before[:12]}, this has "
                f"{checksum[:12]}; give another folder with --out",
            )
        trainer.teach(weights)
        return checksum


def find_teacher(run: Run, tokenizer: AnyTokenizer) -> RunTeacher | None:
    """Find the model that `train.teacher` names; None for none.

    tokenizer: of the data. Raises BadInput for a path without a model, and for a model that gives
    other meanings to ids or has no room for the rows.
    """
    source = run.train.teacher
    if source is None:
        return None
    try:
        found = locate(source)
    except BadInput as error:
        where = "train.teacher" if error.where == "MODEL" else f"train.teacher: {error.where}"
        raise BadInput(where, error.given, error.allowed, error.nearest) from None
    mine, network = run.model, found.run.model
    if network.vocab_size != mine.vocab_size:
        allowed = f"a model with the {mine.vocab_size:,} ids of model.vocab_size"
        raise BadInput("train.teacher", f"{source}, with {network.vocab_size:,} ids", allowed)
    if network.context is not None and run.train.length > network.context:
        allowed = f"at most the {network.context:,} tokens of the teacher's context"
        raise BadInput("train.length", run.train.length, allowed)
    theirs = tokenizer_of(found)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise BadInput(
            "train.teacher",
            source,
            f"a model with the tokenizer of the data (fingerprint {tokenizer.fingerprint[:12]}): "
            f"this has {theirs.fingerprint[:12]}",
        )
    return RunTeacher(found)


def tokenizer_of(found: Located) -> AnyTokenizer:
    """The tokenizer of a model before its weights are read."""
    if found.checkpoint is not None:
        return found.checkpoint.tokenizer
    return find_tokenizer(found.folder / "tokenizer.json")


def checksum_of(weights: Any) -> str:
    """A checksum of weights that are split over any mesh: the sums of their bits, modulo 2^32."""

    @jax.jit
    def sums(weights: Any) -> dict[str, Array]:
        def total(leaf: Array) -> Array:
            bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
            return jnp.sum(bits.astype(jnp.uint32))

        return {name: total(leaf) for name, leaf in named(weights).items()}

    found = {name: int(value) for name, value in sums(weights).items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
