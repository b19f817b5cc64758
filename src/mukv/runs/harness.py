"""Adapt a model to EleutherAI's lm-evaluation-harness, to evaluate it on the harness's tasks:

    lm_eval.simple_evaluate(model=harness_model("runs/NAME"), tasks=["lambada_openai"])

Implements the three request types of the harness: `loglikelihood` of a continuation,
`loglikelihood_rolling` of a whole text, and `generate_until`. Needs `pip install 'mukv[eval]'`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput
from mukv.core.typing import Array
from mukv.infer.sampling import Sampling
from mukv.runs.loaded import Model, load

MULTIPLE = 64
"""Texts are padded to a multiple of this, so that few lengths are compiled."""
LOGITS = 1 << 26
"""Most logits (row, token, vocabulary) of a batch of more than one row."""


def harness_model(source: str | Path | Model) -> Any:
    """Return an `lm_eval.api.model.LM` of a loaded model, a run directory, a Hugging Face folder, a
    GGUF file or a hub id. Raises BadInput if lm-eval is not installed, or as `mukv.load` does."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput("harness_model", str(source), "needs `pip install 'mukv[eval]'`") from None

    class MukvLM(Answers, LM):
        def __init__(self, model: Model):
            LM.__init__(self)
            Answers.__init__(self, model)

    return MukvLM(source if isinstance(source, Model) else load(source))


class Answers:
    """The methods that the harness calls. Each takes a list of requests, whose `args` the harness
    documents, and returns one result per request."""

    def __init__(self, model: Model):
        self.model = model

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.folder)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation), return log p(continuation | context) in nats, and
        whether greedy decoding would give the continuation."""
        rows = [self._pair(*request.args) for request in requests]
        # Rows are sorted by length, longest first: this saves padding, and if the device has too
        # little memory, the first batch fails.
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
        found: dict[int, tuple[float, bool]] = {}
        while order:
            width = -(-len(rows[order[0]][0]) // MULTIPLE) * MULTIPLE
            size = max(1, LOGITS // (width * self.model.network.vocab_size))
            batch, order = order[:size], order[size:]
            padded = np.zeros((size, width + 1), np.int32)
            for row, place in zip(padded, batch, strict=False):
                row[: len(rows[place][0])] = rows[place][0]
            likely, greedy = map(np.asarray, self._scores(self.model.scaled, padded))
            for row, place in enumerate(batch):
                ids, known = rows[place]
                scored = slice(known - 1, len(ids) - 1)
                total = likely[row, scored].sum(dtype=np.float64)
                found[place] = float(total), bool(greedy[row, scored].all())
        return [found[place] for place in range(len(rows))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """For each (text,), return log p of the whole text in nats, computed in windows like the
        loss of `mukv eval`."""

        def score(text: str) -> float:
            row = np.asarray([*self._prefix, *self.model.tokenizer.encode(text)])
            found = self.model.evaluate([row])
            return -found.loss * found.tokens

        return [score(request.args[0]) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings), return the generated continuation, up to the first of the
        texts in the setting `until`."""
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        most = int(settings.get("max_gen_toks", 256))
        warm = settings.get("do_sample", False) or None
        sampling = Sampling(float((warm and settings.get("temperature", 1.0)) or 0.0))
        ids = self._fitting(self.model.encode(context) or [*self._prefix], most)
        made = self.model.generate_ids([ids], most, sampling).tokens[0]
        kept = [token for token in made if token not in self.model.ends]
        text = self.model.tokenizer.decode_further(kept)
        return _before([until] if isinstance(until, str) else until, text)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the last ids of context and continuation that fit into the model's context length,
        and how many of these ids belong to the context (at least one)."""
        # Tokenizers join a space to the word after it, so trailing spaces of the context are
        # counted as continuation.
        kept, tokenizer = context.rstrip(), self.model.tokenizer
        # As in the harness's own classes, an end token is put only before what has no context.
        prefix = tokenizer.start if kept else self._prefix
        whole = [*prefix, *tokenizer.encode(context + continuation)]
        known = max(1, len(prefix) + len(tokenizer.encode(kept)))
        fitting = self._fitting(whole, 0)
        return fitting, max(1, known - (len(whole) - len(fitting)))

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """Return the last ids that fit into the model's context length together with `room` more
        tokens."""
        context = self.model.network.context
        return ids if context is None else ids[-max(1, context - room) :]

    @property
    def _prefix(self) -> tuple[int, ...]:
        """Ids put before a text without a context, so that its first token has one: the start
        tokens of the tokenizer, or else the first end token."""
        return self.model.tokenizer.start or self.model.ends[:1]

    @cached_property
    def _scores(self) -> Any:
        decoder, compute = self.model.network, self.model.run.train.compute

        def scores(weights: Any, ids: Array) -> tuple[Array, Array]:
            tokens, targets = ids[:, :-1], ids[:, 1:]
            logits = decoder.logits(weights, decoder.hidden(weights, tokens, compute=compute))
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1) == targets

        return jax.jit(scores)


def _before(ends: Iterable[str], text: str) -> str:
    """Return the text up to the first occurrence of any of `ends`."""
    for end in ends:
        text = text.split(end, 1)[0] if end else text
    return text
