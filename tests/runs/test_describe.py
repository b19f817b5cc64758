"""`describe`: parameters, FLOPs and bytes are right, and no array is allocated."""

from __future__ import annotations

import io

import jax
import pytest
from rich.console import Console

from mukv.attention.delta_rule import CHUNK
from mukv.core import params
from mukv.model.counting import flops_per_token
from mukv.runs import config
from mukv.runs.describe import describe, show
from mukv.train.step import Trainer


@pytest.mark.parametrize(
    ("preset", "parameters", "layers"),
    [("llama-3.1-8b", 8_030_261_248, 32), ("llama-3.1-70b", 70_553_706_496, 80)],
)
def test_llama_allocates_nothing(preset, parameters, layers):
    before = {id(array) for array in jax.live_arrays()}
    facts = describe(config.load(preset))
    assert {id(array) for array in jax.live_arrays()} <= before
    assert facts["parameters"] == parameters
    assert facts["dtype"] == "bfloat16"
    # Keys and values of 8 heads of 128 numbers of 2 bytes.
    assert [layer["cache_bytes_per_token"] for layer in facts["layers"]] == [4096] * layers
    assert facts["cache_bytes_per_token"] == 4096 * layers
    assert facts["cache_bytes_constant"] == 0


def test_flops_of_llama():
    """FLOPs are 6 per weight in a product (not embedding and gains), plus those of attention."""
    run = config.load("llama-3.1-8b")
    declared = params.named(run.model.params()).values()
    products = 6 * sum(param.size for param in declared if param.fan_in)
    attention = 3 * 32 * 4 * 32 * 128 * (8192 + 1) / 2
    assert describe(run)["flops_per_token"] == round(products + attention)
    longer, shorter = (flops_per_token(run.model, length) for length in (8192, 4096))
    assert longer - shorter == round(attention - 3 * 32 * 4 * 32 * 128 * (4096 + 1) / 2)


def test_windows_and_reuse():
    facts = describe(config.load("tiny-window"))
    entry = 2 * 2 * 32 * 4  # key and value, two heads of 32 numbers of 4 bytes
    assert [layer["cache_bytes_constant"] for layer in facts["layers"]] == [64 * entry] * 3 + [0]
    assert [layer["cache_bytes_per_token"] for layer in facts["layers"]] == [0] * 3 + [entry]
    assert facts["cache_bytes_constant"] == 3 * 64 * entry
    reuse = describe(config.load("tiny-reuse"))
    for layer in reuse["layers"]:
        assert layer["cache_bytes_per_token"] == (0 if layer["reads"] is not None else entry)
    assert any(layer["reads"] is not None for layer in reuse["layers"])


def test_layers_that_read_by_the_choice_of_another():
    """They cache no key of an indexer and score nothing; the choice rules out a faster core in rows
    that are longer than it."""
    run = config.load("tiny-dsa-shared")
    facts = describe(run)
    assert [layer["indexed_by"] for layer in facts["layers"]] == [None, 0, None, 2]
    assert ["index" in layer["cached"] for layer in facts["layers"]] == [True, False] * 2
    assert [layer["cache_bytes_per_token"] for layer in facts["layers"]] == [320, 256] * 2
    assert {layer["core"] for layer in facts["layers"]} == {"plain"}
    short = describe(config.load("tiny-dsa-shared", ["train.length=32"]))
    assert [layer["core"] for layer in short["layers"]] == ["plain", "fused"] * 2
    # A choice of 32 entries; 4 heads of 48 and 32, and in two layers an indexer of 4 heads of 16.
    seen, read = (sum(min(t, most) for t in range(1, 129)) / 128 for most in (128, 32))
    products = 6 * sum(
        param.size for param in params.named(run.model.params()).values() if param.fan_in
    )
    pairs = 4 * 2 * 4 * (48 + 32) * read + 2 * 2 * 4 * 16 * seen
    assert facts["flops_per_token"] == round(products + 3 * pairs)
    shown = io.StringIO()
    show(facts, run, Console(file=shown, width=200))
    assert "own, chosen by 2" in shown.getvalue()


def test_bytes_of_compressed_entries():
    """HCA of DeepSeek V4's size takes 8 bytes a token, and constant bytes for 128 tokens in the
    window and 3 float32 vectors."""
    keys = "kind: hca, head_dim: 512, rope_dim: 64"
    facts = describe(
        config.load(
            "tiny",
            [
                f"model.attention={{{keys}, every: 128, window: 128}}",
                "train.compute.dtype=bfloat16",
            ],
        )
    )
    layer = facts["layers"][0]
    assert layer["cache_bytes_per_token"] == 512 * 2 / 128
    assert layer["cache_bytes_constant"] == 128 * 512 * 2 + 3 * 512 * 4
    assert layer["cached"] == {"window.key": (1, 512), "compressed.key": (1, 512)}
    rare = f"model.attention={{{keys}, every: 1000, window: 1000}}"
    tiny = describe(config.load("tiny", [rare]))
    assert tiny["layers"][0]["cache_bytes_per_token"] == 512 * 4 / 1000
    assert tiny["cache_bytes_per_token"] == 4 * 512 * 4 / 1000


def test_flops_of_compressed_attention():
    """FLOPs are 4 H d for each entry that is seen: those of the window, and (t + 1) // m compressed
    ones."""
    run = config.load("tiny-hca")
    attention = run.model.layers[0].attention
    seen = [min(t, attention.window) + t // attention.every for t in range(1, 129)]
    products = 6 * sum(
        param.size for param in params.named(run.model.params()).values() if param.fan_in
    )
    expected = products + 3 * 4 * 4 * 4 * 32 * sum(seen) / 128
    assert flops_per_token(run.model, 128) == round(expected)


def test_a_window_costs_less_to_train():
    full, window = (config.load(name) for name in ("tiny", "tiny-window"))
    assert flops_per_token(window.model, 256) < flops_per_token(full.model, 256)
    assert flops_per_token(window.model, 64) == flops_per_token(full.model, 64)


def test_flops_of_cross_attention_to_concepts():
    def longer(kind):
        model = config.load("tiny-concept-fixed", [f"model.injection={{kind: {kind}}}"]).model
        return flops_per_token(model, 256) - flops_per_token(model, 128)

    # A token sees half of the concepts, 64 rather than 32; scores and values, 4 heads of 32.
    assert longer("cross") - longer("residual") == 3 * 4 * 4 * 32 * (64 - 32) / 2


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4), (8, 1)])
def test_described_shardings_are_those_of_the_weights(mesh):
    run = config.load("tiny", [f"mesh.data={mesh[0]}", f"mesh.tensor={mesh[1]}"])
    rows = {row["weight"]: row for row in describe(run)["weights"]}
    trainer = Trainer(run.model, run.train, run.mesh.build())
    for name, leaf in params.named(trainer.abstract_state().weights).items():
        assert list(leaf.sharding.spec) == rows[name]["sharding"]
        assert leaf.shape == tuple(rows[name]["dims"].values())
    assert len(rows) == len(params.named(run.model.params()))


@pytest.mark.product
@pytest.mark.parametrize("preset", config.presets())
def test_every_preset_shows_in_a_narrow_terminal(preset):
    run, out = config.load(preset), io.StringIO()
    show(describe(run), run, Console(file=out, width=80))
    assert f"{params.count(run.model.params()):,}" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_states_cost_constant_bytes_and_flops():
    """Three layers of Gated DeltaNet take constant bytes, and FLOPs per token independent of
    length."""
    run = config.load("tiny-hybrid-gdn")
    facts = describe(run)
    *states, last = facts["layers"]
    assert {layer["position"] for layer in states} == {"none"}
    assert last["position"] == "rope"
    assert {layer["core"] for layer in states} == {None}
    size = 4 * (4 * 32 * 32 + 3 * 3 * 4 * 32)
    assert [layer["cache_bytes_constant"] for layer in facts["layers"]] == [size] * 3 + [0]
    assert [layer["cache_bytes_per_token"] for layer in states] == [0] * 3
    assert facts["cache_bytes_per_token"] == 2 * 2 * 32 * 4
    products = 6 * sum(
        param.size for param in params.named(run.model.params()).values() if param.fan_in
    )
    attention = 3 * 4 * 4 * 32 * (128 + 1) / 2
    chunks = 3 * 3 * 4 * (6 * 32 * 32 + CHUNK * 8 * 32)
    assert facts["flops_per_token"] == round(products + attention + chunks)
