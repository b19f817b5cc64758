"""`mukv import` and `mukv export` return the same model, and every command takes it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mukv as package
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.hub import FAMILIES, checkpoint
from mukv.hub.layout import planned
from mukv.model import Layer, Stage
from mukv.runs import config
from mukv.runs.exchange import export_model

pytestmark = pytest.mark.xdist_group("trained")


def told(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.product
def test_every_command_takes_an_imported_model(mukv, trained, folder, tmp_path):
    """A run, its export and the import of the export have the same loss, continuation and
    description."""
    (tmp_path / "text.txt").write_text("Déjà vu number 3. " * 9)
    facts = told(mukv("import", folder, "--out", tmp_path / "run", "--json"))
    assert facts["architecture"] == "LlamaForCausalLM"
    sources = trained, folder, tmp_path / "run"
    length = ("--length", 32, "--json")
    losses = [told(mukv("eval", s, "--text", tmp_path / "text.txt", *length)) for s in sources]
    assert losses[0] == losses[1] == losses[2]
    asked = ("--prompt", "Déjà", "--max-tokens", 9, "--json")
    texts = [told(mukv("generate", source, *asked))["token_ids"] for source in sources]
    assert texts[0] == texts[1] == texts[2]
    described = [told(mukv("describe", source, "--json")) for source in sources]
    assert described[1]["parameters"] == described[0]["parameters"] == facts["parameters"]
    assert described[2]["layers"] == described[0]["layers"]


@pytest.mark.product
@pytest.mark.parametrize("source", ["a folder", "a run"])
def test_training_begins_with_its_weights(mukv, folder, tmp_path, token_file, source):
    if source == "a run":
        told(mukv("import", folder, "--out", tmp_path / "run", "--json"))
        given = (tmp_path / "run", f"train.start={tmp_path / 'run'}")
    else:
        given = (folder,)
    step = ("train.steps=1", "train.learning_rate=1e-20", "train.batch=2", "train.length=32")
    tuned = tmp_path / "tuned"
    (given[0] / "chat_template.jinja").write_text(CHAT)
    told(mukv("train", *given, *step, f"data.path={token_file}", "--out", tuned, "--json"))
    before, after = (named(package.load(each).weights) for each in (folder, tuned))
    for name, leaf in after.items():
        np.testing.assert_allclose(leaf, before[name], atol=1e-9)
    assert package.load(tuned).encode_chat("hi") == [256, *b"[user] hi"]


def test_weights_are_read_in_blocks(folder, monkeypatch):
    found = checkpoint.open_checkpoint(folder)
    monkeypatch.setattr("mukv.hub.base.BLOCK_BYTES", 1 << 10)
    many = 0
    for piece in found.pieces:
        blocks = list(piece.blocks(found.source))
        np.testing.assert_array_equal(np.concatenate(blocks), piece.read(found.source))
        many += len(blocks) > 1
    assert many


def test_names_of_the_tokenizer_come_along(folder):
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["bos_token"] == "<|begin|>"
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == 256


@pytest.mark.product
def test_without_a_tokenizer_there_are_ids(mukv, folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    told(mukv("import", folder, "--out", tmp_path / "run", "--json"))
    np.save(tmp_path / "ids.npy", np.arange(40))
    for source in (folder, tmp_path / "run"):
        found = told(mukv("eval", source, "--tokens", tmp_path / "ids.npy", "--json"))
        assert found["bits_per_byte"] is None
        asked = ("generate", source, "--token-ids", "1,2", "--max-tokens", 3, "--json")
        assert len(told(mukv(*asked))["token_ids"]) == 3
    done = mukv("generate", tmp_path / "run", "--prompt", "a")
    assert done.returncode == 2
    assert "no tokenizer.json" in done.stderr


@pytest.mark.product
def test_a_text_ends_where_the_model_says(mukv, folder, tmp_path):
    asked = ("--token-ids", "256,68", "--max-tokens", 12, "--json")
    free = told(mukv("generate", folder, *asked))["token_ids"]
    end = free[2]
    said = {"eos_token_id": [end, 5]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    told(mukv("import", folder, "--out", tmp_path / "run", "--json"))
    for source in (folder, tmp_path / "run"):
        found = told(mukv("generate", source, *asked))["token_ids"]
        assert found == free[: free.index(end) + 1]
    assert told(mukv("generate", folder, *asked, "--stop", 5))["token_ids"] == free


def test_default_end_token(folder):
    """A model without an end token gets that of its family, 2 for Llama as in transformers; null is
    kept."""
    (folder / "generation_config.json").unlink()
    assert package.load(folder).ends == ()  # null means: no end token
    path = folder / "config.json"
    said = json.loads(path.read_text())
    del said["eos_token_id"]
    path.write_text(json.dumps(said))
    assert package.load(folder).ends == (2,)


def test_an_export_names_all_special_tokens(folder):
    assert {"bos_token_id", "eos_token_id", "pad_token_id"} <= json.loads(
        (folder / "config.json").read_text()
    ).keys()


def test_a_type_that_does_not_hold_the_numbers_is_refused(trained, tmp_path):
    model = package.load(trained)
    large = {**model.weights, "embedding": model.weights["embedding"].at[0, 0].set(1e6)}
    for dtype in ("float16", "bfloat16"):
        given = (replace(model, weights=large), trained, tmp_path / dtype, dtype)
        if dtype == "float16":
            with pytest.raises(BadInput, match=r"--dtype: got 'float16'.*embedding"):
                export_model(*given)
        else:
            export_model(*given)
        assert (tmp_path / dtype).exists() == (dtype == "bfloat16")


CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.mark.product
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_message_is_put_as_the_template_says(mukv, folder, tmp_path, place):
    pytest.importorskip("jinja2")
    if place.endswith("jinja"):
        (folder / place).write_text(CHAT)
    else:
        settings = {"bos_token": {"content": "<|begin|>"}, "chat_template": CHAT}
        (folder / place).write_text(json.dumps(settings))
    told(mukv("import", folder, "--out", tmp_path / "run", "--json"))
    expected = [256, *b"[user] hi"]
    assert package.load(tmp_path / "run").encode_chat("hi") == expected
    ids = ",".join(map(str, expected))
    said = told(mukv("generate", folder, "--chat", "--prompt", "hi", "--max-tokens", 4, "--json"))
    same = told(mukv("generate", folder, "--token-ids", ids, "--max-tokens", 4, "--json"))
    assert said["token_ids"] == same["token_ids"]
    # A line separates the prompt from the answer.
    for more in ((), ("--copies", 2)):
        asked = ("generate", folder, "--chat", "--prompt", "hi", "--max-tokens", 4)
        shown = mukv(*asked, *more).stdout
        assert "hi\n---\n" in shown
        assert shown.count("\n---\n") == (2 if more else 1)


UNFIT = {
    "tiny-dsa": ("attention.indexer", "DeepseekV3ForCausalLM has None"),
    "tiny-shared-kv": ("attention.kind", "shared_kv"),
    "tiny-alibi": ("position.kind", "alibi"),
    "tiny-hybrid": ("position.kind", "nope"),
    "tiny-sinks": ("attention.sinks", "learned"),
    "tiny-reuse": ("plan: reads", "True"),
    "tiny model.attention.eviction.window=8": ("model.attention.eviction: got", "has None"),
}


@pytest.mark.parametrize("preset", UNFIT)
def test_models_that_transformers_lacks_are_refused(trained, tmp_path, preset):
    model = package.load(trained)
    name, *overrides = preset.split()
    other = replace(model, run=config.load(name, overrides))
    with pytest.raises(BadInput) as error:
        export_model(other, trained, tmp_path / "out")
    for words in UNFIT[preset]:
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("preset", "architecture"),
    [
        ("tiny", "LlamaForCausalLM"),
        ("tiny-mha", "LlamaForCausalLM"),
        ("llama-3.2-1b", "LlamaForCausalLM"),
        ("gemma-2-9b", "Gemma2ForCausalLM"),
        ("tiny-mla", "DeepseekV3ForCausalLM"),
    ],
)
def test_the_first_fitting_architecture(preset, architecture):
    model = config.load(preset).model
    fitting = [name for name, family in FAMILIES.items() if not list(family.misfits(model))]
    assert fitting[0] == architecture


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([4, None] * 3, [(2, 3)]),
        ([4, 4, None] * 2 + [4, 4], [(3, 2), (1, 2)]),
        ([None] * 3 + [4] * 2, [(1, 3), (1, 2)]),
        ([None, 4, 5], [(3, 1)]),
        ([4], [(1, 1)]),
    ],
)
def test_layers_are_written_as_the_shortest_plan(windows, expected):
    layers = [Layer(window=window) for window in windows]
    stages = planned(layers)
    assert [(len(stage.pattern), stage.repeats) for stage in stages] == expected
    assert [layer for s in stages for _ in range(s.repeats) for layer in s.pattern] == layers
    assert all(isinstance(stage, Stage) for stage in stages)


# Bad input


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(folder):
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(9000)


NORM = "model.norm.weight"
FIRST = "model.layers.0.input_layernorm.weight"
WRONG = {
    "unknown architecture": (
        lambda f: change_config(f, architectures=["LlamaForCausalML"]),
        ["config.json: architectures", "LlamaForCausalML", "Gemma2ForCausalLM", "did you mean"],
    ),
    "no architecture": (
        lambda f: change_config(f, architectures=None),
        ["architectures", "LlamaForCausalLM"],
    ),
    "unknown rope": (
        lambda f: change_config(f, rope_scaling={"rope_type": "longrope"}),
        ["rope_scaling: rope_type", "longrope", "llama3"],
    ),
    "dynamic rope": (
        lambda f: change_config(f, rope_scaling={"type": "dynamic", "factor": 2.0}),
        ["rope_scaling: type", "dynamic"],
    ),
    "rope without a factor": (
        lambda f: change_config(f, rope_scaling={"rope_type": "llama3"}),
        ["rope_scaling: factor", "required"],
    ),
    "activation": (
        lambda f: change_config(f, hidden_act="relu"),
        ["hidden_act", "relu", "silu"],
    ),
    "a missing key": (
        lambda f: change_config(f, hidden_size=None),
        ["config.json: hidden_size", "required"],
    ),
    "a key of another type": (
        lambda f: change_config(f, num_hidden_layers="2"),
        ["num_hidden_layers", "whole number"],
    ),
    "biases of the MLP": (lambda f: change_config(f, mlp_bias=True), ["mlp_bias", "True"]),
    "no layers": (lambda f: change_config(f, num_hidden_layers=0), ["num_hidden_layers", "0"]),
    "heads that don't divide": (
        lambda f: change_config(f, num_attention_heads=3, num_key_value_heads=2),
        ["kv_heads", "must divide"],
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "missing tensor": (
        lambda f: change_weights(f, lambda tensors: tensors.pop(NORM)),
        [NORM, "missing"],
    ),
    "unexpected tensor": (
        lambda f: change_weights(f, lambda tensors: tensors.update(new=tensors[NORM])),
        ["new", "no such tensor"],
    ),
    "another shape": (
        lambda f: change_weights(f, lambda tensors: tensors.update({NORM: np.ones(3, "f4")})),
        [NORM, "[3]", "[32]"],
    ),
    "another type": (
        lambda f: change_weights(f, lambda tensors: tensors.update({NORM: np.ones(32, "i4")})),
        [NORM, "I32", "BF16"],
    ),
    "types that differ": (
        lambda f: change_weights(f, lambda t: t.update({FIRST: t[FIRST].astype("f2")})),
        ["attention_norm.gain", "float16", "one type"],
    ),
    "another head": (
        lambda f: change_config(f, tie_word_embeddings=True),
        ["lm_head.weight", "tie_word_embeddings"],
    ),
    "missing shard": (shard, ["a.safetensors", "no such file"]),
    "no index": (
        lambda f: (f / "b.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
        ["2 .safetensors files", "index"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["0 .safetensors files"]),
    "truncated": (truncate, ["model.safetensors", "cut short"]),
    "another tokenizer": (
        lambda f: change_config(f, vocab_size=200),
        ["embed_tokens", "[264, 32]"],
    ),
    "a tokenizer that is none": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ["tokenizer.json"],
    ),
}


@pytest.mark.product
@pytest.mark.parametrize("case", WRONG)
def test_errors_of_damaged_folders(mukv, folder, tmp_path, case):
    damage, words = WRONG[case]
    damage(folder)
    done = mukv("import", folder, "--out", tmp_path / "run")
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert [word for word in words if word not in error] == [], error
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_too_small_for_the_tokenizer(mukv, folder, tmp_path):
    change_config(folder, vocab_size=200)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_weights(folder, lambda tensors: tensors.update({n: tensors[n][:200] for n in names}))
    done = mukv("import", folder, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "257 ids" in done.stderr
    assert "another model's tokenizer" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("import", "foldr", "--out", "new"), ["SOURCE", "foldr", "did you mean 'folder'"]),
        (("import", "folder", "--out", "folder"), ["--out", "not in use"]),
        (("export", "foldr", "--out", "new"), ["MODEL", "hub id"]),
        (("export", "folder", "--out", "folder"), ["--out", "not in use"]),
        (("export", "folder", "--out", "new", "--dtype", "float"), ["--dtype", "did you mean"]),
        (("generate", "folder", "--chat", "--prompt", "a"), ["--chat", "chat_template.jinja"]),
        (("generate", "folder", "--chat", "--token-ids", "1"), ["--chat", "--prompt"]),
        (("eval", "folder", "--text", "a.txt", "--stride", "0"), ["--stride", "at least 1"]),
        (("train", "folder", "train.start=nowhere"), ["train.start", "nowhere"]),
    ],
)
def test_bad_arguments(mukv, folder, tmp_path, monkeypatch, token_file, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text of a few words")
    if args[0] == "train":
        args = (*args, f"data.path={token_file}", "train.length=32", "--out", "tuned")
    done = mukv(*args)
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert [word for word in words if word not in error] == [], error
    assert not (tmp_path / "new").exists()
