"""Compute loss, perplexity and bits per byte of a model on token ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float
from mukv.model.base import LanguageModel
from mukv.model.loss import chunked_losses

BATCH_TOKENS = 8192
"""Tokens per forward pass."""


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    tokens: number of predicted tokens
    loss: mean loss in nats per token
    bits_per_byte: loss in bits per UTF-8 byte of text; None if the number of bytes is unknown
    """

    tokens: int
    loss: float
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@lru_cache(maxsize=8)
def _losses(model: LanguageModel, compute: Compute) -> Any:
    def losses(weights: Any, tokens: Array, targets: Array) -> Float[Array, "batch token"]:
        hidden = model.hidden(weights, tokens, compute=compute)
        return chunked_losses(model, weights, hidden, targets, compute)

    return jax.jit(losses)


def evaluate(
    model: LanguageModel,
    weights: Any,
    rows: Sequence[np.ndarray],
    length: int,
    token_bytes: np.ndarray | None = None,
    compute: Compute | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Predict every token of each row except its first.

    weights: stacked and scaled
    rows: token ids, int [token] each
    length: tokens per window; longer rows are cut into windows, each with a forward pass of its own
    token_bytes: UTF-8 bytes of each id, int [vocab]; None if unknown
    stride: tokens from the start of a window to the start of the next; a token that two windows
        predict counts once, in the earlier window; None means `length`, with which consecutive
        windows share one token, the input of the later window's first prediction

    Raises BadInput for ids out of range and rows of one token.
    """
    compute = settled(compute)
    if model.context is not None and length > model.context:
        raise BadInput("length", length, f"the model's context is {model.context} tokens")
    if stride is not None and not 1 <= stride <= length:
        raise BadInput("stride", stride, f"1 to the length of a window ({length})")
    for row in rows:
        if len(row) < 2:
            raise BadInput("tokens", len(row), "at least 2 tokens: one to read, one to predict")
        if row.min() < 0 or row.max() >= model.vocab_size:
            worst = int(row.min() if row.min() < 0 else row.max())
            raise BadInput("tokens", worst, f"token ids go from 0 to {model.vocab_size - 1}")
    longest = min(length, max(map(len, rows)) - 1)
    windows = [window for row in rows for window in _windows(row, longest, stride or longest)]
    batch = max(1, BATCH_TOKENS // longest)
    losses = _losses(model, compute)
    nats, tokens, read = 0.0, 0, 0
    for first in range(0, len(windows), batch):
        padded = np.zeros((min(batch, len(windows)), longest + 1), np.int32)
        counted = np.zeros((len(padded), longest), bool)
        for place, (window, known) in enumerate(windows[first : first + batch]):
            padded[place, : len(window)] = window
            counted[place, known : len(window) - 1] = True
        table = losses(weights, jnp.asarray(padded[:, :-1]), jnp.asarray(padded[:, 1:]))
        nats += float(np.asarray(table, np.float64)[counted].sum())
        tokens += int(counted.sum())
        if token_bytes is not None:
            read += int(token_bytes[padded[:, 1:][counted]].sum())
    bits = nats / math.log(2) / read if read else None
    return Evaluation(tokens, nats / tokens, bits)


def _windows(row: np.ndarray, length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the windows of a row, each with the number of its predictions that an earlier window
    has made.
    """
    done = 0
    for start in range(0, len(row) - 1, stride):
        stop = min(start + length, len(row) - 1)
        yield row[start : stop + 1], done - start
        done = stop
        if stop == len(row) - 1:
            return
