"""Law 3, second half: every field of the configuration changes something, or is refused.

The fields are found by walking the root configuration; one that is in no table here fails.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from mukv import config, describe, runs
from mukv.config import Run
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.data.batches import Batches
from mukv.data.build import build_tokens
from mukv.train import Trainer

BASE = (
    "model.d_model=8",
    "model.attention={heads: 2, kv_heads: 1, head_dim: 4}",
    "model.attention.position={kind: rope, scaling: {kind: llama3, factor: 4, original_length: 8}}",
    "model.mlp.hidden=12",
    "model.plan=[{pattern: [{}], repeats: 2}]",
    "train.steps=4",
    "train.batch=4",
    "train.length=16",
    "train.learning_rate=0.01",
    "train.schedule.warmup=2",
)
LAYER = "model.plan.0.pattern.0"
ROPE = "model.attention.position"

CHANGES = {
    "Data.path": "data.path={other}",
    "Data.packing": "data.packing=contiguous",
    "Decoder.vocab_size": "model.vocab_size=272",
    "Decoder.d_model": "model.d_model=16",
    "Decoder.plan": "model.plan=[{repeats: 3}]",
    "Decoder.readout": "model.readout=tied",
    "Stage.pattern": "model.plan=[{pattern: [{}, {}], repeats: 2}]",
    "Stage.repeats": "model.plan.0.repeats=1",
    "Layer.attention": f"{LAYER}.attention={{kind: grouped, heads: 1, kv_heads: 1, head_dim: 4}}",
    "Layer.position": f"{LAYER}.position={{kind: nope}}",
    "Layer.mlp": f"{LAYER}.mlp={{kind: gated, hidden: 8}}",
    "Layer.window": f"{LAYER}.window=3",
    "Layer.reads": "model.plan=[{}, {pattern: [{reads: 0}]}]",
    "Grouped.heads": "model.attention.heads=4",
    "Grouped.kv_heads": "model.attention.kv_heads=2",
    "Grouped.head_dim": "model.attention.head_dim=8",
    "Grouped.scale": "model.attention.scale=0.9",
    "Grouped.position": "model.attention.position={kind: nope}",
    "RoPE.base": f"{ROPE}.base=50",
    "RoPE.scaling": f"{ROPE}.scaling=null",
    "Llama3.factor": f"{ROPE}.scaling.factor=2",
    "Llama3.low_frequency_factor": f"{ROPE}.scaling.low_frequency_factor=0.001",
    "Llama3.high_frequency_factor": f"{ROPE}.scaling.high_frequency_factor=1.1",
    "Llama3.original_length": f"{ROPE}.scaling.original_length=64",
    "Gated.hidden": "model.mlp.hidden=16",
    "Gated.activation": "model.mlp.activation=gelu",
    "RMSNorm.epsilon": "model.norm.epsilon=0.01",
    "Training.steps": "train.steps=9",
    "Training.seed": "train.seed=1",
    "Training.batch": "train.batch=8",
    "Training.length": "train.length=8",
    "Training.learning_rate": "train.learning_rate=0.02",
    "Training.clip_norm": "train.clip_norm=0.01",
    "Cosine.warmup": "train.schedule.warmup=1",
    "Cosine.final": "train.schedule.final=0.5",
    "AdamW.beta1": "train.optimizer.beta1=0.5",
    "AdamW.beta2": "train.optimizer.beta2=0.5",
    "AdamW.epsilon": "train.optimizer.epsilon=0.1",
    "AdamW.weight_decay": "train.optimizer.weight_decay=0",
    "Compute.dtype": "train.compute.dtype=bfloat16",
    "Compute.operands": "train.compute.operands=bfloat16",
    "MeshShape.data": "mesh.data=2",
    "MeshShape.tensor": "mesh.tensor=2",
}
"""What each changes is seen in the weights, their places, or four steps of training."""

LOOP = {
    "Training.log_every": "train.log_every=3",
    "Training.evaluate_every": "train.evaluate_every=2",
    "Training.validation_batches": "train.validation_batches=1",
    "Training.checkpoint_every": "train.checkpoint_every=3",
    "Training.keep_last": "train.keep_last=2",
    "Training.keep_best": "train.keep_best=4",
}
"""These are seen in what a run writes."""

SAME = {
    "Compute.unroll": "train.compute.unroll=false",
    "Compute.rematerialise": "train.compute.rematerialise=true",
    "Compute.fused": "train.compute.fused=false",
    "Compute.loss_chunk": "train.compute.loss_chunk=5",
    "Training.accumulate": "train.accumulate=2",
}
"""These say how, not what: memory and time differ, the numbers must not."""

REFUSED = {"Decoder.context": ("model.context=8", r"train\.length: got 16; at most model.context")}

ELSEWHERE = {
    "Training.profile": "writes a profile beside the run",
    "Training.trackers": "packages that are not installed here; unknown names: test_bad_input.py",
}


@cache
def walked() -> dict[str, type]:
    """Class of each field, by "Class.field". `kind` only names the class; a field of one class
    and nothing else is what its own fields are."""
    found: dict[str, type] = {}
    waiting: list[Any] = [Run]
    while waiting:
        cls = waiting.pop()
        hints = get_type_hints(cls)
        for field in fields(cls):
            name, inner = f"{cls.__name__}.{field.name}", inside(hints[field.name])
            new = [each for each in inner if f"{each.__name__}." not in "".join(found)]
            waiting += new
            chosen = len(inner) != 1 or get_args(hints[field.name])
            if chosen and not (field.name == "kind" and get_origin(hints["kind"]) is Literal):
                found[name] = cls
    return found


def inside(hint: Any) -> list[type]:
    """The dataclasses in an annotation."""
    if isinstance(hint, type) and is_dataclass(hint):
        return [hint]
    return [cls for part in get_args(hint) for cls in inside(part)]


def classes() -> set[type]:
    return set(walked().values())


def test_every_field_is_in_one_table():
    tables = (CHANGES, LOOP, SAME, REFUSED, ELSEWHERE)
    assert sorted(name for table in tables for name in table) == sorted(walked())


@pytest.fixture(scope="module")
def load(token_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "a.txt").write_text("Other text, of one document. " * 40)
    other = build_tokens([str(folder / "a.txt")], folder / "tokens").path

    def load(*overrides: str) -> Run:
        given = (text.replace("{other}", str(other)) for text in overrides)
        return config.load("tiny", [f"data.path={token_file}", *BASE, *given])

    return load


def trained(run: Run) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, norms and rates of four steps, and the weights after them."""
    trainer = Trainer(run.model, run.train, config.MeshShape().build())
    tokens, training = runs.open_corpus(run), run.train
    batches = Batches(
        tokens, training.seed, training.batch, training.length, packing=run.data.packing
    )
    state, seen = trainer.initial_state(), []
    for step in range(4):
        state, metrics = trainer.step(state, step, trainer.put(batches.at(step)))
        seen += map(float, metrics)
    return seen, {name: np.asarray(leaf) for name, leaf in named(state.weights).items()}


@pytest.fixture(scope="module")
def base(load):
    run = load()
    return describe.weights(run), trained(run)


@pytest.mark.parametrize("name", CHANGES)
def test_it_changes_something(load, base, name):
    run = load(CHANGES[name])
    if describe.weights(run) != base[0]:
        return
    seen, weights = trained(run)
    assert seen != base[1][0]
    assert any((leaf != base[1][1][name]).any() for name, leaf in weights.items())


@pytest.mark.parametrize("name", SAME)
def test_it_says_how_and_not_what(load, base, name):
    run = load(SAME[name])
    assert run != load()
    np.testing.assert_allclose(trained(run)[0], base[1][0], rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(load, name):
    override, message = REFUSED[name]
    with pytest.raises(BadInput, match=message):
        load(override)


OFTEN = (
    "batch=2",
    "length=8",
    "log_every=1",
    "evaluate_every=1",
    "validation_batches=9",
    "checkpoint_every=1",
    "keep_last=3",
    "keep_best=0",
)


@pytest.fixture(scope="module")
def written(load, tmp_path_factory):
    """Which numbers are logged at which steps, what validation says, and which steps are kept."""

    @cache
    def run(*overrides: str) -> Any:
        folder = tmp_path_factory.mktemp("run") / "run"
        often = [f"train.{text}" for text in (*OFTEN, "batch=2", "length=8")]
        runs.train(
            load(*often, "train.validation_batches=9", *overrides), runs.RunDirectory(folder)
        )
        lines = map(json.loads, Path(folder / "metrics.jsonl").read_text().splitlines())
        logged = [(line["step"], sorted(line), line.get("validation_loss")) for line in lines]
        return logged, sorted(path.name for path in (folder / "checkpoints").iterdir())

    return run


@pytest.mark.parametrize("name", LOOP)
def test_it_changes_what_is_written(written, name):
    assert written(LOOP[name]) != written()
