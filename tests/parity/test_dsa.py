"""Law 11 for DSA: layers of transformers' DeepSeek V3.2 and ours agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Indexer, Latent, Mask
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.position import RoPE
from tests.parity.models import torch, transformers

LENGTH, HEADS, WIDTH, ROTATED, RANK, QUERY_RANK = 29, 4, 8, 8, 16, 12
INDEXER = Indexer(heads=16, width=16, top_k=5)


@pytest.fixture(scope="module")
def theirs():
    """A layer, and what entered and left it."""
    torch.manual_seed(0)
    config = transformers.DeepseekV32Config(
        num_hidden_layers=1,
        mlp_layer_types=["dense"],
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
        attn_implementation="eager",
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer, seen = model.model.layers[0].self_attn, {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
            if "norm" in name and weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)

        def keep(_, __, given, out):
            seen["x"], seen["y"] = given["hidden_states"].numpy(), out[0].numpy()

        layer.register_forward_hook(keep, with_kwargs=True)
        model(torch.randint(0, 97, (2, LENGTH)))
    return layer, seen["x"], seen["y"]


def ours(layer):
    """Return the same layer of mukv and its weights.

    Their indexer rotates halves, their attention adjacent pairs; ours has one pairing, so that the
    rotated dimensions of the indexer are put in the other order, which no score depends on.
    """
    attention = Latent(
        position=RoPE(pairing="interleaved"),
        heads=HEADS,
        rank=RANK,
        head_dim=WIDTH,
        rope_dim=ROTATED,
        query_rank=QUERY_RANK,
        norm=RMSNorm(epsilon=layer.q_a_layernorm.variance_epsilon),
        indexer=INDEXER,
    )
    flat = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}

    def across(name):
        return flat[f"{name}.weight"].T

    pairs = np.arange(ROTATED).reshape(2, -1).T.reshape(-1)
    order = np.concatenate([pairs, np.arange(ROTATED, INDEXER.width)])
    asks = across("indexer.wq_b").reshape(QUERY_RANK, INDEXER.heads, -1)
    down, up = across("kv_a_proj_with_mqa"), across("kv_b_proj").reshape(RANK, HEADS, -1)
    write = {
        "latent": down[:, :RANK],
        "key": down[:, RANK:],
        "norm": {"gain": flat["kv_a_layernorm.weight"]},
        "index": {
            "key": across("indexer.wk")[:, order],
            "norm": {
                "gain": flat["indexer.k_norm.weight"][order],
                "bias": flat["indexer.k_norm.bias"][order],
            },
        },
    }
    read = {
        "query_latent": across("q_a_proj"),
        "query_norm": {"gain": flat["q_a_layernorm.weight"]},
        "query": across("q_b_proj"),
        "index": {"query": asks[..., order], "weight": across("indexer.weights_proj")},
        "key_up": up[..., :WIDTH],
        "value_up": up[..., WIDTH:],
        "output": across("o_proj"),
    }
    declared = attention.write_params(32), attention.read_params(32)
    return attention, map_params(
        lambda param, weight: jnp.asarray(weight.reshape(param.shape)), declared, (write, read)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_agrees(theirs, fused):
    """Outputs within 1e-5 of the largest."""
    layer, x, expected = theirs
    attention, (write, read) = ours(layer)
    compute = Compute(fused=fused, attention_chunk=8)
    position = jnp.tile(jnp.arange(LENGTH), (2, 1))

    @jax.jit
    def forward(x):
        written = attention.by_store(attention.write(write, x, position))
        bags = [bag.entries(written[name], position) for name, bag in attention.bags.items()]
        return attention.read(read, x, position, bags, Mask(aligned=True), compute)[0]

    found = np.asarray(forward(jnp.asarray(x)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
