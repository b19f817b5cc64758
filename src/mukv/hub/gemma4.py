"""The text model of Gemma 4 (Gemma Team 2026; the source is transformers' code).

Global layers have heads of their own width and number, of which they rotate the fastest pairs, and
may take values from the projection of the keys. The last layers may read the entries of the last
layer of their own type that writes, and then may have an MLP of twice the width. Values are
normalised without a gain, and logits have the scale 1. Each layer may have an input of its own, and
multiplies the residual stream by a number. Each MLP may have experts beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mukv.attention import AnyAttention, Attention, Grouped, SharedKV
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.base import Rule
from mukv.hub.family import MOST_HEADS, MOST_LAYERS, QKV, Family, differences
from mukv.hub.gemma import DEFAULTS
from mukv.hub.gemma4_keys import (
    EQUAL,
    PER_LAYER,
    ROPES,
    SIZES,
    LastGlobal,
    WiderReaders,
    read_sizes,
    read_sources,
    sources,
)
from mukv.hub.llama import BRANCHES, ENDS, LAYER
from mukv.hub.rotation import GLOBAL, LOCAL, read_proportional_rope, write_proportional_rope
from mukv.hub.settings import ACTIVATIONS, Given
from mukv.model import Decoder, Layer
from mukv.model.block import SandwichNorm
from mukv.model.layer_inputs import LayerInputs
from mukv.position import RoPE

ATTENTION, EXPERTS = f"{LAYER}.self_attn", f"{LAYER}.experts"
GATE_UP = "experts (part expert_hidden) embed"
RULES = (
    *ENDS,
    *BRANCHES,
    Rule(f"{ATTENTION}.q_norm.weight", "read.query_norm.gain", "head_dim"),
    Rule(f"{ATTENTION}.k_norm.weight", "write.key_norm.gain", "head_dim"),
    Rule(f"{ATTENTION}.k_proj.weight", "write.value", "(kv_heads head_dim) embed", kind=SharedKV),
    Rule(f"{ATTENTION}.k_norm.weight", "read.key_norm.gain", "head_dim", kind=SharedKV),
    Rule(f"{LAYER}.input_layernorm.weight", "attention_norm.gain", "embed"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "attention_post_norm.gain", "embed"),
    Rule(f"{LAYER}.pre_feedforward_layernorm.weight", "mlp_norm.gain", "embed"),
    Rule(f"{LAYER}.post_feedforward_layernorm.weight", "mlp_post_norm.gain", "embed"),
    Rule(f"{LAYER}.per_layer_input_gate.weight", "inputs.gate", "input_width embed"),
    Rule(f"{LAYER}.per_layer_projection.weight", "inputs.up", "embed input_width"),
    Rule(f"{LAYER}.post_per_layer_input_norm.weight", "inputs.post_norm.gain", "embed"),
    Rule(f"{LAYER}.layer_scalar", "layer_scale", "layer_scale"),
    Rule("model.embed_tokens_per_layer.weight", "layer_inputs.table", "vocab inputs"),
    Rule("model.per_layer_model_projection.weight", "layer_inputs.projection", "inputs embed"),
    Rule("model.per_layer_projection_norm.weight", "layer_inputs.norm.gain", "input_width"),
    Rule(f"{LAYER}.mlp.gate_proj.weight", "mlp.mlp.gate", "hidden embed"),
    Rule(f"{LAYER}.mlp.up_proj.weight", "mlp.mlp.up", "hidden embed"),
    Rule(f"{LAYER}.mlp.down_proj.weight", "mlp.mlp.down", "embed hidden"),
    Rule(f"{LAYER}.post_feedforward_layernorm_1.weight", "mlp.mlp_post_norm.gain", "embed"),
    Rule(f"{LAYER}.pre_feedforward_layernorm_2.weight", "mlp.experts_norm.gain", "embed"),
    Rule(f"{LAYER}.post_feedforward_layernorm_2.weight", "mlp.experts_post_norm.gain", "embed"),
    Rule(f"{LAYER}.router.scale", "mlp.router_norm.gain", "embed"),
    Rule(f"{LAYER}.router.proj.weight", "mlp.experts.router", "experts embed"),
    Rule(f"{LAYER}.router.per_expert_scale", "mlp.experts.expert_scale", "experts"),
    Rule(f"{EXPERTS}.gate_up_proj", "mlp.experts.gate", GATE_UP, (0, 2)),
    Rule(f"{EXPERTS}.gate_up_proj", "mlp.experts.up", GATE_UP, (1, 2)),
    Rule(f"{EXPERTS}.down_proj", "mlp.experts.down", "experts embed expert_hidden"),
    Rule("model.norm.weight", "final_norm.gain", "embed"),
)


@dataclass(frozen=True)
class Gemma4(Family):
    """A family whose local and global layers have attention of different sizes."""

    feedforward: WiderReaders = field(default_factory=WiderReaders)

    def ignored(self, model: Decoder) -> str:
        reading = "|".join(str(layer.index) for layer in model.layers if not layer.writes)
        names = "(k_proj|v_proj|k_norm|v_norm)"
        return rf"^model\.layers\.({reading})\.self_attn\.{names}\." if reading else "$^"

    # Reading their configuration

    def read(self, given: Given) -> Decoder:
        given = replace(given, defaults=self.defaults)
        given.require("model_type", self.model_type, *self.other_types)
        # "vision" concerns images alone.
        given.require("use_bidirectional_attention", False, "vision")
        for key in ("quantization_config", "rope_scaling"):
            given.require(key)
        count = given.whole("num_hidden_layers", high=MOST_LAYERS)
        windows = self.windows.read(given, count)
        sources = read_sources(given, windows)
        if given.flag(EQUAL) and any(source is not None for source in sources):
            allowed = "false where num_kv_shared_layers is not 0"
            raise BadInput(f"{given.where}: {EQUAL}", True, allowed)
        sizes = read_sizes(given, windows)
        attention = {local: self._attention(given, local, *own) for local, own in sizes.items()}
        parts = self.feedforward.read_layers(given, sources)
        usual = attention.get(True, attention[False])
        layers = [
            Layer(
                attention=None if attention[bool(window)] == usual else attention[bool(window)],
                window=window,
                reads=source,
                mlp=None if part == parts[0] else part,
            )
            for window, source, part in zip(windows, sources, parts, strict=True)
        ]
        return self.decoder(given, usual, parts[0], layers, self._inputs(given))

    def _attention(
        self, given: Given, local: bool, kv_heads: int, head_dim: int
    ) -> Grouped | SharedKV:
        """Return the attention of the layers with or without a window."""
        heads = given.whole("num_attention_heads", high=MOST_HEADS)
        if heads % kv_heads:
            key = "num_key_value_heads" if local else "num_global_key_value_heads"
            allowed = f"a number that divides num_attention_heads ({heads})"
            raise BadInput(f"{given.where}: {key}", kv_heads, allowed)
        if head_dim % 2:
            key = "head_dim" if local else "global_head_dim"
            raise BadInput(f"{given.where}: {key}", head_dim, "an even number")
        common: dict[str, Any] = {
            "position": self._rope(given, LOCAL if local else GLOBAL),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "norm": RMSNorm(given.number("rms_norm_eps")),
            "scale": 1.0,
        }
        if local or not given.flag(EQUAL):
            return Grouped(**common, norm_values=True, biases=self._read_biases(given))
        given.require("attention_bias", False)
        return SharedKV(**common)

    def _rope(self, given: Given, kind: str) -> RoPE:
        if given.mapping.get("rope_parameters") is None:
            settings = Given(ROPES[kind], given.where)
        else:
            both = given.inside("rope_parameters")
            if both.mapping.get(kind) is None:
                raise BadInput(f"{both.where}: {kind}", None, "required: a mapping")
            settings = both.inside(kind)
        return read_proportional_rope(settings, given)

    def _inputs(self, given: Given) -> LayerInputs | None:
        width = given.whole("hidden_size_per_layer_input", low=0)
        if not width:
            return None
        rows, vocab = (given.whole(k) for k in ("vocab_size_per_layer_input", "vocab_size"))
        if rows != vocab:
            allowed = f"vocab_size ({vocab})"
            raise BadInput(f"{given.where}: vocab_size_per_layer_input", rows, allowed)
        activation = given.one_of(self.feedforward.activation, ACTIVATIONS)
        return LayerInputs(width, activation, "root_width")

    # Writing their configuration

    def written_scale(self, attention: Attention) -> float | None:
        return 1.0

    def misfits(self, model: Decoder) -> Iterator[BadInput]:
        for layer in model.layers:
            mixer = layer.attention
            if not isinstance(mixer, Grouped) and not (isinstance(mixer, SharedKV) and mixer.norm):
                allowed = "grouped, or shared_kv with a norm"
                yield BadInput("attention.kind", getattr(mixer, "kind", "?"), allowed)
                return
        norm = RMSNorm(model.norm.epsilon)
        wanted: dict[str, tuple[Any, ...]] = {
            "norm": (model.norm, norm),
            "residual": (model.residual, self.residual),
            "positions": (model.positions, None),
            "embedding_scale": (model.embedding_scale, self.embedding_scale),
        }
        if model.layer_inputs is not None:
            scale = model.layer_inputs.embedding_scale
            wanted["layer_inputs.embedding_scale"] = (scale, "root_width")
        yield from differences(wanted)
        for attention in dict.fromkeys(layer.softmax for layer in model.layers):
            yield from self._misfits_of(attention, norm)
        try:
            self._keys_of_layers(model)
        except BadInput as error:
            yield error

    def _misfits_of(self, attention: AnyAttention, norm: RMSNorm) -> Iterator[BadInput]:
        """Yield an error for each property of an attention that this family can't express."""
        assert isinstance(attention, Grouped | SharedKV)
        place = attention.position
        wanted: dict[str, tuple[Any, ...]] = {
            "attention.norm": (attention.norm, norm),
            "attention.softcap": (attention.softcap, None),
            "attention.sinks": (attention.sinks, None),
            "attention.gate": (attention.gate, None),
        }
        if isinstance(attention, Grouped):
            biases = tuple(sorted(attention.biases))
            wanted["attention.norm_over"] = (attention.norm_over, "head")
            wanted["attention.norm_values"] = (attention.norm_values, True)
            wanted["attention.eviction"] = (attention.eviction, None)
            wanted["attention.biases"] = (biases, (), tuple(sorted((*QKV, "output"))))
        yield from differences(wanted)
        if not isinstance(place, RoPE):
            yield BadInput("attention.position.kind", place.kind, "rope")
            return
        if isinstance(attention, SharedKV) and place.pairing != "half":
            # The order of a head's dimensions is that of the values too.
            yield BadInput("attention.position.pairing", place.pairing, "half")
        try:
            write_proportional_rope(place)
        except BadInput as error:
            yield error

    def _keys_of_layers(self, model: Decoder) -> dict[str, Any]:
        """Return the keys of windows, sizes of heads, shared entries and MLPs. Raises BadInput for
        those that the family can't express."""
        layers = model.layers
        keys = {
            **self.windows.write([layer.window for layer in layers]),
            "num_kv_shared_layers": sources(layers),
            **self.feedforward.write_layers(model),
        }
        kinds: dict[bool, set[Any]] = {}
        for layer in layers:
            kinds.setdefault(bool(layer.window), set()).add(layer.attention)
        for found in kinds.values():
            if len(found) > 1:
                raise BadInput("plan: attention", found, "the same in all layers of a type")
        whole = kinds[False].pop()
        local = kinds.get(True, {whole}).pop()
        equal = isinstance(whole, SharedKV)
        if True in kinds and not isinstance(local, Grouped):
            raise BadInput("plan: attention", local.kind, "grouped in layers with a window")
        if equal and keys["num_kv_shared_layers"]:
            allowed = "grouped where a layer reads the entries of another"
            raise BadInput("plan: attention", whole.kind, allowed)
        biases = {bool(getattr(each, "biases", ())) for each in (local, whole)}
        if whole.heads != local.heads or len(biases) > 1:
            name = "heads" if whole.heads != local.heads else "biases"
            raise BadInput(f"plan: attention.{name}", getattr(local, name), "one in all layers")
        keys |= {
            "num_attention_heads": whole.heads,
            "num_key_value_heads": local.kv_heads,
            "head_dim": local.head_dim,
            "global_head_dim": whole.head_dim,
            "num_global_key_value_heads": whole.kv_heads if equal else None,
            EQUAL: equal,
            "attention_bias": biases.pop(),
        }
        if whole.kv_heads != local.kv_heads and not equal:
            own = dict(zip(SIZES, (whole.kv_heads, whole.head_dim), strict=True))
            keys[PER_LAYER] = {str(layer.index): own for layer in layers if not layer.window}
        ropes = {LOCAL: local.position, GLOBAL: whole.position}
        keys["rope_parameters"] = {
            kind: write_proportional_rope(place)
            for kind, place in ropes.items()
            if isinstance(place, RoPE)
        }
        return keys

    def write(self, model: Decoder, context: int) -> dict[str, Any]:
        return {
            **self.common_keys(model, context),
            "vocab_size_per_layer_input": model.vocab_size,
            "hidden_size_per_layer_input": model.layer_inputs.width if model.layer_inputs else 0,
            "final_logit_softcapping": model.logit_softcap,
            **self._keys_of_layers(model),
        }


GEMMA4 = Gemma4(
    "Gemma4ForCausalLM",
    "gemma4_text",
    RULES,
    {
        **{key: value for key, value in DEFAULTS.items() if key != "rope_theta"},
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "num_hidden_layers": 30,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "final_logit_softcapping": None,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        EQUAL: False,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
    residual=SandwichNorm(layer_scale=True),
    embedding_scale="root_width",
    feedforward=WiderReaders("hidden_activation"),
    logit_softcap="final_logit_softcapping",
    windows=LastGlobal(6),
)
