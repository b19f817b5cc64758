"""Llama 2, 3, 3.1, 3.2, 3.3 and models with the same layout (Touvron et al. 2023)."""

from __future__ import annotations

from mukv.hub.base import Rule
from mukv.hub.family import Family

ENDS = (
    Rule("model.embed_tokens.weight", "embedding", "vocab embed"),
    Rule("lm_head.weight", "readout", "vocab embed"),
)
LAYER = "model.layers.{layer}"
PROJECTIONS = (
    Rule(f"{LAYER}.self_attn.q_proj.weight", "read.query", "(heads head_dim) embed"),
    Rule(f"{LAYER}.self_attn.k_proj.weight", "write.key", "(kv_heads head_dim) embed"),
    Rule(f"{LAYER}.self_attn.v_proj.weight", "write.value", "(kv_heads head_dim) embed"),
    Rule(f"{LAYER}.self_attn.o_proj.weight", "read.output", "embed (heads value_dim)"),
    Rule(f"{LAYER}.self_attn.q_proj.bias", "read.query_bias", "(heads head_dim)"),
    Rule(f"{LAYER}.self_attn.k_proj.bias", "write.key_bias", "(kv_heads head_dim)"),
    Rule(f"{LAYER}.self_attn.v_proj.bias", "write.value_bias", "(kv_heads head_dim)"),
    Rule(f"{LAYER}.self_attn.o_proj.bias", "read.output_bias", "embed"),
)
BRANCHES = (
    *PROJECTIONS,
    Rule(f"{LAYER}.mlp.gate_proj.weight", "mlp.gate", "hidden embed"),
    Rule(f"{LAYER}.mlp.up_proj.weight", "mlp.up", "hidden embed"),
    Rule(f"{LAYER}.mlp.down_proj.weight", "mlp.down", "embed hidden"),
)
NORMS = (
    Rule(f"{LAYER}.input_layernorm.weight", "attention_norm.gain", "embed"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "mlp_norm.gain", "embed"),
    Rule(f"{LAYER}.self_attn.q_norm.weight", "read.query_norm.gain", "head_dim"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", "write.key_norm.gain", "head_dim"),
    Rule("model.norm.weight", "final_norm.gain", "embed"),
)
RULES = (*ENDS, *BRANCHES, *NORMS)

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
}
"""Defaults of transformers 5; those of the other families are too."""

LLAMA = Family("LlamaForCausalLM", "llama", RULES, DEFAULTS, width_of_heads=True)
