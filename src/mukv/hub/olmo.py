"""OLMo 2 and OLMo 3 (OLMo Team 2024, 2025).

They have norms after each branch only, and one norm over all heads of the queries or keys of a
token. OLMo 3 has windows in three of four layers; a scaled rotation applies to the others alone.
"""

from __future__ import annotations

from mukv.hub.base import Rule
from mukv.hub.family import Family
from mukv.hub.gemma import EveryNthGlobal
from mukv.hub.llama import BRANCHES, DEFAULTS, ENDS, LAYER
from mukv.hub.rotation import (
    LOCAL,
    THETA,
    read_global_rope,
    read_rotation,
    write_ropes_by_type,
)
from mukv.hub.settings import Given
from mukv.model.block import PostNorm
from mukv.position import RoPE

RULES = (
    *ENDS,
    *BRANCHES,
    Rule(f"{LAYER}.post_attention_layernorm.weight", "attention_post_norm.gain", "embed"),
    Rule(f"{LAYER}.post_feedforward_layernorm.weight", "mlp_post_norm.gain", "embed"),
    Rule(f"{LAYER}.self_attn.q_norm.weight", "read.query_norm.gain", "(heads head_dim)"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", "write.key_norm.gain", "(kv_heads head_dim)"),
    Rule("model.norm.weight", "final_norm.gain", "embed"),
)
DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 50_304,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50_279,
}
DEFAULTS3 = {**DEFAULTS, "sliding_window": 4096, "rope_theta": 500_000.0}


def read_local(given: Given) -> RoPE:
    """Read the rotation of layers with a window: `rope_theta` outside of `rope_parameters` and
    `rope_scaling` do not apply to them, as in transformers.
    """
    settings = given.inside("rope_parameters").inside(LOCAL)
    base = settings.mapping.get(THETA, DEFAULTS3[THETA])
    return read_rotation(Given({**settings.mapping, THETA: base}, settings.where), given, THETA)


OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    RULES,
    DEFAULTS,
    residual=PostNorm(),
    query_norm="projection",
)
OLMO3 = Family(
    "Olmo3ForCausalLM",
    "olmo3",
    RULES,
    DEFAULTS3,
    residual=PostNorm(),
    query_norm="projection",
    windows=EveryNthGlobal(4),
    position=read_global_rope,
    local=read_local,
    write_ropes=write_ropes_by_type,
)
