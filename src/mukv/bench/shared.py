"""Ask prompts under several cache policies, each prompt read once for all of them.

What comes before the question is read with a cache that records it (`mukv.cache.RECORD`), from
which each policy makes its own. The question and the right answer are then read in one pass behind
it: an answer is right if each of its tokens is the likeliest after those before it, which is what
greedy decoding would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mukv.bench.asking import Asker
from mukv.compress.candidates import Candidate
from mukv.compress.reader import PolicyReader
from mukv.core.compute import settled
from mukv.tasks.prompts import Prompt

TOKENS = 4096
"""Largest number of tokens that are read at once."""


def right_under(
    asker: Asker,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    tick: Callable[[float], None] = lambda share: None,
) -> list[np.ndarray]:
    """Return which prompts are answered rightly, bool [prompt], for each policy.

    prompts: with one answer each. The policy chooses before the question is read.
    tick: called with the share of the work that is done, after each policy of each batch
    """
    model = asker.model
    parts = [asker.parts(prompt) for prompt in prompts]
    answers = [model.tokenizer.encode(f": {prompt.answers[0]}").tolist() for prompt in prompts]
    width = max(len(context) for context, _ in parts)
    behind = max(
        len(question) + len(answer) for (_, question), answer in zip(parts, answers, strict=True)
    )
    compute = settled(model.run.train.compute)
    reader = PolicyReader(model.network, model.decoding, compute, width, width + behind)
    found = [np.zeros(len(prompts), bool) for _ in candidates]
    batch = max(1, TOKENS // width)
    steps, done = len(candidates) * -(-len(prompts) // batch), 0
    for first in range(0, len(prompts), batch):
        # The last batch is padded with its last row, so that one shape is compiled.
        rows = [min(row, len(prompts) - 1) for row in range(first, first + batch)]
        contexts = padded([parts[row][0] for row in rows], width)
        count = np.array([len(parts[row][0]) for row in rows])
        follow = padded([[*parts[row][1], *answers[row]] for row in rows], behind)
        _, record, _ = reader.record(contexts, count)
        for each, right in zip(candidates, found, strict=True):
            cache, _ = reader.compressed(record, each.policy, each.centres)
            likeliest = reader.likeliest(cache, follow)
            for place, row in enumerate(rows):
                start = len(parts[row][1])
                stop = start + len(answers[row])
                guessed = likeliest[place, start - 1 : stop - 1]
                right[row] = np.array_equal(guessed, follow[place, start:stop])
            done += 1
            tick(done / steps)
    return found


def padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return rows of ids as one array, int32 [row token], with zeros at their ends."""
    made = np.zeros((len(rows), width), np.int32)
    for place, row in zip(made, rows, strict=True):
        place[: len(row)] = row
    return made
