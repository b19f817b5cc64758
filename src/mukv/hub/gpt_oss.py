"""gpt-oss (OpenAI 2025): experts with biases, attention sinks, windows in every second layer.

Files whose experts are quantised as MXFP4 are refused; they can be converted to bfloat16 by
transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mukv.hub.base import Rule
from mukv.hub.family import Family
from mukv.hub.feedforward import ClampedExperts
from mukv.hub.gemma import EveryNthGlobal
from mukv.hub.llama import ENDS, LAYER, NORMS, PROJECTIONS
from mukv.hub.rotation import ORIGINAL, THETA, read_rope, write_scaling
from mukv.hub.settings import Given
from mukv.position import RoPE

EXPERTS = f"{LAYER}.mlp.experts"
RULES = (
    *ENDS,
    *PROJECTIONS,
    Rule(f"{LAYER}.self_attn.sinks", "read.sinks", "heads"),
    Rule(f"{LAYER}.mlp.router.weight", "mlp.router", "experts embed"),
    Rule(f"{LAYER}.mlp.router.bias", "mlp.router_bias", "experts"),
    Rule(f"{EXPERTS}.gate_up_proj", "mlp.gate", "experts embed (expert_hidden part)", (0, 2)),
    Rule(f"{EXPERTS}.gate_up_proj", "mlp.up", "experts embed (expert_hidden part)", (1, 2)),
    Rule(f"{EXPERTS}.gate_up_proj_bias", "mlp.gate_bias", "experts (expert_hidden part)", (0, 2)),
    Rule(f"{EXPERTS}.gate_up_proj_bias", "mlp.up_bias", "experts (expert_hidden part)", (1, 2)),
    Rule(f"{EXPERTS}.down_proj", "mlp.down", "experts expert_hidden embed"),
    Rule(f"{EXPERTS}.down_proj_bias", "mlp.down_bias", "experts embed"),
    *NORMS,
)
DEFAULTS = {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "sliding_window": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "rope_theta": 150_000.0,
}
SCALED = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    ORIGINAL: 4096,
}
"""The rotation if the file has none."""


def read_scaled(given: Given) -> RoPE:
    """Read the rotation; a missing one is scaled. To transformers an empty `rope_scaling` is
    missing, an empty `rope_parameters` is not."""
    missing = given.mapping.get("rope_parameters") is None
    if missing and not given.mapping.get("rope_scaling"):
        given = replace(given, mapping={**given.mapping, "rope_parameters": SCALED})
    return read_rope(given)


def write_scaled(position: RoPE, local: RoPE) -> dict[str, Any]:
    """Return the keys of the rotation; one that is not scaled is named too."""
    scaling = write_scaling(position.scaling) or {"rope_type": "default"}
    return {"rope_parameters": {THETA: position.base, **scaling}}


GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    RULES,
    DEFAULTS,
    feedforward=ClampedExperts(),
    sinks="learned",
    windows=EveryNthGlobal(2),
    position=read_scaled,
    write_ropes=write_scaled,
)
