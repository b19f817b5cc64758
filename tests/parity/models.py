"""Models of transformers, one of each family, with random weights of the size of trained ones:
norms have gains other than one, activations and logits are of about one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, CONTEXT = 97, 512
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PATTERN = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
PATTERN += ["sliding_attention", "full_attention", "full_attention"]
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-3": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-2": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen-2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen-3": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen-3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen-3-next": (
        "Qwen3Next",
        {
            "head_dim": 16,
            "rms_norm_eps": 1e-3,
            "full_attention_interval": 3,
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "gemma-2": ("Gemma2", {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24}),
    "gemma-3": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "num_hidden_layers": 8,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 16,
            "rope_parameters": BY_TYPE,
        },
    ),
    "gemma-4": (
        "Gemma4",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 9,
            "num_hidden_layers": 7,
            "layer_types": PATTERN[:7],
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 6,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma-4-31b": (
        "Gemma4",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 9,
            "num_hidden_layers": 6,
            "layer_types": PATTERN[:6],
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 0,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.3,
                    "rope_theta": 1e5,
                    "factor": 4.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma-4-26b": (
        "Gemma4",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 9,
            "layer_types": PATTERN[:4],
            "rms_norm_eps": 1e-3,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "olmo-2": ("Olmo2", {"rope_parameters": {**YARN, "truncate": False}}),
    "gpt-2": ("GPT2", {"n_inner": 48}),
    "olmo-3": ("Olmo3", {"sliding_window": 7, "rope_parameters": BY_TYPE}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 12,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 8,
            "v_head_dim": 6,
            "rms_norm_eps": 1e-3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "moonlight": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
            "rope_interleave": False,
        },
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 12,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 8,
            "v_head_dim": 6,
            "rms_norm_eps": 1e-3,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 4.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v2-lite": (
        "DeepseekV2",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 6,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 2.0,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 8,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}
"""Windows are shorter than the texts, and texts longer than the original length of RoPE scaling."""


def named_weights(model: Any) -> list[tuple[str, Any]]:
    """Return the parameters of a model, and the buffers that its files have."""
    kept = model.state_dict()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    return [*model.named_parameters(), *buffers]


def build(family: str, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """Build a model of transformers with random weights."""
    name = f"{family}{'Text' if family in ('Gemma3', 'Gemma4') else ''}Config"
    config = getattr(transformers, name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in named_weights(model):
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or ".ln_" in name or name.endswith(("layer_scalar", "scale")):
                weight.copy_(0.2 * noise + (family not in ("Gemma2", "Gemma3")))
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model


def published(model: Any) -> dict[str, Any]:
    """Return the tensors of a model by the names that they have in files: each expert of Qwen and
    DeepSeek has tensors of its own."""
    found = {}
    for name, weight in named_weights(model):
        stem, _, last = name.rpartition(".")
        apart = model.config.model_type.startswith(("qwen", "deepseek"))
        if not stem.endswith("experts") or not apart:
            found[name] = weight.detach()
            continue
        for number, own in enumerate(weight.detach()):
            parts = dict(zip(("gate_proj", "up_proj"), own.chunk(2), strict=True))
            parts = {"down_proj": own} if last == "down_proj" else parts
            for part, tensor in parts.items():
                found[f"{stem}.{number}.{part}.weight"] = tensor.contiguous()
    return found


def logits(model: Any, ids: np.ndarray, **given: Any) -> np.ndarray:
    """Return the logits of the transformers model, float32 [batch token vocab]."""
    with torch.inference_mode():
        tensors = {name: torch.tensor(value) for name, value in given.items()}
        return model(torch.tensor(ids), **tensors).logits.float().numpy()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def our_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Return mukv's logits without compilation, which is faster for a single use."""
    compute = model.run.train.compute
    with jax.disable_jit():
        hidden = model.network.hidden(model.scaled, jnp.asarray(ids), compute=compute)
        return np.asarray(model.network.logits(model.scaled, hidden, compute))
