"""`describe --device`: estimated bytes agree with those of compiled programs, and suggestions
fit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from mukv.core.device import DEVICES, Device, device
from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape, batch_sharding, replicated
from mukv.runs import config
from mukv.runs.estimate import POLICIES, Estimate, estimate
from mukv.train import footprint
from mukv.train.step import BATCH_FIELDS, Trainer
from tests.conftest import MINUSCULE

HOST = Device("cpu", 1 << 40, 1e12, 1e11, 8, 1e10, 1e9, "cpu")
EXAMPLE = ("mesh.data=64", "mesh.tensor=8", "train.length=8192", "train.compute.platform=gpu")


@cache
def of(preset: str, *changes: str, name: str = "h100") -> Estimate:
    return Estimate(config.load(preset, changes), DEVICES[name])


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4), (8, 1)])
@pytest.mark.parametrize("changes", [(), ("train.optimizer={kind: muon}",)], ids=["adamw", "muon"])
def test_state_is_what_each_device_is_given(mesh, changes):
    sizes = f"mesh.data={mesh[0]}", f"mesh.tensor={mesh[1]}"
    run = config.load("tiny-experts", [*changes, *sizes])
    trainer = Trainer(run.model, run.train, run.mesh.build())
    held = footprint.state_bytes(trainer)
    assert Estimate(run, HOST).state == held


def test_a_teacher_is_counted():
    run = config.load("tiny", [*MINUSCULE, "train.teacher=there", "mesh.data=2"])
    teacher = config.load("tiny", ["mesh.data=2"]).model
    trainer = Trainer(run.model, run.train, run.mesh.build(), teacher)
    held = footprint.state_bytes(trainer)
    assert held["teacher"] > held["weights"]
    assert Estimate(run, HOST, teacher).state == held


@pytest.mark.product
def test_a_compiled_program_holds_what_is_estimated():
    """Estimated bytes of the loss and its gradient agree with the program's on 2 x 2 devices;
    tests/laws/test_compiled.py compares whole steps on GPUs."""
    run = config.load("tiny", [*MINUSCULE, "model.d_model=128", "mesh.data=2", "mesh.tensor=2"])
    trainer = Trainer(run.model, run.train, run.mesh.build())
    rows = jax.ShapeDtypeStruct((2, 8), jnp.int32, sharding=batch_sharding(trainer.mesh))
    batch = dict.fromkeys(BATCH_FIELDS, rows) | {"weight": rows.update(dtype=jnp.float32)}
    weights = trainer.abstract_state().weights
    placed = (replicated(trainer.mesh), trainer.shardings().weights)
    with jax.set_mesh(trainer.mesh):
        traced = jax.jit(trainer._gradient, out_shardings=placed).lower(weights, batch, None)
        memory = traced.compile().memory_analysis()
    state = Estimate(run, HOST).state
    assert state["weights"] == pytest.approx(memory.argument_size_in_bytes, rel=0.01)
    assert state["gradient"] == pytest.approx(memory.output_size_in_bytes, rel=0.01)


def test_each_policy_stores_less_than_the_one_before():
    found = of("llama-3.2-1b", *EXAMPLE)
    rows = [found.kept(policy) for policy in POLICIES]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) == len(POLICIES)
    # Offloading removes the bfloat16 residual stream before each of 16 layers, split over `tensor`.
    stream = rows[POLICIES.index(True)] - rows[POLICIES.index("offload")]
    assert stream == 16 * 8192 * 2048 * 2 // 8


def test_work_and_collectives_of_a_large_model():
    found = of("llama-3.1-70b", *EXAMPLE, "train.compute.rematerialise=true")
    parameters, layers, width = 70_553_706_496, 80, 8192
    assert sum(found.state.values()) == pytest.approx(16 * parameters / 512, rel=0.01)
    assert found.batch == 64
    tokens = 8192
    assert found.flops == pytest.approx(tokens * 449_226_473_472 / 8, rel=1e-6)
    assert 0.25 < found.recomputed / found.flops < 1 / 3
    readout = 128256 * width
    # Two gathers in bfloat16 and one float32 gradient; the readout in float32, gathered once.
    inside = (parameters - 2 * readout) / 8 * (2 + 2 + 4)
    assert found.collectives["data"] == pytest.approx(inside + 3 * 4 * readout / 8, rel=0.02)
    # In each layer four gathers and sums of the residual stream per branch, and three to recompute
    # it. Those of the loss.
    sums = 2 * tokens * width * (2 * 4 + 3) * layers + 2 * 2 * tokens * width
    assert found.collectives["tensor"] == sums


def test_links_between_islands_are_shared():
    h100 = DEVICES["h100"]
    assert h100.link(8, 1) == h100.fast
    assert h100.link(64, 1) == 8 * h100.network
    assert h100.link(64, 8) == h100.network


@pytest.mark.product
def test_what_does_not_fit_and_the_nearest_mesh_that_does():
    found = of("llama-3.2-1b", "train.compute.platform=gpu", "train.compute.rematerialise=true")
    small = replace(found, device=replace(found.device, memory=8e9))
    told = estimate(small.run, small.device, "small")
    assert not told["fits"]
    mesh = MeshShape(**told["nearest_mesh"])

    def fits(mesh: MeshShape) -> bool:
        moved = replace(small, run=replace(small.run, mesh=mesh))
        return moved.fits(moved.bytes(policy=True))

    assert fits(mesh)
    half = mesh.size // 2
    assert half
    assert not any(fits(MeshShape(half // n, n)) for n in (1, 2, 4, 8) if n <= half)


def test_the_last_stage_is_estimated():
    """Of a training with longer and longer rows, the last has the longest."""
    stages = "train.stages=[{begin: 10, length: 256}, {begin: 20, length: 512}]"
    found = estimate(config.load("tiny", [stages, "train.batch=8"]), DEVICES["h100"], "h100")
    alone = config.load("tiny", ["train.batch=2", "train.length=512"])
    assert found == estimate(alone, DEVICES["h100"], "h100")
    assert (found["batch"], found["length"]) == (2, 512)


def test_rows_that_a_mesh_cannot_divide_are_said(mukv):
    done = mukv("describe", "tiny", "mesh.data=2", "train.batch=3", "--device", "h100")
    assert done.returncode == 0
    assert "3 rows" in done.stderr
    assert "batch 4 x 128" in done.stdout


def test_unknown_devices_are_refused():
    with pytest.raises(BadInput, match="allowed: a100"):
        device("h10")


@pytest.mark.product
def test_the_command(mukv):
    line = ("describe", "tiny", "mesh.data=4", "--device", "v5p", "--length", "64", "--json")
    facts = json.loads(mukv(*line).stdout.splitlines()[-1])
    step = facts["step"]
    assert (step["device"], step["length"], step["batch"]) == ("v5p", 64, 8)
    assert facts["bytes_per_device"] == step["bytes_per_device"]
    assert set(step["rematerialise"]) == {"false", "products", "true", "offload"}
    assert 0 < step["mfu_bound_without_overlap"] <= step["mfu_bound"] < 1
