"""A model that was trained here and exported gives the same logits in transformers, under every
parameterisation."""

from __future__ import annotations

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import mukv
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.data.tokenizer import NoTokenizer
from mukv.model.block import SandwichNorm, Ungated
from mukv.model.experts import Experts
from mukv.position import NoPE, RoPE
from mukv.runs.config import Run
from mukv.runs.exchange import export_model, import_model
from mukv.runs.loaded import Model
from mukv.scaling.parameterization import Scaling
from mukv.train.training import Training
from tests.conftest import command
from tests.laws import matrix
from tests.parity.models import logits, torch, transformers

pytestmark = pytest.mark.xdist_group("trained")

HEADS = {"embed": 4, "heads": 2, "head_dim": 2, "value_dim": 2, "layer": 1}
BASE = HEADS | {"hidden": 6}
ROUTED = Scaling(kind="mup", base=HEADS | {"expert_hidden": 6}, depth=0.7)
LATENTS = Scaling(
    kind="mup",
    base={
        **{"embed": 4, "heads": 2, "value_dim": 2, "query_dim": 4, "latent": 3, "query_latent": 3},
        **{"expert_hidden": 6, "shared_hidden": 6, "layer": 1},
    },
    depth=0.7,
)
SCALED = {"scaling": Scaling(kind="mup", base=BASE, depth=0.7), "readout": "tied"}
ALL = ("query", "key", "value", "output")
FAST = RoPE(base=100.0, pairing="interleaved")
GEMMA = {
    "norm": RMSNorm(stored="offset"),
    "residual": SandwichNorm(),
    "embedding_scale": "root_width",
    "logit_softcap": 3.0,
    "scaling": Scaling(kind="mup", base=BASE),
}
CLAMPED = Experts(
    experts=4, hidden=12, activation="quick_gelu", limit=0.9, up_offset=1.0, biases=True
)
GROUPED = Experts(
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
SOFTMAX = {"router": "softmax", "normalise": False, "choice_bias": False, "group_best": 1}
MODELS = {
    "llama": ("plain", {"scale": 0.3, "position": FAST}, SCALED),
    "llama-untied": ("plain", {"position": FAST}, {**SCALED, "readout": "linear"}),
    "mistral": ("window", {}, SCALED),
    "qwen-2": ("plain", {"biases": ("query", "key", "value"), "scale": 0.3}, SCALED),
    "qwen-3": ("local-global", {"norm": RMSNorm(), "scale": 0.3, "position": FAST}, SCALED),
    "gemma-2": ("local-global", {"scale": 0.3, "softcap": 2.0}, {**GEMMA, "readout": "tied"}),
    "gemma-2-untied": ("plain", {"scale": 0.3}, GEMMA),
    "gemma-3": ("local-global", {"norm": RMSNorm(stored="offset")}, {**GEMMA, "readout": "tied"}),
    "gpt-oss": (
        "local-global",
        {"sinks": "learned", "biases": ALL, "scale": 0.3, "position": FAST},
        {"scaling": ROUTED, "readout": "tied", "mlp": CLAMPED},
    ),
    "deepseek": ("plain", {"scale": 0.3}, {"scaling": LATENTS, "mlp": GROUPED}),
    "deepseek-softmax": (
        "plain",
        {"scale": 0.3},
        {"scaling": LATENTS, "mlp": replace(GROUPED, **SOFTMAX)},
    ),
    "deepseek-dense": (
        "plain",
        {"query_rank": None, "scale": 0.3, "position": FAST},
        {"readout": "tied"},
    ),
    "gpt-2": (
        "plain",
        {"kv_heads": 4, "head_dim": 4, "scale": 0.3, "position": NoPE(), "biases": ALL},
        {
            **SCALED,
            "norm": RMSNorm(centred=True),
            "mlp": Ungated(hidden=24, biases=True),
            "positions": "learned",
            "context": 256,
        },
    ),
}
"""Plan, changes of the attention, changes of the model: all that an export folds into weights."""


@pytest.mark.product
@pytest.mark.parametrize("name", MODELS)
def test_what_is_scaled_is_folded_into_the_weights(name, tmp_path):
    plan, attention, changes = MODELS[name]
    # A config.json has one rotation for all layers.
    kind = "latent" if name.startswith("deepseek") else "gqa"
    model = matrix.build(kind, "rope", plan, **changes)
    shared = replace(model.attention, **attention)
    model = replace(model, attention=shared, plan=matrix.PLANS[plan])
    weights = map_params(lambda _, leaf: jnp.asarray(leaf), model.params(), matrix.weights(model))
    ours = Model(Run(model=model, train=Training(compute=matrix.EXACT)), weights, NoTokenizer())
    told = export_model(ours, tmp_path / "nowhere", tmp_path / "out")
    assert told["architecture"].lower().startswith(name.replace("-untied", "").split("-")[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = matrix.tokens()
    expected = np.asarray(ours.logits(ids))
    np.testing.assert_allclose(logits(theirs, ids), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.product
def test_a_trained_model_is_the_same_there(trained, token_file, tmp_path):
    """Tokens, logits and perplexity are those in transformers, with its tokenizer made from
    ours."""
    assert command("export", trained, "--out", tmp_path / "out").returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, text = mukv.load(trained), "Déjà vu number 7. " * 3
    ids = np.array([ours.encode(text)])
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    np.testing.assert_allclose(logits(theirs, ids), ours.logits(ids), atol=1e-4)
    (tmp_path / "text.txt").write_text(text)
    done = command("eval", trained, "--text", tmp_path / "text.txt", "--length", 64, "--json")
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        loss = theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.product
def test_perplexity_with_a_stride(trained, tmp_path):
    """Perplexity equals that with the windows of transformers' guide, where the overlap with the
    window before is only context."""
    assert command("export", trained, "--out", tmp_path / "out").returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours, length, stride, done, nats = mukv.load(trained), 20, 7, 1, 0.0
    row = np.array(ours.encode("Déjà vu number 7. " * 3))
    for begin in range(0, len(row), stride):
        # A window of transformers contains its last target.
        end = min(begin + length + 1, len(row))
        labels = row[begin:end].copy()
        labels[: done - begin] = -100
        with torch.inference_mode():
            given = torch.tensor(row[None, begin:end]), torch.tensor(labels[None])
            nats += float(theirs(given[0], labels=given[1]).loss) * (end - done)
        done = end
        if end == len(row):
            break
    found = ours.evaluate([row], length, stride)
    assert found.tokens == len(row) - 1
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)


CHAT = """{%- if not bos_token is defined %}{{ raise_exception('no begin') }}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n\n' }}{%- endif %}
"""


def test_conversations_are_encoded_as_in_transformers(trained, tmp_path):
    assert command("export", trained, "--out", tmp_path / "out").returncode == 0
    (tmp_path / "out" / "chat_template.jinja").write_text(CHAT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = " Déjà <|begin|> vu? "
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
    )
    assert mukv.load(tmp_path / "out").encode_chat(message) == expected


META = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16}


@pytest.mark.parametrize("tied", [False, True])
def test_metas_own_files(tmp_path, monkeypatch, tied):
    """Two model-parallel files with Meta's names and interleaved rotation give the model of the
    Hugging Face folder."""
    from tests.parity.models import LLAMA3, TINY, build, saved

    scaling = {**LLAMA3, "factor": 32.0 if tied else 8.0, "original_max_position_embeddings": 8192}
    fields = {**TINY, "intermediate_size": 96, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    theirs = build("Llama", {**fields, "vocab_size": 98, "rope_parameters": scaling})
    folder = saved(theirs, tmp_path / "theirs")
    names = {"embed_tokens": "tok_embeddings", "norm": "norm"}
    names |= {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2"}
    names |= {"mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    parts: list[dict] = [{}, {}]
    for name, weight in theirs.state_dict().items():
        if name == "lm_head.weight":
            target = "output.weight"
        else:
            inner = name.removeprefix("model.").removesuffix(".weight")
            layer, dot, rest = inner.partition("layers.")[2].partition(".")
            key = names[rest if dot else inner]
            target = f"layers.{layer}.{key}.weight" if dot else f"{key}.weight"
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.reshape(-1, 2, 4, 32)  # heads of two halves of four pairs
            weight = halves.transpose(1, 2).reshape(weight.shape)
        axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        whole = weight.ndim == 1
        for part, piece in zip(parts, weight.chunk(2, axis), strict=True):
            part[target] = weight if whole else piece.clone()
        for part in parts:
            part["rope.freqs"] = torch.ones(4)
    meta = tmp_path / "meta"
    meta.mkdir()
    for number, part in enumerate(parts):
        torch.save(part, meta / f"consolidated.{number:02}.pth")
    said = {**META, "rope_theta": 10_000.0, "use_scaled_rope": True, "norm_eps": 1e-5}
    (meta / "params.json").write_text(json.dumps({**said, "vocab_size": -1}))
    import_model(str(folder), tmp_path / "one")
    # In blocks of a few rows, some of which lie in both files.
    monkeypatch.setattr("mukv.hub.base.BLOCK_BYTES", 1 << 10)
    import_model(str(meta), tmp_path / "two")
    files = [tmp_path / each / "weights/weights.safetensors" for each in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    one, two = (mukv.load(tmp_path / each).network for each in ("one", "two"))
    assert replace(two, context=one.context) == one
