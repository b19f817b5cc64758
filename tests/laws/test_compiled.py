"""Law 14: training steps compiled for H100 GPUs and TPUs call the attention kernels that `describe`
names; those for GPUs sum gradients by reduce-scatter.

The compilers are in packages of their own folder: `make test` installs that for GPUs in
.cache/compilers, and `MUKV_COMPILERS` is the path of another folder. benchmarks/compiled.py says
how to fill it, also with the compiler for TPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiled
from mukv.core.device import DEVICES
from mukv.runs import config
from mukv.runs.estimate import estimate

PACKAGES = Path(os.environ.get("MUKV_COMPILERS", ".cache/compilers"))
needs_compiler = pytest.mark.skipif(
    not (PACKAGES / "jax_cuda12_plugin").is_dir(), reason=f"no jax-cuda12-plugin in {PACKAGES}"
)
needs_tpu_compiler = pytest.mark.skipif(
    not (PACKAGES / "libtpu").is_dir(), reason=f"no libtpu in {PACKAGES}"
)
WIDE = ("model.d_model=512", "model.plan=[{repeats: 3}]", "model.vocab_size=16384")
STEP = ("model.attention={kind: grouped, heads: 8, kv_heads: 4, head_dim: 64}",)
"""Heads wide enough for the kernel of a step of decoding."""

COMMON = ("--packages", str(PACKAGES), "--length", "512", "--json")


def counted(*given: str, preset: tuple[str, ...] = ("tiny", *WIDE)) -> dict:
    """Return what benchmarks/compiled.py prints in its own process."""
    ran = subprocess.run(
        [sys.executable, "benchmarks/compiled.py", *preset, *COMMON, *given],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "src", "XLA_FLAGS": ""},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


CAPPED = "{kind: grouped, softcap: 30, sinks: learned}"
LATENT = "{kind: latent, heads: 4, rank: 64, head_dim: 32, rope_dim: 16}"


@needs_compiler
def test_every_kind_of_attention_is_a_kernel():
    """Packed rows, windows, soft caps with sinks, and latent attention, in one program."""
    kinds = f"[{{}}, {{window: 100}}, {{attention: {CAPPED}}}, {{attention: {LATENT}}}]"
    assert counted(f"model.plan=[{{pattern: {kinds}}}]")["calls"] == {"flash": 3 * 4}


@needs_compiler
@pytest.mark.product
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.plan=[{pattern: [{window: 100}, {}]}]",),
        (f"model.attention={CAPPED}",),
        (f"model.attention={LATENT}",),
        ("--length", "40"),
    ],
    ids=["packed", "window", "capped with sinks", "latent", "short"],
)
def test_attention_is_a_kernel(changes):
    """Each layer calls one kernel in the forward pass and two in the backward pass."""
    layers = 2 if "plan" in "".join(changes) else 3
    assert counted(*changes)["calls"] == {"flash": 3 * layers}


@needs_tpu_compiler
@pytest.mark.product
@pytest.mark.timeout(1800)  # libtpu compiles slowly
@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_attention_is_a_kernel_on_a_tpu(mesh):
    """Each layer calls one kernel in the forward pass and two in the backward pass."""
    assert counted("--device", "v5p", "--mesh", mesh)["calls"] == {"splash": 3 * 3}


@needs_compiler
def test_gradients_are_scattered_and_the_readout_is_gathered_once():
    found = counted("--mesh", "4x2")["collectives"]
    readout = 512 * 16384 * 4 // 2
    large = {key: one for key, one in found.items() if one["largest"] > 1 << 20}
    assert not [key for key in large if key.startswith("all-reduce f32 in loops")], found
    gathers = [key for key, one in found.items() if "all-gather" in key and "in loops" in key]
    assert all(found[key]["largest"] < readout for key in gathers), found


@needs_compiler
@pytest.mark.product
@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_the_estimate_is_what_the_program_takes(mesh):
    """Estimated bytes of device memory are within 15 % of the program's; collectives agree except
    for those that the partitioner gathers in float32."""
    changes = ["train.compute.rematerialise=true", "train.batch=8", "train.length=4096"]
    given = ("--mesh", f"{mesh[0]}x{mesh[1]}", "--length", "4096", changes[0])
    facts = counted(*given, preset=("llama-3.2-1b",))
    sizes = [f"mesh.data={mesh[0]}", f"mesh.tensor={mesh[1]}", "train.compute.platform=gpu"]
    told = estimate(config.load("llama-3.2-1b", changes + sizes), DEVICES["h100"], "h100")
    taken = sum(facts["memory_bytes"].values())
    assert told["bytes_per_device"]["total"] == pytest.approx(taken, rel=0.15)
    moved = sum(one["bytes"] for one in facts["collectives"].values())
    assert sum(told["collective_bytes"].values()) == pytest.approx(moved, rel=0.15)


@needs_compiler
def test_a_step_reads_caches_by_one_kernel_per_layer():
    """Every layer calls one kernel. With a quantised cache a step has no more kernels than with
    the exact cache, and moves fewer bytes."""
    given = ("--length", "16384", "--batch", "1", *STEP)
    exact, int8, int4 = (counted("--decode", name, *given) for name in ("full", "int8", "int4"))
    for found in (exact, int8, int4):
        assert found["calls"] == {"flash_decode": 3}
        assert found["kernels"] <= exact["kernels"]
    body = 3 * 16384 * 2 * 4 * 64
    # Of 2 bytes per number int8 stores about 1.2, and int4 0.7.
    assert exact["moved_bytes"] - int8["moved_bytes"] > 0.7 * body
    assert exact["moved_bytes"] - int4["moved_bytes"] > 1.2 * body


@needs_compiler
@pytest.mark.product
def test_chosen_pages_are_not_copied():
    """A step that reads pages calls the kernel, and stores nothing as large as its pages."""
    found = counted("--decode", "pages:0.25", "--length", "16384", "--batch", "1", *STEP)
    assert found["calls"] == {"flash_decode": 3}
    pages = 16384 // 4 * 2 * 4 * 64 * 2
    assert found["memory_bytes"]["temporary"] < pages


MODULE = """HloModule step

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%p, %p)
}

%turn (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %add = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %sum = f32[8]{0} all-reduce(%add), to_apply=%fused
  ROOT %next = (s32[], f32[8]{0}) tuple(%x, %sum)
}

ENTRY %main (a: bf16[4]) -> f32[8] {
  %a = bf16[4]{0} parameter(0)
  %whole = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%a), dimensions={0}
  %init = (s32[], f32[8]{0}) tuple(%a, %a)
  ROOT %loop = (s32[], f32[8]{0}) while(%init), body=%turn, config={"known_trip_count":{"n":"5"}}
}
"""


LIMITED = """
%below (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY"""
"""The condition of a loop of five iterations, as the compiler for TPUs prints it."""


@pytest.mark.parametrize("noted", [True, False])
def test_operations_in_loops_are_counted_per_iteration(noted):
    text = MODULE
    if not noted:
        known = 'body=%turn, config={"known_trip_count":{"n":"5"}}'
        assert known in text
        text = text.replace(known, "condition=%below, body=%turn").replace("ENTRY", LIMITED[1:])
    found = compiled.counts(text)
    assert found.kernels == 5
    assert found.collectives == {
        "all-reduce f32 in loops": (5 * 32, 5, 32),
        "all-gather bf16 outside": (32, 1, 32),
    }
