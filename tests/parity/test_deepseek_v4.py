"""Law 11 for compressed attention: layers agree with those of transformers' DeepSeek V4."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from mukv.attention import CSA, HCA, Indexer
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.position import RoPE, YaRN
from tests.parity.layers import assert_agree, drawn, output, seen, shaped
from tests.parity.models import torch, transformers

LENGTH, WINDOW, HEADS, WIDTH, GROUPS = 37, 6, 4, 16, 2
EVERY = {1: 5, 2: 2}
"""Tokens per entry of the layer with HCA and of that with CSA."""
INDEXER = Indexer(heads=16, width=16, top_k=3)


@pytest.fixture(scope="module")
def theirs():
    """Return layers with a window alone, with HCA and with CSA: their inputs, outputs and
    rotations."""
    torch.manual_seed(0)
    kinds = [
        "sliding_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ]
    config = transformers.DeepseekV4Config(
        vocab_size=97,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=WIDTH,
        q_lora_rank=12,
        num_experts_per_tok=2,
        n_routed_experts=4,
        partial_rotary_factor=0.5,
        sliding_window=WINDOW,
        o_groups=GROUPS,
        o_lora_rank=8,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        max_position_embeddings=256,
        mlp_layer_types=["moe"] * 3,
        layer_types=kinds,
        compress_rates={kinds[1]: EVERY[1], kinds[2]: EVERY[2]},
        index_n_heads=INDEXER.heads,
        index_head_dim=INDEXER.width,
        index_topk=INDEXER.top_k,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        attn_implementation="eager",
    )
    model = drawn(transformers.DeepseekV4ForCausalLM(config))
    layers = [layer.self_attn for layer in model.model.layers]
    found = seen(layers, lambda: model(torch.randint(0, 97, (2, LENGTH))))
    rotary = model.model.rotary_emb
    turns = [getattr(rotary, f"{layer.rope_layer_type}_inv_freq").numpy() for layer in layers]
    return config, layers, found, turns


def ours(config, layer, index):
    """Return the same layer of mukv and its weights."""
    scaling = YaRN(factor=4.0, original_length=32, temperature="none") if index else None
    attention = HCA(
        position=RoPE(
            base=160_000.0 if index else 10_000.0, scaling=scaling, pairing="interleaved"
        ),
        heads=HEADS,
        head_dim=WIDTH,
        rope_dim=WIDTH // 2,
        query_rank=12,
        window=WINDOW,
        every=EVERY.get(index),
        groups=GROUPS,
        output_rank=8,
        sinks="learned",
        norm=RMSNorm(epsilon=config.rms_norm_eps),
    )
    if index == 2:
        shared = {f.name: getattr(attention, f.name) for f in fields(HCA) if f.name != "kind"}
        attention = CSA(**shared, indexer=INDEXER)
    flat = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}

    def across(name):
        return flat[f"{name}.weight"].T

    write = {"key": across("kv_proj"), "norm": {"gain": flat["kv_norm.weight"]}}

    def compressor(prefix):
        return {
            "value": across(f"{prefix}.kv_proj"),
            "gate": across(f"{prefix}.gate_proj"),
            "bias": flat[f"{prefix}.position_bias"],
            "norm": {"gain": flat[f"{prefix}.kv_norm.weight"]},
        }

    if index:
        write["compressed"] = compressor("compressor")
    down = flat["o_a_proj.weight"].reshape(GROUPS, 8, HEADS // GROUPS, WIDTH)
    read = {
        "query_latent": across("q_a_proj"),
        "query_norm": {"gain": flat["q_a_norm.weight"]},
        "query": across("q_b_proj").reshape(12, HEADS, WIDTH),
        "sinks": flat["sinks"],
        "output_down": np.moveaxis(down, 1, 3),
        "output_up": across("o_b_proj").reshape(GROUPS, 8, 32),
    }
    if index == 2:
        write["index"] = compressor("compressor.indexer")
        read["index"] = {
            "query": across("compressor.indexer.q_b_proj"),
            "weight": across("compressor.indexer.scorer.weights_proj"),
        }
    return attention, shaped(attention, 32, write, read)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_layer_agrees(theirs, index, fused):
    """Outputs agree to 1e-5 of the largest, and rotations to the rounding of float32."""
    config, layers, found, turns = theirs
    attention, weights = ours(config, layers[index], index)
    assert isinstance(attention.position, RoPE)
    np.testing.assert_allclose(attention.position.frequencies(WIDTH // 2), turns[index], rtol=1e-6)
    x, expected = found[index]
    assert_agree(output(attention, weights, x, Compute(fused=fused, attention_chunk=8)), expected)
