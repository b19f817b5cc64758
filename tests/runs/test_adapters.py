"""Runs that train adapters: adapters are saved without their base, and merged with it when a model
is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mukv as package
from mukv.core.params import named
from mukv.data.tokens import open_tokens
from mukv.runs.folder import RunDirectory
from mukv.storage.weights import load_weights, save_weights
from tests.conftest import Command
from tests.pairs import params
from tests.parity.models import logits, torch, transformers

pytestmark = pytest.mark.xdist_group("trained")

ADAPTER = ("train.adapter.rank=4", "train.adapter.alpha=6")
FEW = (
    *("train.steps=6", "train.batch=2", "train.length=32", "train.checkpoint_every=2"),
    *("train.keep_last=3", "train.validation_batches=1", "train.learning_rate=0.02"),
)


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory) -> Path:
    """Return the model whose weights the adapters change. Tests must not write to it."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def made(mukv: Command, base, tmp_path_factory) -> Path:
    """Return a run that trained adapters. Tests must not write to it."""
    out = tmp_path_factory.mktemp("adapted") / "adapted"
    done = mukv("train", base, f"train.start={base}", *ADAPTER, *FEW, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "0 of" not in done.stderr
    return out


@pytest.fixture
def adapted(made, tmp_path) -> Path:
    """Return a copy of the run `made`, which tests may write to."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_adapters_are_saved_apart(made, base, trained):
    own, metadata = load_weights(made / "weights")
    assert metadata["step"] == "6"
    assert {name.rpartition(".")[2] for name in named(own)} == {"a", "b"}
    inside = ("mlp.down", "mlp.gate", "mlp.up", "read.output", "read.query", "write.key")
    names = {f"stage0.slot0.{name}" for name in (*inside, "write.value")}
    assert {name.rpartition(".")[0] for name in named(own)} == names
    assert (base / "weights/weights.safetensors").read_bytes() == (
        trained / "weights/weights.safetensors"
    ).read_bytes()
    saved = json.loads((made / "checkpoints/6/manifest/metadata").read_text())["leaves"]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(own))
    shapes = [json.loads(text[text.index("[") :]) for text in saved.values()]
    assert sum(int(np.prod(shape)) for shape in shapes) == 3 * numbers + 2


def test_loaded_weights_are_merged(made, base):
    own, below = named(load_weights(made / "weights")[0]), named(package.load(base).weights)
    found = named(package.load(made).weights)
    assert found.keys() == below.keys()
    for name, leaf in found.items():
        expected = np.asarray(below[name])
        if f"{name}.a" in own:
            a, b = own[f"{name}.a"], own[f"{name}.b"]
            flat = a.reshape(len(a), -1, 4) @ b.reshape(len(b), 4, -1)
            change = 1.5 * flat.reshape(expected.shape)
            assert np.abs(change).max() > 1e-3
            expected = expected + change
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


@pytest.mark.product
def test_from_a_checkpoint_too(adapted, made):
    whole = package.load(made).weights
    shutil.rmtree(adapted / "weights")
    jax.tree.map(np.testing.assert_array_equal, package.load(adapted).weights, whole)


@pytest.mark.product
def test_validation_is_that_of_the_merged_model(mukv, made, token_file):
    """The last logged validation loss equals that of the loaded model."""
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    logged = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
    tokens = open_tokens(token_file).validation
    rows = [np.asarray(tokens.tokens[: 2 * 32 + 1])]
    found = package.load(made).evaluate(rows, length=32)
    assert found.loss == pytest.approx(logged, rel=0.2)
    done = mukv("generate", made, "--prompt", "Déjà", "--max-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.product
@pytest.mark.parametrize(
    "line",
    [
        ("eval", "--length", "16"),
        ("analyze", "--length", "16", "--samples", "2"),
        ("compress", "--policy", "streaming:0.5", "--length", "32"),
    ],
)
def test_every_command_reads_it(mukv, adapted, tmp_path, line):
    (tmp_path / "text").write_text("Déjà vu, again and again. " * 20)
    name, *options = line
    done = mukv(name, adapted, "--text", tmp_path / "text", *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.product
def test_transformers_reads_what_is_exported(mukv, made, tmp_path):
    done = mukv("export", made, "--out", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "there", dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, 256, (1, 12))
    ours = package.load(made)
    np.testing.assert_allclose(ours.logits(ids), logits(theirs, ids), atol=1e-4)
    again = package.load(tmp_path / "there")
    jax.tree.map(np.testing.assert_array_equal, again.weights, ours.weights)


@pytest.mark.product
def test_a_whole_run_starts_from_it(mukv, made, base, tmp_path):
    """A run without adapters starts from the merged weights and trains all of them."""
    given = (f"train.start={made}", "train.adapter=null", *FEW, "train.steps=1")
    rate = ("train.learning_rate=1e-12", "train.optimizer.weight_decay=0.0")
    done = mukv("train", base, *given, *rate, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    found = named(load_weights(tmp_path / "whole/weights")[0])
    merged = named(package.load(made).weights)
    assert found.keys() == merged.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, merged[name], atol=1e-9)
    assert not (tmp_path / "whole/base.json").exists()


@pytest.mark.product
def test_killed_and_continued_it_ends_in_the_same_bits(mukv, adapted, made):
    """A run that is left as after a kill in step 4 reads the base again and ends with the same
    bits."""
    shutil.rmtree(adapted / "checkpoints/6")
    shutil.rmtree(adapted / "weights")
    done = mukv("train", adapted)
    assert done.returncode == 0, done.stderr
    one, other = (load_weights(folder / "weights")[0] for folder in (adapted, made))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.product
def test_killed_before_the_first_step(mukv, adapted, made):
    """A folder with a configuration but without base.json is continued."""
    for name in ("checkpoints", "weights"):
        shutil.rmtree(adapted / name)
    (adapted / "base.json").unlink()
    assert mukv("train", adapted).returncode == 0
    assert (adapted / "base.json").read_bytes() == (made / "base.json").read_bytes()


@pytest.fixture
def moved(adapted, base, tmp_path) -> tuple[Path, Path]:
    """Return a run with adapters, and its base in another folder; tests may write to both."""
    there = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    text = (adapted / "config.yaml").read_text()
    (adapted / "config.yaml").write_text(text.replace(str(base), str(there)))
    return adapted, there


@pytest.mark.product
def test_the_base_may_lie_elsewhere(mukv, moved, made, base):
    adapted, _ = moved
    jax.tree.map(
        np.testing.assert_array_equal, package.load(adapted).weights, package.load(made).weights
    )
    assert mukv("train", adapted, f"train.start={base}", "train.steps=8").returncode == 0
    assert RunDirectory(adapted).load_config().train.start == str(base)


def change(folder: Path) -> None:
    """Change the numbers of one weight of a run."""
    tree, metadata = load_weights(folder / "weights")
    name = "embedding"
    tree[name] = np.nextafter(tree[name], np.float32(9), dtype=np.float32)
    save_weights(folder / "weights", tree, metadata)


LINES = [("eval", "--text", "config.yaml"), ("export", "--out", "x"), ("train", "train.steps=8")]


@pytest.mark.parametrize("line", params(LINES, LINES[:1]))
def test_a_changed_base_is_refused(mukv, moved, tmp_path, monkeypatch, line):
    adapted, there = moved
    change(there)
    before = files(adapted)
    monkeypatch.chdir(adapted)
    name, *options = line
    done = mukv(name, adapted, *options)
    assert done.returncode == 2
    assert f"train.start: got '{there}'" in done.stderr
    assert f"the adapters in {adapted} were trained on: embedding" in done.stderr
    assert {path for path in files(adapted) if path.name != ".lock"} == {*before}


def test_a_missing_base_is_refused(mukv, moved):
    adapted, there = moved
    shutil.rmtree(there)
    for line in (("generate", adapted, "--prompt", "a"), ("train", adapted, "train.steps=8")):
        done = mukv(*line)
        assert done.returncode == 2
        assert f"train.start: got '{there}'" in done.stderr
    with pytest.raises(package.BadInput, match=r"config.yaml: train.start: got .*elsewhere"):
        package.load(adapted)


@pytest.mark.parametrize("content", [None, "{", '{"format": "other"}'])
def test_without_base_json_nothing_is_merged(mukv, adapted, content):
    (adapted / "base.json").unlink()
    if content is not None:
        (adapted / "base.json").write_text(content)
    with pytest.raises(package.BadInput, match=r"base\.json: got"):
        package.load(adapted)
    assert mukv("train", adapted, "train.steps=8").returncode == 2


def test_adapters_of_a_model_of_other_sizes_are_refused(mukv, adapted, tmp_path):
    """The error names the first weight of the base that does not fit."""
    text = (adapted / "config.yaml").read_text()
    (adapted / "config.yaml").write_text(text.replace("hidden: 48", "hidden: 40"))
    with pytest.raises(package.BadInput, match=r"stage0\.slot0\.mlp\.down"):
        package.load(adapted)


BAD = {
    "train.start=null": "train.start: got None; the model whose weights",
    "train.start=nowhere": "train.start: got 'nowhere'; a run with weights",
    "train.adapter.weights=[qery]": "did you mean 'query'?",
    "train.adapter.weights=[attention_norm]": "a matrix: stage0.slot0.attention_norm.gain is a",
    "train.adapter.weights=[]": "train.adapter.weights: got []; at least one",
    "train.adapter.weights=['*.nothing.*']": "train.adapter.weights: got '*.nothing.*'",
    "train.adapter.rank=17": "rank: got 17; at most 16, the smaller side of stage0.slot0.write.key",
    "train.adapter.rank=0": "train.adapter.rank: got 0; at least 1",
    "train.adapter.alpha=0": "train.adapter.alpha: got 0",
    "train.adapter.ratio=-1": "train.adapter.ratio: got -1",
    "train.adapter.rnk=3": "did you mean 'rank'?",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input(mukv, base, tmp_path, change):
    given = (f"train.start={base}", "train.adapter.rank=4", change)
    done = mukv("train", base, *given, "--out", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert BAD[change] in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_adapters_have_one_base(mukv, made, base, tmp_path):
    """A base with adapters is refused; the error names their base and says how to merge them."""
    done = mukv("train", made, f"train.start={made}", *FEW, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert f"such as the base of this one, {base}; `mukv export RUN --out DIR`" in done.stderr


def test_other_adapters_are_another_run(mukv, adapted):
    done = mukv("train", adapted, "train.adapter.rank=2")
    assert done.returncode == 2
    assert "train.adapter.rank: got 2; the run in" in done.stderr


def test_describe_shows_what_is_trained(mukv, made):
    facts = json.loads(mukv("describe", made, "--json").stdout)
    own = load_weights(made / "weights")[0]
    trained = sum(leaf.size for leaf in jax.tree.leaves(own))
    assert facts["trained_parameters"] == trained < facts["parameters"]
    held = facts["training_bytes"]
    assert held["weights"] == held["gradient"] == 4 * trained
    assert held["optimizer"] == 8 * trained + 4
    assert held["frozen"] == 4 * facts["parameters"]
    rows = {row["weight"]: row for row in facts["weights"]}
    assert rows["stage0.slot0.mlp.up"]["learning_rate"] == 0
    assert rows["stage0.slot0.mlp.up.a"]["learning_rate"] == 1
    whole = json.loads(mukv("describe", made, "train.adapter=null", "--json").stdout)
    assert whole["training_bytes"]["frozen"] == 0
    assert whole["training_bytes"]["optimizer"] == 8 * whole["parameters"] + 4
    assert whole["flops_per_token"] > facts["flops_per_token"]
    assert f"{trained:,} in adapters" in mukv("describe", made).stdout


@pytest.mark.product
def test_gates_of_learned_eviction(mukv, base, tmp_path):
    """Gates are trained on a model without any, saved apart, and used by the policy `dms`."""
    out = tmp_path / "gated"
    given = f"train.start={base}", "model.attention.eviction.window=4", *FEW
    done = mukv("train", base, *given, "train.adapter.kind=eviction", "--out", out)
    assert done.returncode == 0, done.stderr
    own, below = named(load_weights(out / "weights")[0]), named(package.load(base).weights)
    assert {*own} == {"stage0.slot0.write.eviction"}
    assert np.abs(own["stage0.slot0.write.eviction"]).max() > 0
    model = package.load(out)
    for name, leaf in named(model.weights).items():
        np.testing.assert_array_equal(leaf, own[name] if name in own else below[name])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-2])
    assert 0 < last["evicted"] < 1
    assert last["divergence"] >= 0
    text = model.generate("import this", max_tokens=12, policy="dms:0.75", prefill_chunk=8)
    assert len(text.token_ids) == 12
    with pytest.raises(package.BadInput, match="has none"):
        package.load(base).generate("import", policy="dms")
    done = mukv("export", out, "--out", tmp_path / "exported")
    assert done.returncode == 2
    assert "model.attention.eviction: got" in done.stderr
