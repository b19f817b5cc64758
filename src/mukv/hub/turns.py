"""Split conversations into turns: what a model reads, and what it learns to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mukv.core.errors import BadInput
from mukv.hub.chat import chat_texts

ASSISTANT = "assistant"


class Turn(NamedTuple):
    """A part of a conversation's text. learned: whether the model is to predict it."""

    text: str
    learned: bool


def turns(folder: Path, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Turn]]:
    """Split each conversation at the answers of the assistant.

    folder: folder with the chat template

    An answer begins where the template lets a model answer, and includes what ends the turn; what
    follows the last answer is left out. The texts of the turns together are the conversation as the
    template formats it, and each answer follows what a model would be given in `mukv chat`.

    Raises BadInput as `chat_text` does, for a conversation without an answer or that begins with
    one, and for a template that changes earlier turns when one is added.
    """
    places = [[*_answers(messages)] for messages in conversations]
    asked = [
        request
        for messages, answers in zip(conversations, places, strict=True)
        for place in answers
        for request in ((messages[:place], True), (messages[: place + 1], False))
    ]
    texts = iter(chat_texts(folder, asked) if asked else [])
    found = []
    for answers in places:
        done, split = "", list[Turn]()
        for _ in answers:
            before, after = next(texts), next(texts)
            if not (before.startswith(done) and after.startswith(before)):
                given = "a template that changes earlier turns"
                raise BadInput("--chat", given, "one whose text grows by each turn")
            split += [Turn(before[len(done) :], False), Turn(after[len(before) :], True)]
            done = after
        found.append(split)
    return found


def _answers(messages: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the places of the answers."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if ASSISTANT not in roles or roles[0] == ASSISTANT:
        raise BadInput("messages", roles, f"a role {ASSISTANT} that answers another message")
    yield from (place for place, role in enumerate(roles) if role == ASSISTANT)
