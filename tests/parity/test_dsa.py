"""Law 11 for DSA: layers of transformers' DeepSeek V3.2 and GLM-5 and ours agree."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Indexer, Latent, Mask
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.position import RoPE
from tests.parity.layers import assert_agree, bags_of, drawn, output, seen, shaped
from tests.parity.models import torch, transformers

LENGTH, HEADS, WIDTH, ROTATED, RANK, QUERY_RANK = 29, 4, 8, 8, 16, 12
INDEXER = Indexer(heads=16, width=16, top_k=5)
KINDS = {
    "DeepseekV32": {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]},
    "GlmMoeDsa": {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense"] * 2,
        "indexer_types": ["full", "shared"],
    },
}


@pytest.fixture(scope="module", params=KINDS)
def theirs(request):
    """The architecture, its layers, and what entered and left each of them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        kv_lora_rank=RANK,
        q_lora_rank=QUERY_RANK,
        qk_rope_head_dim=ROTATED,
        qk_nope_head_dim=WIDTH,
        v_head_dim=WIDTH,
        index_topk=INDEXER.top_k,
        index_head_dim=INDEXER.width,
        index_n_heads=INDEXER.heads,
        n_group=1,
        topk_group=1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
        **KINDS[request.param],
    )
    model = drawn(transformers.AutoModelForCausalLM.from_config(config))
    layers = [layer.self_attn for layer in model.model.layers]
    return request.param, layers, seen(layers, lambda: model(torch.randint(0, 97, (2, LENGTH))))


def ours(architecture, layer):
    """Return the same layer of mukv and its weights.

    DeepSeek's indexer rotates halves, its attention adjacent pairs; ours has one pairing, so that
    the rotated dimensions of the indexer are put in the other order, which no score depends on.
    """
    attention = Latent(
        position=RoPE(pairing="interleaved"),
        heads=HEADS,
        rank=RANK,
        head_dim=WIDTH,
        rope_dim=ROTATED,
        query_rank=QUERY_RANK,
        norm=RMSNorm(epsilon=layer.q_a_layernorm.variance_epsilon),
    )
    flat = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}

    def across(name):
        return flat[f"{name}.weight"].T

    down, up = across("kv_a_proj_with_mqa"), across("kv_b_proj").reshape(RANK, HEADS, -1)
    write = {
        "latent": down[:, :RANK],
        "key": down[:, RANK:],
        "norm": {"gain": flat["kv_a_layernorm.weight"]},
    }
    read = {
        "query_latent": across("q_a_proj"),
        "query_norm": {"gain": flat["q_a_layernorm.weight"]},
        "query": across("q_b_proj"),
        "key_up": up[..., :WIDTH],
        "value_up": up[..., WIDTH:],
        "output": across("o_proj"),
    }
    if layer.indexer is not None:
        attention, order = replace(attention, indexer=INDEXER), np.arange(INDEXER.width)
        if architecture == "DeepseekV32":
            order[:ROTATED] = np.arange(ROTATED).reshape(2, -1).T.reshape(-1)
        asks = across("indexer.wq_b").reshape(QUERY_RANK, INDEXER.heads, -1)
        norm = {
            "gain": flat["indexer.k_norm.weight"][order],
            "bias": flat["indexer.k_norm.bias"][order],
        }
        write["index"] = {"key": across("indexer.wk")[:, order], "norm": norm}
        read["index"] = {"query": asks[..., order], "weight": across("indexer.weights_proj")}
    return attention, shaped(attention, 32, write, read)


@pytest.mark.parametrize("fused", [False, True])
def test_layers_agree(theirs, fused):
    """Outputs agree, also of a layer that reads by the choice of the layer before it."""
    architecture, layers, found = theirs
    compute, choice = Compute(fused=fused, attention_chunk=8), None
    for layer, (x, expected) in zip(layers, found, strict=True):
        attention, weights = ours(architecture, layer)
        assert_agree(output(attention, weights, x, compute, choice), expected)
        choice = chosen(attention, weights, x, compute)


def chosen(attention, weights, x, compute):
    """Return the choice of a layer for whole rows."""
    write, read = weights
    position = jnp.tile(jnp.arange(LENGTH), (2, 1))

    @jax.jit
    def choose(x):
        bags = bags_of(attention, write, x, position)
        return attention.choose(read, x, position, bags, Mask(aligned=True), compute)

    return choose(jnp.asarray(x))
