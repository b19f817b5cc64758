"""Describe a family of models, which share a class name in Hugging Face's format, as data.

Reading and writing of a family's config.json both follow from the data. Its weights are mapped by
rules (base.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mukv.attention import AnyAttention, Attention, Grouped
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.base import Rule
from mukv.hub.feedforward import FeedforwardKeys
from mukv.hub.layer_keys import MixerKeys, WindowKeys, states
from mukv.hub.layout import planned
from mukv.hub.rotation import PARTIAL, read_rope, write_rope, write_scaling
from mukv.hub.settings import Given
from mukv.model import Decoder, Layer
from mukv.model.block import AnyResidual, PreNorm
from mukv.model.feedforward import AnyFeedforward
from mukv.model.layer_inputs import LayerInputs
from mukv.model.plan import ResolvedLayer
from mukv.position import RoPE

QKV = ("query", "key", "value")
MOST_HEADS, MOST_LAYERS = 1 << 16, 1 << 10
"""Upper bounds that no real model reaches. Larger numbers are mistakes, which would take long to be
refused later.
"""


@dataclass(frozen=True)
class Family:
    """Description of a family of models.

    architecture, model_type: names of the family in a config.json
    other_types: other values of `model_type` in files with this architecture
    rules: rules of its tensors
    defaults: values of the keys that a config.json may leave out
    norm: form in which gains of norms are stored
    residual, embedding_scale: as in `Decoder`
    feedforward: keys of the feed-forward parts
    sinks, gate: as in `Attention`
    biases: biases that all models of the family have; None if the key `attention_bias` decides
    query_norm: axis over which queries and keys are normalised; None if they are not
    query_scale, attention_softcap, logit_softcap: keys of these numbers; None if there is no key
    width_of_heads: whether the number of heads must divide the width
    windows: keys of the windows
    mixers: keys of the layers without softmax attention
    position: function that reads the rotation
    local: function that reads the rotation of layers with a window; None if it is the same
    write_ropes: function that writes both rotations; None if there is only one
    prefix: beginning of the names of tensors, which a file may leave out
    pairing: rotated pairs of all models of the family
    pairing_key: key that says whether rotated pairs are interleaved; None if all models have the
        same
    """

    architecture: str
    model_type: str
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    norm: Literal["gain", "offset"] = "gain"
    residual: AnyResidual = field(default_factory=PreNorm)
    embedding_scale: Literal["root_width"] | None = None
    feedforward: FeedforwardKeys = field(default_factory=FeedforwardKeys)
    sinks: Literal["learned"] | None = None
    gate: Literal["head", "channel"] | None = None
    biases: tuple[Literal["query", "key", "value", "output"], ...] | None = None
    query_norm: Literal["head", "projection"] | None = None
    query_scale: str | None = None
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    width_of_heads: bool = False
    windows: WindowKeys = field(default_factory=WindowKeys)
    mixers: MixerKeys = field(default_factory=MixerKeys)
    position: Callable[[Given], RoPE] = read_rope
    local: Callable[[Given], RoPE] | None = None
    write_ropes: Callable[[RoPE, RoPE], dict[str, Any]] | None = None
    prefix: str = ""
    other_types: tuple[str, ...] = ()
    pairing: Literal["half", "interleaved"] = "half"
    pairing_key: str | None = None

    def ignored(self, model: Decoder) -> str:
        """Return a pattern of the names of tensors that a file may have and that are not read."""
        return "$^"

    def rules_for(self, tensors: Iterable[str]) -> tuple[Rule, ...]:
        """Return the rules for a file with tensors of these names."""
        if not self.prefix or any(name.startswith(self.prefix) for name in tensors):
            return self.rules
        return tuple(
            replace(rule, theirs=rule.theirs.removeprefix(self.prefix)) for rule in self.rules
        )

    # Reading their configuration

    def read(self, given: Given) -> Decoder:
        """Return the model that a config.json describes. Raises BadInput, with the key, for a value
        that can't be represented."""
        given = replace(given, defaults=self.defaults)
        given.require("model_type", self.model_type, *self.other_types)
        given.require("use_bidirectional_attention", False)
        for key in ("quantization_config", "per_layer_config"):
            given.require(key)
        attention = self.read_attention(given, given.whole("hidden_size"))
        count = given.whole("num_hidden_layers", high=MOST_LAYERS)
        local = self.local(given) if self.local else None
        parts = self.feedforward.read(given, count)
        windows, mixers = self.windows.read(given, count), self.mixers.read(given, count)
        layers = [
            Layer(
                attention=mixer,
                window=window,
                position=local if window else None,
                mlp=None if part == parts[-1] else part,
            )
            for window, mixer, part in zip(windows, mixers, parts, strict=True)
        ]
        return self.decoder(given, attention, parts[-1], layers)

    def decoder(
        self,
        given: Given,
        attention: AnyAttention,
        mlp: AnyFeedforward,
        layers: Sequence[Layer],
        layer_inputs: LayerInputs | None = None,
    ) -> Decoder:
        """Return the model with these layers, which have `attention` and `mlp` where they name
        none."""
        return Decoder(
            vocab_size=given.whole("vocab_size"),
            d_model=given.whole("hidden_size"),
            attention=attention,
            mlp=mlp,
            plan=planned(layers),
            norm=RMSNorm(given.number("rms_norm_eps"), self.norm),
            residual=self.residual,
            embedding_scale=self.embedding_scale,
            readout="tied" if given.flag("tie_word_embeddings") else "linear",
            logit_softcap=self._cap(given, self.logit_softcap),
            context=given.whole("max_position_embeddings"),
            layer_inputs=layer_inputs,
        )

    def read_attention(self, given: Given, width: int) -> Attention:
        """Return the attention of all layers that have one. width: of the residual stream"""
        heads = given.whole("num_attention_heads", high=MOST_HEADS)
        kv_heads = given.whole("num_key_value_heads", null=True) or heads
        if heads % kv_heads:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            allowed = f"must divide num_attention_heads ({heads}); kv_heads that do: {fitting}"
            raise BadInput(f"{given.where}: num_key_value_heads", kv_heads, allowed)
        head_dim = given.whole("head_dim", null=True) or width // heads
        if head_dim < 2 or head_dim % 2:
            allowed = "an even number, as pairs are rotated; hidden_size / heads if left out"
            raise BadInput(f"{given.where}: head_dim", head_dim, allowed)
        norm = RMSNorm(given.number("rms_norm_eps"), self.norm)
        return Grouped(
            position=self.position(given),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm=norm if self.query_norm else None,
            norm_over=self.query_norm or "head",
            scale=self._read_scale(given, head_dim),
            softcap=self._cap(given, self.attention_softcap),
            sinks=self.sinks,
            gate=self.gate,
            biases=self._read_biases(given),
        )

    def _cap(self, given: Given, key: str | None) -> float | None:
        return given.number(key, null=True) if key else None

    def _read_scale(self, given: Given, head_dim: int) -> float | None:
        scalar = given.number(self.query_scale) if self.query_scale else head_dim
        return None if scalar == head_dim else scalar**-0.5

    def _read_biases(self, given: Given) -> tuple[Any, ...]:
        if self.biases is not None:
            return self.biases
        return (*QKV, "output") if given.flag("attention_bias") else ()

    # Writing their configuration

    def written_scale(self, attention: Attention) -> float | None:
        """Return the scale of the logits that an exported model has in a layer with this attention:
        its own if a config.json can express it, or that of all models of the family, for which
        the queries are multiplied by the ratio; None for 1 / sqrt(query_dim).
        """
        kept = self.query_scale and whole_scalar(attention.scale)
        return attention.scale if kept else None

    def misfits(self, model: Decoder) -> Iterator[BadInput]:
        """Yield an error for each property of a model that this family can't express."""
        layers = [layer for layer in model.layers if isinstance(layer.attention, Attention)]
        first = layers[0].attention if layers else model.layers[0].attention
        if not isinstance(first, Grouped):
            yield BadInput("attention.kind", getattr(first, "kind", "?"), "grouped")
            return
        try:
            self.mixers.write(states(model))
        except BadInput as error:
            yield error
            return
        try:
            self.feedforward.write([layer.mlp for layer in model.layers])
        except BadInput as error:
            yield error
            if error.where == "mlp.kind":
                return
        for place in dict.fromkeys(layer.softmax.position for layer in layers):
            if not isinstance(place, RoPE):
                yield BadInput("attention.position.kind", place.kind, "rope")
                return
            if place.p != 1:
                yield BadInput("attention.position.p", place.p, "1")
            if place.partial != 1 and PARTIAL not in self.defaults:
                yield BadInput("attention.position.partial", place.partial, "1")
            if place.partial != 1 and place.pairing != "half":
                yield BadInput("attention.position.pairing", place.pairing, "half")
            try:
                write_scaling(place.scaling)
            except BadInput as error:
                yield error
        norm = RMSNorm(model.norm.epsilon, self.norm)
        some = ((), (*QKV, "output")) if self.biases is None else (self.biases,)
        pairings = {str(getattr(layer.softmax.position, "pairing", None)) for layer in layers}
        wanted: dict[str, tuple[Any, ...]] = {
            "plan: reads": (any(layer.reads is not None for layer in layers), False),
            "plan: attention": (
                {replace(layer.attention, position=first.position) for layer in layers},
                {first},
            ),
            "plan: position": (self._positions(layers), True),
            "norm.centred": (model.norm.centred, False),
            "positions": (model.positions, None),
            "layer_inputs": (model.layer_inputs, None),
            "residual.layer_scale": (model.residual.layer_scale, False),
            "attention.norm_values": (first.norm_values, False),
            "norm.stored": (model.norm.stored, self.norm),
            "residual.kind": (model.residual.kind, self.residual.kind),
            "embedding_scale": (model.embedding_scale, self.embedding_scale),
            "attention.norm": (first.norm, norm if self.query_norm else None),
            "attention.norm_over": (first.norm_over, self.query_norm or "head"),
            "attention.sinks": (first.sinks, self.sinks),
            "attention.gate": (first.gate, self.gate),
            "attention.eviction": (first.eviction, None),
            "attention.biases": (set(first.biases), *map(set, some)),
        }
        if len(pairings) > 1:
            yield BadInput("plan: position.pairing", sorted(pairings), "one in all layers")
        if self.width_of_heads and model.d_model % first.heads:
            allowed = f"a number that divides d_model ({model.d_model})"
            yield BadInput("attention.heads", first.heads, allowed)
        for key, cap in (
            (self.attention_softcap, ("attention.softcap", first.softcap)),
            (self.logit_softcap, ("logit_softcap", model.logit_softcap)),
        ):
            if key is None:
                wanted[cap[0]] = (cap[1], None)
        yield from differences(wanted)
        try:
            self.windows.write([layer.window for layer in model.layers])
        except BadInput as error:
            yield error

    def _positions(self, layers: Sequence[ResolvedLayer]) -> bool:
        """Whether layers share rotations as the family can express: one rotation for all of them,
        or, if `local` is given, one for those with a window and one for the others."""
        by_window: dict[bool, set[Any]] = {}
        for layer in layers:
            by_window.setdefault(bool(layer.window), set()).add(layer.softmax.position)
        if not self.local:
            return len(set().union(*by_window.values())) == 1
        return all(len(positions) == 1 for positions in by_window.values())

    def write(self, model: Decoder, context: int) -> dict[str, Any]:
        """Return the config.json of a model that this family can express.

        context: longest sequence in tokens, used if the model has no limit
        """
        layers = [layer for layer in model.layers if isinstance(layer.attention, Attention)]
        attention = layers[0].attention
        assert isinstance(attention, Grouped)
        whole = [layer for layer in layers if not layer.window] or layers
        place = whole[0].softmax.position
        assert isinstance(place, RoPE)
        config: dict[str, Any] = {
            **self.common_keys(model, context),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            **self.feedforward.write([layer.mlp for layer in model.layers]),
            **self.windows.write([layer.window for layer in model.layers]),
            **self.mixers.write(states(model)),
        }
        if self.biases is None:
            config["attention_bias"] = bool(attention.biases)
        if self.query_scale:
            config[self.query_scale] = whole_scalar(attention.scale) or attention.head_dim
        if self.attention_softcap:
            config[self.attention_softcap] = attention.softcap
        if self.logit_softcap:
            config[self.logit_softcap] = model.logit_softcap
        if self.write_ropes:
            near = [layer for layer in layers if layer.window] or layers
            local = near[0].softmax.position
            assert isinstance(local, RoPE)
            return config | self.write_ropes(place, local)
        return config | write_rope(place)

    def common_keys(self, model: Decoder, context: int) -> dict[str, Any]:
        """Return the keys that concern no single layer. context: as in `write`"""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "num_hidden_layers": len(model.layers),
            "rms_norm_eps": model.norm.epsilon,
            "max_position_embeddings": model.context or context,
            "tie_word_embeddings": model.readout == "tied",
        }


def whole_scalar(scale: float | None) -> int | None:
    """Return the integer n with scale = 1 / sqrt(n), the only form of a scale in a config.json;
    None if there is none.
    """
    if scale is None:
        return None
    scalar = scale**-2
    return round(scalar) if abs(round(scalar) - scalar) < 1e-9 * scalar else None


def differences(wanted: Mapping[str, tuple[Any, ...]]) -> Iterator[BadInput]:
    """Yield an error for each property whose value is none of those that a family can express.

    wanted: by the property's name, its value, followed by those that are allowed
    """
    for where, (given, *allowed) in wanted.items():
        if given not in allowed:
            yield BadInput(where, given, " or ".join(map(str, allowed)))
