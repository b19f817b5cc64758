"""An exported model is the same model in transformers and in mukv, or the export is refused.

Models are drawn from the configuration space of mukv: one that an architecture of transformers has,
with up to three fields exchanged for values of other models.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mukv
from mukv.attention import Grouped, Indexer, Latent, SharedKV
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.data.tokenizer import NoTokenizer
from mukv.model import Decoder, Layer, Stage
from mukv.model.block import Gated, PostNorm, PreNorm, SandwichNorm
from mukv.model.experts import Experts
from mukv.model.layer_inputs import LayerInputs
from mukv.model.mlp_and_experts import MLPAndExperts
from mukv.position import NTK, ALiBi, LinearScaling, Llama3, NoPE, RoPE, YaRN
from mukv.runs.config import Run
from mukv.runs.exchange import export_model
from mukv.runs.loaded import Model
from mukv.scaling.parameterization import Scaling, sizes
from mukv.train.training import Training
from tests.laws.matrix import EXACT
from tests.parity.models import logits, our_logits, torch, transformers

VOCAB = 31
IDS = np.random.default_rng(0).integers(0, VOCAB, (1, 20))
WIDTHS = {"embed": 8, "heads": 2, "head_dim": 4, "value_dim": 4, "hidden": 12, "layer": 1}
WIDTHS |= {"query_dim": 7, "latent": 5, "query_latent": 6}
WIDTHS |= {"inputs": 8, "input_width": 3}
WIDTHS |= {"expert_hidden": 6, "shared_hidden": 9}
"""Sizes that the parameterisations scale from; a model has some of these dimensions."""
SCALINGS = [
    None,
    LinearScaling(factor=4.0),
    Llama3(factor=4.0, original_length=8),
    YaRN(factor=4.0, original_length=16, fast=4.0),
    YaRN(factor=2.0, original_length=16, temperature="none"),
    YaRN(factor=1.0, original_length=4),
    YaRN(factor=8.0, original_length=9_000_000),
    YaRN(factor=2.0, original_length=16, temperature="logits"),
    YaRN(factor=2.0, original_length=16, rounded=False),
    NTK(factor=2.0),
]
ROPES = [RoPE(base=base, scaling=each) for each in SCALINGS for base in (100.0, 1e4)]
TURNED = [RoPE(base=50.0, pairing="interleaved"), ROPES[3], ROPES[0]]
ALL = ("query", "key", "value", "output")
LOCAL, FAST = Layer(window=5), Layer(window=5, position=RoPE(base=30.0))
SLOWED = Layer(window=5, position=RoPE(base=30.0, scaling=LinearScaling(factor=8.0)))
YARNED = Layer(window=5, position=RoPE(base=30.0, scaling=SCALINGS[3]))
TURNED_LOCAL = Layer(window=5, position=RoPE(base=30.0, pairing="interleaved"))
WIDE = Gated(hidden=48, activation="gelu")
NORMED = {"heads": 4, "kv_heads": 1, "head_dim": 16, "norm": RMSNorm()}
NARROW = Grouped(**NORMED, norm_values=True, position=RoPE(base=1e5, p=0.5))
EQUAL = SharedKV(**NORMED, position=RoPE(base=1e5, p=0.25, scaling=LinearScaling(factor=2.0)))
PLANS = {
    "plain": (Stage(repeats=3),),
    "window": (Stage((LOCAL,), 2),),
    "local-global": (Stage((LOCAL, Layer()), 2),),
    "last local": (Stage(repeats=2), Stage((LOCAL,))),
    "fast local": (Stage((FAST, FAST, Layer())),),
    "slowed local": (Stage((SLOWED, Layer()), 2),),
    "yarned local": (Stage((YARNED, Layer(), YARNED)),),
    "all slowed": (Stage((SLOWED,), 2),),
    "fast global": (Stage((LOCAL, Layer(position=RoPE(base=1e5)))),),
    "turned local": (Stage((TURNED_LOCAL, Layer())),),
    "two windows": (Stage((LOCAL, Layer(window=3), Layer())),),
    "two ropes": (Stage((FAST, LOCAL, Layer())),),
    "first dense": (Stage((Layer(mlp=Gated(hidden=20)),)), Stage(repeats=2)),
    "reuse": (Stage((Layer(), Layer(reads=-1))),),
    "two MLPs": (Stage((Layer(), Layer(mlp=Gated(hidden=20)))),),
    "hybrid": (Stage((LOCAL, Layer(position=NoPE()))),),
    "last readers": (
        Stage((LOCAL, Layer())),
        Stage((Layer(window=5, reads=0), Layer(reads=1)), 2),
    ),
    "wide readers": (
        Stage((Layer(), LOCAL, Layer())),
        Stage((Layer(window=5, reads=1, mlp=WIDE), Layer(reads=2, mlp=WIDE))),
    ),
    "own heads": (Stage((LOCAL, Layer(attention=NARROW)), 2),),
    "equal": (Stage((LOCAL, Layer(attention=EQUAL)), 2),),
    "equal readers": (Stage((Layer(attention=EQUAL), Layer(attention=EQUAL, reads=-1))),),
    "two attentions": (
        Stage((Layer(), Layer(attention=Grouped(heads=2, kv_heads=1, head_dim=8)))),
    ),
}
"""Plans, some of which no config.json can express."""
OFFSET = RMSNorm(stored="offset")
GEMMA = {"norm": OFFSET, "residual": SandwichNorm(), "embedding_scale": "root_width",
         "readout": "tied", "mlp": Gated(hidden=24, activation="gelu")}  # fmt: skip
CLAMPED = Experts(
    experts=4, hidden=12, activation="quick_gelu", limit=0.9, up_offset=1.0, biases=True
)
SIGMOID = Experts(
    experts=8,
    top_k=3,
    hidden=12,
    shared=1,
    router="sigmoid",
    scale=1.5,
    groups=4,
    top_groups=2,
    choice_bias=True,
)
SOFTMAX = Experts(
    experts=6,
    top_k=2,
    hidden=12,
    shared=2,
    normalise=False,
    scale=2.0,
    groups=3,
    top_groups=2,
    group_best=1,
)
GEMMA4 = {**GEMMA, "norm": RMSNorm(), "residual": SandwichNorm(layer_scale=True),
          "layer_inputs": LayerInputs(6, embedding_scale="root_width")}  # fmt: skip
BESIDE = MLPAndExperts(
    mlp=Gated(hidden=24, activation="gelu"),
    experts=Experts(experts=4, hidden=12, activation="gelu", expert_scale=True),
    router_scale=24**-0.5,
)
OVER_ALL = {"norm": RMSNorm(), "norm_over": "projection"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "Llama": ({}, {}, ("plain",)),
    "Mistral": ({}, {}, ("window", "plain")),
    "Qwen2": ({"biases": ("query", "key", "value")}, {}, ("local-global", "last local", "plain")),
    "Qwen3": ({"norm": RMSNorm()}, {}, ("local-global", "plain")),
    "Gemma2": ({"softcap": 2.0}, {**GEMMA, "logit_softcap": 3.0}, ("local-global",)),
    "Gemma3": ({"norm": OFFSET}, GEMMA, ("fast local", "slowed local", "yarned local", "plain")),
    "Gemma4": (
        {"norm": RMSNorm(), "norm_values": True},
        GEMMA4,
        ("local-global", "last readers", "wide readers", "own heads", "equal"),
    ),
    "Olmo2": (OVER_ALL, {"residual": PostNorm()}, ("plain",)),
    "Olmo3": (OVER_ALL, {"residual": PostNorm()}, ("local-global", "fast local", "slowed local")),
    "GptOss": ({"sinks": "learned", "biases": ALL}, {"mlp": CLAMPED}, ("local-global", "plain")),
    "DeepseekV3": ({}, {"mlp": SIGMOID}, ("plain", "first dense")),
    "DeepseekV2": ({}, {"mlp": SOFTMAX}, ("plain", "first dense")),
}
"""For each architecture: changes of the attention and of the model, and names of plans."""
PLACES = [*ROPES, *TURNED, *ROPES, *TURNED, RoPE(p=0.5), RoPE(partial=0.5), ALiBi(), NoPE()]
GROUPED = {"heads": 4, "kv_heads": 2, "head_dim": 8, "position": ROPES[1]}
LATENT = {"heads": 4, "rank": 10, "head_dim": 6, "rope_dim": 8, "head_value_dim": 5}
LATENT |= {"query_rank": 12, "position": ROPES[1]}
ATTENTION: Mapping[str, list[Any]] = {
    "heads": [2, 3, 6],
    "kv_heads": [1, 2],
    "head_dim": [6, 10, 32],
    "scale": [0.3, 8**-0.5, 24**-0.5, 1.0, 3.0],
    "softcap": [None, 1.5],
    "sinks": ["learned"],
    "biases": [(), ALL, ALL[::-1], ALL[:3], ALL[2::-1], ("query",), ("output",)],
    "norm": [None, RMSNorm(), OFFSET, RMSNorm(epsilon=1e-3)],
    "norm_values": [True],
    "position": PLACES,
}
LATENTS: Mapping[str, list[Any]] = {
    "heads": [2, 3],
    "rank": [7],
    "head_dim": [4],
    "rope_dim": [4],
    "rope_parts": [2],
    "head_value_dim": [None, 8],
    "query_rank": [None, None, 7],
    "scale": [0.3, 14**-0.5, 1.0],
    "softcap": [1.5],
    "sinks": ["learned"],
    "gate": ["head"],
    "indexer": [Indexer(heads=2, width=8, top_k=3)],
    "norm": [None, RMSNorm(epsilon=1e-3)],
    "position": PLACES,
}
"""Values that fields of the attention are exchanged for."""
MODEL: Mapping[str, list[Any]] = {
    "d_model": [12, 20],
    "mlp": [
        Gated(hidden=7),
        Gated(hidden=24, activation="gelu"),
        replace(CLAMPED, top_k=1, normalise=False),
        replace(CLAMPED, capacity=1.0),
        *(BESIDE, replace(BESIDE, router_scale=1.0)),
        *(SIGMOID, SOFTMAX, replace(SIGMOID, choice_bias=False), replace(SIGMOID, shared=0)),
        replace(SIGMOID, normalise=False, groups=1, top_groups=1, activation="gelu"),
        *(replace(SOFTMAX, group_best=2), replace(SOFTMAX, groups=1, top_groups=1, scale=1.0)),
    ],
    "norm": [RMSNorm(epsilon=1e-2), OFFSET, RMSNorm()],
    "residual": [PreNorm(), PostNorm(), SandwichNorm(), SandwichNorm(layer_scale=True)],
    "layer_inputs": [None, LayerInputs(4), LayerInputs(4, "silu", "root_width")],
    "embedding_scale": [None, "root_width"],
    "readout": ["linear", "tied"],
    "logit_softcap": [None, 1.5],
    "context": [7, 4096],
    "scaling": [Scaling(kind="mup"), Scaling(kind="mup", depth=0.7)],
    "plan": [*PLANS.values()],
}


def drawn(draw: random.Random, architecture: str | None = None, most: int = 3) -> Decoder | None:
    """Draw a model of an architecture, or of any, and exchange at most this number of fields; None
    if the combination is not a valid model."""
    architecture = architecture or draw.choice([*KINDS])
    attention, model, plans = KINDS[architecture]
    latent = architecture.startswith("Deepseek")
    usual, exchanged = (LATENT, LATENTS) if latent else (GROUPED, ATTENTION)
    attention = {**usual, **attention}
    model = {"plan": PLANS[draw.choice(plans)], "mlp": Gated(hidden=24), **model}
    if draw.random() < 0.5:
        attention["position"] = draw.choice(ROPES[:12])
    for _ in range(draw.randint(0, most)):
        fields, table = draw.choice([(attention, exchanged), (model, MODEL)])
        key = draw.choice([*table])
        fields[key] = draw.choice(table[key])
    if not latent and attention["heads"] % attention["kv_heads"]:
        attention["kv_heads"] = 1
    scaling = model.pop("scaling", None)
    try:
        shared = Latent(**attention) if latent else Grouped(**attention)
        made = Decoder(vocab_size=VOCAB, **{"d_model": 24, **model}, attention=shared)
        if scaling:
            base = {name: WIDTHS[name] for name in [*sizes(made.params()), "layer"]}
            made = replace(made, scaling=replace(scaling, base=base))
        return made
    except BadInput:
        return None


def weights(model: Decoder) -> Any:
    """Draw random weights, none at its initial value."""
    noise = np.random.default_rng(1)

    def draw(param: Any) -> Any:
        scale = 0.2 if param.role == "vector" else max(param.fan_in_size, 1) ** -0.5
        values = scale * noise.standard_normal(param.shape) + (param.init == "ones")
        return jnp.asarray(values, "float32")

    return map_params(draw, model.params())


ROUNDING = {"Gemma4ForCausalLM": 1e-4}
"""Tolerance of logits, relative to the largest, where 1e-5 is too little. Weights of a Gemma 4 that
are changed by a factor of 1 + 6e-8 n, n drawn from a normal distribution, change transformers' own
logits by 3.6e-5."""


def exported(model: Decoder, out: Path) -> str:
    """Export a model and compare it; return the architecture, or "refused"."""
    training = Training(compute=EXACT, length=min(32, model.context or 32))
    ours = Model(Run(model=model, train=training), weights(model), NoTokenizer())
    try:
        told = export_model(ours, out.parent / "nowhere", out)
    except BadInput as error:
        if out.exists() or not error.where.startswith("model."):
            raise
        return "refused"
    expected = our_logits(ours, IDS)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == told["architecture"]
    again = mukv.load(out)
    again = replace(again, run=replace(again.run, train=training))
    for words, found in (("theirs", logits(theirs.eval(), IDS)), ("ours", our_logits(again, IDS))):
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < ROUNDING.get(told["architecture"], 1e-5), f"{words}: {error:.1e}"
    return told["architecture"]


def check(count: int, seed: int, tmp_path: Path, record_property: Any) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    draw, counts, wrong, seen = random.Random(seed), Counter(), [], set()
    first = [*KINDS]
    while len(seen) < count:
        # At first one model of each architecture as it is.
        model = drawn(draw, first.pop(), 0) if first else drawn(draw)
        if model is None or model in seen:
            continue
        seen.add(model)
        try:
            counts[exported(model, tmp_path / str(len(seen)))] += 1
        except Exception as error:
            wrong.append(f"{model}: {type(error).__name__} {error}")
    record_property("counted", ("exports", dict(counts)))
    assert not wrong, f"{len(wrong)} wrong of {counts}\n" + "\n".join(wrong[:8])
    assert counts.keys() >= {f"{kind}ForCausalLM" for kind in KINDS}


@pytest.mark.product
def test_every_export_is_the_model_or_refused(tmp_path, record_property):
    check(36, 0, tmp_path, record_property)


@pytest.mark.product
@pytest.mark.parametrize("seed", range(1, 3))
def test_more_exports(tmp_path, record_property, seed):
    check(200, seed, tmp_path, record_property)


def test_fields_that_a_config_cannot_express_are_named(tmp_path):
    """The error names the field of mukv's configuration."""
    plain = Decoder(vocab_size=VOCAB, attention=Grouped(position=RoPE()))
    shared = replace(plain, attention=SharedKV(position=RoPE()))
    scaled = {
        "attention.position.scaling": NTK(factor=2.0),
        "attention.position.scaling.temperature": SCALINGS[-3],
    }
    models = {
        name: replace(plain, attention=Grouped(position=RoPE(scaling=each)))
        for name, each in scaled.items()
    }
    models |= {"attention.kind": shared, "plan: reads": replace(plain, plan=PLANS["reuse"])}
    for name, model in models.items():
        ours = Model(Run(model=model), weights(model), NoTokenizer())
        with pytest.raises(BadInput) as error:
            export_model(ours, tmp_path / "nowhere", tmp_path / "out")
        assert error.value.where == f"model.{name}"
