"""Load the models of the studies of attention: a trained one, and one in the shape of Llama.

The trained one is that of `retrieval/`: text with facts to be recalled. The other has the heads of
Llama 3.2 1B (32 query heads of 64 on 8 KV heads, its rotation) in four layers and random weights;
it serves as a baseline without training.
"""

from __future__ import annotations

import doctest
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mukv
from mukv.analysis.capture import CapturedRows
from mukv.analysis.samples import windows
from mukv.core.params import initialise
from mukv.data.build import default_corpus
from mukv.data.feed import Half
from mukv.data.tokenizer import AnyTokenizer, ByteTokenizer
from mukv.data.tokens import TokenFile
from mukv.model import Decoder
from mukv.runs import config
from mukv.storage.files import cache_folder

ROOT = Path(__file__).parents[1]
LLAMA = (
    "model.d_model=2048",
    "model.attention={heads: 32, kv_heads: 8, head_dim: 64}",
    "model.attention.position={base: 500000, scaling: {kind: llama3, factor: 32}}",
    "model.mlp.hidden=8192",
    "model.plan=[{repeats: 4}]",
)


@dataclass(frozen=True)
class Subject:
    """A model with its weights, as stored and as scaled for the forward pass."""

    name: str
    model: Decoder
    stored: Any

    @property
    def scaled(self) -> Any:
        return self.model.scaled(self.stored)


def trained(path: Path) -> Subject:
    found = mukv.load(path)
    assert isinstance(found.network, Decoder)
    return Subject("trained, 3 layers", found.network, found.weights)


def llama_shaped(seed: int = 0) -> Subject:
    model = config.load("tiny", LLAMA).model
    assert isinstance(model, Decoder)
    deviations = jax.tree.map(lambda weight: weight.deviation, model.resolved())
    stored = initialise(model.params(), deviations, jax.random.key(seed))
    return Subject("heads of Llama 3.2 1B, random weights", model, stored)


TEXTS = ("code", "prose", "dialogue")


def _text(corpus: TokenFile, split: Half) -> str:
    tokens = corpus.split(split).tokens
    return bytes(tokens[tokens < 256].astype("uint8")).decode("utf-8", "ignore")


def sessions(parts: Iterable[str]) -> str:
    """Return the sessions with the Python interpreter in the docstrings of some code."""
    turns: list[doctest.Example] = []
    for part in parts:
        with suppress(ValueError):  # raised for a session with uneven indentation
            turns += doctest.DocTestParser().get_examples(part)
    return "".join(f">>> {turn.source}{turn.want}" for turn in turns)


def texts(
    length: int, samples: int, tokenizer: AnyTokenizer | None = None
) -> dict[str, CapturedRows]:
    """Return code (held out from training), prose (this project's pages) and dialogue (sessions
    with the Python interpreter from the library's docstrings), in windows of `length` tokens.

    tokenizer: None for bytes
    """
    corpus = default_corpus(cache_folder())
    code = _text(corpus, "validation")
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    prose = "\n".join(page.read_text() for page in pages)
    # The validation half has too few sessions for windows of many tokens of several bytes.
    dialogue = sessions([code] if tokenizer is None else _text(corpus, "train").split("\n\n\n"))
    tokenizer = tokenizer or ByteTokenizer()
    given = dict(zip(TEXTS, (code, prose, dialogue), strict=True))
    return {
        name: windows(
            name, [np.array([*tokenizer.start, *tokenizer.encode(text)])], length, samples
        )
        for name, text in given.items()
    }
