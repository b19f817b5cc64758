"""Ask a model with prompts, through its chat template if it has one, and decode its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mukv.bench.scoring import BATCH_TOKENS
from mukv.cache import Policy
from mukv.core.errors import BadInput
from mukv.hub.chat import chat_text, has_template
from mukv.runs.loaded import Model
from mukv.tasks.prompts import Prompt, PromptForm

Form = Literal["chat", "plain", "text"]
"""Form in which a model is asked that was not trained on a task: a prompt in its chat template, a
prompt without template, or the task's own text, which the model continues."""
PLACE = "MUKV-MESSAGE"
"""Placeholder of the message when a template is rendered once for all prompts."""
ROOM = 16
"""Number of tokens that an answer may have beyond twice those of the right answer."""


class DecodedAnswers(NamedTuple):
    """Decoded answers.

    texts: answers without the tokens that end a text
    cache_bytes: bytes of the allocated cache per prompt
    """

    texts: list[str]
    cache_bytes: float


class Asker:
    """Asks a model with prompts.

    chat: whether the model's chat template is used; None to use it if there is one
    shots: solved prompts before each prompt; with a template they are earlier turns of the chat
    """

    def __init__(self, model: Model, chat: bool | None = None, shots: Sequence[Prompt] = ()):
        self.model, self.shots = model, shots
        self.chat = has_chat(model) if chat is None else chat
        self.around = self._template() if self.chat else None

    @property
    def form(self) -> Form:
        return "chat" if self.chat else "plain"

    def whole(self, prompt: Prompt) -> str:
        """Return the text that the model continues, with special tokens written out."""
        if not self.chat:
            solved = [f"{shot.message}{shot.opening} {named(shot)}\n\n" for shot in self.shots]
            return f"{''.join(solved)}{prompt.message}{prompt.opening}"
        if self.around is None:
            return self._rendered(prompt.message) + prompt.opening
        before, after = self.around
        return f"{before}{prompt.message}{after}{prompt.opening}"

    def ids(self, prompt: Prompt) -> list[int]:
        return self.encoded(self.whole(prompt))

    def parts(self, prompt: Prompt, after: bool = False) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt before its question, and the tokens from the question on;
        or, with `after`, those up to the end of its question, and the others. Raises BadInput for a
        chat template that changes the question."""
        whole = self.whole(prompt)
        place = whole.rfind(prompt.question)
        if place < 1:
            allowed = "a template that leaves the question as it is, or --aware"
            raise BadInput("chat_template", "another question", allowed)
        place += len(prompt.question) if after else 0
        ids, before = self.encoded(whole), self.encoded(whole[:place])
        # The last token of the context may have merged with the first letters of the question.
        pairs = enumerate(zip(ids, before, strict=False))
        cut = next((at for at, (one, two) in pairs if one != two), min(len(ids), len(before)))
        return ids[:cut], ids[cut:]

    def encoded(self, text: str) -> list[int]:
        """Encode a text in which special tokens are written out."""
        return self.model.tokenizer.encode_marked(text) if self.chat else self.model.encode(text)

    def room(self, prompt: Prompt) -> int:
        """Return the number of new tokens that an answer may have."""
        return 2 * len(self.model.tokenizer.encode(f" {named(prompt)}")) + ROOM

    def needed(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt and its answer."""
        return len(self.ids(prompt)) + self.room(prompt)

    def fitting(
        self, form: PromptForm, length: int, seed: int, indices: np.ndarray
    ) -> list[Prompt]:
        """Make test samples with as much filler as fits into `length` tokens, answers included.

        Raises BadInput for a length that is too short.
        """
        least, found = form.task.smallest, []
        size = least

        def made(index: int, size: int) -> Prompt:
            return form.batch(size, seed, "test", np.array([index]))[0]

        for index in indices.tolist():
            needed = self.needed(made(index, least))
            if needed > length:
                allowed = f"at least {needed} tokens of this model for {form.task.kind}"
                raise BadInput("length", length, allowed)

            def fits(size: int, index: int = index) -> bool:
                return self.needed(made(index, size)) <= length

            size = largest(fits, least, size)
            found.append(made(index, size))
        return found

    def answers(
        self,
        prompts: Sequence[Prompt],
        policy: Policy,
        aware: bool = True,
        tick: Callable[[int], None] = lambda done: None,
    ) -> DecodedAnswers:
        """Decode answers greedily.

        aware: whether the policy first chooses after the question was read, not before
        tick: called with the number of prompts that are answered
        """
        rows = [(self.ids(prompt), []) if aware else self.parts(prompt) for prompt in prompts]
        most = max(map(self.room, prompts))
        batch = min(len(rows), max(1, BATCH_TOKENS // max(len(row) for row, _ in rows)))
        texts: list[str] = []
        taken = 0.0
        for first in range(0, len(rows), batch):
            # The last batch is padded with the last row, so that one shape is compiled.
            chosen = [rows[min(at, len(rows) - 1)] for at in range(first, first + batch)]
            contexts, questions = map(list, zip(*chosen, strict=True))
            then = None if aware else questions
            made = self.model.generate_ids(contexts, most, policy=policy, then=then)
            taken = made.cache_bytes / batch
            for ids in made.tokens[: len(rows) - first]:
                kept = [token for token in ids if token not in self.model.ends]
                texts.append(self.model.tokenizer.decode_further(kept))
            tick(len(texts))
        return DecodedAnswers(texts, taken)

    def _template(self) -> tuple[str, str] | None:
        """Return the texts that a template puts before and after a message; None if they depend on
        the message."""
        before, found, after = self._rendered(PLACE).partition(PLACE)
        example = "\n".join(["A text of", *["several lines."] * 50, "And a question?"])
        known = found and PLACE not in after and self._rendered(example) == before + example + after
        return (before, after) if known else None

    def _rendered(self, message: str) -> str:
        turns: list[dict[str, str]] = []
        for shot in self.shots:
            answer = f"{shot.opening} {named(shot)}".strip()
            turns += [
                {"role": "user", "content": shot.message},
                {"role": "assistant", "content": answer},
            ]
        if self.model.folder is None:
            raise BadInput("--form", "chat", "a model that was loaded from a folder")
        return chat_text(self.model.folder, [*turns, {"role": "user", "content": message}])


def has_chat(model: Model) -> bool:
    """Whether a model has a chat template."""
    return model.folder is not None and has_template(model.folder)


def named(prompt: Prompt) -> str:
    """Return the right answer as a text."""
    return f"{', '.join(prompt.answers)}."


def largest(fits: Callable[[int], bool], least: int, guess: int) -> int:
    """Return the largest number that fits, by bisection around a guess; `least` must fit."""
    low, high, step = least, guess, 1
    if guess > least and fits(guess):
        low = guess
    if low == guess:
        high = guess + 1
        while fits(high):
            low, step = high, 2 * step
            high += step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
