"""Chat with a model through its chat template, with one KV cache kept between turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import jax

from mukv.cache import FULL, Policy
from mukv.core.compute import settled
from mukv.core.errors import BadInput
from mukv.hub.chat import chat_text
from mukv.infer.conversation import Conversation, check_policy
from mukv.infer.decode import TAIL
from mukv.infer.sampling import Sampling
from mukv.infer.stream import TokenStream
from mukv.model.counting import cache_bytes
from mukv.runs.loaded import Model
from mukv.runs.located import Located
from mukv.train.footprint import require_bytes

MOST_TOKENS = 4096
"""Default limit of a conversation in tokens: the cache is allocated for all of them at once."""


@dataclass(frozen=True)
class Reply:
    """A model's answer to one message.

    text: the answer, without stop texts and special tokens
    tokens: number of generated tokens
    cache_tokens, cache_bytes: size of the cache after the answer
    read: number of prompt tokens that were prefilled in this turn
    restarted: whether the cache was rebuilt, because the chat template changed earlier tokens
    prefill_seconds, compile_seconds: time of prefill and of compilation in this turn
    first_token_seconds: time from the message to the first token, with rendering and compilation
    tokens_per_second: speed of decoding
    """

    text: str
    tokens: int
    cache_tokens: int
    cache_bytes: int
    read: int
    restarted: bool
    prefill_seconds: float
    compile_seconds: float
    first_token_seconds: float
    tokens_per_second: float


def room(found: Located, length: int | None) -> int:
    """Return the most tokens of a conversation: `length`, or if it is None the model's context but
    at most MOST_TOKENS. Raises BadInput for a length below 2 or above the model's context."""
    context = found.run.model.context
    if length is None:
        return min(context or MOST_TOKENS, MOST_TOKENS)
    if length < 2:
        raise BadInput("length", length, "at least 2 tokens")
    if context is not None and length > context:
        raise BadInput("length", length, f"the model's context is {context} tokens")
    return length


def check(found: Located, system: str | None, policy: Policy, length: int) -> None:
    """Check a conversation before weights are read. Raises BadInput for a model without a chat
    template, a template that refuses the system prompt, a policy that does not fit the model or a
    conversation, and a KV cache that needs more device memory than is free."""
    chat_text(found.folder, _messages(system, [{"role": "user", "content": "Hello"}]))
    check_policy(policy)
    model = found.run.model
    compute = settled(found.run.train.compute)
    sizes = 1, length, min(TAIL, length)
    jax.eval_shape(lambda: model.empty_cache(*sizes, compute.type, policy))
    taken = cache_bytes(model, *sizes, compute.type, policy)
    require_bytes("the cache", taken, "length", length)


class Chat:
    """A conversation between a user and a model, and the cache of its tokens."""

    def __init__(
        self,
        speaker: Model,
        length: int,
        system: str | None = None,
        sampling: Sampling | None = None,
        policy: Policy = FULL,
        max_tokens: int = 512,
        stop: Sequence[str] = (),
    ):
        """Allocate the cache of a conversation of `length` tokens.

        speaker: the model
        length: most tokens of the conversation
        system: the system prompt
        sampling: how tokens are drawn; greedily if None
        policy: the cache policy
        max_tokens: most tokens of an answer
        stop: texts before which an answer ends

        Raises BadInput for a model that was not loaded from a folder.
        """
        if speaker.folder is None:
            raise BadInput("chat", str(speaker.folder), "a model that was loaded from a folder")
        self.speaker, self.folder = speaker, speaker.folder
        self.system, self.max_tokens, self.stop = system, max_tokens, tuple(filter(None, stop))
        self.messages: list[dict[str, str]] = []
        policy, centres = speaker.calibrated(policy)
        compute = speaker.run.train.compute
        self.conversation = Conversation(
            speaker.network, speaker.decoding, length, sampling, compute, policy, centres
        )
        self.written = ""
        """The decoded text of the tokens in the cache."""

    def reset(self) -> None:
        """Delete all messages and empty the cache; the system prompt stays."""
        self.messages = []
        self._forget()

    def set_system(self, system: str | None) -> None:
        """Set another system prompt and delete all messages. Raises BadInput for a prompt that the
        template refuses; then nothing changes."""
        chat_text(self.folder, _messages(system, [{"role": "user", "content": "Hello"}]))
        self.system = system
        self.reset()

    def say(
        self,
        message: str,
        out: TextIO | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer a message.

        out: stream that the answer is printed to, token by token
        interrupted: called after each token; if it returns True, the answer ends

        Raises BadInput for a message that the template refuses or that does not fit into the
        conversation's length; the conversation is then unchanged.
        """
        begun = time.perf_counter()
        first: list[float] = []
        messages = [*self.messages, {"role": "user", "content": message}]
        rendered = chat_text(self.folder, _messages(self.system, messages))
        before = bool(self.conversation.ids)
        ids, text = self._continued(rendered)
        restarted = before and not self.conversation.continues(ids)
        stream = TokenStream(self.speaker.tokenizer, out, stop=self.stop)

        def show(token: int) -> None:
            if not first:
                first.append(time.perf_counter() - begun)
            stream.add([token])

        made = self.conversation.answer(
            ids,
            self.max_tokens,
            self.speaker.ends,
            show,
            lambda tokens: stream.ended or interrupted(),
        )
        stream.end()
        in_cache = self.conversation.ids
        self.written = text + self.speaker.tokenizer.decode_further(in_cache[len(ids) :])
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
        return Reply(
            text=stream.text,
            tokens=len(made.tokens),
            cache_tokens=len(in_cache),
            cache_bytes=made.cache_bytes,
            read=made.read,
            restarted=restarted,
            prefill_seconds=made.prefill_seconds,
            compile_seconds=made.compile_seconds,
            first_token_seconds=first[0],
            tokens_per_second=made.tokens_per_second,
        )

    def _continued(self, rendered: str) -> tuple[list[int], str]:
        """Return the ids of a rendered conversation, and its text.

        If the text begins with the text of the tokens in the cache, these ids are reused and only
        the rest is encoded. A model may generate other tokens for a text than its tokenizer gives;
        with the tokenizer's ids, the cache would have to be rebuilt.
        """
        ids = self.speaker.tokenizer.encode_marked(rendered)
        if not self.conversation.ids or self.conversation.continues(ids):
            return ids, rendered
        if len(rendered) > len(self.written) and rendered.startswith(self.written):
            rest = self.speaker.tokenizer.encode_marked(rendered[len(self.written) :])
            return [*self.conversation.ids, *rest], rendered
        return ids, rendered

    def _forget(self) -> None:
        self.conversation.reset()
        self.written = ""


def _messages(system: str | None, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [*([{"role": "system", "content": system}] if system else []), *messages]
