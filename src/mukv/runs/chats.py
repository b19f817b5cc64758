"""Conversations as documents of a token file, of which only the assistant's answers are learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mukv.core.errors import BadInput
from mukv.data.build import Ids
from mukv.data.text import WHOLE_BYTES, TextPiece
from mukv.data.tokenizer import AnyTokenizer, load_tokenizer
from mukv.hub.turns import turns
from mukv.runs.located import Located

RENDERED_AT_ONCE = 64
"""Conversations that one process formats; its time is limited."""


@dataclass(frozen=True)
class Conversations:
    """Encode conversations with a model's chat template.

    found: the model
    tokenizer: that of the model

    The turns are encoded one by one, as in `mukv chat`, where the model gets a prompt and adds its
    answer.
    """

    found: Located
    tokenizer: AnyTokenizer

    def __call__(self, task: Sequence[TextPiece]) -> list[Ids]:
        """Return the ids of each conversation. Raises BadInput for one that the template refuses,
        that has no answer, or that is longer than 1 MiB."""
        messages = []
        for piece in task:
            if piece.long:
                most = f"a conversation of at most {WHOLE_BYTES >> 20} MiB"
                raise BadInput(piece.name, "a longer one", most)
            messages.append(json.loads(piece.data))
        return [
            ids
            for first in range(0, len(task), RENDERED_AT_ONCE)
            for ids in self._encoded(messages[first : first + RENDERED_AT_ONCE])
        ]

    def _encoded(self, conversations: Sequence[list[dict[str, object]]]) -> list[Ids]:
        found = []
        for split in turns(self.found.folder, conversations):
            parts = [self.tokenizer.encode_marked(turn.text) for turn in split]
            learned = [
                np.full(len(part), turn.learned) for part, turn in zip(parts, split, strict=True)
            ]
            size = sum(len(turn.text.encode()) for turn in split)
            ids = np.concatenate(list(map(np.array, parts))).astype(np.int32)
            found.append(Ids(ids, size, np.concatenate(learned)))
        return found


def conversations(found: Located) -> Conversations:
    """Return the encoder of conversations with a model."""
    if found.checkpoint is not None:
        return Conversations(found, found.checkpoint.tokenizer)
    return Conversations(found, load_tokenizer(found.folder / "tokenizer.json"))
