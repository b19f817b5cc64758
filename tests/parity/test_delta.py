"""Layers with a delta rule agree with transformers' modules.

The output norm divides by the root mean square of what a head reads, which can be tiny. Outputs
are therefore compared to 1e-3 of the largest, and states to 1e-6.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import DIRECT, Carried, GatedDelta, KimiDelta, Mask
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from tests.pairs import params
from tests.parity.layers import drawn, seen, shaped
from tests.parity.models import torch, transformers

modeling_kimi_linear = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")

LENGTH, WIDTH = 75, 32
KEY_HEADS, HEADS, KEY, VALUE, TAPS = 2, 4, 8, 12, 4
PIECES = [(LENGTH,), (20, 1, 1, 53)]
"""Tokens of each piece of a row."""


def states_seen(model, layer, ids):
    """Return input and output of a layer in the module, and its final state."""
    cache = transformers.cache_utils.DynamicCache(config=model.config)
    ((x, y),) = seen([layer], lambda: model(ids, past_key_values=cache, use_cache=True))
    return x, y, cache.get_recurrent_state(0, state_idx=0).numpy()


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_conv_kernel_dim=TAPS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=HEADS,
        num_experts=0,
        mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
        attn_implementation="eager",
    )
    model = drawn(transformers.Qwen3NextForCausalLM(config))
    layer = model.model.layers[0].linear_attn
    flat = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}
    share = HEADS // KEY_HEADS
    sizes = np.cumsum([KEY, KEY, share * VALUE])
    fused = flat["in_proj_qkvz.weight"].T.reshape(WIDTH, KEY_HEADS, -1)
    query, key, value, gate = np.split(fused, sizes, axis=-1)
    beta, decay = np.split(flat["in_proj_ba.weight"].T.reshape(WIDTH, KEY_HEADS, -1), 2, axis=-1)
    taps = np.split(flat["conv1d.weight"][:, 0].T, np.cumsum([KEY_HEADS * KEY] * 2), axis=-1)
    write = {
        "query": query,
        "key": key,
        "value": value,
        "convolution": dict(zip(("query", "key", "value"), taps, strict=True)),
        "beta": beta,
        "decay": decay,
        "rate": flat["A_log"],
        "step": flat["dt_bias"],
    }
    read = {
        "gate": gate,
        "norm": {"gain": flat["norm.weight"]},
        "output": flat["out_proj.weight"].T,
    }
    ours = GatedDelta(
        heads=HEADS,
        key_heads=KEY_HEADS,
        head_dim=KEY,
        head_value_dim=VALUE,
        taps=TAPS,
        norm=RMSNorm(config.rms_norm_eps),
    )
    return ours, write, read, states_seen(model, layer, torch.randint(0, 97, (2, LENGTH)))


@pytest.fixture(scope="module")
def kimi():
    torch.manual_seed(0)
    config = transformers.KimiLinearConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        linear_head_dim=KEY,
        linear_num_heads=HEADS,
        linear_conv_kernel_dim=TAPS,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense"] * 2,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = drawn(modeling_kimi_linear.KimiLinearForCausalLM(config))
    layer = model.model.layers[0].self_attn
    flat = {name: weight.detach().numpy() for name, weight in layer.named_parameters()}
    taps = np.split(flat["conv1d.weight"][:, 0].T, 3, axis=-1)
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "beta": "b_proj"}
    write = {name: flat[f"{theirs}.weight"].T for name, theirs in names.items()} | {
        "convolution": dict(zip(("query", "key", "value"), taps, strict=True)),
        "decay": {
            "down": flat["forget_gate.f_a_proj.weight"].T,
            "up": flat["forget_gate.f_b_proj.weight"].T,
        },
        "rate": flat["forget_gate.A_log"],
        "step": flat["forget_gate.dt_bias"],
    }
    read = {
        "gate": {"down": flat["g_a_proj.weight"].T, "up": flat["g_b_proj.weight"].T},
        "norm": {"gain": flat["o_norm.weight"]},
        "output": flat["o_proj.weight"].T,
    }
    ours = KimiDelta(heads=HEADS, head_dim=KEY, taps=TAPS, norm=RMSNorm(config.rms_norm_eps))
    return ours, write, read, states_seen(model, layer, torch.randint(0, 97, (2, LENGTH)))


@pytest.mark.parametrize("pieces", params(PIECES, PIECES[1:], str))
@pytest.mark.parametrize("model", ["qwen", "kimi"])
def test_a_layer_agrees(model, pieces, request):
    """Outputs and final state agree for a whole row, and for a row continued from states."""
    layer, write, read, (x, expected, state) = request.getfixturevalue(model)
    write, read = shaped(layer, WIDTH, write, read)

    @jax.jit
    def forward(x, position, states):
        carried = Carried(states, jnp.full(len(x), x.shape[1]))
        written = layer.write(write, x, position, carried)
        given = (read, x, position, (), Mask(aligned=True), Compute(), written.pop(DIRECT))
        return layer.read(*given)[0], written

    states = {name: store.zeros(2) for name, store in layer.states.items()}
    found, start = [], 0
    for piece in pieces:
        place = jnp.tile(jnp.arange(start, start + piece), (2, 1))
        out, states = forward(jnp.asarray(x[:, start : start + piece]), place, states)
        found.append(out)
        start += piece
    assert np.abs(expected).max() > 1
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-3 * largest)
    own = np.asarray(states["memory"]["state"])
    largest = np.abs(state).max()
    np.testing.assert_allclose(own, state.reshape(own.shape), atol=1e-6 * max(largest, 1))
