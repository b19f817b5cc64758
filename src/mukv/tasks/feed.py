"""Train on a task: its batches, tokenizer and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from mukv.core.errors import BadInput
from mukv.data.batches import Batch
from mukv.data.feed import Half, Source
from mukv.data.tokenizer import JsonTokenizer
from mukv.schema.schema import to_yaml
from mukv.tasks.base import Samples, Task

VALIDATION_BATCHES = 16
"""Number of batches of an evaluation without a limit, because a task has no last sample."""


def as_batch(samples: Samples) -> Batch:
    """Turn samples into a training batch, in which only tokens of answers have weight."""
    tokens, graded = samples.tokens, samples.graded
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        position=np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)),
        segment=np.ones_like(tokens),
        weight=np.pad(graded[:, 1:], ((0, 0), (0, 1))).astype(np.float32),
    )


@dataclass(frozen=True, eq=False)
class TaskBatches:
    """Batches of one split of a task. Batch `step` has the samples step * batch to
    (step + 1) * batch - 1."""

    task: Task
    seed: int
    batch: int
    length: int
    split: Half

    def at(self, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """Return this host's rows of a batch."""
        if self.batch % hosts:
            raise BadInput("batch", self.batch, f"a multiple of the number of hosts ({hosts})")
        share = self.batch // hosts
        rows = step * self.batch + host * share + np.arange(share)
        return as_batch(self.task.batch(self.length, self.seed, self.split, rows))

    def once(self, limit: int | None = None, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """Yield the first `limit` batches."""
        for step in range(limit or VALIDATION_BATCHES):
            yield self.at(step, host, hosts)


@dataclass(frozen=True)
class TaskFeed:
    """A task as the input of a run."""

    task: Task

    @property
    def tokenizer(self) -> JsonTokenizer:
        return tokenizer(self.task)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(to_yaml(self.task).encode()).hexdigest()

    def source(self, split: Half, seed: int, batch: int, length: int) -> Source:
        return TaskBatches(self.task, seed, batch, length, split)


@lru_cache
def tokenizer(task: Task) -> JsonTokenizer:
    """Make a tokenizer that maps the task's text to its ids and back."""
    inner = Tokenizer(models.BPE(vocab={}, merges=[]))
    inner.decoder = decoders.Fuse()  # without a decoder, a text has spaces between its tokens
    inner.add_tokens([AddedToken(word, normalized=False) for word in task.vocabulary.spelling])
    return JsonTokenizer(inner.to_str())
