"""Qwen3-Next (Qwen Team 2025): layers of Gated DeltaNet, and one of gated attention in four.

The gate of attention is in the tensor of the queries. The projections of a layer of Gated DeltaNet
are in two tensors, whose rows are grouped by key head, and its convolutions in one. Each layer has
experts, of which a shared one has a gate of its own. Three in four dimensions of a head are not
rotated. Heads that predict several tokens are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mukv.attention import AnyAttention, GatedDelta
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.base import Rule, TensorRows, blocks
from mukv.hub.family import MOST_HEADS, Family
from mukv.hub.feedforward import SparseExperts
from mukv.hub.layer_keys import MixerKeys
from mukv.hub.llama import DEFAULTS, ENDS, LAYER
from mukv.hub.qwen import EXPERTS
from mukv.hub.rotation import GLOBAL, read_partial_rope, write_partial_rope
from mukv.hub.settings import Given

LINEAR = "linear_attention"
"""Type of the layers of Gated DeltaNet."""
DELTA = f"{LAYER}.linear_attn"


def projections(number: int) -> Callable[[GatedDelta], TensorRows]:
    """Return the rows of queries, keys, values or gates in the tensor that has these four for each
    key head."""

    def rows(delta: GatedDelta) -> TensorRows:
        key, value = delta.head_dim, delta.value_dim * delta.heads // delta.query_heads
        return blocks((key, key, value, value), number, delta.query_heads)

    return rows


def strengths(number: int) -> Callable[[GatedDelta], TensorRows]:
    """Return the rows of strengths or decays in the tensor that has both for each key head."""

    def rows(delta: GatedDelta) -> TensorRows:
        share = delta.heads // delta.query_heads
        return blocks((share, share), number, delta.query_heads)

    return rows


def channels(number: int) -> Callable[[GatedDelta], TensorRows]:
    """Return the rows of queries, keys or values in the tensor of the convolutions."""

    def rows(delta: GatedDelta) -> TensorRows:
        key, value = delta.query_heads * delta.head_dim, delta.heads * delta.value_dim
        return blocks((key, key, value), number, 1)

    return rows


KEY, VALUE = "(delta_key_heads delta_dim)", "(delta_heads delta_value_dim)"
MIXED, STRENGTHS, TAPS = (
    f"{DELTA}.{name}.weight" for name in ("in_proj_qkvz", "in_proj_ba", "conv1d")
)
RULES = (
    *ENDS,
    Rule(f"{LAYER}.self_attn.q_proj.weight", "read.query", "(heads part head_dim) embed", (0, 2)),
    Rule(f"{LAYER}.self_attn.q_proj.weight", "read.gate", "(heads part value_dim) embed", (1, 2)),
    Rule(f"{LAYER}.self_attn.k_proj.weight", "write.key", "(kv_heads head_dim) embed"),
    Rule(f"{LAYER}.self_attn.v_proj.weight", "write.value", "(kv_heads head_dim) embed"),
    Rule(f"{LAYER}.self_attn.o_proj.weight", "read.output", "embed (heads value_dim)"),
    Rule(f"{LAYER}.self_attn.q_norm.weight", "read.query_norm.offset", "head_dim"),
    Rule(f"{LAYER}.self_attn.k_norm.weight", "write.key_norm.offset", "head_dim"),
    Rule(MIXED, "write.query", f"{KEY} embed", rows=projections(0)),
    Rule(MIXED, "write.key", f"{KEY} embed", rows=projections(1)),
    Rule(MIXED, "write.value", f"{VALUE} embed", rows=projections(2)),
    Rule(MIXED, "read.gate", f"{VALUE} embed", rows=projections(3)),
    Rule(STRENGTHS, "write.beta", "delta_heads embed", rows=strengths(0)),
    Rule(STRENGTHS, "write.decay", "delta_heads embed", rows=strengths(1)),
    Rule(TAPS, "write.convolution.query", f"{KEY} () taps", rows=channels(0)),
    Rule(TAPS, "write.convolution.key", f"{KEY} () taps", rows=channels(1)),
    Rule(TAPS, "write.convolution.value", f"{VALUE} () taps", rows=channels(2)),
    Rule(f"{DELTA}.dt_bias", "write.step", "delta_heads"),
    Rule(f"{DELTA}.A_log", "write.rate", "delta_heads"),
    Rule(f"{DELTA}.norm.weight", "read.norm.gain", "delta_value_dim"),
    Rule(f"{DELTA}.out_proj.weight", "read.output", f"embed {VALUE}"),
    *EXPERTS,
    Rule(f"{LAYER}.mlp.shared_expert.gate_proj.weight", "mlp.shared.gate", "shared_hidden embed"),
    Rule(f"{LAYER}.mlp.shared_expert.up_proj.weight", "mlp.shared.up", "shared_hidden embed"),
    Rule(f"{LAYER}.mlp.shared_expert.down_proj.weight", "mlp.shared.down", "embed shared_hidden"),
    Rule(f"{LAYER}.mlp.shared_expert_gate.weight", "mlp.shared_gate", "shared_gate embed"),
    Rule(f"{LAYER}.input_layernorm.weight", "attention_norm.offset", "embed"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", "mlp_norm.offset", "embed"),
    Rule("model.norm.weight", "final_norm.offset", "embed"),
)


@dataclass(frozen=True)
class DeltaKeys(MixerKeys):
    """Keys of the layers of Gated DeltaNet, which `layer_types` names."""

    def read(self, given: Given, layers: int) -> Sequence[AnyAttention | None]:
        given.require("attention_bias", False)
        types = given.items("layer_types")
        if types is None:
            period = given.whole("full_attention_interval")
            types = [GLOBAL if (layer + 1) % period == 0 else LINEAR for layer in range(layers)]
        if len(types) != layers or any(word not in (LINEAR, GLOBAL) for word in types):
            allowed = f"{layers} words, each {LINEAR} or {GLOBAL}"
            raise BadInput(f"{given.where}: layer_types", types, allowed)
        if LINEAR not in types:
            return [None] * layers
        given.require("hidden_act", "silu", "swish")
        heads = given.whole("linear_num_value_heads", high=MOST_HEADS)
        key_heads = given.whole("linear_num_key_heads", high=MOST_HEADS)
        if heads % key_heads:
            allowed = f"a number that divides linear_num_value_heads ({heads})"
            raise BadInput(f"{given.where}: linear_num_key_heads", key_heads, allowed)
        delta = GatedDelta(
            heads=heads,
            key_heads=key_heads,
            head_dim=given.whole("linear_key_head_dim", high=MOST_HEADS),
            head_value_dim=given.whole("linear_value_head_dim", high=MOST_HEADS),
            taps=given.whole("linear_conv_kernel_dim", high=1 << 10),
            norm=RMSNorm(given.number("rms_norm_eps")),
        )
        return [delta if word == LINEAR else None for word in types]

    def write(self, mixers: Sequence[AnyAttention | None]) -> dict[str, Any]:
        types = [LINEAR if mixer else GLOBAL for mixer in mixers]
        found = {mixer for mixer in mixers if mixer}
        if not found:
            return {"layer_types": types}
        if len(found) > 1:
            raise BadInput("plan: attention", found, "one kind beside gated attention")
        delta = found.pop()
        if not isinstance(delta, GatedDelta):
            raise BadInput("plan: attention", delta.kind, "gated_delta or grouped")
        if delta.beta != 1:
            raise BadInput("plan: attention.beta", delta.beta, "1")
        return {
            "layer_types": types,
            "linear_num_value_heads": delta.heads,
            "linear_num_key_heads": delta.query_heads,
            "linear_key_head_dim": delta.head_dim,
            "linear_value_head_dim": delta.value_dim,
            "linear_conv_kernel_dim": delta.taps,
        }


QWEN3_NEXT = Family(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    RULES,
    {
        **DEFAULTS,
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        "bos_token_id": None,
        "eos_token_id": None,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    norm="offset",
    feedforward=SparseExperts(shared=True),
    biases=(),
    query_norm="head",
    gate="channel",
    mixers=DeltaKeys(),
    position=read_partial_rope,
    write_ropes=write_partial_rope,
)
