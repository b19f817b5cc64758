"""Gemma 2 and the text model of Gemma 3 (Gemma Team 2024, 2025).

They have norms before and after each branch, gains stored as offsets from one, scaled embeddings,
and local and global layers. Gemma 3 normalises queries and keys instead of capping logits, and
rotates local layers with higher frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.base import Rule
from mukv.hub.family import Family
from mukv.hub.feedforward import FeedforwardKeys
from mukv.hub.layer_keys import LayerWindows, WindowKeys
from mukv.hub.llama import BRANCHES, ENDS, LAYER
from mukv.hub.rotation import GLOBAL, LOCAL, read_global_rope, read_local_rope, write_ropes
from mukv.hub.settings import Given
from mukv.model.block import SandwichNorm

UNUSED = 4096
"""Size of the window that is written if no layer has a window."""
RULES = (
    *ENDS,
    *BRANCHES,
    Rule(f"{LAYER}.input_layernorm.weight", "attention_norm.offset", "embed"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "attention_post_norm.offset", "embed"),
    Rule(f"{LAYER}.pre_feedforward_layernorm.weight", "mlp_norm.offset", "embed"),
    Rule(f"{LAYER}.post_feedforward_layernorm.weight", "mlp_post_norm.offset", "embed"),
    Rule(f"{LAYER}.self_attn.q_norm.weight", "read.query_norm.offset", "head_dim"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", "write.key_norm.offset", "head_dim"),
    Rule("model.norm.weight", "final_norm.offset", "embed"),
)


@dataclass(frozen=True)
class ByType(WindowKeys):
    """`layer_types` names the layers that have a window; all windows have the same size."""

    def default(self, given: Given, layers: int) -> list[bool]:
        """Return which layers have a window where `layer_types` is left out."""
        raise NotImplementedError

    def read(self, given: Given, layers: int) -> LayerWindows:
        types = given.items("layer_types")
        if types is None:
            local = self.default(given, layers)
        elif len(types) != layers or any(word not in (LOCAL, GLOBAL) for word in types):
            allowed = f"{layers} words, each {LOCAL} or {GLOBAL}"
            raise BadInput(f"{given.where}: layer_types", types, allowed)
        else:
            local = [word == LOCAL for word in types]
        window = self.window(given) if any(local) else None
        return [window if here else None for here in local]

    def window(self, given: Given) -> int:
        """Return the size of the windows in tokens."""
        return given.whole("sliding_window")

    def write(self, windows: LayerWindows) -> dict[str, Any]:
        sizes = {window for window in windows if window}
        if len(sizes) > 1:
            raise BadInput("plan: window", sorted(sizes), "one size")
        return {
            "sliding_window": min(sizes, default=None),
            "layer_types": [LOCAL if window else GLOBAL for window in windows],
        }


@dataclass(frozen=True)
class EveryNthGlobal(ByType):
    """If `layer_types` is left out, the last of every `period` layers has no window.

    period: number of layers per global layer
    key: key of a config.json that replaces `period`; None if there is no such key
    """

    period: int
    key: str | None = None

    def default(self, given: Given, layers: int) -> list[bool]:
        period = given.whole(self.key, self.period) if self.key else self.period
        return [(layer + 1) % period != 0 for layer in range(layers)]

    def write(self, windows: LayerWindows) -> dict[str, Any]:
        keys = super().write(windows)
        # transformers requires a size even where no layer has a window.
        return keys if any(windows) else keys | {"sliding_window": UNUSED}


DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "rope_theta": 10_000.0,
}
DEFAULTS3 = {
    **DEFAULTS,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    RULES,
    DEFAULTS,
    norm="offset",
    residual=SandwichNorm(),
    embedding_scale="root_width",
    feedforward=FeedforwardKeys("hidden_activation"),
    query_scale="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping",
    logit_softcap="final_logit_softcapping",
    width_of_heads=True,
    windows=EveryNthGlobal(2),
)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    RULES,
    DEFAULTS3,
    norm="offset",
    residual=SandwichNorm(),
    embedding_scale="root_width",
    feedforward=FeedforwardKeys("hidden_activation"),
    query_norm="head",
    query_scale="query_pre_attn_scalar",
    logit_softcap="final_logit_softcapping",
    width_of_heads=True,
    windows=EveryNthGlobal(6, "sliding_window_pattern"),
    position=read_global_rope,
    local=read_local_rope,
    write_ropes=write_ropes,
)
