"""Configurations of every family: each key left out, at its default, unusual, null, impossible.

A point is a config.json. It may have keys of other families too, since published files do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

ABSENT = object()
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
"""Keys whose defaults make a model large."""
LOCAL, GLOBAL = "sliding_attention", "full_attention"
BASE = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 24,
    "full_attention_interval": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 40,
    "top_k_experts": 2,
}
"""Keys of every point. Heads have a width that no family has by default."""
OWN = {
    "DeepseekV3ForCausalLM": {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "qk_rope_head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
    },
    "DeepseekV2ForCausalLM": {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
    },
}
"""Keys of every point of one family, which must fit each other. They are changed alone only."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0, "rope_type": "llama3"}
YARN = {"rope_type": "yarn", "factor": 4.0}
BEFORE = {"original_max_position_embeddings": 16}
SCALINGS: list[Any] = [
    None,
    {},
    {"rope_type": "default"},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 8},
    {"rope_type": "linear", "type": "dynamic", "factor": 3.0, "rope_theta": 300.0},
    {**LLAMA3, **BEFORE},
    LLAMA3,
    {**LLAMA3, "low_freq_factor": 4.0},
    {**YARN, **BEFORE},
    {**YARN, **BEFORE, "beta_fast": 4, "beta_slow": 0.5, "truncate": True},
    {**YARN, **BEFORE, "attention_factor": 1.0},
    {**YARN, **BEFORE, "attention_factor": 1.7},
    {**YARN, **BEFORE, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": None},
    {**YARN, **BEFORE, "mscale": 0.7},
    {**YARN, **BEFORE, "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 1.0, "beta_slow": 1.0},
    {**YARN, **BEFORE, "mscale_all_dim": 1.0},
    {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.5},
    {**YARN, **BEFORE, "factor": None},
    {**YARN, **BEFORE, "truncate": False},
    {**YARN, "original_max_position_embeddings": 4},
    {**YARN, "original_max_position_embeddings": 9_000_000},
    YARN,
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "linear", "factor": 0.5},
    {"rope_type": "linear"},
    {"rope_theta": 77.0},
    {"rope_type": None},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
]
BY_TYPE: list[Any] = [
    {GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}},
    {GLOBAL: {"type": "linear", "factor": 8.0}, LOCAL: {"rope_type": "default"}},
    {LOCAL: {"rope_type": "linear", "factor": 4.0}, GLOBAL: {"rope_theta": 1e3}},
    {LOCAL: {**YARN, **BEFORE, "rope_theta": 500.0}, GLOBAL: {**LLAMA3, **BEFORE}},
    {LOCAL: YARN, GLOBAL: None},
]
SLOWEST = {"rope_type": "proportional", "rope_theta": 1e5}
PROPORTIONAL: list[Any] = [
    {GLOBAL: {**SLOWEST, "partial_rotary_factor": 0.3}, LOCAL: SLOWEST},
    {GLOBAL: {**SLOWEST, "factor": 8.0}, LOCAL: {"rope_type": "default", "rope_theta": 300.0}},
    {GLOBAL: {**SLOWEST, "partial_rotary_factor": 1.5}, LOCAL: SLOWEST},
    {GLOBAL: {**YARN, **BEFORE, "rope_theta": 500.0}, LOCAL: {"rope_type": "default"}},
    {GLOBAL: {"rope_theta": 500.0}, LOCAL: {"rope_theta": 50.0, "partial_rotary_factor": 0.5}},
]
KEYS: dict[str, list[Any]] = {
    "vocab_size": [ABSENT, None, 41],
    "hidden_size": [ABSENT, None, 48, 36],
    "intermediate_size": [ABSENT, None, 17],
    "num_hidden_layers": [ABSENT, 0, 1, 7],
    "num_attention_heads": [ABSENT, None, 32, 4, 2],
    "num_key_value_heads": [ABSENT, None, 1, 8, 3],
    "head_dim": [ABSENT, None, 10, 7, 2],
    "hidden_act": [ABSENT, "gelu_pytorch_tanh", "gelu_new", "swish", "gelu", "relu", None],
    "hidden_activation": [ABSENT, "silu", "gelu_fast", "gelu", None],
    "max_position_embeddings": [ABSENT, 16, None],
    "rms_norm_eps": [ABSENT, 0.05, None],
    "tie_word_embeddings": [ABSENT, True, False, None],
    "attention_bias": [ABSENT, True, False, None],
    "mlp_bias": [ABSENT, True, False],
    "rope_theta": [ABSENT, 100.0, 500, 3e7, None],
    "rope_scaling": [ABSENT, *SCALINGS],
    "rope_parameters": [ABSENT, *SCALINGS, *BY_TYPE, *PROPORTIONAL],
    "original_max_position_embeddings": [ABSENT, 32, None],
    "rope_local_base_freq": [ABSENT, 50.0, 1e5, None],
    "partial_rotary_factor": [ABSENT, 1.0, 0.5],
    "sliding_window": [ABSENT, 5, 1, 4096, None, 0],
    "use_sliding_window": [ABSENT, True, False, None],
    "max_window_layers": [ABSENT, 1, 0, 99, None],
    "layer_types": [ABSENT, None, "mixed", "global", "local", "long", "other"],
    "sliding_window_pattern": [ABSENT, 2, 1, None],
    "query_pre_attn_scalar": [ABSENT, 8, 24, 0, -4, None],
    "attn_logit_softcapping": [ABSENT, 1.0, None],
    "final_logit_softcapping": [ABSENT, 2.0, None],
    "use_bidirectional_attention": [ABSENT, False, None, True],
    "attention_dropout": [ABSENT, 0.5],
    "n_embd": [ABSENT, 48],
    "n_inner": [ABSENT, None, 17],
    "activation_function": [ABSENT, "gelu", "gelu_pytorch_tanh", "relu", None],
    "layer_norm_epsilon": [ABSENT, 0.05, None],
    "scale_attn_weights": [ABSENT, False],
    "scale_attn_by_inverse_layer_idx": [ABSENT, False, True],
    "reorder_and_upcast_attn": [ABSENT, True],
    "add_cross_attention": [ABSENT, True],
    "num_local_experts": [None, 1, 3],
    "num_experts_per_tok": [ABSENT, None, 1, 3],
    "num_experts": [None, 1, 3],
    "moe_intermediate_size": [24, 7],
    "shared_expert_intermediate_size": [12, None],
    "norm_topk_prob": [ABSENT, True, False],
    "decoder_sparse_step": [ABSENT, 2],
    "mlp_only_layers": [ABSENT, None, [1], [9]],
    "full_attention_interval": [ABSENT, 1, 3],
    "linear_conv_kernel_dim": [ABSENT, 2],
    "linear_value_head_dim": [8, None],
    "linear_num_key_heads": [4, 3],
    "kv_lora_rank": [9, None],
    "q_lora_rank": [None, 7],
    "qk_rope_head_dim": [6],
    "v_head_dim": [8, None],
    "n_routed_experts": [6],
    "n_group": [1, 3, 4, None],
    "topk_group": [2, 3],
    "topk_method": [ABSENT, "greedy", "noaux_tc", None],
    "first_k_dense_replace": [0, 3, 9, None],
    "n_shared_experts": [2, 0, None],
    "routed_scaling_factor": [1.0, 0, None],
    "rope_interleave": [True, False, None],
    "global_head_dim": [ABSENT, 8, 7, None],
    "num_global_key_value_heads": [1, 3, None],
    "attention_k_eq_v": [True, False, None],
    "num_kv_shared_layers": [1, 2, 9, None],
    "use_double_wide_mlp": [True, None],
    "hidden_size_per_layer_input": [ABSENT, 0, None],
    "vocab_size_per_layer_input": [ABSENT, 41],
    "per_layer_config": [
        None,
        {},
        {"2": {"head_dim": 6}},
        {"0": {"head_dim": 6}},
        {"x": {}},
        {"1": {"intermediate_size": 9}},
        {"2": {"num_key_value_heads": 4}},
    ],
    "enable_moe_block": [True, None],
    "top_k_experts": [ABSENT, 1, 9],
    "swiglu_limit": [ABSENT, 0.5, None],
    "swiglu_alpha": [ABSENT, 1.0],
    "model_type": [ABSENT, "bert"],
}
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "GPT2LMHeadModel": "gpt2",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
}
TOGETHER: list[dict[str, Any]] = [
    *({"rope_scaling": {**each}, **BEFORE} for each in (LLAMA3, YARN)),
    *({"rope_parameters": {**each}, **BEFORE} for each in (LLAMA3, YARN)),
    *({"rope_scaling": {**each, **BEFORE}, "original_max_position_embeddings": 64}
      for each in (LLAMA3, YARN)),
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
     "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
     "rope_parameters": {GLOBAL: {"rope_theta": 50.0}, LOCAL: {"rope_theta": 60.0}}},
    {"rope_theta": 200.0, "rope_parameters": {"rope_theta": 90.0, "rope_type": "default"}},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 90.0, "rope_type": "default"}},
    {"rope_theta": 200.0, "rope_local_base_freq": 30.0,
     "rope_parameters": {GLOBAL: {"rope_type": "linear", "factor": 2.0}, LOCAL: {}}},
    {"rope_local_base_freq": 30.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 5, "layer_types": "mixed"},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "num_hidden_layers": 31, "sliding_window": 3},
    {"use_sliding_window": False, "layer_types": "mixed", "sliding_window": 5},
    {"sliding_window": 5, "layer_types": "local"},
    {"sliding_window": None, "layer_types": "global"},
    {"sliding_window": 5, "sliding_window_pattern": 2},
    {"num_key_value_heads": ABSENT, "num_attention_heads": 32},
    {"head_dim": ABSENT, "num_attention_heads": 4},
    {"hidden_size": 50, "num_attention_heads": 4, "head_dim": 6},
    {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "num_hidden_layers": 7,
     "layer_types": "mixed", "sliding_window": 5},
    {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "sliding_window": 5},
    {"attention_k_eq_v": True, "layer_types": "mixed", "num_kv_shared_layers": 1},
    {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "sliding_window": 5},
    {"num_local_experts": ABSENT, "n_routed_experts": 6, "n_group": 3, "topk_group": 2},
]  # fmt: skip
"""Changes whose effect needs several keys at once."""


def single() -> Iterator[dict[str, Any]]:
    """Yield changes of one key at a time, and of keys that belong together."""
    yield {}
    for key, values in KEYS.items():
        yield from ({key: value} for value in values if key not in SIZES or value is not ABSENT)
    yield from (changes for changes in TOGETHER if "num_hidden_layers" not in changes)


def sizes() -> Iterator[dict[str, Any]]:
    """Yield changes of the sizes that published models have."""
    yield from ({key: ABSENT} for key in SIZES)
    yield from (changes for changes in TOGETHER if "num_hidden_layers" in changes)


def several(count: int, seed: int, architecture: str) -> Iterator[dict[str, Any]]:
    """Yield changes of several keys at once."""
    kept = OWN.get(architecture, {})
    draw = random.Random(seed)
    for _ in range(count):
        keys = [key for key in KEYS if key not in SIZES and draw.random() < 0.2]
        keys = [key for key in keys if key not in kept]
        changed = {key: draw.choice(KEYS[key]) for key in keys if key != "model_type"}
        # Impossible and refused values have been tried alone: take fewer of them.
        yield {key: value for key, value in changed.items() if value or draw.random() < 0.3}


def config(architecture: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a point."""
    names = {"architectures": [architecture], "model_type": FAMILIES[architecture]}
    made = {**BASE, **OWN.get(architecture, {}), **names, "pad_token_id": None, **changes}
    made = {key: value for key, value in made.items() if value is not ABSENT}
    usual = 30 if "Gemma4" in architecture else 26 if "Gemma" in architecture else 32
    layers = made.get("num_hidden_layers", usual)
    types = made.get("layer_types")
    if isinstance(types, str):
        made["layer_types"] = {
            "mixed": [LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, GLOBAL, LOCAL] * 5,
            "global": [GLOBAL] * layers,
            "local": [LOCAL] * layers,
            "long": [GLOBAL] * (layers + 1),
            "other": ["chunked_attention"] * layers,
        }[types][: max(layers, len(types) == 4 and layers + 1)]
    return made
