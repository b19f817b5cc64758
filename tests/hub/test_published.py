"""Published configurations are read as the preset of that name, with its number of weights."""

from __future__ import annotations

from typing import Any

import pytest

from mukv.core.params import active, count
from mukv.hub import FAMILIES
from mukv.hub.settings import Given
from mukv.runs import config
from mukv.runs.describe import describe

SLOWED = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMALL_LLAMA = {**LLAMA, "rope_scaling": SLOWED, "tie_word_embeddings": True}
LARGE_LLAMA = {**LLAMA, "rope_scaling": {**SLOWED, "factor": 8.0}, "tie_word_embeddings": False}
GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}


def sizes(width: int, hidden: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **others,
    }


PUBLISHED = {
    "llama-3.2-1b": (SMALL_LLAMA | sizes(2048, 8192, 16, 32, head_dim=64), 1_235_814_400),
    "llama-3.2-3b": (SMALL_LLAMA | sizes(3072, 8192, 28, 24), 3_212_749_824),
    "llama-3.1-8b": (LARGE_LLAMA | sizes(4096, 14336, 32, 32), 8_030_261_248),
    "llama-3.1-70b": (LARGE_LLAMA | sizes(8192, 28672, 80, 64), 70_553_706_496),
    "gemma-2-2b": (GEMMA | sizes(2304, 9216, 26, 8, num_key_value_heads=4), 2_614_341_888),
    "gemma-2-9b": (GEMMA | sizes(3584, 14336, 42, 16, num_key_value_heads=8), 9_241_705_984),
    "gemma-2-27b": (
        GEMMA
        | sizes(4608, 36864, 46, 32, num_key_value_heads=16)
        | {"head_dim": 128, "query_pre_attn_scalar": 144},
        27_227_128_320,
    ),
}


YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163_840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": YARN,
    "rope_theta": 10_000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129_280,
    **sizes(7168, 18_432, 61, 128),
}
KIMI = {
    **DEEPSEEK3,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131_072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50_000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163_840,
    **sizes(7168, 18_432, 61, 64),
}


@pytest.mark.parametrize(
    ("published", "total", "used"), [(DEEPSEEK3, 671e9, 37e9), (KIMI, 1.03e12, 32e9)]
)
def test_published_experts_have_their_number_of_weights(published, total, used):
    """DeepSeek-V3 and Kimi K2 have the numbers of weights that their reports name, and what is
    written is read as the same model."""
    family = FAMILIES["DeepseekV3ForCausalLM"]
    model = family.read(Given(published, "config.json"))
    assert not list(family.misfits(model))
    assert family.read(Given(family.write(model, 0), "config.json")) == model
    assert count(model.params()) == pytest.approx(total, rel=0.005)
    assert active(model.params()) == pytest.approx(used, rel=0.03)
    dense = published["first_k_dense_replace"]
    assert [layer.mlp.kind for layer in model.layers] == ["gated"] * dense + ["experts"] * (
        61 - dense
    )


@pytest.mark.product
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_the_preset(name):
    published, parameters = PUBLISHED[name]
    run = config.load(name)
    family = FAMILIES[published["architectures"][0]]
    assert family.read(Given(published, "config.json")) == run.model
    assert not list(family.misfits(run.model))
    written = family.write(run.model, 0)
    said = {key: value for key, value in published.items() if key != "torch_dtype"}
    assert {key: written[key] for key in said if key in written} == {
        key: value for key, value in said.items() if key in written
    }
    assert said.keys() - written.keys() <= {"mlp_bias", "hidden_act"}
    assert describe(run)["parameters"] == parameters
