"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, and biases in every product.

Its linear layers are stored transposed, and queries, keys and values in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mukv.attention import Grouped
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.base import Rule
from mukv.hub.family import MOST_HEADS, MOST_LAYERS, QKV, Family, differences
from mukv.hub.settings import ACTIVATIONS, Given
from mukv.model import Decoder, Stage
from mukv.model.block import PreNorm, Ungated
from mukv.position import NoPE

PREFIX = "transformer."
LAYER = f"{PREFIX}h.{{layer}}"
FUSED = f"{LAYER}.attn.c_attn"
RULES = (
    Rule(f"{PREFIX}wte.weight", "embedding", "vocab embed"),
    Rule(f"{PREFIX}wpe.weight", "positions", "position embed"),
    Rule("lm_head.weight", "readout", "vocab embed"),
    Rule(f"{LAYER}.ln_1.weight", "attention_norm.gain", "embed"),
    Rule(f"{LAYER}.ln_1.bias", "attention_norm.bias", "embed"),
    Rule(f"{FUSED}.weight", "read.query", "embed (part heads head_dim)", (0, 3)),
    Rule(f"{FUSED}.weight", "write.key", "embed (part kv_heads head_dim)", (1, 3)),
    Rule(f"{FUSED}.weight", "write.value", "embed (part kv_heads head_dim)", (2, 3)),
    Rule(f"{FUSED}.bias", "read.query_bias", "(part heads head_dim)", (0, 3)),
    Rule(f"{FUSED}.bias", "write.key_bias", "(part kv_heads head_dim)", (1, 3)),
    Rule(f"{FUSED}.bias", "write.value_bias", "(part kv_heads head_dim)", (2, 3)),
    Rule(f"{LAYER}.attn.c_proj.weight", "read.output", "(heads value_dim) embed"),
    Rule(f"{LAYER}.attn.c_proj.bias", "read.output_bias", "embed"),
    Rule(f"{LAYER}.ln_2.weight", "mlp_norm.gain", "embed"),
    Rule(f"{LAYER}.ln_2.bias", "mlp_norm.bias", "embed"),
    Rule(f"{LAYER}.mlp.c_fc.weight", "mlp.up", "embed hidden"),
    Rule(f"{LAYER}.mlp.c_fc.bias", "mlp.up_bias", "hidden"),
    Rule(f"{LAYER}.mlp.c_proj.weight", "mlp.down", "hidden embed"),
    Rule(f"{LAYER}.mlp.c_proj.bias", "mlp.down_bias", "embed"),
    Rule(f"{PREFIX}ln_f.weight", "final_norm.gain", "embed"),
    Rule(f"{PREFIX}ln_f.bias", "final_norm.bias", "embed"),
)
DEFAULTS = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50_256,
    "eos_token_id": 50_256,
    "pad_token_id": None,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
"""Names that count before their own, as in transformers."""
ALL = (*QKV, "output")


@dataclass(frozen=True)
class LearnedPositions(Family):
    """The family of GPT-2, with a configuration of its own."""

    def read(self, given: Given) -> Decoder:
        given = replace(given, defaults=self.defaults)
        given.require("model_type", self.model_type)
        given.require("quantization_config")
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            given.require(key, False)
        names = {
            own: other if other in given.mapping else own for own, other in OTHER_NAMES.items()
        }
        width = given.whole(names["n_embd"])
        heads = given.whole(names["n_head"], high=MOST_HEADS)
        if width % heads:
            raise BadInput(f"{given.where}: {names['n_head']}", heads, f"must divide {width}")
        scaled = given.flag("scale_attn_weights")
        return Decoder(
            vocab_size=given.whole("vocab_size"),
            d_model=width,
            attention=Grouped(
                position=NoPE(),
                heads=heads,
                kv_heads=heads,
                head_dim=width // heads,
                scale=None if scaled or width == heads else 1.0,
                biases=ALL,
            ),
            mlp=Ungated(
                hidden=given.whole("n_inner", null=True) or 4 * width,
                activation=given.one_of("activation_function", ACTIVATIONS),
                biases=True,
            ),
            plan=(Stage(repeats=given.whole(names["n_layer"], high=MOST_LAYERS)),),
            norm=RMSNorm(given.number("layer_norm_epsilon"), centred=True),
            readout="tied" if given.flag("tie_word_embeddings") else "linear",
            context=given.whole(names["n_positions"]),
            positions="learned",
        )

    def misfits(self, model: Decoder) -> Iterator[BadInput]:
        first, mlp = model.layers[0].attention, model.layers[0].mlp
        if not isinstance(first, Grouped):
            yield BadInput("attention.kind", getattr(first, "kind", "?"), "grouped")
            return
        if not isinstance(mlp, Ungated):
            yield BadInput("mlp.kind", getattr(mlp, "kind", "?"), "ungated")
            return
        plain = Grouped(
            heads=first.heads,
            kv_heads=first.heads,
            head_dim=model.d_model // first.heads,
            scale=first.scale,
            biases=first.biases,
        )
        wanted: dict[str, tuple[Any, ...]] = {
            "positions": (model.positions, "learned"),
            "norm.centred": (model.norm.centred, True),
            "norm.stored": (model.norm.stored, "gain"),
            "residual.kind": (model.residual.kind, PreNorm().kind),
            "embedding_scale": (model.embedding_scale, None),
            "logit_softcap": (model.logit_softcap, None),
            "mlp.biases": (mlp.biases, True),
            "attention.biases": (set(first.biases), set(ALL)),
            "attention.position.kind": (first.position.kind, "nope"),
            "attention": (first, plain),
            "d_model": (model.d_model, first.heads * first.head_dim),
            "plan: attention": ({layer.attention for layer in model.layers}, {first}),
            "plan: mlp": ({layer.mlp for layer in model.layers}, {mlp}),
            "plan: window": ({layer.window for layer in model.layers}, {None}),
            "plan: reads": ({layer.reads for layer in model.layers}, {None}),
        }
        yield from differences(wanted)

    def write(self, model: Decoder, context: int) -> dict[str, Any]:
        attention, mlp = model.layers[0].attention, model.layers[0].mlp
        assert isinstance(attention, Grouped)
        assert isinstance(mlp, Ungated)
        words = {"silu": "silu", "gelu": "gelu_new", "quick_gelu": "quick_gelu"}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": model.vocab_size,
            "n_positions": model.context or context,
            "n_embd": model.d_model,
            "n_layer": len(model.layers),
            "n_head": attention.heads,
            "n_inner": mlp.hidden,
            "activation_function": words[mlp.activation],
            "layer_norm_epsilon": model.norm.epsilon,
            "tie_word_embeddings": model.readout == "tied",
        }


GPT2 = LearnedPositions("GPT2LMHeadModel", "gpt2", RULES, DEFAULTS, prefix=PREFIX)
