"""Encode tasks as text with any tokenizer, to a given length in its tokens.

The puzzles are the same as in the task's own tokens. Questions and answers are encoded separately,
so that the tokens of an answer do not depend on the text before it. Shots are solved samples of the
training split that precede each text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.data.tokenizer import AnyTokenizer
from mukv.tasks import AnyTask, Samples

PILOTS = 8
"""Number of samples from which the number of tokens of a text is estimated."""


@dataclass(frozen=True)
class TextForm:
    """A task in the tokens of a tokenizer. Raises BadInput if the tokenizer can't encode it.

    shots: solved samples before each text
    """

    task: AnyTask
    tokenizer: AnyTokenizer
    shots: int = 0

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise BadInput("--shots", self.shots, "at least 0")
        for word in self.task.vocabulary.spelling:
            # Some tokenizers add or drop a leading space, which does not matter.
            if self.tokenizer.decode(self.tokenizer.encode(word)).strip() != word.strip():
                raise BadInput(
                    "tokenizer", word, f"one that can write the words of {self.task.kind}"
                )

    def batch(self, length: int, seed: int, indices: Int[np.ndarray, " row"]) -> Samples:
        """Make test samples of at most `length` tokens, padded at the end. The fields of the
        samples count tokens of the tokenizer.

        Raises BadInput for a length that is too short.
        """
        task, before = self.task, self._shots(seed)
        room, needed = length - len(before), self._needed(task.smallest, seed, indices)
        if room < needed:
            allowed = f"at least {needed + len(before)} tokens of this tokenizer for {task.kind}"
            raise BadInput("length", length, allowed)
        size = task.smallest
        # As much filler as fits, by bisection, because the number of tokens grows with the filler.
        step = 1 << max(length.bit_length() - 1, 0)
        while step:
            pilots = indices[:PILOTS]
            if size + step <= length and self._needed(size + step, seed, pilots) <= room:
                size += step
            step //= 2
        while size > task.smallest and self._needed(size, seed, indices) > room:
            size = max(task.smallest, size - max(1, size // 64))
        samples = task.batch(size, seed, "test", indices)
        return _joined([self._row(samples, row, before) for row in range(len(indices))], length)

    def _needed(self, size: int, seed: int, indices: Int[np.ndarray, " row"]) -> int:
        """Return the number of tokens of the longest text of these samples.

        size: length of the samples in the task's own tokens
        """
        samples = self.task.batch(size, seed, "test", indices)
        return max(len(self._row(samples, row, [])[0]) for row in range(len(indices)))

    def _shots(self, seed: int) -> list[int]:
        """Return the ids before every sample."""
        ids = list(self.tokenizer.start)
        if self.shots:
            size = self.task.smallest
            samples = self.task.batch(size, seed, "train", np.arange(self.shots))
            for row in samples.tokens:
                ids += self.tokenizer.encode(self.task.render(row) + "\n\n").tolist()
        return ids

    def _row(self, samples: Samples, row: int, before: list[int]) -> tuple[list[int], np.ndarray]:
        """Return the ids of one sample, and (start, stop, fact) of each answer in them."""
        task, encode = self.task, self.tokenizer.encode
        ids, done, spans = list(before), 0, []
        tokens = samples.tokens[row]
        for start, stop in zip(samples.start[row], samples.stop[row], strict=True):
            if stop == start:
                spans.append((len(ids), len(ids)))
                continue
            ids += encode(task.render(tokens[done:start])).tolist()
            begin = len(ids)
            ids += encode(task.render(tokens[start:stop])).tolist()
            spans.append((begin, len(ids)))
            done = stop
        ids += encode(task.render(tokens[done:])).tolist()
        # The index of a fact is estimated from the mean number of ids per token of the task.
        scale = (len(ids) - len(before)) / len(tokens)
        fact = len(before) + np.floor(samples.fact[row] * scale)
        begins = np.array([span[0] for span in spans])
        return ids, np.stack([*np.array(spans).T, np.minimum(fact, begins - 1)]).astype(np.int64)


def _joined(rows: list[tuple[list[int], np.ndarray]], length: int) -> Samples:
    """Pad rows to equal length; earlier tokens never attend to the padding after them."""
    tokens = np.zeros((len(rows), length), np.int32)
    for row, (ids, _) in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    start, stop, fact = (np.stack([spans[part] for _, spans in rows]) for part in range(3))
    return Samples(tokens, start, stop, fact)
