"""Load a model with its weights and tokenizer (`mukv.load`), to generate, evaluate and inspect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast, get_args, overload

import jax
import numpy as np

from mukv.attention import Attention
from mukv.cache import FULL, Calibrated, Policy
from mukv.core.arguments import require_types, strings, token_ids, whole_numbers
from mukv.core.compact import any_compact, require_format
from mukv.core.compute import Compute, DType, settled
from mukv.core.errors import BadInput, unknown_name
from mukv.core.mesh import MeshShape, weight_shardings
from mukv.core.typing import Array, Float, Int
from mukv.data.tokenizer import AnyTokenizer, find_tokenizer, load_tokenizer
from mukv.hub import checkpoint
from mukv.hub.chat import chat_text
from mukv.hub.settings import read_json
from mukv.infer.attention import attention_weights
from mukv.infer.decode import Generation, Sizes, decoding_weights, generate
from mukv.infer.evaluate import Evaluation, evaluate
from mukv.infer.prompts import joined
from mukv.infer.replay import asking
from mukv.infer.sampling import Sampling
from mukv.model.base import LanguageModel
from mukv.model.counting import cache_bytes
from mukv.runs.calibrated import with_calibration
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.latest import latest_weights
from mukv.runs.located import Located, locate
from mukv.storage.compact import nbytes
from mukv.storage.weights import require_finite
from mukv.train.footprint import require_bytes

NOT_EMPTY = "a text that is not empty: this model has no token that begins a text"
"""What is allowed as a prompt of a model whose tokenizer has no start tokens."""


@dataclass(frozen=True)
class Text:
    """One generated continuation: its text up to the stop text, and the ids of all new tokens."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Model:
    """A model with its weights and tokenizer, as `mukv.load` returns it.

    run, tokenizer: configuration and tokenizer of the model
    weights: weights as they are saved, without the multipliers of the parameterisation
    """

    run: Run
    weights: Any
    tokenizer: AnyTokenizer
    ends: tuple[int, ...] = ()
    """Ids that end a generated text; empty if the model's files name none."""
    folder: Path | None = None
    """The folder that the model was loaded from; None if it was made otherwise."""

    @property
    def network(self) -> LanguageModel:
        return self.run.model

    @property
    def decoder(self) -> LanguageModel:
        """The former name of `network`."""
        return self.network

    @property
    def converted(self) -> bool:
        """Whether the weights were converted to few bits when they were loaded."""
        return any_compact(self.weights)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights' arrays as they are loaded."""
        return nbytes(self.weights)

    def computing(self, dtype: str | None, where: str = "dtype") -> Model:
        """Return this model with another type of activations, cache entries and operands.

        dtype: "float32" or "bfloat16"; None for the model's own settings
        where: name of the argument, for messages. Raises BadInput for any other type.
        """
        if dtype is None:
            return self
        known = get_args(DType)
        if dtype not in known:
            raise unknown_name(where, dtype, known)
        own = replace(self.run.train.compute, dtype=cast(DType, dtype), operands=None)
        return replace(self, run=replace(self.run, train=replace(self.run.train, compute=own)))

    @cached_property
    def scaled(self) -> Any:
        """Weights as the forward pass takes them: stacked by layer and multiplied by the
        multipliers of the parameterisation."""
        return self.network.scaled(self.weights)

    @cached_property
    def decoding(self) -> Any:
        """Weights as decoding takes them (see `decoding_weights`)."""
        return decoding_weights(self.network, self.weights, self.run.train.compute)

    def logits(
        self, tokens: Any, position: Any = None, segment: Any = None
    ) -> Float[Array, "batch token vocab"]:
        """Compute the float32 logits [batch token vocab] of the token after each of `tokens`.

        tokens: ids [batch token] or [token], as lists or arrays of whole numbers
        position: index of each token in its document, in the shape of `tokens`; None for its index
            in the row
        segment: number of each token's document, in the shape of `tokens`. A token attends only to
            its own document; give padding a number that no document has

        Raises BadInput for other types and shapes, unknown ids, and rows longer than the context.
        """
        ids = self._token_ids("tokens", tokens)
        places = []
        for name, given in (("position", position), ("segment", segment)):
            found = None if given is None else whole_numbers(name, given)
            if found is not None and found.shape != ids.shape:
                raise BadInput(name, found.shape, f"the shape of tokens, {ids.shape}")
            places.append(found)
        return _forward(self.network, self.run.train.compute)(self.scaled, ids, *places)

    def _token_ids(self, where: str, given: Any) -> Int[np.ndarray, "batch token"]:
        """Return ids as an array. Raises BadInput for ids that the model does not have and for rows
        longer than its context."""
        ids = token_ids(where, given, self.network.vocab_size)
        context = self.network.context
        if context is not None and ids.shape[1] > context:
            raise BadInput(where, f"{ids.shape[1]} tokens", f"the model's context is {context}")
        return ids

    def attention(self, text: str | Sequence[int] | Any) -> dict[int, np.ndarray]:
        """Compute the attention weights of a text: float32 [head query key], by layer index, for
        each layer with softmax attention.

        text: a text, or its token ids [token]. The weights of a query sum to 1, or to less if the
        head has a sink logit. Raises BadInput for ids that the model does not have, for a model
        without softmax attention, and for weights that need more device memory than is free.
        """
        given = self.encode(text) if isinstance(text, str) else text
        ids = self._token_ids("text", given)
        attentions = (layer.attention for layer in self.network.layers)
        heads = sum(each.heads for each in attentions if isinstance(each, Attention))
        require_bytes("attention weights", 4 * heads * ids.size**2, "text", ids.size)
        return attention_weights(self.network, self.scaled, ids, self.run.train.compute)

    def encode(self, text: str) -> list[int]:
        """Encode a text as token ids, after the start tokens of a document if the model has any."""
        return [*self.tokenizer.start, *self.tokenizer.encode(text).tolist()]

    def encode_marked(self, text: str) -> list[int]:
        """Encode like `encode`, but encode the names of special tokens in the text (such as
        `<|endoftext|>`) as their ids. No start tokens are added if the text begins with them."""
        ids, start = self.tokenizer.encode_marked(text), self.tokenizer.start
        return ids if tuple(ids[: len(start)]) == start else [*start, *ids]

    def encode_chat(self, message: str) -> list[int]:
        """Encode one user message with the model's chat template. Raises BadInput for a model
        without a folder or chat template, and for a message that the template refuses."""
        if self.folder is None:
            raise BadInput("--chat", message[:40], "a model that was loaded from a folder")
        text = chat_text(self.folder, [{"role": "user", "content": message}])
        return self.tokenizer.encode_marked(text)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
        show: Any = None,
        policy: Policy = FULL,
        ended: Callable[[list[int]], bool] | None = None,
        then: Sequence[Sequence[int]] | None = None,
        prefill_chunk: int | None = None,
    ) -> Generation:
        """Continue token ids: `mukv.infer.decode.generate` with this model's weights.

        stop: ids that end a text; None for `ends`. Raises BadInput for ids that the model does not
        have, and for a KV cache that needs more device memory than is free.
        """
        compute = self.run.train.compute
        stop = self.ends if stop is None else stop
        cache = self.calibrated(policy)
        behind = max(map(len, then), default=0) if then else 0
        self._require_room(joined(prompts, then), max_tokens, policy, behind)
        asked = prompts, max_tokens, sampling, stop, compute, show, *cache, ended, then
        return generate(self.network, self.decoding, *asked, prefill_chunk)

    def _require_room(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, policy: Policy, behind: int
    ) -> None:
        """Raise BadInput for a KV cache that needs more device memory than is free."""
        if max_tokens < 1:
            return  # `generate` raises BadInput for it
        compute = settled(self.run.train.compute)
        policy = FULL if policy.keep.replays else policy
        longest = max(map(len, prompts), default=1)
        sizes = Sizes.plan(len(prompts), longest, max_tokens, behind)
        room = sizes.batch, sizes.body, sizes.tail
        taken = cache_bytes(self.network, *room, compute.type, policy, sizes.after)
        require_bytes("the cache", taken, "max_tokens", max_tokens)

    @property
    def by_head(self) -> bool:
        """Whether every layer without a window stores keys for each key head, which calibrated
        cluster centres need."""
        layers = [layer for stack in self.network.stacks for layer in stack.layers]
        kept = [layer.softmax for layer in layers if layer.whole]
        return all(attention.entry_sets == attention.key_heads for attention in kept)

    def calibrated(self, policy: Policy) -> tuple[Policy, Calibrated]:
        """Return a policy that is completed with data of this model, and its calibrated arrays.

        The policy `kvzip` gets the token ids of its instructions, `kvzap` the predictors that `mukv
        analyze --calibrate scores` saved. The policy `clusters` gets the centres that `mukv analyze
        --calibrate keys` (or another kind) saved, if there are any, layers store keys for each key
        head, and the weights were not converted when they were loaded. Raises BadInput as
        `with_calibration` does.
        """
        policy, own = asking(policy, self.tokenizer.encode), (self.converted, self.by_head)
        return with_calibration(policy, self.folder, self.weights, *own)

    @overload
    def generate(self, prompts: str, *args: Any, **kwargs: Any) -> Text: ...

    @overload
    def generate(
        self, prompts: list[str] | tuple[str, ...], *args: Any, **kwargs: Any
    ) -> list[Text]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        policy: str | Policy = FULL,
        prefill_chunk: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Text | list[Text]:
        """Continue a text, or several texts that are decoded as one batch.

        max_tokens: most new tokens of a continuation
        sampling: how tokens are drawn (greedily if None), or its fields one by one
        policy: the cache policy, or its text such as "snapkv:0.25+int8"
        prefill_chunk: number of prompt tokens that are prefilled at once, after which the policy
            chooses entries; None for the whole prompt
        stop: texts; a continuation ends before the first of them, or at the model's end token. Its
            token ids include those of the stop text

        Returns a Text, or a list for a list. Raises BadInput for values of another type or range,
        and for an empty text if the model has no token that begins a text.
        """
        texts = strings("prompts", prompts)
        if not texts:
            raise BadInput("prompts", "[]", "a text, or a list of at least one")
        fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        given = {name: value for name, value in fields.items() if value is not None}
        if sampling is not None and given:
            raise BadInput("sampling", sampling, f"either sampling or {', '.join(given)}")
        require_types(max_tokens=(max_tokens, int), sampling=(sampling, Sampling | None))
        if isinstance(policy, str):
            policy = Policy.parse(policy, where="policy")
        require_types(policy=(policy, Policy), prefill_chunk=(prefill_chunk, int | None))
        ends = [text for text in strings("stop", stop) if text]

        def over(ids: list[int]) -> bool:
            text = self.tokenizer.decode_further(ids)
            return any(end in text for end in ends)

        ids = [self.encode(text) for text in texts]
        if not all(ids):
            raise BadInput("prompts", "", NOT_EMPTY)
        made = self.generate_ids(
            ids,
            max_tokens,
            sampling or Sampling(**given),
            policy=policy,
            ended=over if ends else None,
            prefill_chunk=prefill_chunk,
        )
        found = [self._until(row, ends) for row in made.tokens]
        return found[0] if isinstance(prompts, str) else found

    def _until(self, ids: list[int], ends: Sequence[str]) -> Text:
        """Decode new tokens. Cut the text before the first of `ends`, and the ids after it."""
        text = self.tokenizer.decode_further(ids)
        places = [text.index(end) for end in ends if end in text]
        if not places:
            return Text(text, ids)
        count = next(
            count
            for count in range(1, len(ids) + 1)
            if any(end in self.tokenizer.decode_further(ids[:count]) for end in ends)
        )
        return Text(text[: min(places)], ids[:count])

    def evaluate(
        self, rows: Sequence[np.ndarray], length: int | None = None, stride: int | None = None
    ) -> Evaluation:
        """Compute the mean loss on rows of token ids [token], in nats per token.

        length: tokens per window; None for the length of training rows
        stride: tokens between the starts of windows; None for `length`

        Raises BadInput for the values that `mukv.infer.evaluate.evaluate` refuses.
        """
        return evaluate(
            self.network,
            self.scaled,
            rows,
            length or self.run.train.length,
            self.tokenizer.token_bytes(self.network.vocab_size),
            self.run.train.compute,
            stride,
        )


@lru_cache(maxsize=32)
def _forward(model: LanguageModel, compute: Compute) -> Any:
    """Return the jitted function of `Model.logits`, cached so that each shape is compiled once."""

    def forward(weights: Any, ids: Array, *places: Array | None) -> Array:
        hidden = model.hidden(weights, ids, *places, compute=compute)
        return model.logits(weights, hidden, compute)

    return jax.jit(forward)


def load(
    source: str | Path | Located,
    mesh: MeshShape | None = None,
    allow_nonfinite: bool = False,
    weights: str | None = None,
) -> Model:
    """Load a model with its weights and tokenizer.

    source: a run directory (its exported weights, or its latest checkpoint if that is newer), a
        Hugging Face folder, a GGUF file or a hub id
    mesh: mesh of devices that the weights are sharded over; None for one device
    allow_nonfinite: accept weights that are infinite or not a number
    weights: format that the weights are converted to while they are read, for inference on one
        device: "int8", "int4" or "bfloat16"; None to keep their dtype

    Raises BadInput for a source that is not a model, for damaged files, for weights that are not
    finite, and for a format that is unknown or given together with a mesh or `allow_nonfinite`.
    """
    mesh = mesh or MeshShape()
    if weights is not None:
        require_format(weights)
        if mesh.size > 1:
            raise BadInput("weights", weights, "a mesh of one device: these are not split")
        if allow_nonfinite:
            raise BadInput("weights", weights, "finite weights, not `allow_nonfinite`")
    found = source if isinstance(source, Located) else locate(source)
    model = _load(found, mesh, weights)
    if weights is None and not allow_nonfinite:
        require_finite(model.weights, found.source)
    return model


def _load(found: Located, mesh: MeshShape, kind: str | None) -> Model:
    if found.checkpoint is not None:
        run = replace(found.run, mesh=mesh)
        ends = checkpoint.end_ids(found.checkpoint.special)
        given = found.checkpoint
        weights = given.place(mesh.build()) if kind is None else given.compact(kind)
        return Model(run, weights, given.tokenizer, ends, found.folder)
    folder, run = RunDirectory(found.folder), found.run
    built = mesh.build()
    weights = latest_weights(run, folder, built, kind)
    if mesh.size > 1:
        weights = jax.device_put(weights, weight_shardings(run.model.params(), built))
    if not folder.generation.exists():
        return Model(run, weights, load_tokenizer(folder.tokenizer), folder=folder.path)
    ends = checkpoint.end_ids(read_json(folder.generation))
    return Model(run, weights, find_tokenizer(folder.tokenizer), ends, folder.path)
