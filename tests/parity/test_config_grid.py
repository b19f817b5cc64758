"""A config.json means what it means to transformers: both load a grid of them.

Where transformers loads a file, our logits equal its own to 1e-4, or the error names the key.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import mukv
import mukv.hub.settings
from mukv.core.errors import BadInput
from mukv.hub import FAMILIES
from tests.pairs import params
from tests.parity import grid
from tests.parity.models import named_weights, our_logits, published, torch, transformers

IDS = np.random.default_rng(0).integers(0, 40, (1, 20))
ROUNDING = {"Gemma4ForCausalLM": 5e-4, "Qwen3NextForCausalLM": 2e-3}
"""Tolerance of logits, relative to the largest, where 1e-4 is too little. With 30 layers of Gemma
4, transformers' own logits in float32 differ from those in float64 by 3.1e-4. Weights of Qwen3-Next
that are off by one unit in the last place change them by 8e-4, and with 48 layers by 1.4e-2."""
SAME, REFUSED, NEITHER, OURS = "same logits", "refused by name", "refused by both", "ours alone"


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def theirs(folder: Path):
    """Return the transformers model with random weights; None if transformers refuses the file."""
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in named_weights(model):
                noise = torch.randn(weight.shape, generator=generator)
                near_one = "norm" in name or name.endswith(("layer_scalar", "scale"))
                scale = 0.2 if near_one else weight.shape[-1] ** -0.5
                weight.add_(noise * scale)
            logits = model.eval()(torch.tensor(IDS)).logits.float().numpy()
    except Exception:  # a dozen types, from validation to the forward pass
        return None, None
    return model, logits


def ours(folder: Path, config: dict, known: dict):
    """Return our logits, or None where an error names one of the keys.

    known: logits of earlier networks; equal networks have equal weights.
    """
    try:
        model = mukv.load(folder)
    except BadInput as error:
        if not any(key in error.where for key in [*config, *grid.KEYS]):
            raise
        return None
    decoder = model.network
    if not decoder.positions:
        decoder = replace(decoder, context=None)
    if decoder not in known:
        known[decoder] = our_logits(model, IDS)
    return known[decoder]


def compare(architecture: str, changes: dict, folder: Path, known: dict) -> str:
    config = grid.config(architecture, changes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model, expected = theirs(folder)
    if model is None or not np.isfinite(expected).all():
        # There are no tensors to compare with, only what we report about the file.
        family = FAMILIES[architecture]
        try:
            family.read(mukv.hub.settings.Given(config, "config.json"))
        except BadInput:
            return NEITHER
        return OURS
    save_file(published(model), folder / "a.safetensors")  # tied ones once
    found = ours(folder, config, known)
    if found is None:
        return REFUSED
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < ROUNDING.get(architecture, 1e-4), f"{error:.1e}"
    return SAME


def compare_all(architecture, points, tmp_path, record_property):
    counts, wrong, known = Counter(), [], {}
    for number, changes in enumerate(points):
        try:
            counts[compare(architecture, changes, tmp_path / str(number), known)] += 1
        except Exception as error:
            shown = {key: "absent" if v is grid.ABSENT else v for key, v in changes.items()}
            wrong.append(f"{shown}: {type(error).__name__} {error}"[:500])
    record_property("counted", (f"configurations of {architecture}", dict(counts)))
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong[:20])
    return counts


@pytest.mark.product
@pytest.mark.parametrize("architecture", params(grid.FAMILIES, [*grid.FAMILIES][:1]))
def test_every_key_with_one_family(architecture, tmp_path, record_property):
    """Every point agrees in one of the families; `test_each_key` compares all."""
    turn = list(grid.FAMILIES).index(architecture)
    points = [each for i, each in enumerate(grid.single()) if (i + turn) % 6 == 0]
    counts = compare_all(architecture, points, tmp_path, record_property)
    assert counts[SAME] > 15


@pytest.mark.product
@pytest.mark.parametrize("architecture", grid.FAMILIES)
def test_each_key(architecture, tmp_path, record_property):
    counts = compare_all(architecture, grid.single(), tmp_path, record_property)
    assert counts[SAME] > 100


@pytest.mark.product
@pytest.mark.parametrize("architecture", grid.FAMILIES)
def test_sizes_that_are_left_out(architecture, tmp_path, record_property):
    counts = compare_all(architecture, grid.sizes(), tmp_path, record_property)
    assert counts[SAME] >= 3


@pytest.mark.product
@pytest.mark.parametrize("architecture", params(grid.FAMILIES, [*grid.FAMILIES][::3]))
@pytest.mark.parametrize(("count", "least"), params([(8, 0), (100, 20)], [(8, 0)], unpack=True))
def test_several_keys_at_once(architecture, count, least, tmp_path, record_property):
    points = grid.several(count, 0, architecture)
    counts = compare_all(architecture, points, tmp_path, record_property)
    assert counts[SAME] > least


@pytest.mark.parametrize("architecture", grid.FAMILIES)
def test_defaults_are_theirs(architecture):
    config = transformers.AutoConfig.for_model(grid.FAMILIES[architecture])
    rope = getattr(config, "rope_parameters", {})
    for key, value in FAMILIES[architecture].defaults.items():
        if key in ("rope_theta", "rope_local_base_freq"):
            kind = "sliding_attention" if "local" in key else "full_attention"
            assert rope.get(kind, rope)["rope_theta"] == value, key
        else:
            there = type(config).__dataclass_fields__.get(key)
            # A key that this family does not have is ignored by it.
            assert there is None or there.default == value, key
