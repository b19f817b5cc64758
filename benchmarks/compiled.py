"""Compile a step for H100 GPUs or TPUs without having them; count kernels, bytes and collectives.

Run: pip install --no-deps --target DIR jax-cuda12-pjrt==JAX jax-cuda12-plugin==JAX libtpu
     python benchmarks/compiled.py llama-3.2-1b --packages DIR --mesh 8x1 --batch 8 --length 4096
     python benchmarks/compiled.py llama-3.2-1b --packages DIR --decode int4 --length 131072
     python benchmarks/compiled.py tiny --packages DIR --device v5p --mesh 2x2

JAX is the installed version of jax; libtpu is needed for a TPU only, and its compiler is slow. The
second compiles one step of training, the third one step of decoding on one device with a cache of
`--length` tokens. The counts are, per device and step: kernels,
calls of attention kernels, the bytes that kernels read and write (each array once), and the bytes
of each kind of collective (the larger of what it reads and writes). Counts serve to compare two
programs; they are not times. The body of a loop counts once per iteration, and a kernel in a loop
that reads a part of an array counts as reading all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
"""An H100 as XLA describes a target (GpuTargetConfigProto)."""
TORI = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
"""Shapes of slices of TPU v5p, by their number of chips."""
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
BODY = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations=\{)=?%?([\w.\-]+)")
TURNS = re.compile(r'known_trip_count"?:\s*\{"n":"?(\d+)')
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LAUNCHED = ("fusion", "custom-call", "dot", "copy", "sort", "scatter", "gather", "reduce")
WIDTHS = {"pred": 1, "bf16": 2}


class Target(NamedTuple):
    """How a device is compiled for.

    platform: name in `train.compute.platform`
    backend: JAX's name for it
    options: options of XLA
    """

    platform: str
    backend: str
    options: dict[str, int]


TARGETS = {
    "h100": Target("gpu", "cuda", {"xla_gpu_autotune_level": 0}),  # autotuning needs the device
    "v5p": Target("tpu", "tpu", {}),
}


class Exchange(NamedTuple):
    """Totals of one kind of collective: bytes, number, and bytes of the largest one."""

    bytes: int
    number: int
    largest: int


class Counts(NamedTuple):
    """Counts of a compiled program on one device.

    kernels: number of kernels
    moved: bytes that they read and write
    calls: number of calls of kernels that are not XLA's own, by name
    collectives: by kind, type and whether in a loop, such as "all-gather bf16 in loops"
    """

    kernels: int
    moved: int
    calls: dict[str, int]
    collectives: dict[str, Exchange]


class Instruction(NamedTuple):
    """An HLO instruction: the text of its shape, its operation, names of operands, and its line."""

    shape: str
    operation: str
    operands: list[str]
    line: str


def size(shape: str) -> int:
    """Return the bytes of all arrays in a shape."""

    def one(kind: str, dims: str) -> float:
        width = WIDTHS.get(kind) or int(re.sub(r"\D.*", "", kind[1:])) / 8
        return width * math.prod(int(n) for n in dims.split(",") if n)

    return int(sum(one(*found) for found in ARRAY.findall(shape)))


def exchanged(instruction: Instruction, body: dict[str, Instruction]) -> tuple[str, int]:
    """Return the type of a collective, and the larger of the bytes that it reads and writes."""
    given = [body[name].shape for name in instruction.operands if name in body]
    read, written = sum(map(size, given)), size(instruction.shape)
    if instruction.operation in ("all-gather-start", "reduce-scatter-start"):
        written -= read  # its shape has the operands as well
    largest = max((size(one), one) for one in given)[1]
    return ARRAY.findall(largest)[0][0], max(read, written)


def turns(line: str, bodies: Mapping[str, Mapping[str, Instruction]]) -> int:
    """Return the iterations of a loop, given its line and all computations of the program.

    XLA for GPUs notes the number. The compiler for TPUs does not: the number is then the constant
    that the loop's counter is compared with. It is 1 where neither is found.
    """
    if noted := TURNS.search(line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = bodies.get(condition[1], {}) if condition else {}
    limits = [
        int(limit[1])
        for one in body.values()
        if (limit := re.search(r" s32\[\]\S* constant\((\d+)\)", one.line))
    ]
    return limits[0] if len(limits) == 1 and "direction=LT" in str(body) else 1


def counts(text: str) -> Counts:
    """Count the kernels, bytes and collectives of an optimised program.

    text: the program as XLA prints it
    """
    bodies: dict[str, dict[str, Instruction]] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if head := BODY.match(line):
            body = bodies[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.\-]+)", found[4].split("), ")[0])
            body[found[1]] = Instruction(found[2], found[3], operands, line)
    kernels, passed, calls = 0, 0, Counter()
    moved, number, largest = Counter(), Counter(), Counter()

    def visit(name: str, times: int, looped: bool) -> None:
        nonlocal kernels, passed
        body = bodies.get(name, {})
        for instruction in body.values():
            operation, line = instruction.operation, instruction.line
            kind = operation.removesuffix("-start")
            if operation == "while":
                inner = re.search(r"body=%?([\w.\-]+)", line)
                visit(inner[1] if inner else "", times * turns(line, bodies), True)
            elif operation in ("call", "conditional", "async-start"):
                for inner in CALLED.findall(line):
                    visit(inner, times, looped)
            elif kind in COLLECTIVES:
                type_, given = exchanged(instruction, body)
                key = f"{kind} {type_} {'in loops' if looped else 'outside'}"
                moved[key] += given * times
                number[key] += times
                largest[key] = max(largest[key], given)
            elif operation in LAUNCHED:
                kernels += times
                given = {
                    name: size(body[name].shape) for name in instruction.operands if name in body
                }
                passed += times * (sum(given.values()) + size(instruction.shape))
                if "triton" in line and "pallas_call" in line:
                    calls["flash_decode" if "/flash_decode/" in line else "flash"] += times
                elif "tpu_custom_call" in line and "splash" in line:
                    calls["splash"] += times
                elif "fmha" in line:
                    calls["cudnn attention"] += times

    visit(entry, 1, False)
    kinds = {key: Exchange(n, number[key], largest[key]) for key, n in moved.most_common()}
    return Counts(kernels, passed, dict(calls), kinds)


def devices_of(name: str, count: int) -> list[Any]:
    """Return `count` devices that can be compiled for but not run on. name: a key of TARGETS"""
    from jax.experimental.topologies import get_topology_desc

    if name == "v5p":
        torus = next(shape for chips, shape in TORI.items() if chips >= count)
        return get_topology_desc(f"v5p:{torus}", "tpu").devices[:count]
    # Numbers of slices, of hosts, and of devices per host.
    shape = f"1x{max(1, count // 8)}x{min(count, 8)}"
    return get_topology_desc("", "cuda", topology=shape, target_config=TARGET).devices


def compiled(given: argparse.Namespace) -> tuple[Any, float]:
    """Return the compiled program of a training step, and the seconds of its compilation."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from mukv.core.mesh import batch_sharding
    from mukv.runs import config
    from mukv.train.step import BATCH_FIELDS, Trainer

    target = TARGETS[given.device]
    own = [f"train.batch={given.batch}", f"train.length={given.length}"]
    own += [f"mesh.{axis}={n}" for axis, n in zip(("data", "tensor"), given.mesh, strict=True)]
    own += [f"train.compute.platform={target.platform}"]
    run = config.load(given.preset, [*own, *given.overrides])
    sizes = run.mesh.sizes
    found = np.array(devices_of(given.device, run.mesh.size)).reshape(*sizes.values())
    mesh = Mesh(found, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    trainer = Trainer(run.model, run.train, mesh)
    rows = jax.ShapeDtypeStruct(
        (given.batch, given.length), jnp.int32, sharding=batch_sharding(mesh)
    )
    batch = dict.fromkeys(BATCH_FIELDS, rows) | {"weight": rows.update(dtype=jnp.float32)}
    state = trainer.abstract_state()
    with jax.set_mesh(mesh):
        traced = jax.jit(
            trainer.update, donate_argnums=0, out_shardings=(trainer.shardings(), None)
        ).trace(state, 0, batch)
    start = time.perf_counter()
    program = traced.lower(lowering_platforms=(target.backend,)).compile(target.options)
    return program, time.perf_counter() - start


def decoding(given: argparse.Namespace) -> tuple[Any, float]:
    """Return the compiled program of one greedy step of decoding, and the seconds it took."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from mukv.cache import Policy
    from mukv.core import params
    from mukv.infer.decode import TAIL, decoding_weights
    from mukv.runs import config

    target = TARGETS[given.device]
    device = devices_of(given.device, 1)[0]
    own = ["model.context=null", f"train.compute.platform={target.platform}"]
    run = config.load(given.preset, [*own, *given.overrides])
    model, compute = run.model, run.train.compute.resolve(target.platform)

    def arguments(weights: Any) -> tuple[Any, ...]:
        room = given.batch, given.length, TAIL, compute.type, Policy.parse(given.decode)
        cache = model.empty_cache(*room).split()
        weights = decoding_weights(model, weights, compute)
        return weights, *cache, jnp.zeros(given.batch, jnp.int32)

    def step(weights: Any, frozen: Any, live: Any, token: Any) -> tuple[Any, Any]:
        cache = model.cache_class.join(frozen, live)
        logits, cache = model.step(weights, cache, token, compute=compute)
        return jnp.argmax(logits, axis=-1), cache.split()[1]

    placed = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda leaf: leaf.update(sharding=placed),
        jax.eval_shape(arguments, params.abstract(model.params())),
    )
    traced = jax.jit(step, donate_argnums=2).trace(*shapes)
    lowered = traced.lower(lowering_platforms=(target.backend,))
    start = time.perf_counter()
    program = lowered.compile(target.options)
    return program, time.perf_counter() - start


def memory(program: Any) -> dict[str, int]:
    """Return the bytes of a program on one device: its arguments, and its temporaries."""
    found = program.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }


def facts(program: Any, seconds: float) -> dict[str, Any]:
    """Return the counts of a compiled program as plain data. seconds: time of its compilation"""
    found = counts(program.as_text() or "")
    return {
        "compile_seconds": round(seconds, 1),
        "kernels": found.kernels,
        "moved_bytes": found.moved,
        "calls": found.calls,
        "memory_bytes": memory(program),
        "collectives": {key: one._asdict() for key, one in found.collectives.items()},
    }


def sizes(text: str) -> tuple[int, int]:
    """Read the sizes of the mesh, such as 8x1."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}; two numbers, such as 8x1")
    return int(found[1]), int(found[2])


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--packages", required=True, help="folder of the compiler's packages")
    parser.add_argument("--device", choices=sorted(TARGETS), default="h100")
    parser.add_argument("--mesh", type=sizes, default=(1, 1), metavar="DATAxTENSOR")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--decode", metavar="POLICY", help="compile a decoding step under this policy, such as full"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_intermixed_args()
    needed = {"h100": "jax_plugins", "v5p": "libtpu"}[given.device]
    if not os.path.isdir(os.path.join(given.packages, needed)):
        parser.error(f"--packages: no {needed} in {given.packages}; the first lines say how")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if given.device == "v5p":
        # libtpu asks the machine's metadata server otherwise.
        os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
        os.environ["TPU_LIBRARY_PATH"] = os.path.join(given.packages, "libtpu", "libtpu.so")
        os.environ["TPU_ACCELERATOR_TYPE"] = "v5p-8"
    sys.path.append(given.packages)
    from mukv.core.errors import BadInput

    try:
        program, seconds = compiled(given) if given.decode is None else decoding(given)
    except BadInput as error:
        parser.error(str(error))
    told = facts(program, seconds)
    if given.json:
        print(json.dumps(told))
        return
    print(f"compiled in {seconds:.1f} s; kernels {told['kernels']:,}; calls {told['calls']}")
    print(f"{told['moved_bytes'] / 2**30:.2f} GiB read and written by kernels")
    held = told["memory_bytes"]
    print(", ".join(f"{size / 2**30:.2f} GiB {name}" for name, size in held.items()))
    for key, one in told["collectives"].items():
        print(f"{key:36} {one['bytes'] / 2**30:8.3f} GiB in {one['number']:,}")


if __name__ == "__main__":
    main()
